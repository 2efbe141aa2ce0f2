"""The supernet: its members are the models they stand for, and a training step adds up theirs. Draws are fair."""

import collections
import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from posmlp import create_model
from posmlp.config import RecipeError, load_recipe
from posmlp.errors import UserError
from posmlp.learn.learner import ExplodedError, Learner
from posmlp.model.spec import UNITS, Architecture, Choices, block_units
from posmlp.model.supernet import draw_paths
from posmlp.tasks.recognition import CrossEntropy
from posmlp.video.augment import to_train_input
from tests.helpers.batches import make_batch
from tune_spaces import block_types

CHOICES = {
    "blocks": [
        ["parallel", "cascade_ts", "cascade_st", "joint", "temporal"],
        ["parallel", "joint"],
        ["spatial"],
        ["cascade_ts"],
    ],
    "groups": [[1, 4, 16], [1, 4, 16], [8], [1, 16]],
    "depths": [[1, 2], [1, 2, 4], [1], [1, 3]],
}
OWN = {"blocks": ("joint", "parallel", "spatial", "cascade_ts"), "groups": (4, 16, 8, 1), "depths": (2, 2, 1, 3)}
SIZES = {"num_classes": 8, "frames": 4, "image_size": 32}
ARCHITECTURES = st.builds(
    Architecture, **{key: st.tuples(*map(st.sampled_from, stages)) for key, stages in CHOICES.items()}
)


def tiny(**overrides):
    """A supernet in fp64 whose parameters are all random, none zero or one."""
    torch.manual_seed(0)
    model = create_model("tiny", num_classes=7, choices=CHOICES, **(OWN | overrides)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def alone(architecture):
    return create_model("tiny", num_classes=7, **dataclasses.asdict(architecture)).double().eval()


def clips(count=2):
    return torch.randn(count, 3, 4, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- the model ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(ARCHITECTURES)
def test_a_member_is_the_model_of_its_architecture(architecture):
    """Its weights fit ``create_model``, which then computes the same; all of them are the supernet's own tensors."""
    net = tiny()
    member, model = net.member(architecture), alone(architecture)
    model.load_state_dict(member.state_dict())
    torch.testing.assert_close(member(clips()), model(clips()))
    own = {id(tensor) for tensor in net.state_dict(keep_vars=True).values()}
    assert {id(tensor) for tensor in member.state_dict(keep_vars=True).values()} <= own


def test_scaled_weights_fit_the_longest_member():
    torch.manual_seed(0)
    net = create_model("tiny", dims=(64,) * 4, windows=((4, 4, 4),) * 4, choices=CHOICES, init="scaled", **OWN)
    steps = 2 * 2 + 4 + 1 + 3 * 2  # depth x residual steps of the longest block type, of each stage
    for stage in net.stages:
        for block in stage.blocks:
            for kind, unit in block.units.items():
                tokens = {"temporal": 4, "spatial": 16, "joint": 64}[kind]
                assert unit.fc1.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
                assert unit.fc2.weight.std().item() == pytest.approx(1 / 8 / steps**0.5, rel=0.05)
                for count, table in unit.gate.tables.items():
                    if int(count) > 4:
                        assert table.std().item() == pytest.approx(2 / tokens**0.5, rel=0.4)


def test_out_of_training_it_is_its_own_architecture():
    net = tiny()
    net.draw(1, 0, 0)
    own = Architecture(**OWN)
    assert net.paths != [own]
    model = alone(own)
    model.load_state_dict(net.member(own).state_dict())
    torch.testing.assert_close(net(clips()), model(clips()))
    assert [f.shape for f in net.features(clips())] == [f.shape for f in model.features(clips())]


@settings(max_examples=30)
@given(ARCHITECTURES)
def test_a_training_step_is_one_of_the_member_alone(architecture):
    """Gradients, statistics and weights after a step, against the same model by itself; all else stays."""
    net = tiny()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = alone(architecture)
    model.load_state_dict(net.member(architecture).state_dict())
    net.paths = [architecture]
    for trained in (net.train(), model.train()):
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        trained(clips(4)).square().sum().backward()
        optimizer.step()
    after = net.member(architecture).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(after[name], tensor)
    path = {id(tensor) for tensor in net.member(architecture).state_dict(keep_vars=True).values()}
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert (id(tensor) in path) or torch.equal(tensor, before[name])


def test_what_is_not_chosen_is_the_models_own():
    net = create_model("tiny", choices={"depths": [[1, 2], [], [], []]}, depths=(2, 2, 1, 1))
    assert [len(stage.blocks) for stage in net.stages] == [2, 2, 1, 1]
    own = create_model("tiny", depths=(2, 2, 1, 1))
    assert net.choices.blocks == (("parallel",),) * 4 and net.choices.groups == ((4,), (8,), (8,), (16,))
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in own.parameters())


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"groups": [[3], [8], [8], [16]]}, "stage 1: 16 channels are not divisible by 3 groups"),
        ({"groups": [[1], [], [], []]}, r"stage 1: the model's own groups 4 is not in \(1,\)"),
        ({"blocks": [["parallel", "jiont"], [], [], []]}, r"unknown block type 'jiont' \(did you mean 'joint'\?\)"),
        ({"depths": [[1, 0], [], [], []]}, "must be positive whole numbers"),
        ({"depths": [[1], [2]]}, "choices of depths have 2 entries, expected one for each of 4 stages"),
        ({"depths": 3}, "choices of depths 3 must be one list per stage"),
        ({"widths": []}, r"choices of \['widths'\] are not known; known: \['blocks', 'groups', 'depths'\]"),
    ],
)
def test_impossible_choices_are_told(choices, message):
    with pytest.raises(UserError, match=message):
        create_model("tiny", choices=choices)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.choices.deths=[[1],[1],[1],[1]]", r"model.choices.deths: unknown key \(did you mean 'depths'\?\)"),
        ("train.compile=true", "model.choices works neither with train.compile nor with scaling.parallel fsdp"),
        ("model.choices.groups=[[3],[],[],[]]", "16 channels are not divisible by 3 groups"),
    ],
)
def test_a_recipe_with_wrong_choices_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("demo", ["model.choices.depths=[[1,2],[],[],[]]", override])


