"""Two workers (gloo, two processes) give the same losses and weights as one, at the same global batch."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_flatten

from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.learn.learner import ExplodedError, Learner
from posmlp.learn.parallel import SyncBatchNorm, parallelise
from posmlp.video.batch import Batch
from tests.helpers.batches import DETECTION, make_box_batch
from tests.helpers.process_groups import join_group, run_group

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]
STEPS = 4
FINE_TUNING = ("optim.freeze=2", "optim.layer_decay=0.7", "model.weights=given")


def global_batch(seed, task="recognition"):
    if task == "detection":
        return make_box_batch(seed=seed)
    g = torch.Generator().manual_seed(seed)
    return Batch(
        clips=torch.randint(0, 256, (8, 4, 32, 32, 3), dtype=torch.uint8, generator=g),
        labels=torch.arange(8),
        weights=torch.ones(8),
        seeds=torch.randint(0, 2**63 - 1, (8,), generator=g),
    )


def train(rank, world, overrides, state=None):
    """Train a worker's share for ``STEPS`` steps, from scratch or resumed; returns losses, weights and state."""
    config = load_recipe("demo", [*SMALL, f"scaling.workers={world}", *overrides])
    torch.manual_seed(0)
    model = create_model(config.model.name, **config.model.overrides())
    learner = Learner(parallelise(model, config, torch.device("cpu")), config, STEPS)
    if state:
        learner.load_state_dict(*state)
    size, losses = 8 // world, []
    for step in range(learner.step, learner.step + STEPS):
        losses.append(learner.train_step(list(global_batch(step, config.task).micro_batches(size))[rank]).loss)
    return losses, learner.weights(), learner.state_dict()


def worker(rank, world, folder, overrides):
    join_group(folder, rank, world)
    result = train(rank, world, overrides, torch.load(f"{folder}/state.pt", weights_only=True))
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.destroy_process_group()


def on_two(folder, *overrides, state=None):
    """Run ``train`` on two workers; returns the result of rank 0."""
    folder.mkdir()
    torch.save(state, folder / "state.pt")
    run_group(worker, 2, 2, str(folder), overrides)
    return torch.load(folder / "result.pt", weights_only=True)


def distance(one, other, overrides=()):
    """Distance of two sets of weights, relative to how far training has moved them."""
    assert one.keys() == other.keys()
    start = create_weights(overrides)
    return norm_of(one, other) / norm_of(one, start)


def norm_of(one, other):
    return math.sqrt(sum(float((one[k].double() - other[k].double()).square().sum()) for k in one))


