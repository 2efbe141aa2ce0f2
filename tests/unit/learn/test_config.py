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
    Scalar,
    TrainSplitSection,
    ValSplitSection,
    as_typed,
    current_keys,
    flatten,
    load_recipe,
    read_yaml,
    set_key,
    set_value,
    shorten_warmup,
    warn_renamed,
)
from tests.helpers.log_lines import log_lines

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
        ("model.dims=[16, 33, 48, 64]", ["stage 2: 33 channels are not divisible by 8 groups"]),
        ("model.blocks=paralel", ["unknown block type 'paralel'", "did you mean 'parallel'"]),
        ("scaling.workers=3", ["train.global_batch", "scaling.workers 3"]),
        ("data.crop_scale=[1.0, 0.5]", ["data.crop_scale (1.0, 0.5)"]),
        ("optim.warmup_epochs=1000", ["optim.warmup_epochs 1000", "train.epochs"]),
        ("name=../elsewhere", ["name", "'../elsewhere'"]),
        ("epochs", ["'epochs'", "section.key=value"]),
        ("train.epochs.x=3", ["'epochs' is a value"]),
        ("train.epochs=[", ["not YAML"]),
        ("model.choices={depth: []}", ["model.choices.depth: unknown key", "did you mean 'depths'"]),
        ("data.train.pth=x", ["data.train.pth: unknown key", "did you mean 'path'"]),
        ("data.train.where=3", ["data.train.where: ", "valid dictionary, not 3"]),
        ("scaling.train_on={a: '-'}", ["scaling.train_on.a: ", "not '-'"]),
    ],
)
def test_wrong_overrides_are_refused_with_key_and_value(override, expected):
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", [override])
    for part in expected:
        assert part in str(error.value)


def test_a_problem_says_the_value_as_it_was_read():
    with pytest.raises(RecipeError, match=r"train\.epochs: .*integer.*, not 1\.5$"):
        load_recipe("demo", ["train.epochs=1.5"])
    assert (repr(read_yaml("1.50")), repr(read_yaml("yes"))) == ("1.5", "True")


def test_all_problems_are_listed_at_once():
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", ["train.epochs=x", "optim.lr=y", "data.tran=3"])
    assert all(key in str(error.value) for key in ("train.epochs", "optim.lr", "data.tran"))