# --- paths -------------------------------------------------------------------------------------------------------

CYCLE = 36  # steps: a multiple of each stage's sets of units times its block types of a set, or times its groups


def paths_of(count, steps, seed=3, choices=CHOICES):
    return [draw_paths(Choices(**choices), count, seed, step) for step in steps]


def tally(paths, value):
    """How often each value of a function of the architecture was drawn."""
    return collections.Counter(map(value, paths))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("first", [0, 7 * CYCLE])
def test_each_choice_of_a_stage_is_drawn_equally_often_on_each_path(count, first):
    """Block types by what they train: first the set of units, then a type with these; group counts for each set."""
    for number, paths in enumerate(zip(*paths_of(count, range(first, first + CYCLE)), strict=True)):
        for stage, (blocks, groups, depths) in enumerate(zip(*CHOICES.values(), strict=True)):
            sets = collections.Counter(frozenset(block_units(block)) for block in blocks)
            for block in blocks:
                expected = CYCLE / len(sets) / sets[frozenset(block_units(block))]
                assert tally(paths, lambda a, i=stage: a.blocks[i])[block] == expected
            found = tally(paths, lambda a, i=stage: (frozenset(block_units(a.blocks[i])), a.groups[i]))
            assert found == {(units, n): CYCLE / len(sets) / len(groups) for units in sets for n in groups}
            chosen = depths if number > 1 or count == 1 else [(max, min)[number](depths)]
            assert tally(paths, lambda a, i=stage: a.depths[i]) == {depth: CYCLE / len(chosen) for depth in chosen}


