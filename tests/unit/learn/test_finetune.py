"""Fine-tuning: frozen stages and linear probe, learning rates by depth, class weights."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from posmlp import create_model
from posmlp.config import OptimSection, RecipeError, load_recipe
from posmlp.learn.finetune import describe_frozen, frozen_parts, layer_of
from posmlp.learn.learner import Learner
from posmlp.learn.optim import build_optimizer, learning_rate
from posmlp.video.augment import to_train_input
from posmlp.video.batch import Batch
from tests.helpers.batches import make_batch

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8", "model.weights=given"]
# all that could move a frozen weight, or a buffer
BUSY = ["optim.warmup_epochs=0", "optim.weight_decay=0.5", "optim.ema=0.9", "model.drop_path=0.5"]


def make_learner(*overrides, steps=5):
    config = load_recipe("demo", [*SMALL, *overrides])
    torch.manual_seed(0)
    return Learner(create_model(config.model.name, **config.model.overrides()), config, steps)


# --- frozen parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freeze", "learning"),
    [
        ("0", ("stages.0.", "stages.1.", "stages.2.", "stages.3.", "norm.", "head.")),
        ("2", ("stages.2.", "stages.3.", "norm.", "head.")),
        ("4", ("norm.", "head.")),
        ("all", ("head.",)),
    ],
)
def test_only_the_parts_behind_the_frozen_ones_change(freeze, learning):
    """Of weights, EMA and buffers, after steps with weight decay, drop path and EMA; bit for bit."""
    learner = make_learner(f"optim.freeze={freeze}", *BUSY)
    before = {name: x.clone() for name, x in learner.module.state_dict().items()}
    for step in range(3):
        learner.train_step(make_batch(seed=step))
    for after in (learner.module.state_dict(), learner.weights()):
        changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
        assert changed == {name for name in before if name.startswith(learning)}


def test_the_parameters_that_learn_are_told():
    """Of the linear probe: one weight for each channel of the last stage, and one bias, for each class."""
    learner = make_learner("optim.freeze=all")
    total, classes = sum(p.numel() for p in learner.module.parameters()), len(learner.module.head.bias)
    expected = classes * (learner.module.head.in_features + 1)
    assert describe_frozen(learner.module, "all") == f"optim.freeze all: {expected:,} of {total:,} parameters learn"
    assert describe_frozen(make_learner().module, None) == ""


def test_frozen_parameters_have_neither_gradient_nor_state():
    learner = make_learner("optim.freeze=2")
    learner.train_step(make_batch())
    frozen = [p for part in frozen_parts(learner.module, 2) for p in part.parameters()]
    optimised = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert frozen and not any(p.requires_grad or p.grad is not None or id(p) in optimised for p in frozen)
    assert len(frozen) + len(optimised) == len(list(learner.module.parameters()))


def test_a_frozen_stage_drops_no_paths_and_keeps_its_statistics():
    """The features of frozen parts in training equal those in evaluation, although drop path is on."""
    learner = make_learner("optim.freeze=2", "model.drop_path=0.9")
    learner.train_step(make_batch())
    clips, _ = to_train_input(make_batch(), learner.config, torch.arange(8))
    training = learner.module.features(clips)  # the modules' modes are those of the step
    learner.module.eval()
    evaluation = learner.module.features(clips)
    assert torch.equal(training[1], evaluation[1])
    assert not torch.equal(training[3], evaluation[3]), "the stages that learn drop paths"


def test_a_linear_probe_builds_no_graph_in_the_backbone_and_is_a_step_of_the_head_alone():
    learner = make_learner("optim.freeze=all", "optim.warmup_epochs=0", "optim.weight_decay=0.1")
    seen = []
    for stage in learner.module.stages:
        stage.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    batch = make_batch()
    clips, targets = to_train_input(batch, learner.config, torch.arange(8))
    with torch.no_grad():
        learner.module.eval()
        x = learner.module.features(clips)[-1].flatten(2).mT
        features = nn.functional.layer_norm(x, x.shape[-1:], learner.module.norm.weight, learner.module.norm.bias)
        features = features.mean(1)
    head = nn.Linear(features.shape[1], 8)
    head.load_state_dict(learner.module.head.state_dict())
    optimizer = AdamW(
        [{"params": [head.weight], "weight_decay": 0.1}, {"params": [head.bias], "weight_decay": 0.0}], lr=3e-3
    )
    nn.functional.cross_entropy(head(features), targets).backward()
    optimizer.step()
    seen.clear()
    learner.train_step(batch)
    assert seen == [False] * 4
    torch.testing.assert_close(learner.module.head.weight, head.weight)
    torch.testing.assert_close(learner.module.head.bias, head.bias)


def test_freezing_random_weights_is_refused():
    with pytest.raises(RecipeError, match=r"optim\.freeze 2 keeps weights that are trained already"):
        load_recipe("demo", [*SMALL, "optim.freeze=2", "model.weights=null"])


@pytest.mark.parametrize("text", ["5", "-1", "some", "1.5"])
def test_a_wrong_number_of_stages_is_refused(text):
    problem = rf"optim\.freeze: expected a number of stages from 0 to 4, or all, not '{text}'$"
    with pytest.raises(RecipeError, match=problem):
        load_recipe("demo", [*SMALL, f"optim.freeze={text}"])


# --- learning rates by depth ------------------------------------------------------------------------------------


def test_the_rate_of_each_layer_is_the_closed_form():
    """tiny has depths 1, 2, 1, 1: stem 0, blocks 1 to 5, head 6, so the rate of layer n is rate * 0.5^(6 - n)."""
    learner = make_learner("optim.layer_decay=0.5", "train.epochs=4", "optim.warmup_epochs=1", steps=2)
    assert [len(stage.blocks) for stage in learner.module.stages] == [1, 2, 1, 1]
    layers = {"stem": 0, "stages.0": 1, "stages.1.downsample": 2, "stages.1.blocks.0": 2, "stages.1.blocks.1": 3}
    layers |= {"stages.2": 4, "stages.3": 5, "norm": 6, "head": 6}
    config = learner.config
    for step in range(4):  # warm-up and cosine
        learner.train_step(make_batch(seed=step))
        rate_of = {id(p): group["lr"] for group in learner.optimizer.param_groups for p in group["params"]}
        rate = learning_rate(step / 2, config.train, config.optim)
        for name, parameter in learner.module.named_parameters():
            (layer,) = {n for prefix, n in layers.items() if f"{name}.".startswith(f"{prefix}.")}
            assert rate_of[id(parameter)] == pytest.approx(rate * 0.5 ** (6 - layer)), name
    assert len(rate_of) == len(list(learner.module.parameters()))


def test_the_layers_are_those_of_timm():
    """With ``timm.optim.param_groups_layer_decay``: stem, every block in order, then norm and head with rate 1."""
    depths = (2, 2, 6, 2)
    names = ["stem.proj1.weight"]
    names += [f"stages.{i}.blocks.{j}.units.s.fc1.weight" for i, depth in enumerate(depths) for j in range(depth)]
    assert [layer_of(name, depths) for name in names] == list(range(13))
    assert layer_of("norm.weight", depths) == layer_of("head.bias", depths) == 13
    assert layer_of("stages.2.downsample.proj.weight", depths) == layer_of("stages.2.blocks.0.x", depths) == 5


def test_a_layers_weights_move_in_proportion_to_its_rate():
    """The first step of AdamW moves every weight by about the rate, whatever its gradient."""
    learner = make_learner("optim.layer_decay=0.5", "optim.warmup_epochs=0", "optim.weight_decay=0")
    before = {name: p.detach().clone() for name, p in learner.module.named_parameters()}
    learner.train_step(make_batch())
    moved = {name: (p - before[name]).abs().max().item() for name, p in learner.module.named_parameters()}
    assert moved["head.weight"] == pytest.approx(3e-3, rel=1e-2)
    assert moved["stem.proj1.weight"] == pytest.approx(3e-3 * 0.5**6, rel=1e-2)


def test_no_decay_of_the_rate_is_the_usual_optimizer():
    model = create_model("tiny")
    usual, by_layer = (build_optimizer(model, OptimSection(layer_decay=decay)) for decay in (None, 1.0))
    assert [sorted(map(id, g["params"])) for g in usual.param_groups] == [
        sorted(map(id, g["params"])) for g in by_layer.param_groups
    ]
    assert {*usual.param_groups[0]} | {"rate_scale"} == {*by_layer.param_groups[0]}


@pytest.mark.parametrize("keys", [["optim.layer_decay=0.6"], ["optim.freeze=1", "optim.layer_decay=0.6"]])
def test_fine_tuning_resumes_bit_for_bit(keys):
    straight, resumed = make_learner(*BUSY, *keys), make_learner(*BUSY, *keys)
    straight.train_step(make_batch())
    straight.train_step(make_batch(seed=1))
    resumed.load_state_dict(*deepcopy((straight.weights(), straight.state_dict())))
    for learner in (straight, resumed):
        learner.train_step(make_batch(seed=2))
    assert [g["lr"] for g in straight.optimizer.param_groups] == [g["lr"] for g in resumed.optimizer.param_groups]
    one, other = straight.weights(), resumed.weights()
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- class weights ----------------------------------------------------------------------------------------------


def weighted_learner(weights, *overrides):
    config = load_recipe("demo", [*SMALL, *overrides])
    torch.manual_seed(0)
    model = create_model(config.model.name, **config.model.overrides())
    return Learner(model, config, 5, class_weights=None if weights is None else np.array(weights))


def test_the_loss_weighs_each_class():
    """Written out: the parts of each class's share in the mixed, smoothed target, times the weight of the class."""
    weights = [0.5, 2, 1, 1, 3, 0.25, 1, 1]
    learner = weighted_learner(weights, "augment.mixup=0.8", "optim.label_smoothing=0.1")
    batch = make_batch()
    clips, targets = to_train_input(batch, learner.config, torch.arange(8))
    learner.module.train()
    parts = -(0.9 * targets + 0.1 / 8) * learner.module(clips).log_softmax(1)
    expected = (parts * torch.tensor(weights)).sum(1).mean().item()
    assert learner.backward(batch)[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("weights", "shares"), [(None, [0.75, 0.25]), ([0.5 / 0.75, 0.5 / 0.25], [0.5, 0.5])])
