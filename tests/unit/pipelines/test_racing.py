"""Racing: which member gets the next fresh seed, from the records alone; and the fronts that it finds."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import racing as simulation
from pipelines.studies import pareto, racing
from pipelines.studies.study import TrialState

trial = simulation.trial


def test_without_repeats_there_is_none():
    assert racing.next_repeat([trial(0, 0.5, 1.0)], ["gmacs"], 0) is None
    assert racing.next_repeat([], ["gmacs"], 3) is None


def test_the_front_of_the_first_seeds_comes_first():
    trials = [trial(0, 0.5, 1.0), trial(1, 0.4, 2.0), trial(2, 0.7, 3.0)]
    chosen = racing.next_repeat(trials, ["gmacs"], 2)
    assert (chosen.first.number, chosen.seed, chosen.reason) == (0, 1, "on the front of the first seeds")
    running = replace(trial(3, 0.0, 1.0, 0, 1), state=TrialState.RUNNING, metrics={})
    assert racing.next_repeat([*trials, running], ["gmacs"], 2).first.number == 2  # a running one counts as given
    both = [*trials, running, replace(running, number=4, repeat_of=2)]
    assert racing.next_repeat(both, ["gmacs"], 2) is None  # until one of them ends


def test_a_seed_is_never_given_twice_and_failures_count():
    trials = [trial(0, 0.5, 1.0), replace(trial(1, 0.0, 1.0, 0, 1), state=TrialState.FAILED, metrics={})]
    assert racing.next_repeat(trials, ["gmacs"], 3) is None  # nothing to decide with
    trials += [trial(2, 0.5, 1.0, 0, 2)]
    assert racing.next_repeat(trials, ["gmacs"], 3) is None  # two were given, and no other member may be on the front
    old = [replace(trial(0, 0.5, 1.0), seed=7), trial(1, 0.6, 1.0, 0, 8)]
    assert racing.next_repeat(old, ["gmacs"], 3).seed == 9


def test_a_settled_front_gets_no_more_and_an_open_place_does():
    clear = [trial(0, 0.3, 1.0), trial(1, 0.8, 2.0)]
    clear += [
        trial(2 + 2 * n + s, t.metrics["val/top1"] + s / 1e3, 1.0, n, 1 + s)
        for n, t in enumerate(clear)
        for s in (0, 1)
    ]
    assert racing.next_repeat(clear, ["gmacs"], 5) is None
    close = [trial(0, 0.50, 1.0), trial(1, 0.52, 2.0), trial(2, 0.1, 3.0)]
    values = {0: (0.48, 0.52), 1: (0.49, 0.53)}
    close += [trial(3 + 2 * n + s, values[n][s], 1.0, n, 1 + s) for n in (0, 1) for s in (0, 1)]
    chosen = racing.next_repeat(close, ["gmacs"], 5)
    assert (chosen.first.number, chosen.seed) == (1, 3)  # trial 0 is the cheapest, its place is certain
    assert chosen.reason.startswith("on the front with probability 0.")
    assert racing.next_repeat(close, ["gmacs"], 2) is None


def test_a_member_that_may_be_on_the_front_is_opened():
    """Trial 1 is just below trial 0 with its first seed, and costs less than trial 2."""
    trials = [trial(0, 0.60, 1.0), trial(1, 0.599, 2.0), trial(2, 0.62, 3.0)]
    values = {0: (0.5, 0.6), 2: (0.6, 0.5)}
    trials += [trial(3 + n + s, values[n][s], 1.0, n, 1 + s) for n in (0, 2) for s in (0, 1)]
    assert racing.next_repeat(trials, ["gmacs"], 2).first.number == 1


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([0.01, 0.05, 0.15]), st.integers(1, 4))
def test_races_end_with_enough_seeds_on_the_front(seed, deviation, repeats):
    rng = np.random.default_rng(seed)
    trials, true = simulation.simulated_study(rng, 8, deviation)
    done = simulation.race(trials, true, deviation, repeats, rng)
    given_seeds = {n: [t.seed for t in done if t.repeat_of == n] for n in range(8)}
    assert all(seeds == list(range(1, len(seeds) + 1)) and len(seeds) <= repeats for seeds in given_seeds.values())
    front = pareto.pareto_front(done, "gmacs")
    assert front and all(len(given_seeds[t.number]) >= min(2, repeats) for t in front)


def test_a_choice_depends_on_the_records_alone():
    rng = np.random.default_rng(3)
    trials, true = simulation.simulated_study(rng, 12, 0.05)
    done = simulation.race(trials, true, 0.05, 3, rng)
    dice = random.Random(0)
    for count in range(len(trials), len(done)):
        known = done[:count]
        chosen = racing.next_repeat(known, ["gmacs"], 3)
        assert (chosen.first.number, chosen.seed) == (done[count].repeat_of, done[count].seed)
        assert racing.next_repeat(dice.sample(known, count), ["gmacs"], 3).first.number == chosen.first.number


@pytest.mark.parametrize("deviation", [0.01, 0.05])
def test_racing_finds_a_better_front_than_seeds_for_the_first_front(deviation):
    lost = {}
    for method in (simulation.repeat_front, simulation.race):
        rng, values = np.random.default_rng(5), []
        for _ in range(30):
            trials, true = simulation.simulated_study(rng, 24, deviation)
            done = method(trials, true, deviation, 3, rng)
            values.append((simulation.loss(done, true), len(done) - len(trials)))
        lost[method.__name__] = np.mean(values, axis=0)
    assert lost["race"][0] < lost["repeat_front"][0]
    assert lost["race"][1] < 1.4 * lost["repeat_front"][1]