# Keys that cannot work together, the message, and the nearest keys that can.
TOGETHER = [
    (
        ["data.decoder=decord", "data.cache_dir=/x"],
        "data.decoder decord has no effect with data.cache_dir, which PyAV fills; remove one of them",
        ["data.decoder=decord", "data.cache_dir=null"],
    ),
    (
        ["data.modality=rgb_difference", "model.frames=1"],
        "data.modality rgb_difference needs model.frames of at least 2",
        ["data.modality=rgb_difference", "model.frames=2"],
    ),
    (
        ["data.full_frame=true", "eval.crops=3"],
        "data.full_frame shows the whole frame, so eval.crops must be 1, not 3",
        ["data.full_frame=true", "eval.crops=1"],
    ),
    (
        ["data.clip_share=[1.2, 0.8]"],
        "data.clip_share (1.2, 0.8) must be two numbers, the smaller one first",
        ["data.clip_share=[0.8, 1.2]"],
    ),
    (
        ["data.clip_share=[0.8, 1.2]", "data.sampling=dense"],
        "data.clip_share and data.pace are for data.sampling uniform; with dense, data.stride sets the length",
        ["data.clip_share=[1, 1]", "data.sampling=dense"],
    ),
    (
        ["data.pace=0.5", "data.sampling=dense"],
        "data.clip_share and data.pace are for data.sampling uniform; with dense, data.stride sets the length",
        ["data.pace=0.5", "data.sampling=uniform"],
    ),
    (
        ["data.crop_scale=[0.5, 0.4]"],
        "data.crop_scale (0.5, 0.4) must be two positive numbers, the smaller one first",
        ["data.crop_scale=[0.5, 0.5]"],
    ),
    (
        ["data.crop_scale=[0, 1]"],
        "data.crop_scale (0.0, 1.0) must be two positive numbers, the smaller one first",
        ["data.crop_scale=[0.001, 1]"],
    ),
    (
        ["data.crop_ratio=[2, 1]"],
        "data.crop_ratio (2.0, 1.0) must be two positive numbers, the smaller one first",
        ["data.crop_ratio=[2, 2]"],
    ),
    (
        ["data.crop_ratio=[-1, 1]"],
        "data.crop_ratio (-1.0, 1.0) must be two positive numbers, the smaller one first",
        ["data.crop_ratio=[0.1, 1]"],
    ),
    (
        ["train.global_batch=12", "scaling.workers=2", "data.repeats=4"],
        "train.global_batch 12 must be divisible by scaling.workers 2 x data.repeats 4",
        ["train.global_batch=16", "scaling.workers=2", "data.repeats=4"],
    ),
    (
        ["train.global_batch=15", "scaling.workers=5", "augment.mixup=0.5"],
        "augment.mixup and augment.cutmix blend pairs: train.global_batch 15 must be divisible by "
        "2 x scaling.workers x data.repeats = 10",
        ["train.global_batch=20", "scaling.workers=5", "augment.mixup=0.5"],
    ),
    (
        ["train.global_batch=12", "data.repeats=4", "augment.cutmix=0.5"],
        "augment.mixup and augment.cutmix blend pairs: train.global_batch 12 must be divisible by "
        "2 x scaling.workers x data.repeats = 8",
        ["train.global_batch=12", "data.repeats=4"],
    ),
    (
        ["scaling.workers=2", "scaling.min_workers=3"],
        "scaling.min_workers 3 is more than scaling.workers 2",
        ["scaling.workers=2", "scaling.min_workers=2"],
    ),
    (
        ["scaling.micro_batch=9", "data.repeats=2"],
        "scaling.micro_batch 9 must be divisible by 2: the clips of a video (data.repeats), and with mixup or cutmix "
        "of two videos, stay together",
        ["scaling.micro_batch=10", "data.repeats=2"],
    ),
    (
        ["scaling.micro_batch=6", "data.repeats=2", "augment.mixup=1"],
        "scaling.micro_batch 6 must be divisible by 4: the clips of a video (data.repeats), and with mixup or cutmix "
        "of two videos, stay together",
        ["scaling.micro_batch=8", "data.repeats=2", "augment.mixup=1"],
    ),
    (
        ["train.precision=fp16", "scaling.parallel=fsdp"],
        "train.precision fp16 does not work with scaling.parallel fsdp; use bf16 or ddp",
        ["train.precision=bf16", "scaling.parallel=fsdp"],
    ),
    (
        ["scaling.decode_in_worker=true", "scaling.decode_on={disk: fast}"],
        "scaling.decode_on is for decode tasks; with scaling.decode_in_worker leave it out",
        ["scaling.decode_in_worker=false", "scaling.decode_on={disk: fast}"],
    ),
    (
        ["train.compile=true", "model.choices={depths: [[1, 2], [], [], []]}"],
        "model.choices works neither with train.compile nor with scaling.parallel fsdp; leave them out",
        ["train.compile=false", "model.choices={depths: [[1, 2], [], [], []]}"],
    ),
    (
        ["scaling.parallel=fsdp", "model.choices={depths: [[1, 2], [], [], []]}"],
        "model.choices works neither with train.compile nor with scaling.parallel fsdp; leave them out",
        ["scaling.parallel=fsdp", "train.compile=true"],
    ),
    (
        ["optim.lr=0.001", "optim.min_lr=0.01"],
        "optim.min_lr 0.01 is more than optim.lr 0.001, the peak rate",
        ["optim.lr=0.01", "optim.min_lr=0.01"],
    ),
    (
        ["train.epochs=5", "optim.warmup_epochs=5.5"],
        "optim.warmup_epochs 5.5 is more than train.epochs 5",
        ["train.epochs=5", "optim.warmup_epochs=5"],
    ),
    (
        ["optim.step_epochs=[10, 15]"],
        "optim.step_epochs is for optim.schedule steps; set that too, or leave it out",
        ["optim.step_epochs=[10, 15]", "optim.schedule=steps"],
    ),
    (
        ["optim.step_factor=0.5"],
        "optim.step_factor is for optim.schedule steps; set that too, or leave it out",
        ["optim.step_factor=0.5", "optim.step_epochs=[10]", "optim.schedule=steps"],
    ),
    (
        ["optim.schedule=steps"],
        "optim.schedule steps needs optim.step_epochs, the epochs after which the rate drops, as in [10, 15]",
        ["optim.schedule=steps", "optim.step_epochs=[0.5]", "optim.warmup_epochs=0.5"],
    ),
    *(
        (
            ["optim.schedule=steps", f"optim.step_epochs={steps}", "train.epochs=20", "optim.warmup_epochs=2"],
            f"optim.step_epochs {steps} must increase, from optim.warmup_epochs 2 on and before train.epochs 20",
            ["optim.schedule=steps", "optim.step_epochs=[2, 19.5]", "train.epochs=20", "optim.warmup_epochs=2"],
        )
        for steps in ("[10.0, 5.0]", "[5.0, 5.0]", "[1.0, 5.0]", "[5.0, 20.0]")
    ),
]