def test_units_are_trained_equally_often_though_more_block_types_have_some():
    recipe = load_recipe("demo")
    choices = {"blocks": (block_types.BLOCK_TYPES,) * 4, "groups": ((4, 8),) * 4, "depths": ((1, 2),) * 4}
    updates = [collections.Counter() for _ in range(4)]
    for paths in paths_of(recipe.train.paths, range(12), choices=choices):
        for stage, counts in enumerate(updates):
            kinds = [kind for path in paths for kind in block_units(path.blocks[stage])]
            assert set(kinds) == set(UNITS)  # in every step
            counts.update(kinds)
    assert all(set(counts.values()) == {18} for counts in updates)  # of 36 paths


def test_paths_of_a_step_differ_as_far_as_there_are_values():
    for paths in paths_of(4, range(CYCLE)):
        for stage, blocks in enumerate(CHOICES["blocks"]):
            sets = {frozenset(block_units(block)) for block in blocks}
            assert {frozenset(block_units(path.blocks[stage])) for path in paths} == sets
        assert len({path.depths[1] for path in paths[1:]}) > 1


def test_stages_are_drawn_independently():
    """Pairs of values of two stages, or of two keys of a stage, are uniform where their values are."""
    paths = [path for (path,) in paths_of(1, range(3600))]
    for one, other in (
        (lambda a: a.groups[0], lambda a: a.groups[1]),
        (lambda a: a.blocks[1], lambda a: a.depths[1]),
        (lambda a: a.groups[1], lambda a: a.depths[1]),
        (lambda a: a.blocks[1], lambda a: a.groups[0]),
    ):
        pairs = tally(paths, lambda a, one=one, other=other: (one(a), other(a)))
        assert len(pairs) == len(tally(paths, one)) * len(tally(paths, other))
        assert stats.chisquare(list(pairs.values())).pvalue > 1e-3
    assert len({*paths}) > 1000


def test_paths_depend_on_seed_and_step_alone():
    forward, backward = paths_of(3, range(20)), paths_of(3, reversed(range(20)))
    assert forward == backward[::-1]
    assert forward != paths_of(3, range(20), seed=4)
    assert all(Choices(**CHOICES).contains(path) for paths in forward for path in paths)


def test_paths_stay_the_same_as_supernets_resume_with_them():
    assert draw_paths(Choices(**CHOICES), 3, 1, 1000) == [  # as NumPy 2 draws them
        Architecture(("joint", "joint", "spatial", "cascade_ts"), (1, 4, 8, 1), (2, 4, 1, 3)),
        Architecture(("cascade_ts", "parallel", "spatial", "cascade_ts"), (4, 1, 8, 16), (1, 1, 1, 1)),
        Architecture(("temporal", "joint", "spatial", "cascade_ts"), (1, 1, 8, 1), (1, 1, 1, 1)),
    ]


# --- training ----------------------------------------------------------------------------------------------------


def learner(*overrides):
    config = load_recipe(
        "demo",
        [
            *("model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8", "optim.ema=0.9"),
            *overrides,
        ],
    )
    tree = config.model_dump(mode="json")
    tree["model"] |= {"choices": CHOICES, **OWN}
    config = type(config).model_validate(tree)
    torch.manual_seed(0)
    return Learner(create_model(config.model.name, **config.model.overrides()), config, 5)


def mean_entropy(logits, targets):
    """Cross-entropy written out; both ``[B, classes]``."""
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    return -(targets * log_probabilities).sum(1).mean()


