"""Frame mAP: equal to an implementation in plain loops on random cases, and to values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from posmlp.detection.frame_map import FrameMap, Scored, Truth, frame_map
from tests.helpers.plain_map import plain_map

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def truth_of(*entries):
    """Ground truth of (key, box, action)."""
    keys, boxes, actions = zip(*entries, strict=True) if entries else ((), (), ())
    return Truth(np.array(keys, np.int64), np.array(boxes, np.float32).reshape(-1, 4), np.array(actions, np.int64))


def scored_of(*entries, classes=1):
    """Scored boxes of (key, box, scores)."""
    keys, boxes, scores = zip(*entries, strict=True) if entries else ((), (), ())
    scores = np.array(scores, np.float32).reshape(-1, classes)
    return Scored(np.array(keys, np.int64), np.array(boxes, np.float32).reshape(-1, 4), scores)


@st.composite
def cases(draw):
    """Few positions and scores, so that equal scores, equal overlaps and an IoU of exactly 0.5 are frequent."""
    classes = draw(st.integers(1, 4))
    key, edge = st.integers(-1, 2), st.integers(0, 3)
    corner = st.tuples(edge, edge)
    anywhere = st.builds(lambda a, b: (*a, *b), corner, corner)  # also empty and inverted
    whole = st.builds(lambda a, w, h: (*a, a[0] + w, a[1] + h), corner, st.integers(1, 3), st.integers(1, 3))
    score = st.sampled_from([-math.inf, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0, math.nan])
    truth = draw(st.lists(st.tuples(key, whole, st.integers(0, classes - 1)), max_size=12))
    scored = draw(st.lists(st.tuples(key, whole | anywhere, st.tuples(*[score] * classes)), max_size=12))
    evaluated = draw(st.none() | st.lists(st.integers(0, classes - 1), max_size=classes))
    return truth_of(*truth), scored_of(*scored, classes=classes), classes, evaluated


@given(cases(), st.none() | st.integers(1, 8), st.booleans())
@example((truth_of(), scored_of(), 1, None), 50, True)
def test_equals_the_rule_in_plain_loops(case, most, by_score):
    truth, scored, classes, evaluated = case
    found = frame_map(truth, scored, classes, evaluated, most=most, by_score=by_score)
    expected = plain_map(truth, scored, classes, evaluated, most, by_score)
    assert found.average_precision.dtype == np.float64
    np.testing.assert_allclose(found.average_precision, expected, rtol=1e-12, atol=1e-15)
    known = [value for value in expected if not math.isnan(value)]
    assert found.map == pytest.approx(sum(known) / len(known) if known else math.nan, nan_ok=True)


def test_equals_the_rule_in_plain_loops_with_many_boxes():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.6, (300, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.1, 0.4, (300, 2))], 1).astype(np.float32)
    truth = Truth(rng.integers(0, 12, 400), boxes[rng.integers(0, 300, 400)], rng.integers(0, 20, 400))
    moved = (boxes + rng.normal(0, 0.02, boxes.shape)).astype(np.float32)
    scored = Scored(rng.integers(0, 12, 300), moved, rng.random((300, 20), np.float32))
    for most, by_score in ((50, True), (None, True), (None, False)):
        found = frame_map(truth, scored, 20, most=most, by_score=by_score)
        np.testing.assert_allclose(
            found.average_precision, plain_map(truth, scored, 20, None, most, by_score), rtol=1e-12
        )


@given(cases(), st.randoms())
def test_does_not_depend_on_the_order_of_key_frames(case, random):
    truth, scored, classes, evaluated = case
    places = {key: random.random() for key in range(-1, 3)}
    order = np.array(sorted(range(len(scored.key)), key=lambda n: places[int(scored.key[n])]), np.int64)
    shuffled = Scored(scored.key[order], scored.boxes[order], scored.scores[order])
    expected = frame_map(truth, scored, classes, evaluated).average_precision
    np.testing.assert_array_equal(frame_map(truth, shuffled, classes, evaluated).average_precision, expected)


# By hand --------------------------------------------------------------------------------------------------------------


def test_area_under_the_envelope():
    # by falling score: wrong, right, right, wrong, right; precision 1/2, 2/3 and 3/5 where recall rises
    truth = truth_of(*[(key, LEFT, 0) for key in (1, 2, 4)])
    scored = scored_of(*[(key, LEFT, [0.9 - key / 10]) for key in range(5)])
    assert frame_map(truth, scored, 1).map == pytest.approx((2 / 3 + 2 / 3 + 3 / 5) / 3)
    more = truth_of(*[(key, LEFT, 0) for key in (1, 2, 4, 8)])  # a fourth box that nothing finds
    assert frame_map(more, scored, 1).map == pytest.approx((2 / 3 + 2 / 3 + 3 / 5) / 4)


def test_duplicates_and_the_order_of_matching():
    # the lower score comes first in the list: by score it is the duplicate, in the list's order the other one is
    truth = truth_of((0, LEFT, 0))
    scored = scored_of((0, LEFT, [0.2]), (0, LEFT, [0.9]))
    assert frame_map(truth, scored, 1).map == 1
    assert frame_map(truth, scored, 1, most=None, by_score=False).map == 1 / 2
    swapped = scored_of((0, LEFT, [0.9]), (0, LEFT, [0.2]))
    assert frame_map(truth, swapped, 1, most=None, by_score=False).map == 1


def test_a_key_frame_keeps_fifty_labelled_boxes():
    # of 51 boxes, the right one has the lowest score
    truth = truth_of((0, LEFT, 0))
    scored = scored_of(*[(0, RIGHT, [0.5 + n / 1000]) for n in range(50)], (0, LEFT, [0.1]))
    assert frame_map(truth, scored, 1).map == 0
    assert frame_map(truth, scored, 1, most=51).map == pytest.approx(1 / 51)
    assert frame_map(truth, scored, 1, most=None).map == pytest.approx(1 / 51)
    elsewhere = scored_of(*[(1, RIGHT, [0.5 + n / 1000]) for n in range(50)], (0, LEFT, [0.1]))
    assert frame_map(truth, elsewhere, 1).map == pytest.approx(1 / 51)  # each key frame has its own fifty


def test_sorting_and_the_limit_each_change_the_result():
    truth = truth_of((0, LEFT, 0), (0, RIGHT, 1))
    scored = scored_of((0, LEFT, [0.3, 0.7]), (0, LEFT, [0.9, 0.1]), (0, RIGHT, [0.2, 0.6]), classes=2)
    # class 0: 0.9 right, 0.3 a duplicate; class 1: 0.7 wrong, 0.6 right
    assert frame_map(truth, scored, 2).average_precision.tolist() == [1, 1 / 2]
    # class 0: 0.3 is right, after 0.9
    assert frame_map(truth, scored, 2, by_score=False).average_precision.tolist() == [1 / 2, 1 / 2]
    # 0.9 and 0.7 remain
    assert frame_map(truth, scored, 2, most=2).average_precision.tolist() == [1, 0]


def test_classes_that_are_not_evaluated_take_no_place():
    truth = truth_of((0, LEFT, 0), (0, LEFT, 1))
    scored = scored_of((0, LEFT, [0.9, 0.1]), classes=2)
    np.testing.assert_array_equal(frame_map(truth, scored, 2, most=1).average_precision, [1, 0])
    np.testing.assert_array_equal(frame_map(truth, scored, 2, [1], most=1).average_precision, [np.nan, 1])
    assert math.isnan(frame_map(truth, scored, 2, []).map)


def test_no_second_choice():
    # both boxes overlap the first truth box most, and the second by 2/3
    near = (0.0, 0.0, 0.5, 0.75)
    truth = truth_of((0, LEFT, 0), (0, (0.0, 0.0, 0.5, 0.5), 0))
    scored = scored_of((0, near, [0.9]), (0, near, [0.8]))
    assert frame_map(truth, scored, 1).map == 1 / 2


@pytest.mark.parametrize(("right", "expected"), [(0.25, 1), (0.2499, 0)])
def test_half_an_overlap_counts(right, expected):
    assert frame_map(truth_of((0, LEFT, 0)), scored_of((0, (0.0, 0.0, right, 1.0), [0.9])), 1).map == expected


def test_equal_overlaps_go_to_the_first_truth_box():
    # the box over both overlaps each by 2/3 and takes the first, which the other box may need
    left, right, both = (0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0), (0.0, 0.0, 0.75, 1.0)
    scored = scored_of((0, both, [0.9]), (0, left, [0.8]))
    assert frame_map(truth_of((0, left, 0), (0, right, 0)), scored, 1).map == 1 / 2
    assert frame_map(truth_of((0, right, 0), (0, left, 0)), scored, 1).map == 1


def test_equal_scores_go_by_key_then_by_order():
    truth = truth_of((1, LEFT, 0))
    wrong, right = (0, LEFT, [0.5]), (1, LEFT, [0.5])
    assert frame_map(truth, scored_of(right, wrong), 1).map == 1 / 2
    truth = truth_of((0, LEFT, 0))
    assert frame_map(truth, scored_of((0, RIGHT, [0.5]), (0, LEFT, [0.5])), 1).map == 1 / 2
    assert frame_map(truth, scored_of((0, LEFT, [0.5]), (0, RIGHT, [0.5])), 1).map == 1
    assert frame_map(truth, scored_of((0, RIGHT, [0.5]), (0, LEFT, [0.5])), 1, most=1).map == 0


def test_empty_boxes_are_no_mistakes_but_take_a_place():
    truth = truth_of((0, LEFT, 0))
    scored = scored_of((0, (0.3, 0.0, 0.3, 1.0), [0.9]), (0, (0.3, 0.9, 0.4, 0.1), [0.8]), (0, LEFT, [0.7]))
    assert frame_map(truth, scored, 1).map == 1
    assert frame_map(truth, scored, 1, most=2).map == 0


def test_classes_without_ground_truth_or_boxes():
    truth = truth_of((0, LEFT, 0), (0, LEFT, 2))
    scored = scored_of((0, LEFT, [0.9, 0.8, -np.inf]), (0, RIGHT, [0.1, 0.8, 0.0]), classes=3)
    found = frame_map(truth, scored, 3)
    np.testing.assert_array_equal(found.average_precision, [1, np.nan, 1 / 2])
    assert found.map == 0.75
    assert found.mean_of([1, 2]) == 0.5
    assert math.isnan(found.mean_of([1]))
    nothing = frame_map(truth, scored_of(classes=3), 3)
    np.testing.assert_array_equal(nothing.average_precision, [0, np.nan, 0])
    assert nothing.map == 0
    assert math.isnan(frame_map(truth_of(), scored, 3).map)
    assert math.isnan(FrameMap(np.array([])).map)


def test_boxes_of_key_frames_without_ground_truth_are_mistakes():
    truth = truth_of((7, LEFT, 0))
    assert frame_map(truth, scored_of((3, LEFT, [0.9]), (7, LEFT, [0.8])), 1).map == 1 / 2


def test_nan_ranks_last():
    truth = truth_of((0, LEFT, 0))
    assert frame_map(truth, scored_of((0, LEFT, [np.nan]), (1, LEFT, [-5.0])), 1).map == 1 / 2


def test_refuses_other_numbers_of_classes():
    truth, scored = truth_of((0, LEFT, 2)), scored_of((0, LEFT, [1, 1, 1]), classes=3)
    with pytest.raises(ValueError, match=r"scores are \(1, 3\), expected \(1, 2\)"):
        frame_map(truth, scored, 2)
    with pytest.raises(ValueError, match="class of the ground truth"):
        frame_map(truth_of((0, LEFT, 3)), scored, 3)
    with pytest.raises(ValueError, match="evaluated class"):
        frame_map(truth, scored, 3, [3])
