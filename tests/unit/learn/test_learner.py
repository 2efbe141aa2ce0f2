"""Optimizer, learning-rate schedule, training and evaluation steps, EMA, resume."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from posmlp import create_model
from posmlp.config import OptimSection, TrainSection, load_recipe
from posmlp.errors import UserError
from posmlp.learn import ema
from posmlp.learn.ema import WeightEMA
from posmlp.learn.evaluation import ClassificationMetrics, video_scores
from posmlp.learn.learner import ExplodedError, Learner, micro_batch_size
from posmlp.learn.optim import build_optimizer, learning_rate
from posmlp.video.augment import to_input, to_train_input
from posmlp.video.batch import Batch
from tests.helpers.batches import make_batch

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]


def make_learner(*overrides, steps=5, class_names=()):
    config = load_recipe("demo", [*SMALL, *overrides])
    torch.manual_seed(0)
    return Learner(create_model(config.model.name, **config.model.overrides()), config, steps, class_names)


def test_rate_warms_up_linearly_then_follows_half_a_cosine():
    config, train = OptimSection(lr=1.0, min_lr=0.1, warmup_epochs=2), TrainSection(epochs=10)
    assert learning_rate(0, train, config) == 0
    assert learning_rate(1, train, config) == pytest.approx(0.5)
    assert learning_rate(2, train, config) == pytest.approx(1.0)
    assert learning_rate(6, train, config) == pytest.approx(0.55)  # half-way: the mean of both ends
    assert learning_rate(10, train, config) == pytest.approx(0.1)
    assert learning_rate(4, train, config) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_rate_follows_the_global_batch():
    config = OptimSection(lr=4e-4, min_lr=1e-6, lr_batch=128, warmup_epochs=0)
    assert learning_rate(0, TrainSection(epochs=10, global_batch=128), config) == pytest.approx(4e-4)
    assert learning_rate(0, TrainSection(epochs=10, global_batch=512), config) == pytest.approx(16e-4)
    assert learning_rate(10, TrainSection(epochs=10, global_batch=512), config) == pytest.approx(4e-6)


def test_rate_drops_in_steps_by_hand():
    """The schedule of SlowFast's recipe for AVA: 20 epochs, steps at 10 and 15, warm-up over 5."""
    settings = {"schedule": "steps", "step_epochs": (10, 15), "warmup_epochs": 5}
    config, train = OptimSection(lr=0.4, min_lr=0, lr_batch=128, **settings), TrainSection(epochs=20, global_batch=32)
    expected = {0: 0, 2.5: 0.05, 5: 0.1, 9.99: 0.1, 10: 0.01, 14.99: 0.01, 15: 0.001, 19.99: 0.001, 20: 0.001}
    assert {epoch: learning_rate(epoch, train, config) for epoch in expected} == pytest.approx(expected)
    lowest = OptimSection(lr=0.1, min_lr=0.02, step_factor=0.5, **settings)
    assert [learning_rate(epoch, train, lowest) for epoch in (9, 10, 15)] == pytest.approx([0.1, 0.05, 0.025])
    assert learning_rate(15, train, lowest.model_copy(update={"step_factor": 0.1})) == 0.02


@given(st.floats(0, 60), st.floats(0, 20), st.sampled_from(["cosine", "steps"]))
def test_rate_stays_within_its_bounds(epoch, warmup, schedule):
    steps = {"schedule": schedule, "step_epochs": (20, 40)}
    config = OptimSection(lr=1e-3, min_lr=1e-6, warmup_epochs=warmup, **steps)
    assert 0 <= learning_rate(epoch, TrainSection(epochs=60), config) <= 1e-3


