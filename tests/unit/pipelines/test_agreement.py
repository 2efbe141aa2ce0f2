"""Workers that agree: three processes on gloo, of which any may ask for something at any step, or fail."""

import json
from itertools import product

import pytest
import torch
import torch.distributed as dist

from pipelines.runs.errors import AgreedError
from pipelines.training.agreement import Action, AgreedBatches
from posmlp.errors import UserError
from tests.helpers.process_groups import join_group, run_group

WORLD, STEPS = 3, 4
ASKED = ("SAVE", "STOP", "FAIL", "broken")


def scenarios():
    """Who asks for what: ``{rank: {step: what}}``. Every single request, and pairs of different ones."""
    singles = [{rank: {step: what}} for what in ASKED for rank in range(WORLD) for step in range(STEPS)]
    pairs = [{0: {a: x}, 2: {b: y}} for x, y in product(ASKED, repeat=2) for a, b in ((1, 1), (1, 2), (2, 1)) if x != y]
    after_the_last = [{rank: {STEPS: "broken"}} for rank in range(WORLD)]
    often = [{0: {0: "SAVE", 2: "SAVE"}, 1: {1: "SAVE", 3: "STOP"}}]
    return [{}, *singles, *pairs, *after_the_last, *often]


def expected(scenario):
    """What every worker does: the largest request of a step, before that step."""
    done = []
    for step in range(STEPS):
        asked = {own[step] for own in scenario.values() if step in own}
        if asked & {"FAIL", "broken"}:
            return [*done, "failed"]
        if "STOP" in asked:
            return [*done, "stopped"]
        done += ["saved"] * ("SAVE" in asked) + [f"step {step}"]
    return done


def reasons(scenario):
    """What the worker of each rank tells the driver: why it has no batch, if it comes to that."""
    steps = sum(each.startswith("step") for each in expected(scenario))
    broken = {
        rank: min((s for s, what in own.items() if what == "broken"), default=STEPS) for rank, own in scenario.items()
    }
    return {rank: step for rank, step in broken.items() if step <= steps and step < STEPS}


def check_together(number):
    """A collective of the training step or of a checkpoint: all workers do the same one."""
    numbers = [torch.zeros((), dtype=torch.int64) for _ in range(WORLD)]
    dist.all_gather(numbers, torch.tensor(number))
    assert {int(each) for each in numbers} == {number}


def drive(own):
    """A worker's loop, as ``Worker.train_epoch``. Returns what it did, and what it told the driver."""
    told = []

    def batches():
        for step in range(STEPS):
            if own.get(step) == "broken":
                raise UserError(f"no batch {step}")
            yield step
        if own.get(STEPS) == "broken":
            raise UserError("after the last batch")

    asked = iter(range(STEPS))

    def request():
        what = own.get(next(asked), "CONTINUE")
        return Action[what] if what != "broken" else Action.CONTINUE

    agreed, done = AgreedBatches(batches(), STEPS, request, told.append), []
    try:
        for step in range(STEPS):
            action = agreed.action()
            if action == Action.SAVE:
                check_together(1000 + step)
                done.append("saved")
            if action == Action.STOP:
                done.append("stopped")
                break
            batch = agreed.take()
            check_together(batch)
            done.append(f"step {batch}")
    except AgreedError as error:
        done.append("failed")
        assert str(error) == (told[0] if told else "another worker failed")
    check_together(-1)  # the next collective of all: nothing is left of the votes
    return done, told


def drive_all(rank, folder):
    join_group(folder, rank, WORLD)
    results = [drive(scenario.get(rank, {})) for scenario in scenarios()]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of each scenario: what each worker did, and what it told the driver."""
    folder = tmp_path_factory.mktemp("group")
    run_group(drive_all, WORLD, str(folder))
    return list(zip(*(json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)), strict=True))


def test_all_workers_do_the_same_at_the_same_step(results):
    """No batch is lost or used twice, and no worker waits for another for ever."""
    for scenario, found in zip(scenarios(), results, strict=True):
        assert [done for done, _ in found] == [expected(scenario)] * WORLD, scenario


def test_the_driver_learns_why_a_worker_has_no_batch(results):
    for scenario, found in zip(scenarios(), results, strict=True):
        told = {rank: [f"no batch {step}"] for rank, step in reasons(scenario).items()}
        assert [told.get(rank, []) for rank in range(WORLD)] == [told for _, told in found], scenario
