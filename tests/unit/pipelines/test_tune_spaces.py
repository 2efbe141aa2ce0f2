"""Every space: a hundred random members can be built, and what cannot is refused in words."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from posmlp import create_model
from posmlp.config import RecipeError, load_recipe
from posmlp.errors import UserError
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
        config = space.recipe(base, member)
        with torch.device("meta"):
            model = create_model(config.model.name, **config.model.overrides())
        if recipe == "demo" and number < 3:
            model = create_model(config.model.name, **config.model.overrides()).eval()
            size = config.model.variant().image_size
            with torch.no_grad():
                assert model(torch.zeros(1, 3, 8, size, size)).shape == (1, 400)
        changed = {key for key, value in config.flat().items() if own[key] != value}
        assert changed <= set(space.keys(member))


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
    with pytest.raises(UserError, match=r"no space 'depth' \(did you mean 'depths'\?\); known: block_types, depths"):
        load_space("depth", load_recipe("demo"))
    with pytest.raises(UserError, match=r"space own\.py: no such file"):
        load_space("own.py", load_recipe("demo"))


def test_spaces_need_neither_ray_nor_mlflow():
    code = "import sys; from posmlp.config import load_recipe; import tune_spaces as t; "
    code += "[t.load_space(n, load_recipe('demo')) for n in t.list_spaces()]; "
    code += "assert not {'ray', 'mlflow', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
