"""Architectures as plain data: what is chosen, drawn and refused, as literals."""

import pytest

from posmlp.errors import UserError
from posmlp.model.spec import (
    Architecture,
    Choices,
    Variant,
    block_units,
    list_models,
    model_variant,
    parse_choices,
    suggest,
    unit_window,
)

ANY = "s8, s16, s32, b8, b16, b32, l8, l16, l32"
CHOICES = Choices(
    blocks=(("parallel", "joint", "spatial"),) * 4,
    groups=((4, 8), (8,), (16, 8), (1, 2, 3)),
    depths=((1, 2, 3, 4),) * 4,
)


def test_a_unit_has_the_window_of_the_axes_that_it_mixes():
    windows = {kind: unit_window(kind, (4, 3, 2)) for kind in ("temporal", "spatial", "joint")}
    assert windows == {"temporal": (4, 1, 1), "spatial": (1, 3, 2), "joint": (4, 3, 2)}


def test_the_units_of_a_block_are_in_the_order_of_its_steps():
    assert block_units("cascade_ts") == ("temporal", "spatial")
    assert block_units("cascade_st") == ("spatial", "temporal")
    assert block_units("parallel") == ("spatial", "temporal")
    assert block_units("joint") == ("joint",)


def test_the_names_of_the_models():
    assert list_models() == ["tiny", "s", "b", "l", *ANY.split(", ")]
    assert [model_variant(name).frames for name in ("s", "s8", "b16", "l32", "tiny")] == [16, 8, 16, 32, 4]
    assert model_variant("b32").dims == model_variant("b").dims == (96, 192, 384, 768)


def test_overrides_become_plain_tuples():
    variant = model_variant("tiny", blocks="joint", depths=[1, 1, 2, 1], windows=[8, 4, 4, 2], num_classes=5)
    assert variant == Variant(
        dims=(16, 32, 48, 64),
        depths=(1, 1, 2, 1),
        groups=(4, 8, 8, 16),
        windows=(8, 4, 4, 2),
        blocks=("joint",) * 4,
        frames=4,
        image_size=64,
        num_classes=5,
        init="scaled",
    )
    assert variant.architecture() == Architecture(("joint",) * 4, (4, 8, 8, 16), (1, 1, 2, 1))
    assert model_variant("tiny", choices={"depths": [[1], (2, 1), [], []]}).choices == Choices(
        depths=((1,), (2, 1), (), ())
    )
    assert model_variant("tiny", choices=Choices()).choices == Choices()


def test_choices_that_a_stage_does_not_have_are_the_models_own():
    own = Architecture(("joint", "spatial", "parallel", "joint"), (1, 2, 3, 4), (5, 6, 7, 8))
    choices = Choices(
        blocks=(("spatial", "parallel"), (), (), ()), groups=((), (16,), (), ()), depths=((), (), (9, 1), ())
    )
    assert choices.with_defaults(own) == Choices(
        blocks=(("spatial", "parallel"), ("spatial",), ("parallel",), ("joint",)),
        groups=((1,), (16,), (3,), (4,)),
        depths=((5,), (6,), (9, 1), (8,)),
    )


def test_choices_contain_an_architecture_if_every_stage_does():
    inside = {"blocks": ("joint", "parallel", "joint", "spatial"), "groups": (4, 8, 8, 3), "depths": (1, 4, 2, 3)}
    assert CHOICES.contains(Architecture(**inside))
    for key, value in {"blocks": "cascade_ts", "groups": 5, "depths": 5}.items():
        for stage in range(4):
            changed = (*inside[key][:stage], value, *inside[key][stage + 1 :])
            assert not CHOICES.contains(Architecture(**inside | {key: changed}))


