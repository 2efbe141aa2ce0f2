"""The steps of an epoch on a training worker, without Ray: what is read when, and what belongs to which step."""

import itertools
import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipelines.data.object_store import StoreMonitor
from pipelines.runs import checkpoints
from pipelines.runs.errors import AgreedError
from pipelines.training import progress
from pipelines.training.agreement import Action, AgreedBatches
from pipelines.training.channel import RunChannel
from pipelines.training.messages import WorkerJob
from pipelines.training.progress import RunProgress, StepSeries
from pipelines.training.worker import Worker, WorkerPlace
from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.errors import BadVideo, UserError
from posmlp.learn.learner import HostCopy, Learner, StartedStep
from posmlp.video.prefetch import prefetch
from tests.helpers.batches import make_batch
from tests.helpers.host_waits import Copies, allow_meta_steps

STEPS = 6
SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]


class Split:
    """What the loop asks of the loader of a split."""

    steps, table = STEPS, range(8 * STEPS)

    def batches(self, epoch):
        for number, batch in enumerate(batches()):
            yield replace(batch, rows=8 * number + torch.arange(8))


def make_worker(folder, monkeypatch, *overrides, device="cpu"):
    config = load_recipe("demo", [*SMALL, *overrides])
    monkeypatch.setattr(Worker, "publish_throughput", lambda *_: None)
    job = WorkerJob(config.model_dump(), str(folder), None, None, None, (), RunChannel(), False, False)
    worker = Worker(job, WorkerPlace(torch.device(device)))
    torch.manual_seed(0)
    model = create_model(config.model.name, **config.model.overrides())
    worker.learner, worker.progress, worker.macs = Learner(model.to(device), config, STEPS), RunProgress(), 1
    worker.train_split = worker.val_split = Split()
    worker.first_epoch, worker.saved_step, worker.store = 0, 0, StoreMonitor(enabled=False)
    worker.series = StepSeries.for_run(STEPS, 8)
    return worker


def batches(nan=None):
    """Each batch has a bad video of its own; the weights of one may be NaN, so that its step explodes."""
    for number in range(STEPS):
        batch = replace(make_batch(seed=number), bad=(BadVideo(str(number), "uri", "cut short"),))
        yield replace(batch, weights=batch.weights * math.nan) if number == nan else batch


def agreed(worker, *args):
    return AgreedBatches(batches(*args), STEPS, worker.request, worker.channel.fail)


def test_the_result_of_a_step_is_read_when_the_next_one_has_started(tmp_path, monkeypatch):
    """But for the first, which is timed apart, and the last."""
    worker, events = make_worker(tmp_path, monkeypatch), []
    start_step, result = Learner.start_step, StartedStep.result

    def start(learner, batch):
        events.append(f"start {learner.step}")
        return start_step(learner, batch)

    def read(started):
        events.append(f"read {started.step}")
        return result(started)

    monkeypatch.setattr(Learner, "start_step", start)
    monkeypatch.setattr(StartedStep, "result", read)
    metrics = worker.train_epoch(agreed(worker), 0)
    expected = "start 0, read 0, start 1, start 2, read 1, start 3, read 2, start 4, read 3, start 5, read 4, read 5"
    assert ", ".join(events) == expected
    assert worker.progress.steps == STEPS and metrics["train/loss"] == worker.progress.loss / STEPS


def test_the_loop_trains_as_steps_that_are_read_at_once(tmp_path, monkeypatch):
    worker, twin = make_worker(tmp_path, monkeypatch), make_worker(tmp_path, monkeypatch)
    worker.train_epoch(agreed(worker), 0)
    results = [twin.learner.train_step(batch) for batch in batches()]
    assert worker.progress.loss == sum(result.loss for result in results)
    ours, theirs = worker.learner.weights(), twin.learner.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("exploding", range(STEPS))
def test_a_step_that_explodes_is_saved_with_its_own_batch(tmp_path, monkeypatch, exploding):
    worker, twin = make_worker(tmp_path, monkeypatch), make_worker(tmp_path, monkeypatch)
    with pytest.raises(AgreedError, match=rf"step {exploding} exploded: loss nan"):
        worker.train_epoch(agreed(worker, exploding), 0)
    for batch in list(batches())[:exploding]:
        twin.learner.train_step(batch)
    step = f"{tmp_path}/exploded/checkpoints/step-{exploding:010d}"
    saved, expected = load_file(f"{step}/batch-0.safetensors"), list(batches())[exploding]
    assert torch.equal(saved["seeds"], expected.seeds) and saved["weights"].isnan().all()
    _, contents = checkpoints.load(step)
    assert all(torch.equal(contents[checkpoints.WEIGHTS][k], v) for k, v in twin.learner.weights().items())


def test_a_checkpoint_has_the_steps_and_bad_videos_up_to_it(tmp_path, monkeypatch):
    """Later batches are there already, and count for later checkpoints."""
    worker = make_worker(tmp_path, monkeypatch, "train.checkpoint_every_steps=2", "train.keep_last=9")
    worker.train_epoch(agreed(worker), 0)
    found = {each.info.step: each.info.progress for each in checkpoints.find(str(tmp_path))}
    assert {step: (p["steps"], sorted(v["sample_id"] for v in p["bad"])) for step, p in found.items()} == {
        2: (2, ["0", "1"]),
        4: (4, ["0", "1", "2", "3"]),
    }