def test_only_matrices_decay():
    model = create_model("tiny")
    decayed, free = build_optimizer(model, OptimSection(weight_decay=0.05)).param_groups
    assert decayed["weight_decay"] == 0.05
    assert free["weight_decay"] == 0
    named = {id(p): name for name, p in model.named_parameters()}
    assert all(named[id(p)].endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight")) for p in free["params"])
    assert sum(len(g["params"]) for g in (decayed, free)) == len(named)


def test_a_step_is_adamw_on_the_mean_loss():
    """Against the same step written out with PyTorch's own pieces; targets are mixed one-hot vectors, smoothed."""
    mixing = ("augment.mixup=0.8", "augment.cutmix=1", "augment.erasing=0.5", "augment.randaug_layers=2")
    learner = make_learner("optim.label_smoothing=0.1", "optim.warmup_epochs=0", "optim.clip_grad=0.5", *mixing)
    twin = make_learner().module
    twin.load_state_dict(learner.module.state_dict())
    config, batch = learner.config, make_batch()
    optimizer = build_optimizer(twin, config.optim)
    twin.train()
    clips, targets = to_train_input(batch, config, torch.arange(8))
    assert not torch.equal(targets, F.one_hot(batch.labels, 8).float())
    loss = -((0.9 * targets + 0.1 / 8) * twin(clips).log_softmax(1)).sum(1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    optimizer.step()
    assert learner.train_step(batch).loss == pytest.approx(loss.item())
    for a, b in zip(learner.module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def metrics_of(learner, batch):
    """The ``val/*`` metrics of one batch."""
    views = learner.config.eval.clips * learner.config.eval.crops
    counts = ClassificationMetrics.empty(8)
    counts.add(video_scores(learner.score(batch), "probabilities"), batch.labels[::views], batch.weights[::views])
    return counts.metrics()


def test_padding_clips_do_not_train_and_are_not_counted():
    batch = make_batch()
    weights = batch.weights.clone()
    weights[5:] = 0
    other = batch.labels.clone()
    other[5:] = 7 - other[5:]
    results = []
    for labels in (batch.labels, other):
        learner = make_learner()
        batch = Batch(batch.clips, labels, weights, batch.seeds)
        results.append((learner.train_step(batch), metrics_of(learner, batch), learner.module.head.bias.tolist()))
    assert results[0] == results[1]
    assert results[0][1]["val/clips"] == 5


def test_metrics_equal_a_plain_count():
    learner, batch = make_learner(), make_batch(16)
    found = metrics_of(learner, batch)
    with torch.no_grad():
        logits = learner.module.eval()(to_input(batch.clips, learner.config)).numpy()
    order = np.argsort(-logits, axis=1)
    labels = batch.labels.numpy()
    hits = order[:, 0] == labels
    assert found["val/top1"] == hits.mean()
    assert found["val/top5"] == (order[:, :5] == labels[:, None]).any(1).mean()
    assert found["val/class_mean"] == pytest.approx(np.mean([hits[labels == c].mean() for c in range(8)]))
    loss = F.cross_entropy(torch.from_numpy(logits), batch.labels).item()
    assert found["val/loss"] == pytest.approx(loss, rel=1e-5)


def test_the_class_mean_ignores_classes_without_videos():
    counts = ClassificationMetrics.empty(3)
    scores = torch.tensor([[0.7, 0.2, 0.1]] * 4).log()
    counts.add(scores, torch.tensor([0, 0, 0, 2]), torch.ones(4))
    assert counts.confusion.tolist() == [[3, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert counts.metrics()["val/top1"] == 0.75
    assert counts.metrics()["val/class_mean"] == 0.5


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (2, 1), (2, 3)])
def test_the_views_of_a_video_are_averaged_as_probabilities(clips, crops):
    learner, views = make_learner(f"eval.clips={clips}", f"eval.crops={crops}"), clips * crops
    with torch.no_grad():
        learner.module.head.weight.mul_(30)  # confident: averaging logits would rank the classes differently
    batch = make_batch(6 * views)
    labels, weights = torch.tensor([0, 3, 5, 1, 7, 2]), torch.tensor([1.0, 1, 0, 1, 1, 0])
    found = metrics_of(
        learner, Batch(batch.clips, labels.repeat_interleave(views), weights.repeat_interleave(views), batch.seeds)
    )
    expected = np.zeros(4)
    for i in (0, 1, 3, 4):
        with torch.no_grad():
            logits = learner.module.eval()(to_input(batch.clips[i * views : (i + 1) * views], learner.config))
        mean = logits.double().softmax(1).mean(0)
        place = int((mean > mean[labels[i]]).sum())
        expected += [-mean[labels[i]].log().item(), place == 0, place < 5, 1]
    loss, top1, top5, count = expected
    assert found["val/clips"] == count
    assert [found[f"val/{k}"] * count for k in ("loss", "top1", "top5")] == pytest.approx([loss, top1, top5], rel=1e-4)


def test_the_learner_flips_classes_by_name():
    names = [f"class {i}" for i in range(6)] + ["left", "right"]
    learner = make_learner("augment.flip_classes={left: right}", class_names=names)
    assert learner.objective.flipped.tolist() == [0, 1, 2, 3, 4, 5, 7, 6]
    assert make_learner("augment.flip_classes={'1': '0'}").objective.flipped.tolist() == [1, 0, 2, 3, 4, 5, 6, 7]
    with pytest.raises(UserError, match=r"augment\.flip_classes.*'rihgt' \(did you mean 'right'\?\)"):
        make_learner("augment.flip_classes={left: rihgt}", class_names=names)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_training_resumes_bit_for_bit(tmp_path, precision):
    overrides = ("optim.ema=0.9", "model.drop_path=0.3", "model.dropout=0.2", f"train.precision={precision}")
    straight, resumed = make_learner(*overrides), make_learner(*overrides)
    for i in range(4):
        straight.train_step(make_batch(seed=i))
        if i == 1:
            torch.save((straight.weights(), straight.state_dict()), tmp_path / "state.pt")
            torch.manual_seed(99)
            resumed.load_state_dict(*torch.load(tmp_path / "state.pt", weights_only=True))
        if i > 1:
            resumed.train_step(make_batch(seed=i))
    a, b = straight.weights(), resumed.weights()
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = straight.module.state_dict(), resumed.module.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_step_does_not_depend_on_random_numbers_drawn_before():
    losses = []
    for seed in (1, 2):
        learner = make_learner("model.drop_path=0.5")
        torch.manual_seed(seed)
        losses.append(learner.train_step(make_batch()).loss)
    assert losses[0] == losses[1]
    assert learner.train_step(make_batch()).loss != losses[0]


def test_the_ema_follows_its_formula_and_gives_the_evaluation_weights():
    learner = make_learner("optim.ema=0.3", "optim.warmup_epochs=0")
    average = learner.module.head.bias.detach().clone()
    for t in range(6):
        learner.train_step(make_batch(seed=t))
        keep = min(0.3, (1 + t) / (10 + t))
        average = keep * average + (1 - keep) * learner.module.head.bias.detach()
    live = learner.module.head.bias.detach().clone()
    with learner.evaluation_weights():
        torch.testing.assert_close(learner.module.head.bias, average)
    assert torch.equal(learner.module.head.bias, live)
    torch.testing.assert_close(learner.weights()["head.bias"], average)


def test_the_ema_includes_buffers():
    model = torch.nn.BatchNorm1d(2)
    average = WeightEMA(model, 0.5)
    model(torch.tensor([[0.0, 1], [2, 5]]))
    average.update()
    with average.applied():
        torch.testing.assert_close(model.running_mean, 0.9 * torch.tensor([0.1, 0.3]))  # keeps (1 + 0) / (10 + 0)
        assert model.num_batches_tracked == 1


def test_a_refused_update_leaves_the_average_as_it_is():
    """Whatever the model holds, counters included."""
    model = torch.nn.BatchNorm1d(2)
    average = WeightEMA(model, 0.5)
    before = [x.clone() for x in average.average]
    with torch.no_grad():
        model.weight.fill_(math.nan)
        model.running_mean.fill_(-math.inf)
        model.num_batches_tracked.fill_(7)
    average.update(torch.tensor(1.0))
    assert all(map(torch.equal, average.average, before))
    average.update(torch.tensor(0.0))
    with average.applied():
        assert model.weight.isnan().all()
        assert model.num_batches_tracked == 7


def test_the_ema_of_a_sharded_model_is_of_this_workers_shard(monkeypatch):
    class Sharded:
        def to_local(self):
            return torch.ones(2)

    class Model:
        def state_dict(self):
            return {"sharded": Sharded(), "whole": torch.zeros(3)}

    monkeypatch.setattr(ema, "DTensor", Sharded)
    assert [x.tolist() for x in WeightEMA(Model(), 0.5).average] == [[1, 1], [0, 0, 0]]


def test_the_ema_of_one_number_by_hand():
    """Keeps 1/10, then 2/11, then 3/12 of the average, and never more than the decay; counters are copied."""
    model = torch.nn.BatchNorm1d(1)
    average = WeightEMA(model, 0.2)
    expected = 0.0
    for live, keep in [(1.0, 0.1), (4.0, 2 / 11), (-2.0, 0.2), (3.0, 0.2)]:
        model.running_mean.fill_(live)
        model.num_batches_tracked += 5
        average.update()
        expected = keep * expected + (1 - keep) * live
        with average.applied():
            assert model.running_mean.item() == pytest.approx(expected)
            assert model.num_batches_tracked.item() == 5 * average.updates
        assert model.running_mean.item() == live
    assert average.updates == 4
    with pytest.raises(ValueError, match="stop"), average.applied():
        assert model.running_mean.item() == pytest.approx(expected)
        raise ValueError("stop")
    assert model.running_mean.item() == 3.0


BUSY = ("optim.warmup_epochs=0", "optim.weight_decay=0.5", "optim.ema=0.9", "model.drop_path=0.3", "augment.mixup=0.8")


def everything(learner):
    """All that a step may change, bit for bit."""
    optimizer = [x for state in learner.optimizer.state.values() for x in state.values()]
    tensors = [*learner.module.state_dict().values(), *optimizer, *learner.ema.average]
    bits = [x.detach().numpy().tobytes() for x in tensors]
    return bits, learner.ema.updates, learner.scaler.state_dict(), learner.step


def exploding(weight, seed=9):
    """A batch whose clips count so much that the step is refused."""
    batch = make_batch(seed=seed)
    return Batch(batch.clips, batch.labels, weight * batch.weights, batch.seeds)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e3])
def test_a_step_that_explodes_changes_nothing(precision, weight):
    """Neither weights, optimizer, its counters, statistics, loss scale, EMA nor schedule; with 1e3 all is finite."""
    learner = make_learner(f"train.precision={precision}", *BUSY)
    for seed in range(2):
        learner.train_step(make_batch(seed=seed))
    before = everything(learner)
    with pytest.raises(ExplodedError, match=r"step 2 exploded: loss .*gradient norm"):
        learner.train_step(exploding(weight))
    assert everything(learner) == before
    learner.train_step(make_batch(seed=3))
    after = everything(learner)
    assert after != before
    assert after[1:] == (3, before[2] | {"_growth_tracker": 3} if precision == "fp16" else {}, 3)


@pytest.mark.parametrize(("what", "expected"), [("nan", "loss nan"), ("large", "loss ")])
def test_weights_that_explode_stay_as_they_are(what, expected):
    learner = make_learner(*BUSY)
    learner.train_step(make_batch())
    with torch.no_grad():
        if what == "nan":
            learner.module.head.bias[3] = math.nan
        else:
            learner.module.head.bias[0] = -1e4
    before = everything(learner)
    with pytest.raises(ExplodedError, match=rf"step 1 exploded: {expected}.*gradient norm"):
        learner.train_step(make_batch(seed=1))
    assert everything(learner) == before


def test_the_first_step_may_explode():
    learner, twin = make_learner(*BUSY), make_learner(*BUSY)
    with pytest.raises(ExplodedError, match="step 0"):
        learner.train_step(exploding(math.nan))
    assert learner.train_step(make_batch()) == twin.train_step(make_batch())
    assert everything(learner) == everything(twin)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_results_that_are_read_late_are_the_same(precision):
    early, late = (make_learner(f"train.precision={precision}", *BUSY) for _ in range(2))
    results = [early.train_step(make_batch(seed=seed)) for seed in range(5)]
    read, pending = [], None
    for seed in range(5):
        started = late.start_step(make_batch(seed=seed))
        if pending:
            read.append(pending.result())
        pending = started
    assert [*read, pending.result()] == results
    assert everything(late) == everything(early)


def test_steps_behind_one_that_exploded_change_nothing():
    """The result of the step that exploded tells of it, with its number; training goes on as if it had never been."""
    learner, twin = make_learner(*BUSY), make_learner(*BUSY)
    for each in (learner, twin):
        each.train_step(make_batch())
    before = everything(learner)
    first, second, third = (
        learner.start_step(batch) for batch in (exploding(1e3), make_batch(seed=4), exploding(math.nan))
    )
    with pytest.raises(RuntimeError, match="step 2 has no result now"):
        second.result()
    with pytest.raises(ExplodedError, match=r"step 1 exploded: loss [0-9]"):
        first.result()
    assert everything(learner) == before
    for void in (first, second, third):
        with pytest.raises(RuntimeError, match="has no result now"):
            void.result()
    for seed in (5, 6):
        assert learner.train_step(make_batch(seed=seed)) == twin.train_step(make_batch(seed=seed))
    assert everything(learner) == everything(twin)


def test_a_state_with_results_to_read_is_not_saved():
    learner = make_learner()
    started = learner.start_step(make_batch())
    for save in (learner.weights, learner.state_dict):
        with pytest.raises(RuntimeError, match="read the result of step 0"):
            save()
    started.result()
    assert learner.state_dict()["step"] == 1


def test_the_state_of_an_optimizer_that_is_not_fused_is_resumed():
    """As older versions have saved it."""
    before, learner, twin = after_two_steps(), make_learner(), make_learner()
    state = deepcopy(before.state_dict())
    twin.load_state_dict(before.weights(), deepcopy(state))
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    learner.load_state_dict(before.weights(), state)
    assert all(group["fused"] for group in learner.optimizer.param_groups)
    assert learner.train_step(make_batch()) == twin.train_step(make_batch())
    a, b = learner.weights(), twin.weights()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_in_fp16_a_step_that_overflows_is_skipped_and_halves_the_loss_scale():
    learner = make_learner("train.precision=fp16", "optim.warmup_epochs=0", "optim.weight_decay=0")
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = learner.module.head.bias.detach().clone()
    assert not math.isfinite(learner.train_step(make_batch()).grad_norm)
    assert torch.equal(learner.module.head.bias, before)
    assert learner.scaler.get_scale() == 2.0**39


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([(1, 0), (2, 0), (1, 0.8), (2, 0.8)]))
def test_micro_batches_fit_the_limit_and_keep_videos_and_pairs_together(videos, limit, mixing):
    repeats, mixup = mixing
    together = repeats * (2 if mixup else 1)
    count, limit = videos * together, limit * together
    keys = [f"train.global_batch={count}", f"data.repeats={repeats}", f"augment.mixup={mixup}"]
    config = load_recipe("demo", [*keys, f"scaling.micro_batch={limit}"])
    size = micro_batch_size(count, config)
    assert size % together == 0
    assert together <= size <= limit
    assert math.ceil(count / size) == math.ceil(count / limit)