@pytest.mark.parametrize(("keys", "message", "nearest"), TOGETHER)
def test_keys_that_cannot_work_together_are_refused_and_the_nearest_that_can_are_not(keys, message, nearest):
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", keys)
    _, *problems = str(error.value).splitlines()
    assert [problem.strip() for problem in problems] == [message]
    config = load_recipe("demo", nearest)
    assert config == Config.model_validate(config.model_dump())


def test_several_problems_of_keys_together_are_one_message():
    with pytest.raises(RecipeError, match=r"min_lr 1 is more than .*; optim\.warmup_epochs 99\.0 is more than "):
        load_recipe("demo", ["optim.min_lr=1", "optim.warmup_epochs=99"])


@pytest.mark.parametrize("key", ["tracking.uri", "tracking.experiment", "train.storage"])
def test_a_password_may_stand_in_the_uri_of_mlflow_alone(key):
    """It is taken off before anything is printed or stored (``pipelines.tracking.uris``)."""
    override = f"{key}=http://me:hushhush@host/x"
    if key == "tracking.uri":
        assert load_recipe("demo", [override]).tracking.uri == "http://me:hushhush@host/x"
        return
    with pytest.raises(RecipeError, match=f"{key} http://host/x: leave user and password out"):
        load_recipe("demo", [override])


@pytest.mark.parametrize(
    ("keys", "clips"),
    [
        ([], 1),
        (["data.repeats=2"], 2),
        (["augment.mixup=0.1"], 2),
        (["augment.cutmix=0.1"], 2),
        (["data.repeats=4", "augment.cutmix=0.1", "augment.mixup=1"], 8),
    ],
)
def test_the_clips_that_stay_together(keys, clips):
    assert load_recipe("demo", keys).clips_together == clips


def test_a_missing_recipe_names_the_known_ones():
    with pytest.raises(RecipeError, match="demo"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "", "name: [unclosed"])