def saved_steps(folder):
    return [each.info.step for each in checkpoints.find(str(folder))]


def test_every_step_can_have_its_checkpoint(tmp_path, monkeypatch):
    """The last one's is saved with the end of the epoch."""
    worker = make_worker(tmp_path, monkeypatch, "train.checkpoint_every_steps=1", "train.keep_last=9")
    worker.train_epoch(agreed(worker), 0)
    assert saved_steps(tmp_path) == list(range(1, STEPS))


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_requested_checkpoint_is_saved_before_its_step(tmp_path, monkeypatch, step):
    worker, votes = make_worker(tmp_path, monkeypatch, "train.keep_last=9"), iter(range(STEPS))
    worker.request = lambda: Action.SAVE if next(votes) == step else Action.CONTINUE
    worker.train_epoch(agreed(worker), 0)
    assert saved_steps(tmp_path) == [step]


def test_a_checkpoint_that_is_due_is_saved_before_a_failure_ends_the_run(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch, "train.checkpoint_every_steps=4", "train.keep_last=9")

    def broken():
        yield from itertools.islice(batches(), 4)
        raise UserError("the loader has failed")

    with pytest.raises(AgreedError, match="the loader has failed"):
        worker.train_epoch(AgreedBatches(broken(), STEPS, worker.request, worker.channel.fail), 0)
    assert saved_steps(tmp_path) == [4]


def test_the_time_of_a_step_is_its_own(tmp_path, monkeypatch):
    """Not the time from one read to the next: the last two results of an epoch are read one after the other."""
    worker, rows, ends = make_worker(tmp_path, monkeypatch), [], []
    monkeypatch.setattr(worker, "send", lambda event: rows.extend(event.rows))
    result = StartedStep.result

    def read(started):
        found = result(started)
        ends.append(started.ended)
        return found

    monkeypatch.setattr(StartedStep, "result", read)
    worker.train_epoch(agreed(worker), 0)
    speeds = [row[-1] for row in rows]
    assert speeds[1:] == [pytest.approx(8 / (after - before)) for before, after in itertools.pairwise(ends)]


def test_a_stop_request_ends_the_epoch_with_all_started_steps_counted(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch)
    worker.request = lambda: Action.STOP if worker.learner.step >= 2 else Action.CONTINUE
    assert worker.train_epoch(agreed(worker), 0) is None
    assert worker.progress.steps == worker.learner.step == 3  # the request is heard a step ahead
    worker.learner.check_all_read()


def loop_events(monkeypatch):
    """The loop's steps, and its reads of results from the device, in order; each read waits for the device."""
    events = []

    def note(name, owner, attribute):
        function = getattr(owner, attribute)

        def noted(self, *args):
            events.append(name)
            return function(self, *args)

        monkeypatch.setattr(owner, attribute, noted)

    note("step", Learner, "start_step")
    note("step", Learner, "score")
    note("read", HostCopy, "read")
    return events


KINETICS = ("flip=0.5", "randaug_layers=2", "erasing=0.5", "mixup=0.8")


@pytest.mark.parametrize("overrides", [(), ("optim.ema=0.9", "optim.clip_grad=1", "scaling.micro_batch=4")])
def test_the_training_loop_waits_for_the_device_only_to_read_the_step_before(tmp_path, monkeypatch, overrides):
    """On the meta device: whatever else asks for a value raises an error. Each step also tells how far the run is."""
    allow_meta_steps(monkeypatch)
    monkeypatch.setattr(progress, "LINE_S", -1.0)
    monkeypatch.setattr(progress, "SEND_STEPS_S", -1.0)
    augment = [f"augment.{each}" for each in KINETICS]
    worker = make_worker(tmp_path, monkeypatch, *augment, *overrides, device="meta")
    events = loop_events(monkeypatch)
    with closing(prefetch(batches(), worker.learner.device)) as ahead, Copies() as seen:
        worker.train_epoch(AgreedBatches(ahead, STEPS, worker.request, worker.channel.fail), 0)
    assert events == ["step", "read", "step", *["step", "read"] * (STEPS - 2), "read"]
    there, back = ("cpu", "meta", False), ("meta", "cpu", False)
    copies = [there] * (2 if overrides else 1) + [back]  # random parameters, of each micro-batch; the result
    assert seen.found == copies * STEPS
    assert len(worker.channel.receive()) >= 2 * STEPS


def test_validation_waits_for_the_device_only_to_read_the_batch_before(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, monkeypatch, device="meta")
    allow_meta_steps(monkeypatch)
    events = loop_events(monkeypatch)
    with Copies(value=1) as seen:
        worker.validate()
    parts = 3  # of a batch's result: scores, labels and weights
    assert events == ["step", *["step", *["read"] * parts] * (STEPS - 1), *["read"] * parts]
    assert seen.found == [("meta", "cpu", False)] * parts * STEPS