def create_weights(overrides):
    config = load_recipe("demo", [*SMALL, *overrides])
    torch.manual_seed(0)
    return create_model(config.model.name, **config.model.overrides()).state_dict()


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="ddp"),
        pytest.param(("scaling.parallel=fsdp", "optim.ema=0.9"), id="fsdp"),
        pytest.param(
            ("optim.ema=0.9", "augment.mixup=0.8", "augment.cutmix=1", "optim.clip_grad=0.1", "train.recompute=true"),
            id="everything",
            marks=pytest.mark.slow,
        ),
        pytest.param((*FINE_TUNING, "optim.ema=0.9"), id="fine_tuning"),
        pytest.param((*FINE_TUNING, "scaling.parallel=fsdp"), id="fine_tuning_fsdp", marks=pytest.mark.slow),
        pytest.param(
            (
                "model.choices={depths: [[1, 2], [1, 2], [1], [1, 3]], blocks: [[parallel, joint], [], [], []],"
                " groups: [[], [1, 8], [], []]}",
                "optim.ema=0.9",
                "train.recompute=true",
            ),
            id="supernet",
        ),
        pytest.param((*DETECTION, "augment.flip=0.5", "optim.ema=0.9"), id="detection"),
        pytest.param((*DETECTION, "scaling.parallel=fsdp"), id="detection_fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_workers_train_as_one(tmp_path, overrides):
    overrides = ("optim.lr=1e-4", *overrides)  # a step hardly changes the next gradient, so rounding does not grow
    one = train(0, 1, overrides)
    two = on_two(tmp_path / "two", *overrides)
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    # where a gradient is close to 0, rounding alone decides AdamW's first steps
    assert distance(two[1], one[1], overrides) < 1e-3
    # each resumes from the other's state; from then on rounding errors grow with every step
    ahead = on_two(tmp_path / "more", *overrides, state=one[1:])[0], train(0, 1, overrides, state=two[1:])[0]
    assert ahead[0][0] == pytest.approx(ahead[1][0], rel=1e-4)
    assert ahead[0] == pytest.approx(ahead[1], rel=1e-2)


def parallel_learner(config):
    """A learner of a worker in a group, always with the same fresh weights."""
    torch.manual_seed(0)
    model = create_model(config.model.name, **config.model.overrides())
    return Learner(parallelise(model, config, torch.device("cpu")), config, STEPS)


def exploding_worker(rank, folder, overrides):
    """Trains with and without a step that explodes by the second worker's clips alone; saves what both lead to."""
    join_group(folder, rank, 2)
    config, results = load_recipe("demo", [*SMALL, "scaling.workers=2", "optim.ema=0.9", *overrides]), []
    for explodes in (True, False):
        learner = parallel_learner(config)
        first, second, third = (list(global_batch(step).micro_batches(4))[rank] for step in range(3))
        learner.train_step(first)
        message = ""
        if explodes:
            bad = Batch(second.clips, second.labels, second.weights * (1e3 if rank else 1.0), second.seeds)
            started = learner.start_step(bad)
            learner.start_step(third)
            with pytest.raises(ExplodedError) as error:
                started.result()
            message = str(error.value)
        losses = [learner.train_step(batch).loss for batch in (second, third)]
        state = learner.state_dict()
        state["optimizer"] = state["optimizer"].get("state")  # the first worker's; the others have none
        results.append((message, losses, learner.weights(), state))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_workers_refuse_a_step_together(tmp_path, parallel):
    """Also the one whose own loss is as usual. Then they go on as if it had never been, bit for bit."""
    run_group(exploding_worker, 2, str(tmp_path), (f"scaling.parallel={parallel}",))
    messages = []
    for rank in (0, 1):
        (message, *exploded), (_, *never) = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        messages.append(message)
        assert tree_flatten(exploded)[1] == tree_flatten(never)[1]
        assert all(map(same, tree_flatten(exploded)[0], tree_flatten(never)[0]))
    assert messages[0].startswith("step 1 exploded: loss ")
    assert messages[0] == messages[1]


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def scoring_worker(rank, folder, overrides):
    """Trains with and without a score by the EMA's weights after each step; saves what both lead to."""
    join_group(folder, rank, 2)
    config, results = load_recipe("demo", [*SMALL, "scaling.workers=2", "optim.ema=0.9", *overrides]), []
    for scores in (True, False):
        learner = parallel_learner(config)
        losses = []
        for step in range(3):
            batch = list(global_batch(step).micro_batches(4))[rank]
            losses.append(learner.train_step(batch).loss)
            if scores:
                with learner.evaluation_weights():
                    learner.score(batch)
        results.append((losses, learner.weights()))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_validation_leaves_training_as_it_is(tmp_path, parallel):
    """Bit for bit: parameters that were gathered for the EMA's scores are not used in the next step."""
    run_group(scoring_worker, 2, str(tmp_path), (f"scaling.parallel={parallel}",))
    for rank in (0, 1):
        scored, not_scored = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(map(same, tree_flatten(scored)[0], tree_flatten(not_scored)[0]))


def reduced_worker(rank, folder):
    """Saves the number of gradient values that the workers exchange in a step with frozen parts."""
    join_group(folder, rank, 2)
    config = load_recipe("demo", [*SMALL, "scaling.workers=2", "optim.freeze=3", "model.weights=given"])
    model = parallelise(create_model(config.model.name, **config.model.overrides()), config, torch.device("cpu"))
    sizes = []

    def reduce(state, bucket):
        sizes.append(bucket.buffer().numel())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0] / 2)

    model.register_comm_hook(None, reduce)
    Learner(model, config, STEPS).train_step(list(global_batch(0).micro_batches(4))[rank])
    torch.save(sizes, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_frozen_parameters_are_not_reduced(tmp_path):
    run_group(reduced_worker, 2, str(tmp_path))
    config = load_recipe("demo", SMALL)
    model = create_model(config.model.name, **config.model.overrides())
    learning = sum(p.numel() for part in (model.stages[3], model.norm, model.head) for p in part.parameters())
    assert [sum(torch.load(tmp_path / f"{rank}.pt")) for rank in (0, 1)] == [learning, learning]


def test_padding_does_not_change_the_gradient():
    """For a global batch that is not divisible by the workers. Batch norms are in eval mode, as they see all clips."""
    gradients = []
    for clips in (6, 8):
        config = load_recipe("demo", [*SMALL, "train.global_batch=6"])
        torch.manual_seed(0)
        learner = Learner(create_model(config.model.name, **config.model.overrides()), config, STEPS)
        freeze_statistics(learner.model)
        (batch, *_) = global_batch(0).micro_batches(clips)
        batch.weights[6:] = 0
        loss, norm = learner.backward(batch)
        gradients.append((loss, norm, [p.grad for p in learner.model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_without_sync_batch_norm_two_workers_differ_from_one(tmp_path):
    """Shows that ``test_two_workers_train_as_one`` can fail."""
    losses = on_two(tmp_path / "two", "train.sync_batch_norm=false")[0]
    assert losses != pytest.approx(train(0, 1, ())[0], rel=1e-5)


def freeze_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.train = lambda mode=True, module=module: module
            module.training = False


@pytest.mark.parametrize("micro_batch", [2, 3, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch(micro_batch):
    """Batch norms are in eval mode, as they see one micro-batch at a time."""
    gradients = []
    for size in (None, micro_batch):
        config = load_recipe("demo", [*SMALL, f"scaling.micro_batch={size or 'null'}"])
        torch.manual_seed(0)
        model = create_model(config.model.name, **config.model.overrides())
        freeze_statistics(model)
        learner = Learner(model, config, STEPS)
        loss, norm = learner.backward(global_batch(0))
        gradients.append((loss, norm, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_ddp_and_fsdp_accumulate_gradients_alike(tmp_path):
    """Gradients are reduced once per step, in the backward pass of the last micro-batch."""
    ddp, fsdp = (
        on_two(tmp_path / kind, "scaling.micro_batch=2", f"scaling.parallel={kind}") for kind in ("ddp", "fsdp")
    )
    assert ddp[0] == pytest.approx(fsdp[0], rel=1e-5)
    assert distance(ddp[1], fsdp[1]) < 1e-3
    whole = on_two(tmp_path / "whole")
    assert whole[0] != pytest.approx(ddp[0], rel=1e-5)  # batch norm sees larger batches
    assert whole[0] == pytest.approx(ddp[0], rel=0.1)


def norm_worker(rank, folder):
    join_group(folder, rank, 2)
    layer, x = norm_case(SyncBatchNorm)
    mine = x.chunk(2)[rank].clone().requires_grad_()
    out = layer(mine)
    (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
    torch.save((out.detach(), mine.grad, layer.running_mean, layer.running_var), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def norm_case(kind):
    torch.manual_seed(0)
    layer = kind(3).train()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer, torch.randn(4, 3, 2, 5, 5) * 3 + 100


def test_sync_batch_norm_equals_batch_norm_over_all_clips(tmp_path):
    """Output, gradient and running statistics against ``nn.BatchNorm3d`` on the whole batch."""
    run_group(norm_worker, 2, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    layer, x = norm_case(nn.BatchNorm3d)
    x.requires_grad_()
    out = layer(x)
    weights = torch.arange(out.numel() // 2).view_as(out[:2]).sin()
    (out * torch.cat([weights, weights])).sum().backward()
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), x.grad, rtol=1e-3, atol=1e-4)
    for part in parts:
        torch.testing.assert_close(part[2], layer.running_mean)
        torch.testing.assert_close(part[3], layer.running_var)


def test_recomputation_changes_nothing():
    results = [train(0, 1, ("model.drop_path=0.5", f"train.recompute={on}")) for on in ("false", "true")]
    assert results[0][0] == results[1][0]
    assert distance(results[0][1], results[1][1]) == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_to_the_same_loss(precision):
    losses = []
    for kind in ("fp32", precision):
        config = load_recipe("demo", [*SMALL, f"train.precision={kind}", "optim.warmup_epochs=0"])
        torch.manual_seed(0)
        learner = Learner(create_model(config.model.name, **config.model.overrides()), config, 5)
        for _ in range(20):
            step = learner.train_step(global_batch(0))
        losses.append(step.loss)
        assert math.isfinite(step.grad_norm)
        assert all(p.dtype == torch.float32 for p in learner.module.parameters())
    assert losses[0] < 1.5
    assert losses[1] == pytest.approx(losses[0], abs=0.3)


@pytest.mark.slow
def test_compiled_training_is_eager_training():
    small = "model.depths=[1, 1, 1, 1]"  # compilation is slow
    eager, compiled = (train(0, 1, (small, f"train.compile={on}")) for on in ("false", "true"))
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4)
    assert eager[1].keys() == compiled[1].keys()