@pytest.mark.parametrize("paths", [1, 2, 3, 5])
def test_a_step_adds_the_gradients_of_its_paths_models(paths):
    """Against each path's own model: the first learns from the labels, the others from its probabilities."""
    one, batch = learner(f"train.paths={paths}"), make_batch()
    with torch.no_grad():
        for parameter in one.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    net = one.module.train()
    net.draw(paths, 5, 2)
    models = [create_model("tiny", **SIZES, **dataclasses.asdict(path)).train() for path in net.paths]
    for model, path in zip(models, net.paths, strict=True):
        model.load_state_dict(net.member(path).state_dict())
    loss, norm = one.backward(batch)

    clips, labels = to_train_input(batch, one.config, torch.arange(8))
    logits = [model(clips) for model in models]
    soft = logits[0].detach().softmax(1)
    losses = [mean_entropy(x, labels if i == 0 else soft) for i, x in enumerate(logits)]
    (sum(losses) / paths).backward()
    expected = {}
    for model, path in zip(models, net.paths, strict=True):
        shared = net.member(path).state_dict(keep_vars=True)
        for name, parameter in model.named_parameters():
            before = expected.get(id(shared[name]), 0)
            expected[id(shared[name])] = before + parameter.grad
    assert loss == pytest.approx(float(sum(losses).detach()) / paths, rel=1e-5)
    assert norm == pytest.approx(float(sum(g.square().sum() for g in expected.values()).sqrt()), rel=1e-4)
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (id(parameter) not in expected), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[id(parameter)], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(net.stem.state_dict(), models[-1].stem.state_dict())  # the statistics too: one update


def test_labels_smoothing_and_class_weights_are_for_the_first_path():
    """Loss and gradient of given logits, written out in NumPy; the first path gets no gradient from the others."""
    config = load_recipe("demo", ["model.num_classes=8", "model.frames=4", "optim.label_smoothing=0.2"])
    weights, batch = np.linspace(0.5, 1.5, 8), make_batch(4)
    batch.weights[1] = 0
    logits = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = CrossEntropy(config, [], weights, torch.device("cpu"))(lambda clips: logits, batch)
    loss.backward()

    x = logits.detach().double().numpy()
    p = np.exp(x) / np.exp(x).sum(2, keepdims=True)
    targets = 0.8 * np.eye(8)[batch.labels] + 0.2 / 8
    losses = -(weights * targets * np.log(p[0])).sum(1) - (p[0] * np.log(p[1])).sum(1) - (p[0] * np.log(p[2])).sum(1)
    counted = np.array([1, 0, 1, 1])
    assert loss.item() == pytest.approx((losses * counted).sum() / 3, rel=1e-5)
    pull = weights * targets
    gradient = np.stack([pull.sum(1, keepdims=True) * p[0] - pull, p[1] - p[0], p[2] - p[0]]) / 3
    np.testing.assert_allclose(logits.grad, gradient * counted[:, None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_micro_batches_of_a_step_have_the_same_paths(micro_batch):
    """Their gradients add up to those of the whole batch. Batch norms are in eval mode, as they see micro-batches."""
    gradients = []
    for size in ("null", micro_batch):
        one = learner(f"scaling.micro_batch={size}")
        one.module.train().draw(3, 0, 4)
        for norm in (one.module.stem.norm1, one.module.stem.norm2):
            norm.eval().train = lambda mode, norm=norm: norm  # a member's training mode leaves it as it is
        loss, total = one.backward(make_batch())
        gradients.append((loss, total, [p.grad for p in one.module.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_step_that_explodes_leaves_a_supernet_as_it_was():
    one, never = learner(), learner()
    bad = make_batch(seed=1)
    bad.weights.fill_(1e3)
    for each in (one, never):
        each.train_step(make_batch(seed=0))
    with pytest.raises(ExplodedError):
        one.train_step(bad)
    for each in (one, never):
        each.train_step(make_batch(seed=1))
    after = never.weights()
    assert all(torch.equal(tensor, after[name]) for name, tensor in one.weights().items())


@functools.cache
def six_steps():
    """Losses and final weights of six steps in a row."""
    one = learner()
    losses = [one.train_step(make_batch(seed=step)).loss for step in range(6)]
    return losses, one.weights()


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_training_goes_on_as_if_it_had_not_stopped(stop):
    """Also while some units have not been on a path, so that the optimizer knows nothing of them yet."""
    losses, weights = six_steps()
    first = learner()
    again = [first.train_step(make_batch(seed=step)).loss for step in range(stop)]
    second = learner()
    second.load_state_dict(first.weights(), first.state_dict())
    again += [second.train_step(make_batch(seed=step)).loss for step in range(stop, 6)]
    assert again == losses
    final = second.weights()
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights.items())