WHOLE = "must be positive whole numbers"
WINDOW = "must be a positive number, (h, w) or (t, h, w)"


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        ({"dims": 3}, ["dims 3 must be a list or tuple with an entry for each of 4 stages"]),
        ({"dims": (16, 32)}, ["dims (16, 32) has 2 entries, expected one for each of 4 stages"]),
        ({"dims": (16, 0, 48, 64)}, [f"dims (16, 0, 48, 64) {WHOLE}"]),
        ({"depths": (1, 1.5, 1, 1)}, [f"depths (1, 1.5, 1, 1) {WHOLE}"]),
        ({"groups": (4, 8, 8, -1)}, [f"groups (4, 8, 8, -1) {WHOLE}"]),
        ({"windows": (8, (1,), (0, 2), 2)}, [f"window (1,) {WINDOW}", f"window (0, 2) {WINDOW}"]),
        ({"windows": (8, 4, 4, (2, 2, 2, 2))}, [f"window (2, 2, 2, 2) {WINDOW}"]),
        ({"windows": (8, 4, 0, (1, 1.5))}, [f"window 0 {WINDOW}", f"window (1, 1.5) {WINDOW}"]),
        (
            {"blocks": ("joint", "paralel", "joint", "zzz")},
            ["unknown block type 'paralel' (did you mean 'parallel'?)", "unknown block type 'zzz'"],
        ),
        (
            {"frames": 0, "image_size": 2.5, "num_classes": -1},
            [f"{text} must be a positive whole number" for text in ("frames 0", "image_size 2.5", "num_classes -1")],
        ),
        (
            {"drop_path": 1, "dropout": -0.1},
            [f"{text} must be at least 0 and less than 1" for text in ("drop_path 1", "dropout -0.1")],
        ),
        ({"drop_path": "x"}, ["drop_path 'x' must be at least 0 and less than 1"]),
        (
            {"dims": (15, 33, 48, 64), "groups": (5, 8, 8, 16)},
            [
                "stage 2: 33 channels are not divisible by 8 groups",
                "stage 1: 15 channels must be even, as the stem starts with half of them",
            ],
        ),
        (
            {"choices": {"blocks": [["joint"], [], [], []]}},
            ["stage 1: the model's own blocks 'parallel' is not in ('joint',)"],
        ),
        (
            {"choices": {"groups": [[4, 3], [8], [8], [16, 7]]}},
            [
                "stage 1: 16 channels are not divisible by 3 groups",
                "stage 4: 64 channels are not divisible by 7 groups",
            ],
        ),
        (
            {"choices": {"depths": [[1], [2]], "groups": [[4]]}},
            [
                "choices of groups have 1 entries, expected one for each of 4 stages",
                "choices of depths have 2 entries, expected one for each of 4 stages",
            ],
        ),
        (
            {"choices": {"depths": [[1, 0], [2, 0], [], []]}},
            [f"depths (0, 2, 1, 1) {WHOLE}", f"depths (1, 0, 1, 1) {WHOLE}"],
        ),
        (
            {"choices": {"depth": 1, "width": 2}},
            ["choices of ['depth', 'width'] are not known; known: ['blocks', 'groups', 'depths']"],
        ),
        (
            {"dims": (16, 33, 48, 64), "choices": {}},
            ["stage 2: 33 channels are not divisible by 8 groups"],
        ),
        ({"choices": {"depths": [1, 2, 3, 4]}}, ["choices of depths [1, 2, 3, 4] must be one list per stage"]),
        ({"choices": {"depths": "abc"}}, ["choices of depths 'abc' must be one list per stage"]),
    ],
)
def test_every_problem_of_a_model_is_listed_once(overrides, problems):
    with pytest.raises(UserError) as error:
        model_variant("tiny", **overrides)
    assert str(error.value) == "model 'tiny' cannot be built: " + "; ".join(problems)


def test_the_limits_are_allowed():
    ones = model_variant("tiny", depths=(1,) * 4, groups=(1,) * 4, windows=(1, (1, 1), (1, 1, 1), 1), dims=(2, 1, 1, 1))
    assert ones.full_windows() == [(4, 1, 1), (4, 1, 1), (1, 1, 1), (4, 1, 1)]
    assert model_variant("tiny", frames=1, image_size=1, num_classes=1, drop_path=0, dropout=0.99).num_classes == 1
    assert parse_choices("tiny", {}) == Choices()


def test_unknown_names_are_answered_with_a_likely_one():
    known = f"known: tiny, s, b, l, {ANY}"
    keys = "dims, depths, groups, windows, blocks, frames, image_size, num_classes, drop_path, dropout, "
    keys += "stage4_stride, init, choices"
    with pytest.raises(UserError) as error:
        model_variant("s61")
    assert str(error.value) == f"unknown model 's61' (did you mean 's16'?); {known}"
    with pytest.raises(UserError) as error:
        model_variant("xyzzy")
    assert str(error.value) == f"unknown model 'xyzzy'; {known}"
    with pytest.raises(UserError) as error:
        model_variant("tiny", dephts=[1], frames=4, zzz=1)
    hints = "'dephts' (did you mean 'depths'?), 'zzz'"
    assert str(error.value) == f"unknown model override {hints}; known: {keys}"
    assert suggest("imagesize", ["frames", "image_size", "image_sizes"]) == " (did you mean 'image_size'?)"
    assert suggest("zzz", {"frames": 1}) == ""
