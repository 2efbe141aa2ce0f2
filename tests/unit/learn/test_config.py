"""Recipes: valid ones are read, invalid ones are refused with a clear message, renamed keys keep working."""

import json
import logging
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

import posmlp
from pipelines.training.preflight import changed_keys
from posmlp.config import (
    RECIPES,
    RENAMED_KEYS,
    Config,
    RecipeError,
    current_keys,
    flatten,
    load_recipe,
    set_value,
    warn_renamed,
)

RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_shipped_recipes_are_valid_and_round_trip(name, tmp_path):
    config = load_recipe(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_recipe(copy) == config


def test_overrides_set_nested_keys_and_parse_as_yaml():
    config = load_recipe(
        "demo", ["train.epochs=7", "data.train.where={group: A}", "model.windows=[8, [4, 4], [2, 4, 4], 2]", "name=x-1"]
    )
    assert config.train.epochs == 7
    assert config.data.train.where == {"group": "A"}
    assert config.model.variant().full_windows() == [(8, 8, 8), (8, 4, 4), (2, 4, 4), (8, 2, 2)]
    assert config.flat()["data.train.where.group"] == "A"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epoch=3", ["train.epoch: unknown key", "did you mean 'epochs'"]),
        ("trian.epochs=3", ["trian: unknown key", "did you mean 'train'"]),
        ("train.epochs=many", ["train.epochs", "valid integer", "'many'"]),
        ("optim.lr=-1", ["optim.lr", "greater than 0", "-1"]),
        ("model.name=s61", ["unknown model 's61'", "did you mean 's16'"]),
        ("model.dims=[16, 33, 48, 64]", ["stage 2: 33 channels do not divide by 8 groups"]),
        ("model.blocks=paralel", ["unknown block type 'paralel'", "did you mean 'parallel'"]),
        ("scaling.workers=3", ["train.global_batch", "scaling.workers 3"]),
        ("data.crop_scale=[1.0, 0.5]", ["data.crop_scale (1.0, 0.5)"]),
        ("optim.warmup_epochs=1000", ["optim.warmup_epochs 1000", "train.epochs"]),
        ("name=../elsewhere", ["name", "'../elsewhere'"]),
        ("epochs", ["'epochs'", "section.key=value"]),
        ("train.epochs.x=3", ["'epochs' is a value"]),
        ("train.epochs=[", ["not YAML"]),
    ],
)
def test_wrong_overrides_are_refused_with_key_and_value(override, expected):
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", [override])
    for part in expected:
        assert part in str(error.value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", ["train.epochs=x", "optim.lr=y", "data.tran=3"])
    assert all(key in str(error.value) for key in ("train.epochs", "optim.lr", "data.tran"))


def test_full_frames_have_one_crop():
    with pytest.raises(RecipeError, match=r"data\.full_frame .* eval\.crops 3"):
        load_recipe("demo", ["data.full_frame=true", "eval.crops=3"])


def test_a_missing_recipe_names_the_known_ones():
    with pytest.raises(RecipeError, match="demo"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "", "name: [unclosed"])
def test_files_that_are_not_a_recipe_are_refused(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(path)


def test_yaml_cannot_build_objects(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)


def test_sections_are_frozen():
    config = load_recipe("demo")
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3
    assert yaml.safe_load(config.to_yaml())["train"]["epochs"] == config.train.epochs


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch {0}']", "!!python/name:os.system"])
def test_yaml_runs_no_code(tmp_path, tag):
    made, path = tmp_path / "made", tmp_path / "recipe.yaml"
    path.write_text(f"name: {tag.format(made)}\n")
    with pytest.raises(RecipeError, match=r"is not YAML: could not determine a constructor for the tag.*python"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="the value is not YAML"):
        load_recipe("demo", [f"name={tag.format(made)}"])
    assert not made.exists()


def test_a_password_in_a_path_is_refused_and_not_printed():
    places = ["train.storage", "model.weights", "data.train.path", "data.val.root", "data.classes", "data.cache_dir"]
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", [f"{key}=s3://me:hushhush@bucket/x" for key in places])
    assert all(f"{key} s3://bucket/x: leave user and password out" in str(caught.value) for key in places)
    assert "hushhush" not in str(caught.value)


# Renamed keys -------------------------------------------------------------------------------------------------------

OLD_VALUES = {"scaling.device_batch": 4, "data.whole": True}


def value_of(config, key):
    return config.flat()[key]


def demo_with(*pairs):
    """The demo's full recipe as plain data, as ``run.json`` has it, with keys replaced by others."""
    tree = load_recipe("demo").model_dump(mode="json")
    for old, new in RENAMED_KEYS.items():
        section, key = new.split(".")
        del tree[section][key]
        assert old in OLD_VALUES
    for name, value in pairs:
        section, key = name.split(".")
        tree[section][key] = value
    return tree


@pytest.fixture
def notices(caplog):
    """The notices so far, as if none had been given in this process."""
    warn_renamed.cache_clear()
    caplog.set_level(logging.INFO)
    yield lambda: [r.getMessage() for r in caplog.records if r.name == "posmlp.config" and r.levelname == "WARNING"]
    warn_renamed.cache_clear()


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_recipe_with_an_old_key_is_read(old, new, tmp_path, notices):
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(demo_with((old, OLD_VALUES[old]))))
    for _ in range(2):
        config = load_recipe(path)
        assert value_of(config, new) == OLD_VALUES[old]
    assert old not in config.to_yaml()
    assert notices() == [f"{old} is now called {new}; the old name is still read"]


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_override_of_an_old_key_is_read(old, new, notices):
    assert value_of(load_recipe("demo", [f"{old}={json.dumps(OLD_VALUES[old])}"]), new) == OLD_VALUES[old]
    assert notices() == [f"{old} is now called {new}; the old name is still read"]


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_stored_config_with_an_old_key_is_read(old, new, notices):
    """As run.json, checkpoint.json and study.json hold it, also where its value is the default."""
    assert value_of(Config.model_validate(demo_with((old, OLD_VALUES[old]))), new) == OLD_VALUES[old]
    default = value_of(load_recipe("demo"), new)
    assert Config.model_validate(demo_with((old, default))) == load_recipe("demo")
    assert len(notices()) == 1


