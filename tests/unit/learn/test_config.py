"""Recipes: what is accepted, and how wrong ones are refused."""

import pytest
import yaml

from posmlp.config import RECIPES, RecipeError, load_recipe

RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_shipped_recipes_are_valid_and_round_trip(name, tmp_path):
    config = load_recipe(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_recipe(copy) == config


def test_overrides_reach_every_depth_and_parse_as_yaml():
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


def test_whole_frames_have_one_view():
    with pytest.raises(RecipeError, match=r"data\.whole .* eval\.crops 3"):
        load_recipe("demo", ["data.full_frame=true", "eval.crops=3"])


def test_a_missing_recipe_names_the_known_ones():
    with pytest.raises(RecipeError, match="demo"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "", "name: [unclosed"])
def test_files_that_are_no_recipe_are_refused(tmp_path, text):
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


def test_a_password_in_a_place_is_refused_and_not_shown():
    places = ["train.storage", "model.weights", "data.train.path", "data.val.root", "data.classes", "data.cache_dir"]
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", [f"{key}=s3://me:hushhush@bucket/x" for key in places])
    assert all(f"{key} s3://bucket/x: leave user and password out" in str(caught.value) for key in places)
    assert "hushhush" not in str(caught.value)
