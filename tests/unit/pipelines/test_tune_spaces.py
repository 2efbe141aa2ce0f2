"""Every space: a hundred random members can be built, and what cannot is refused in words."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from posmlp import create_model
from posmlp.config import RecipeError, load_recipe
from posmlp.errors import UserError
from posmlp.learn.learner import Learner
from posmlp.model.cost import count_macs
from posmlp.model.spec import BLOCKS
from tests.helpers.batches import make_batch
from tune_spaces import Range, Space, draw_value, list_spaces, load_space
from tune_spaces.depths import depth_values

MEMBERS = 100


@pytest.mark.parametrize("recipe", ["demo", "small_data", "ssv1_s16"])
@pytest.mark.parametrize("name", list_spaces())
def test_a_hundred_members_are_built(name, recipe):
    base = load_recipe(recipe)
    own, space = base.flat(), load_space(name, base)
    rng = np.random.default_rng(0)
    for number in range(MEMBERS):
        member = space.random(rng)
        while name == "ablation" and repeats_another(member):
            member = space.random(rng)
        config = space.recipe(base, member)
        with torch.device("meta"):
            model = create_model(config.model.name, **config.model.overrides())
        if recipe == "demo" and number < 3:
            model = create_model(config.model.name, **config.model.overrides()).eval()
            frames, size = config.model.variant().frames, config.model.variant().image_size
            with torch.no_grad():
                assert model(torch.zeros(1, 3, frames, size, size)).shape == (1, 400)
        changed = {key for key, value in config.flat().items() if own[key] != value}
        assert changed <= set(space.keys(member))


def repeats_another(member):
    """Whether a member of the space ``ablation`` is the same model as one with a window of the recipe's size."""
    temporal = member["block"] == "spatial" and member["temporal_window"] != 1
    return temporal or (member["block"] == "temporal" and member["spatial_window"] != 1)