def after_two_steps(*overrides):
    learner = make_learner(*overrides)
    for seed in (0, 1):
        learner.train_step(make_batch(seed=seed))
    return learner


def test_changed_hyperparameters_apply_on_resume():
    before = after_two_steps()
    learner = make_learner("optim.weight_decay=0.3", "optim.betas=[0.8, 0.9]")
    learner.load_state_dict(before.weights(), before.state_dict())
    assert [g["weight_decay"] for g in learner.optimizer.param_groups] == [0.3, 0.0]
    assert learner.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    moments = [learner.optimizer.state[p]["exp_avg"] for p in learner.module.parameters()]
    expected = [before.optimizer.state[p]["exp_avg"] for p in before.module.parameters()]
    assert all(map(torch.equal, moments, expected))


@pytest.mark.parametrize(("then", "now"), [((), ("optim.ema=0.9",)), (("optim.ema=0.9",), ())])
def test_ema_can_be_switched_on_or_off_on_resume(then, now):
    before, learner = after_two_steps(*then), make_learner(*now)
    learner.load_state_dict(before.weights(), before.state_dict())
    live = before.module.state_dict()
    assert all(torch.equal(v, live[k]) for k, v in learner.module.state_dict().items())
    assert all(torch.equal(v, live[k]) for k, v in learner.weights().items())
    learner.train_step(make_batch(seed=2))


def test_training_resumes_in_another_precision():
    before = after_two_steps()
    learner = make_learner("train.precision=fp16")
    learner.load_state_dict(before.weights(), before.state_dict())
    learner.train_step(make_batch(seed=2))
    assert learner.step == 3


def test_fp16_resumes_exactly_from_before_the_first_applied_step():
    straight, resumed = make_learner("train.precision=fp16"), make_learner("train.precision=fp16")
    straight.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=10**6)
    straight.train_step(make_batch())  # overflows
    resumed.load_state_dict(straight.weights(), deepcopy(straight.state_dict()))
    for learner in (straight, resumed):
        learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        learner.train_step(make_batch(seed=1))
    a, b = straight.weights(), resumed.weights()
    assert all(torch.equal(a[k], b[k]) for k in a)
