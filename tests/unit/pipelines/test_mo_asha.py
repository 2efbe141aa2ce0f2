"""Multi-objective successive halving: its rungs, its order of trials and its decisions, against brute force."""

import ast
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

from pipelines.tuning import mo_asha
from pipelines.tuning.mo_asha import (
    MOASHAScheduler,
    SuccessiveHalving,
    epsilon_net,
    non_dominated_ranks,
    order_points,
    rung_times,
)

# Few different values, so that there are ties; sums and products of them are exact.
VALUES = st.integers(-4, 4).map(float)


def points_of(objectives, values=VALUES, min_size=0):
    return st.lists(st.tuples(*[values] * objectives), min_size=min_size, max_size=12)


def dominates(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def as_array(points, objectives):
    return np.array(points, dtype=float).reshape(len(points), objectives)


# --- rungs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, []), (2, [1]), (3, [1]), (9, [1, 3]), (10, [1, 3]), (60, [7, 20]), (300, [33, 100])]
)
def test_rungs_lie_at_a_ninth_and_a_third(epochs, expected):
    assert rung_times(epochs) == expected
    for warmup in (0.5, 1, 7, 7.5):
        assert rung_times(epochs, warmup=warmup) == [rung for rung in expected if rung > warmup]


@given(st.integers(1, 2000), st.integers(2, 5), st.integers(0, 4))
def test_rungs_are_the_nearest_epochs_to_exact_fractions_and_none_is_late(epochs, factor, count):
    rungs = rung_times(epochs, factor, count)
    assert rungs == sorted(set(rungs)) and len(rungs) <= count
    for rung in rungs:
        assert 1 <= rung <= epochs / 2
        assert any(abs(rung - epochs / factor**k) <= 0.5 or (rung == 1 > epochs / factor**k) for k in (1, 2, 3, 4))
    for k in range(1, count + 1):  # each fraction that an epoch is near to has its rung
        nearest = [t for t in range(1, epochs // 2 + 1) if abs(t - epochs / factor**k) < 0.5]
        assert set(nearest) <= set(rungs)


@given(st.integers(1, 100), st.integers(1, 12))
def test_results_every_k_epochs_count_once_a_rung_and_never_beyond_half(epochs, every):
    """Against a walk over the epochs: a rung is the first result at or after it, unless a later rung has it."""
    halving = SuccessiveHalving(["max"], epochs)
    counted = {}
    for epoch in range(every, epochs + 1, every):
        if halving.add("a", epoch, [0.5]):
            counted[halving.rung_of("a")] = epoch
    expected = {}
    for rung in rung_times(epochs):
        first = math.ceil(rung / every) * every
        if first <= epochs / 2:
            expected = {r: e for r, e in expected.items() if e != first} | {rung: first}
    assert counted == expected


# --- order -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3).flatmap(lambda m: st.tuples(st.just(m), points_of(m))))
def test_ranks_are_those_of_peeling_fronts(case):
    objectives, points = case
    ranks = non_dominated_ranks(as_array(points, objectives))
    left, rank = set(range(len(points))), 0
    while left:
        front = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        assert {i for i in left if ranks[i] == rank} == front
        left -= front
        rank += 1


@given(points_of(2, min_size=1))
def test_an_epsilon_net_takes_the_farthest_point_next(points):
    order = epsilon_net(as_array(points, 2))
    assert sorted(order) == list(range(len(points)))
    assert order[0] == min(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i))
    for place in range(1, len(order)):
        gaps = {i: min(math.dist(points[i], points[j]) for j in order[:place]) for i in order[place:]}
        assert gaps[order[place]] == pytest.approx(max(gaps.values()))


def test_an_epsilon_net_covers_a_front_from_its_ends():
    front = np.array([(1.0, 0.0), (0.9, 0.1), (0.5, 0.5), (0.1, 0.9), (0.0, 1.0)])
    assert epsilon_net(front)[:3] == [0, 4, 2]


def test_each_objective_counts_as_much_in_an_epsilon_net():
    """The farthest point is that in the middle of the wide gap, whichever objective has the larger numbers."""
    front = np.array([(4.0, 0.0), (2.0, 0.5), (1.2, 3.0), (0.0, 4.0)])
    for factor in (1.0, 1000.0, 0.001):
        assert order_points(front * [factor, 1.0]) == order_points(front * [1.0, factor]) == ([0, 3, 1, 2], 4)


SCALES = st.tuples(st.sampled_from([2.0**k for k in (-20, -3, 0, 5, 30)]), st.integers(-8, 8).map(float))


@given(points_of(2), SCALES, SCALES)
def test_the_order_does_not_depend_on_the_units_of_an_objective(points, first, second):
    """Factors are powers of two, so that nothing is rounded."""
    array = as_array(points, 2)
    moved = np.stack([array[:, 0] * first[0] + first[1] * first[0], array[:, 1] * second[0] - second[1] * second[0]], 1)
    assert order_points(moved) == order_points(array)


@given(points_of(2, st.sampled_from([0.0, 1.0, 1.7e308, -1.7e308, math.nan, math.inf, -math.inf])))
def test_points_that_are_not_finite_come_last_and_have_no_rank(points):
    order, best = order_points(as_array(points, 2))
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    assert sorted(order) == list(range(len(points))) and sorted(order[: len(finite)]) == finite
    on_front = [i for i in finite if not any(dominates(points[j], points[i]) for j in finite)]
    assert sorted(order[:best]) == on_front


# --- decisions ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=30), st.integers(2, 4), st.sampled_from(["max", "min"]))
def test_one_objective_is_asha(values, factor, mode):
    """The best floor(n / eta) continue, and in any case the best, with all that equal it."""
    halving = SuccessiveHalving([mode], 100, factor, count=1)
    (rung,) = halving.rungs
    for number, value in enumerate(values):
        assert halving.add(number, rung, [value])
        seen = values[: number + 1]
        ranked = sorted(range(number + 1), key=lambda i: (-seen[i] if mode == "max" else seen[i], i))
        top = ranked[: max(len(seen) // factor, sum(v == seen[ranked[0]] for v in seen))]
        assert halving.may_continue(number) == (number in top)
        assert halving.promotable(range(number + 1)) == top


@settings(deadline=None)
@given(points_of(2, min_size=1))
def test_what_no_trial_dominates_is_never_stopped(points):
    """More accurate is better, and cheaper is."""
    halving = SuccessiveHalving(["max", "min"], 9)
    for number, (top1, cost) in enumerate(points):
        halving.add(number, 1, (top1, cost))
        seen = [(a, -c) for a, c in points[: number + 1]]
        beaten = any(dominates(other, seen[-1]) for other in seen)
        assert halving.may_continue(number) or beaten
        continuing = [n for n in range(number + 1) if halving.may_continue(n)]
        front = [n for n in range(number + 1) if not any(dominates(other, seen[n]) for other in seen)]
        assert set(front) <= set(continuing)
        assert len(continuing) == max(len(front), len(seen) // 3)


@settings(deadline=None)
@given(points_of(2, min_size=1), st.randoms(use_true_random=False))
def test_which_trials_continue_does_not_depend_on_who_came_first(points, chance):
    first, second = SuccessiveHalving(["max", "min"], 9), SuccessiveHalving(["max", "min"], 9)
    numbers = list(range(len(points)))
    for number in numbers:
        first.add(number, 1, points[number])
    chance.shuffle(numbers)
    for number in numbers:
        second.add(number, 1, points[number])
    assert first.continuing == second.continuing


def test_trials_whose_results_are_not_finite_are_stopped_even_among_themselves():
    halving = SuccessiveHalving(["max"], 9)
    for number in range(6):
        halving.add(number, 1, [math.nan])
    assert halving.promotable(range(6)) == []


def test_a_trial_whose_result_is_not_finite_is_stopped_even_alone():
    halving = SuccessiveHalving(["max", "min"], 9)
    for number, top1 in enumerate([math.nan, 0.1, math.inf, -math.inf]):
        halving.add(number, 1, (top1, 1.0))
        assert halving.may_continue(number) == math.isfinite(top1)


def test_a_stopped_trial_may_continue_once_the_rung_has_grown():
    halving = SuccessiveHalving(["max"], 9)
    for number, top1 in enumerate([0.9, 0.5, 0.8, 0.1, 0.2]):
        halving.add(number, 1, [top1])
    assert halving.promotable([1, 2, 3, 4]) == []
    halving.add(5, 1, [0.3])  # the better two of six continue
    assert halving.promotable([1, 2, 3, 4, 5]) == [2]
    halving.add(0, 3, [0.9])
    halving.add(6, 3, [0.95])
    halving.add(0, 1, [0.0])  # a result that is sent again changes nothing
    assert halving.promotable([0, 2, 6]) == [6, 2]  # the highest rung first
    assert len(halving.rungs[1]) == 6


@settings(deadline=None)
@given(st.data())
def test_rungs_that_are_rebuilt_decide_as_those_that_never_stopped(data):
    """Results arrive in any order, with ties; the rebuilt rungs get them in the order of the trials' numbers."""
    epochs = data.draw(st.integers(1, 30))
    sent = {number: 0 for number in range(data.draw(st.integers(1, 8)))}
    costs = [data.draw(VALUES) for _ in sent]
    whole, curves = SuccessiveHalving(["max", "min"], epochs), {number: {} for number in sent}
    rebuilt = SuccessiveHalving(["max", "min"], epochs)
    for _ in range(data.draw(st.integers(0, 40))):
        number = data.draw(st.sampled_from([*sent]))
        sent[number] += 1
        value = curves[number].setdefault(sent[number], data.draw(VALUES))
        if data.draw(st.integers(0, 5)) == 0:  # the search stops and resumes
            rebuilt = SuccessiveHalving(["max", "min"], epochs)
            for each in sent:
                for epoch, top1 in curves[each].items():
                    if (each, epoch) != (number, sent[number]):
                        rebuilt.add(each, epoch, (top1, costs[each]))
            for epoch in range(1, sent[number]):  # a trial that resumes sends its earlier epochs again
                assert not rebuilt.add(number, epoch, (data.draw(VALUES), costs[number]))
        result = (number, sent[number], (value, costs[number]))
        assert rebuilt.add(*result) == whole.add(*result)
        assert [rebuilt.may_continue(n) for n in sent] == [whole.may_continue(n) for n in sent]
        assert rebuilt.promotable(sent) == whole.promotable(sent)


@pytest.mark.parametrize("bad", [{"modes": []}, {"modes": ["largest"]}, {"reduction_factor": 1.5}, {"max_t": 0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"max or min|reduction_factor must be at least 2"):
        SuccessiveHalving(**{"modes": ["max"], "max_t": 9} | bad)


# --- Ray Tune ----------------------------------------------------------------------------------------------------


def test_the_scheduler_stops_what_is_dominated_and_what_is_at_its_end():
    scheduler = MOASHAScheduler({"accuracy": "max", "cost": "min"}, max_t=9, time_attr="epoch")

    def decide(name, epoch, **metrics):
        return scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), {"epoch": epoch, **metrics})

    assert decide("a", 1, accuracy=0.5, cost=2.0) == TrialScheduler.CONTINUE
    assert decide("b", 1, accuracy=0.6, cost=3.0) == TrialScheduler.CONTINUE  # dearer, but more accurate
    assert decide("c", 1, accuracy=0.4, cost=2.5) == TrialScheduler.STOP
    assert decide("d", 1, accuracy=0.4) == TrialScheduler.CONTINUE  # a result without an objective does not count
    assert decide("a", 2, accuracy=0.0, cost=2.0) == TrialScheduler.CONTINUE  # between rungs
    assert decide("b", 9, accuracy=0.6, cost=3.0) == TrialScheduler.STOP
    scheduler.on_trial_complete(None, SimpleNamespace(trial_id="e"), {"epoch": 1, "accuracy": 1.0, "cost": 1.0})
    assert "4 at 1, 0 at 3" in scheduler.debug_string()


def test_the_module_can_be_copied_into_another_project():
    tree = ast.parse(Path(mo_asha.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names} == {
        "numpy",
        "ray.tune.schedulers",
    }