def test_balanced_weights_predict_classes_equally_where_nothing_tells_them_apart(weights, shares):
    """All clips are alike, six of class 0 and two of class 1: the best prediction is the classes' frequencies."""
    keys = ["model.num_classes=2", "optim.freeze=all", "optim.warmup_epochs=0", "optim.weight_decay=0", "optim.lr=0.05"]
    keys += [f"augment.{name}=0" for name in ("brightness", "contrast", "saturation")]
    learner = weighted_learner(weights, *keys, "optim.min_lr=0.05", "train.epochs=100")
    batch = make_batch()
    same = Batch(batch.clips[:1].repeat(8, 1, 1, 1, 1), torch.tensor([0] * 6 + [1] * 2), batch.weights, batch.seeds)
    for _ in range(150):
        learner.train_step(same)
    scores = learner.score(same).exp()[:, 0].mean(0)
    assert scores.tolist() == pytest.approx(shares, abs=0.03)


def test_a_heavy_class_does_not_look_like_an_explosion():
    learner = weighted_learner([0.1] * 7 + [100], "optim.warmup_epochs=0")
    batch = make_batch()
    loss = learner.train_step(Batch(batch.clips, torch.full((8,), 7), batch.weights, batch.seeds)).loss
    assert loss > 10 * np.log(8), "more than a step without weights may have"