def test_files_that_are_not_a_recipe_are_refused(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize(
    "text", ["train: {epochs: 7}\nname: a\ntrain: {patience: 3}\n", "train: {epochs: 7, epochs: 8}\n"]
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, text):
    """YAML keeps the last one alone, so the first would be lost without a word."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"(?s)the key (train|epochs) is there twice; keep one of them.*line"):
        load_recipe(path)


def test_mappings_may_be_merged_and_changed(tmp_path):
    """Also one that is itself merged into another, which YAML reads before it."""
    path, tree = tmp_path / "r.yaml", yaml.safe_load(load_recipe("demo").to_yaml())
    tree.pop("augment")
    path.write_text(yaml.safe_dump(tree) + "augment: {flip: 0.25}\n")
    plain = load_recipe(path)
    merged = "augment: {<<: &outer {<<: &inner {flip: 0.5}, flip: 0.25}}\n"
    path.write_text(yaml.safe_dump(tree) + merged)
    assert load_recipe(path) == plain
    text = "a: &a {x: 1}\nb: {c: &c {<<: *a, x: 2}}\nd: {<<: *c}\n"
    assert read_yaml(text)["b"]["c"].keys() == read_yaml(text)["d"].keys() == {"x"}


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


# Text ---------------------------------------------------------------------------------------------------------------

# Each is something other than text to YAML, or no YAML value at all.
TEXTS = ["1", "001", "1.50", "-3", "2024-01-01", "2024-13-01", "yes", "on", "No", "1e3", "0x10", "1_000", "12:30:45"]
TEXTS += [".inf", "1.", "=", "2001-12-14t21:59:43.10-05:00"]
NOT_YAML = ["{:05d}.jpg", "*.csv", "@a", "a: b", "[1].csv", "- a", "a # b", '"a" b', "&a", "%", "'tis", "|"]


def keys_of(schema, wanted, prefix=""):
    """The keys of a JSON schema for which ``wanted`` is true of one of the schemas that their values may have."""
    for name, field in schema["properties"].items():
        options = [resolve(option) for option in field.get("anyOf", [field])]
        if any(wanted(option) for option in options):
            yield f"{prefix}{name}", {"type": "null"} in options
        for option in options:
            if "properties" in option:
                yield from keys_of(option, wanted, f"{prefix}{name}.")


def resolve(schema):
    return SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


SCHEMA = Config.model_json_schema()
TEXT_KEYS = list(keys_of(SCHEMA, lambda s: s.get("type") == "string"))
MAPPINGS = [
    key for key, _ in keys_of(SCHEMA, lambda schema: schema.get("type") == "object" and "properties" not in schema)
]
LISTS = [key for key, _ in keys_of(SCHEMA, lambda schema: schema.get("items", {}).get("type") == "string")]


def as_file(key, text):
    """What the recipe ``a: {b: text}`` holds, for key ``a.b``."""
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(key.split("."))]
    return flatten(as_typed(read_yaml("\n".join(lines) + f" {text}\n"), Config))


def as_override(key, text):
    tree = {}
    set_key(tree, f"{key}={text}")
    return flatten(tree)


def test_the_text_keys_are_found():
    keys = dict(TEXT_KEYS)
    assert {"name", "data.train.path", "data.template", "data.modality", "tracking.experiment"} <= {*keys}
    assert (keys["model.weights"], keys["data.val.root"], keys["train.storage"]) == (True, True, False)
    assert {*MAPPINGS} == {
        "data.train.where",
        "data.val.where",
        "data.test.where",
        "augment.flip_classes",
        "scaling.train_on",
        "scaling.decode_on",
    }
    assert "train.epochs" not in keys and "model.blocks" in LISTS


@pytest.mark.parametrize(("key", "nullable"), TEXT_KEYS)
def test_a_text_key_takes_the_text_as_it_is_written(key, nullable):
    for text in TEXTS:
        assert as_file(key, text) == as_override(key, text) == as_override(key, f" {text} ") == {key: text}
    for text in ("null", "~"):
        assert as_file(key, text) == as_override(key, text) == {key: None if nullable else text}
        assert as_file(key, f'"{text}"') == as_override(key, f"'{text}'") == {key: text}
    for text in NOT_YAML:
        if text != "- a" or key not in LISTS:
            assert as_override(key, text) == {key: text}
    assert as_file(key, "") == as_override(key, "") == {key: None}


@pytest.mark.parametrize("key", MAPPINGS)
def test_keys_and_values_of_a_mapping_are_text(key):
    for text in [*TEXTS, "null", "~"]:
        if text != "=":
            assert as_file(key, f"{{{text}: {text}}}") == as_override(key, f"{{{text}: {text}}}")
            assert as_file(key, f"{{{text}: {text}}}") == {f"{key}.{text}": text}
        if "." not in text:
            assert as_override(f"{key}.a", text) == as_file(f"{key}.a", text) == {f"{key}.a": text}
    assert as_override(f"{key}.{1}", "{:05d}.jpg") == {f"{key}.1": "{:05d}.jpg"}


@pytest.mark.parametrize("key", LISTS)
def test_the_items_of_a_list_are_text(key):
    assert as_file(key, "[001, on, ~, x]") == as_override(key, "[001, on, ~, x]") == {key: ["001", "on", "~", "x"]}


def test_other_keys_take_what_yaml_reads():
    config = load_recipe("demo", ["train.epochs=0x10", "train.compile=yes", "optim.lr=1.0e-3", "model.weights=null"])
    assert (config.train.epochs, config.train.compile, config.optim.lr) == (16, True, 1e-3)
    assert config.model.weights is None
    windows = load_recipe("demo", ["model.windows=[8, [4, 4], [2, 4, 4], 2]"]).model.windows
    assert windows == (8, (4, 4), (2, 4, 4), 2)


def test_text_survives_the_whole_way(tmp_path):
    where = dict(zip("abcdefghijklmnopqrstuvwxyz", [*TEXTS, "null", "~"], strict=False))
    path = tmp_path / "r.yaml"
    lines = "".join(f"      {key}: {text}\n" for key, text in where.items())
    path.write_text(
        "name: 007\naugment: {flip_classes: {1: 002}}\ndata:\n  template: '{:05d}.jpg'\n"
        "  val: {path: 1e3, where: {1: yes}}\n"
        f"  train:\n    path: 2024-01-01\n    root: 1.50\n    where:\n{lines}"
    )
    config = load_recipe(path, ["data.val.where.split=1", "data.classes=0"])
    assert (config.name, config.data.train.path, config.data.train.root) == ("007", "2024-01-01", "1.50")
    assert config.data.train.where == where
    assert (config.data.val.path, config.data.val.where) == ("1e3", {"1": "yes", "split": "1"})
    assert (config.data.classes, config.data.template) == ("0", "{:05d}.jpg")
    assert config.augment.flip_classes == {"1": "002"}
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_recipe(again) == config == Config.model_validate_json(config.model_dump_json())


def test_an_empty_text_key_is_refused_where_it_must_be_given():
    with pytest.raises(RecipeError, match=r"train\.storage: .*valid string, not None"):
        load_recipe("demo", ["train.storage="])


def test_a_date_that_is_none_can_be_referred_to(tmp_path):
    tree = as_typed(read_yaml("name: &a 2024-13-01\ntrain: {storage: *a}\n"), Config)
    assert tree == {"name": "2024-13-01", "train": {"storage": "2024-13-01"}}


@pytest.mark.parametrize("text", ["a: &a [*a]", "data: &a {train: *a}", "model: {blocks: &a [*a]}"])
def test_yaml_that_refers_to_itself_is_refused(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="cannot be run"):
        load_recipe(path)


def test_aliases_do_not_multiply(tmp_path):
    """A list of lists of lists, each ten times the same, is a billion items when copied."""
    path = tmp_path / "r.yaml"
    path.write_text("a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 10}]\n" for i in range(9)))
    with pytest.raises(RecipeError, match="a9: unknown key"):
        load_recipe(path)


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


def test_a_warm_up_longer_than_the_run_is_scaled_with_it():
    assert load_recipe("demo").optim.warmup_epochs == 2 and load_recipe("demo").train.epochs == 24
    with log_lines() as lines:
        assert load_recipe("demo", ["train.epochs=1"]).optim.warmup_epochs == pytest.approx(2 / 24)
        assert load_recipe("demo", ["train.epochs=1", "optim.lr=0.1"]).optim.lr == 0.1
    with log_lines() as whole:  # a run that is all warm-up
        assert load_recipe("demo", ["train.epochs=2"]).optim.warmup_epochs == pytest.approx(4 / 24)
    assert len(whole) == 1
    assert lines == ["optim.warmup_epochs 2 becomes 0.0833, because train.epochs=1 is shorter"] * 2
    with log_lines() as lines:
        assert load_recipe("demo", ["train.epochs=3"]).optim.warmup_epochs == 2
        assert load_recipe("demo", ["train.epochs=2", "optim.warmup_epochs=2"]).optim.warmup_epochs == 2
        assert load_recipe("demo", ["train.epochs=1", "optim.warmup_epochs=1"]).optim.warmup_epochs == 1
    assert not lines
    with pytest.raises(RecipeError, match=r"warmup_epochs 3\.0 is more than train\.epochs 1"):
        load_recipe("demo", ["train.epochs=1", "optim.warmup_epochs=3"])  # both are chosen
    with pytest.raises(RecipeError, match=r"train\.epochs"):
        load_recipe("demo", ["train.epochs=many"])


def test_a_resolved_recipe_says_what_the_models_name_stands_for():
    config = load_recipe("demo", ["model.name=s16", "model.frames=null", "model.depths=[1,1,1,1]"])
    resolved = config.resolved()
    assert resolved.model.variant() == config.model.variant()
    assert resolved.model.dims == (72, 144, 288, 576)  # of the release
    assert (resolved.model.depths, resolved.model.frames, resolved.model.blocks) == (
        (1, 1, 1, 1),
        16,
        ("parallel",) * 4,
    )
    assert resolved.resolved() == resolved
    assert Config.model_validate(resolved.model_dump(mode="json")) == resolved


def test_values_that_differ_from_their_defaults_are_listed():
    data = ["data.train.path=a.csv", "data.val.path=b.csv"]
    plain = Config.model_validate({"name": "x", "data": {"train": {"path": "a.csv"}, "val": {"path": "b.csv"}}})
    assert plain.non_defaults() == plain.resolved().non_defaults() == {}
    keys = ["model.name=s", "model.dims=[72,144,288,576]", "model.blocks=joint", "train.epochs=7", "optim.lr=0.001"]
    changed = load_recipe("demo", [*data, *keys]).non_defaults()
    assert changed["model.name"] == "s" and changed["model.blocks"] == ["joint"] * 4 and changed["train.epochs"] == 7
    assert "model.dims" not in changed and "optim.lr" not in changed and "name" not in changed


def test_the_short_forms_of_lists_of_videos():
    several = ["a.csv", {"path": "b.csv", "weight": 2}]
    assert TrainSplitSection.expand(several) == {"path": "a.csv", "others": several[1:]}
    assert TrainSplitSection.expand(({"path": "a.csv", "weight": 3},)) == {"path": "a.csv", "weight": 3, "others": []}
    assert TrainSplitSection.expand("a.csv") == {"path": "a.csv"}
    assert [TrainSplitSection.expand(value) for value in ([3, "b"], [], 5)] == [[3, "b"], [], 5]
    assert ValSplitSection.expand(0.25) == {"share": 0.25}
    assert ValSplitSection.expand("b.csv") == {"path": "b.csv"}
    written = Scalar("0.20", 0.2)
    assert ValSplitSection.expand(written) == {"share": written}
    assert ValSplitSection.expand(True) is True
    train = load_recipe("demo", ["data.train=[a.csv, {path: b.csv, weight: 2}]", "data.val=0.25"]).data
    assert [(each.path, each.weight) for each in train.train.lists] == [("a.csv", 1.0), ("b.csv", 2.0)]
    assert (train.val.share, train.val.path) == (0.25, "a.csv")
    assert load_recipe("demo", ["data.train=001"]).data.train.path == "001"  # a path is text as it is written


@pytest.mark.parametrize(
    ("text", "found"), [("- a", "list"), ("5", "int"), ("text", "str"), ("", "NoneType"), ("2024-01-01", "date")]
)
def test_a_file_without_sections_says_what_it_is(text, found, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value) == f"{path}: expected sections such as 'model:' and 'data:', found {found}"


def test_a_warm_up_of_the_whole_run_is_scaled_too():
    before = {"train": {"epochs": 8}, "optim": {"warmup_epochs": 8}}
    tree = {"train": {"epochs": 2}, "optim": {"warmup_epochs": 8, "lr": 0.5}}
    shorten_warmup(tree, before)
    assert tree == {"train": {"epochs": 2}, "optim": {"warmup_epochs": 2.0, "lr": 0.5}}
    longer = {"train": {"epochs": 6}, "optim": {"warmup_epochs": 9}}
    shorten_warmup(longer, {"train": {"epochs": 8}, "optim": {"warmup_epochs": 9}})  # it was too long before
    assert longer["optim"] == {"warmup_epochs": 9}


def test_a_key_is_named_without_the_types_that_were_tried():
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", ["model.windows=[x, 1, 1, 1]"])
    assert "  model.windows: Input should be a valid tuple, not 'x'" in str(error.value).splitlines()


@pytest.mark.parametrize(
    ("keys", "message", "nearest"),
    [
        (
            ["data.val={}"],
            "data.val: missing; give a list (data.val.path), a share of the training videos (0.2), or the column "
            "and value of those that are held out (data.val.where.subject=s01)",
            ["data.val=b.csv"],
        ),
        *(
            (
                [f"data.val={share}"],
                "data.val.share: expected a share of the training videos, more than 0 and less than 1, such as 0.2, "
                f"not {share}",
                ["data.val=0.5"],
            )
            for share in ("1.5", "1", "0", "-0.1")
        ),
        *(
            (
                [f"data.val={value}"],
                "data.val: expected the path of a list, a share of the training videos such as 0.2, or a section with "
                f"the key path, not {shown}",
                ["data.val=b.csv"],
            )
            for value, shown in (("null", "None"), ("[a.csv, b.csv]", "['a.csv', 'b.csv']"))
        ),
        (
            ["data.train=null"],
            "data.train: expected the path of a list, several of them, or a section with the key path, not None",
            ["data.train=[a.csv, b.csv]"],
        ),
        (
            ["data.train=a.csv", "data.val={share: 0.25, root: there}"],
            "data.val.share 0.25 is of the training list a.csv, so data.val has no list, root or where of its own; "
            "leave them out, or set data.val.share=null",
            ["data.train=a.csv", "data.val={share: 0.25}"],
        ),
        (
            ["data.group_by=folder"],
            "data.group_by folder has an effect only where data.val is a share; leave it out",
            ["data.group_by=folder", "data.val=0.25"],
        ),
        (
            ["data.cache_dir=s3://bucket/cache"],
            "data.cache_dir s3://bucket/cache: cached videos are read from a disk; give the path of a folder",
            ["data.cache_dir=file:///scratch/cache"],
        ),
        (
            ["train.monitor=val/loss"],
            "train.monitor val/loss is for train.patience; set that too, or leave it out",
            ["train.monitor=val/loss", "train.patience=3"],
        ),
        (
            ["optim.betas=[0.9, 1.0]"],
            "optim.betas: Input should be less than 1, not 1.0",
            ["optim.betas=[0.9, 0.95]"],
        ),
        (
            ["optim.freeze=2", "model.weights=null"],
            "optim.freeze 2 keeps weights that are trained already: set model.weights, or leave optim.freeze out",
            ["optim.freeze=2", "model.weights=w.pt"],
        ),
        (
            ["optim.freeze=2", "model.weights=w.pt", "model.choices={depths: [[1, 2], [], [], []]}"],
            "optim.freeze 2 does not work with model.choices; leave one of them out",
            ["optim.freeze=2", "model.weights=w.pt"],
        ),
    ],
)
def test_refusals_of_shares_groups_and_frozen_parts_as_they_are_printed(keys, message, nearest):
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", keys)
    assert str(error.value).endswith(f" cannot be run:\n  {message}")
    load_recipe("demo", nearest)