@pytest.mark.parametrize(
    ("recipe", "members", "group_scales"), [("demo", 336, (0.25, 0.5, 1, 2)), ("ssv1_s16", 252, (0.25, 0.5, 1))]
)
def test_all_members_of_the_ablation(recipe, members, group_scales):
    """Each is a model of its own, has one block type, and scales the recipe's groups, windows and clip."""
    base = load_recipe(recipe)
    own, space = base.model.variant(), load_space("ablation", base)
    assert space.dimensions["block"] == tuple(BLOCKS)
    assert space.dimensions["group_scale"] == group_scales
    seen, costs = set(), {}
    for values in itertools.product(*space.dimensions.values()):
        member = dict(zip(space.dimensions, values, strict=True))
        if repeats_another(member):
            with pytest.raises(RecipeError, match=r"(temporal|spatial)_window 0\.\d+: \w+ blocks mix nothing along it"):
                space.recipe(base, member)
            continue
        variant = space.recipe(base, member).model.variant()
        assert variant.blocks == (member["block"],) * 4 and variant.frames == member["frames"]
        assert variant.groups == tuple(member["group_scale"] * n for n in own.groups)
        for (t, h, w), side in zip(variant.full_windows(), own.windows, strict=True):
            assert t == member["temporal_window"] * variant.frames
            assert h == w == math.ceil(member["spatial_window"] * side)
        with torch.device("meta"):
            create_model(base.model.name, **space.recipe(base, member).model.overrides())
        seen.add(variant)
        costs[values] = count_macs(variant)
    assert len(seen) == members
    for (*others, frames), macs in costs.items():  # a clip of half the length costs half as much, or less
        if frames == own.frames:
            assert costs[(*others, frames // 2)] <= 0.5 * macs + own.dims[-1] * own.num_classes
    unchanged = {"block": own.blocks[0], "group_scale": 1.0, "spatial_window": 1.0, "temporal_window": 1.0}
    variant = space.recipe(base, unchanged | {"frames": own.frames}).model.variant()
    assert replace(variant, windows=own.windows) == own and variant.full_windows() == own.full_windows()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_member_of_the_ablation_trains_with_its_clip_length(block):
    space = load_space("ablation", load_recipe("demo"))
    small = load_recipe(
        "demo", ["model.image_size=32", "model.num_classes=8", "train.global_batch=8", "optim.warmup_epochs=0"]
    )
    halved = {
        "temporal_window": 1.0 if block == "spatial" else 0.5,
        "spatial_window": 1.0 if block == "temporal" else 0.5,
    }
    config = space.recipe(small, {"block": block, "group_scale": 0.25, "frames": 4} | halved)
    model = create_model(config.model.name, **config.model.overrides())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "table" in name}
    Learner(model, config, steps_per_epoch=5).train_step(make_batch())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_factors_of_the_ablation_give_whole_groups():
    """Half of 3 groups is no number of groups, although it divides 72 channels."""
    base = load_recipe("ssv1_s16", ["model.groups=[3, 6, 12, 24]"])
    assert 0.5 not in load_space("ablation", base).dimensions["group_scale"]


def test_windows_of_less_than_a_frame_are_refused():
    base = load_recipe("demo", ["model.frames=4"])
    member = {"block": "joint", "group_scale": 1.0, "spatial_window": 1.0, "temporal_window": 0.25, "frames": 2}
    with pytest.raises(RecipeError, match=r"temporal_window 0\.25 of 2 frames is less than a frame"):
        load_space("ablation", base).recipe(base, member)


@pytest.mark.parametrize("recipe", ["demo", "ssv1_s16"])
def test_the_recipes_own_model_is_in_the_spaces_of_architectures(recipe):
    own = load_recipe(recipe).model.variant()
    dimensions = {name: load_space(name, load_recipe(recipe)).dimensions for name in list_spaces()}
    for stage in range(4):
        assert own.depths[stage] in dimensions["depths"][f"depth{stage + 1}"]
        assert own.blocks[stage] in dimensions["block_types"][f"block{stage + 1}"]
        divide = {g for g in (1, 2, 4, 8, 16, 32, 64) if own.dims[stage] % g == 0}
        assert set(dimensions["group_counts"][f"groups{stage + 1}"]) == divide
        assert own.groups[stage] in divide
    space = load_space("widths", load_recipe(recipe))
    assert space.recipe(load_recipe(recipe), {"width": 1.0}).model.variant().dims == own.dims


@pytest.mark.parametrize("depth", range(1, 22))
def test_depths_go_from_one_to_twice_the_depth(depth):
    values = depth_values(depth)
    assert values[0] == 1 and values[-1] == max(3, 2 * depth) and depth in values
    assert len(values) <= 5 and list(values) == sorted(set(values))


def test_ranges_are_drawn_evenly_or_evenly_over_decades():
    rng = np.random.default_rng(0)
    even = [draw_value(Range(2.0, 6.0), rng) for _ in range(4000)]
    assert min(even) >= 2 and max(even) <= 6
    assert np.mean(even) == pytest.approx(4, abs=0.1)
    decades = [math.log10(draw_value(Range(1e-4, 1e-1, log=True), rng)) for _ in range(4000)]
    assert min(decades) >= -4 and max(decades) <= -1
    assert np.mean(decades) == pytest.approx(-2.5, abs=0.08)
    assert np.std(decades) == pytest.approx(3 / math.sqrt(12), abs=0.05)


@pytest.mark.parametrize("bad", [(1.0, 1.0, False), (2.0, 1.0, False), (0.0, 1.0, True)])
def test_an_impossible_range_is_refused(bad):
    with pytest.raises(UserError, match="low must be less than high"):
        Range(*bad)


OWN = """
from tune_spaces import Range, Space


def space(base):
    return Space({"groups": (4, 5), "lr": Range(1e-4, 1e-2, log=True)},
                 lambda m: {"model.groups": [m["groups"]] * 4, "optim.lr": m["lr"]})
"""


def test_a_space_of_ones_own_is_one_file(tmp_path):
    base = load_recipe("demo")
    (tmp_path / "own.py").write_text(OWN)
    space = load_space(str(tmp_path / "own.py"), base)
    config = space.recipe(base, {"groups": 4, "lr": 1e-3})
    assert config.model.groups == (4, 4, 4, 4) and config.optim.lr == 1e-3
    with pytest.raises(RecipeError, match="stage 1: 16 channels are not divisible by 5 groups"):
        space.recipe(base, {"groups": 5, "lr": 1e-3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("x = 1", "has no function space"),
        ("raise SystemExit", "cannot be imported: SystemExit"),
        ("def space(base): return base.nothing", r"space\(base\) failed: AttributeError"),
        ("def space(): pass", r"space\(base\) failed: TypeError"),
        (
            "from tune_spaces import Space\ndef space(base): return Space({'a': [1]}, dict)",
            r"dimension a: \[1\] must be",
        ),
        ("import tune_spaces as t\ndef space(base): return t.Space({'a': ()}, dict)", r"dimension a: \(\) must be"),
        ("def space(base): return {}", "must return a tune_spaces.Space with at least one dimension"),
    ],
)
def test_a_file_that_is_no_space_is_refused(tmp_path, text, message):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_space(str(tmp_path / "own.py"), load_recipe("demo"))


def test_keys_that_fail_are_the_spaces_fault():
    base = load_recipe("demo")
    with pytest.raises(UserError, match=r"the space's keys\(\{'a': 1\}\) failed: KeyError: 'b'"):
        Space({"a": (1, 2)}, lambda m: {"optim.lr": m["b"]}).recipe(base, {"a": 1})
    with pytest.raises(RecipeError, match=r"optim\.lrr: unknown key"):
        Space({"a": (1, 2)}, lambda m: {"optim.lrr": m["a"]}).recipe(base, {"a": 1})


def test_an_unknown_space_is_refused():
    with pytest.raises(UserError, match=r"no space 'depth' \(did you mean 'depths'\?\); known: ablation, block_types"):
        load_space("depth", load_recipe("demo"))
    with pytest.raises(UserError, match=r"space own\.py: no such file"):
        load_space("own.py", load_recipe("demo"))


def test_spaces_need_neither_ray_nor_mlflow():
    code = "import sys; from posmlp.config import load_recipe; import tune_spaces as t; "
    code += "[t.load_space(n, load_recipe('demo')) for n in t.list_spaces()]; "
    code += "assert not {'ray', 'mlflow', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_space_that_lists_its_members_has_these_alone():
    members = ({"a": 1, "b": "x"}, {"a": 2, "b": "y"})
    listed = Space({"a": (1, 2), "b": ("x", "y")}, dict, members)
    assert list(listed.all_members()) == list(members)
    rng = np.random.default_rng(0)
    drawn = [listed.random(rng) for _ in range(50)]
    assert all(member in members for member in drawn) and all(member in drawn for member in members)
    assert len(list(replace(listed, members=None).all_members())) == 4


@pytest.mark.parametrize("member", [{"a": 1}, {"a": 3, "b": "x"}, {"a": 1, "b": "x", "c": 0}])
def test_a_listed_member_without_a_value_of_each_dimension_is_refused(member):
    with pytest.raises(UserError, match="must have one of the values of each dimension, and no Range"):
        Space({"a": (1, 2), "b": ("x", "y")}, dict, (member,))
    with pytest.raises(UserError, match="no Range"):
        Space({"a": Range(0, 1)}, dict, ({"a": 0.5},))