def test_a_config_with_present_keys_gives_no_notice(notices):
    config = load_recipe("demo", ["scaling.micro_batch=4", "data.full_frame=true"])
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert Config.model_validate(config) == config
    assert notices() == []


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
@pytest.mark.parametrize("tree_has", ["old", "new"])
@pytest.mark.parametrize("override_has", ["old", "new"])
def test_an_override_replaces_the_value_under_either_name(old, new, tree_has, override_has, tmp_path):
    names = {"old": old, "new": new}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(demo_with((names[tree_has], OLD_VALUES[old]))))
    other = value_of(load_recipe("demo"), new)
    assert other != OLD_VALUES[old]
    assert value_of(load_recipe(path, [f"{names[override_has]}={json.dumps(other)}"]), new) == other
    stored = demo_with((names[tree_has], OLD_VALUES[old]))
    set_value(stored, names[override_has], other)
    assert value_of(Config.model_validate(stored), new) == other


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_both_names_at_once_are_refused(old, new, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(demo_with((old, OLD_VALUES[old]), (new, OLD_VALUES[old]), ("train.epochs", 0))))
    with pytest.raises(RecipeError, match=rf"{old}: this is the old name of {new}, which is given too") as error:
        load_recipe(path)
    assert "train.epochs" in str(error.value), "all problems at once"
    with pytest.raises(ValidationError):
        Config.model_validate(demo_with((old, OLD_VALUES[old]), (new, OLD_VALUES[old])))


def test_a_stored_config_with_old_keys_compares_equal():
    stored = demo_with(*OLD_VALUES.items())
    before = json.dumps(stored)
    config = load_recipe("demo", [f"{key}={json.dumps(value)}" for key, value in OLD_VALUES.items()])
    assert flatten(current_keys(stored)) == config.flat()
    assert json.dumps(stored) == before, "the record itself stays"


def test_a_run_with_old_keys_resumes_without_a_reported_change():
    stored = demo_with(*OLD_VALUES.items())
    config = load_recipe("demo", [f"{key}={json.dumps(value)}" for key, value in OLD_VALUES.items()])
    assert changed_keys({"config": stored, "lists": {}}, config, {}) == {}
    changed = changed_keys({"config": stored, "lists": {}}, load_recipe("demo"), {})
    assert set(changed) == {"data.full_frame"}, "scaling.* does not change the result"


@pytest.mark.parametrize("tree", [{}, {"scaling": None}, {"scaling": 3}, {3: 4}, {"scaling": {3: 4}}])
def test_renaming_leaves_invalid_trees_to_the_validation(tree):
    assert current_keys(tree) == tree
    with pytest.raises(ValidationError):
        Config.model_validate(tree)


def test_an_old_key_below_a_renamed_one_is_refused_like_the_new():
    for key in ("scaling.device_batch", "scaling.micro_batch"):
        with pytest.raises(RecipeError, match=r"scaling\.micro_batch: .*valid integer"):
            load_recipe("demo", [f"{key}.x=3"])


# Imports ------------------------------------------------------------------------------------------------------------


def test_the_config_is_cheap_to_import():
    code = "import sys, posmlp.config, posmlp; posmlp.__version__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "posmlp.config" in loaded
    assert not {"torch", "numpy", "pyarrow", "ray", "mlflow", "fsspec"} & set(loaded)


def test_the_version_is_that_of_the_distribution(monkeypatch):
    import importlib.metadata

    assert posmlp.__version__ == importlib.metadata.version("posmlp-video")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert posmlp.__version__ == "0+unknown"
