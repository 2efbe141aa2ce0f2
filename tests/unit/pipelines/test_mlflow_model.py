"""The model that a run logs to MLflow: both flavours compute what the checkpoint's model does, without the project."""

import base64
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from pipelines.inference.predict import predict
from pipelines.registry.model_files import save_model_files
from posmlp.video.augment import to_input
from tests.helpers.random_models import CLASSES, videos_of, write_checkpoint
from tests.helpers.small_runs import recipe_for


@pytest.fixture(scope="module")
def saved(motion_set, tmp_path_factory):
    """A run's folder, its recipe, the model of its best checkpoint, and MLflow's files of that model."""
    folder = tmp_path_factory.mktemp("runs")
    secret = "tracking.uri=http://me:geheim@mlflow.example"
    config = recipe_for(folder, motion_set, "model.num_classes=8", f"data.cache_dir={folder}/cache", secret)
    _, best = write_checkpoint(folder / "small", config, step=3, metrics={"val/top1": 0.9})
    write_checkpoint(folder / "small", config, step=9, metrics={"val/top1": 0.4})
    save_model_files(str(folder / "small"), folder / "model")
    return folder / "small", config, best, folder / "model"


@pytest.fixture(scope="module")
def pyfunc(saved):
    """The python_function flavour. MLflow puts the model's code first in sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        yield mlflow.pyfunc.load_model(str(saved[-1]))


def as_base64(file):
    return base64.b64encode(Path(file).read_bytes()).decode()


def test_the_pytorch_flavour_takes_any_batch_and_is_the_best_checkpoint(saved):
    _, config, best, folder = saved
    model = mlflow.pytorch.load_model(str(folder))
    for batch in (1, 7):
        noise = torch.Generator().manual_seed(batch)
        clips = torch.randint(256, (batch, 4, 32, 32, 3), dtype=torch.uint8, generator=noise)
        with torch.no_grad():
            expected = best(to_input(clips, config))
            torch.testing.assert_close(model(clips), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_classes_and_sampling_are_metadata_of_file_and_model(saved):
    folder = saved[-1]
    with zipfile.ZipFile(folder / "data" / "model" / "model.pt2") as file:
        (name,) = (each for each in file.namelist() if each.endswith("posmlp.json"))
        inside = json.loads(file.read(name))
    info = mlflow.models.get_model_info(str(folder))
    assert info.metadata == inside
    assert (inside["classes"], inside["step"], inside["sampling"]["frames"]) == (CLASSES, 3, "uniform")
    assert {*info.flavors} == {"pytorch", "python_function"}
    assert {param.name: param.default for param in info.signature.params} == {"top": 5, "views": "1x1"}


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (2, 3)])
def test_paths_and_bytes_get_the_predictions_of_posmlp_predict(saved, pyfunc, motion_set, clips, crops):
    files = videos_of(motion_set, 4)
    expected = list(predict(str(saved[0]), files, top=8, views=(clips, crops)))
    videos = [files[0], f"file://{files[1]}", as_base64(files[2]), f"data:video/mp4;base64,{as_base64(files[3])}"]
    table = pd.DataFrame({"video": videos}, index=[7, 5, 3, 1])
    found = pyfunc.predict(table, params={"top": 8, "views": f"{clips}x{crops}"})
    assert [*found.index] == [7, 5, 3, 1]
    for row, prediction in zip(found["top"], expected, strict=True):
        assert [each["class"] for each in row] == [name for name, _ in prediction.top]
        shares = [each["probability"] for each in row]
        np.testing.assert_allclose(shares, [share for _, share in prediction.top], atol=1e-5)
    assert [len(row) for row in pyfunc.predict(table)["top"]] == [5] * 4


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ("nowhere.mp4", r"row 2 of 3 \(nowhere\.mp4\): the file is missing"),
        ("data:video/mp4;base64,%%%", r"row 2 of 3 \(data:.*\): it is neither a path nor valid base64"),
        ("%" * 5000, r"row 2 of 3 \(%{40}\.\.\., 5000 characters\): it is neither a path nor valid base64"),
        (base64.b64encode(b"no video" * 1000).decode(), r"row 2 of 3 .*: not a video"),
        ("cut", r"row 2 of 3 \(A.*, 400 characters\): .*(truncated|corrupt|damaged)"),
        (" ", r"row 2 of 3 \( \): it is empty; expected a path, a URI or the base64 text"),
    ],
)
def test_a_bad_video_is_an_error_that_names_its_row(pyfunc, motion_set, bad, expected):
    good, other = videos_of(motion_set, 2)
    bad = as_base64(good)[:400] if bad == "cut" else bad
    with pytest.raises(MlflowException, match=expected) as error:
        pyfunc.predict(pd.DataFrame({"video": [good, bad, other]}))
    assert "\n" not in error.value.message and error.value.error_code == "INVALID_PARAMETER_VALUE"


@pytest.mark.parametrize(
    ("params", "expected"), [({"top": 0}, "top 0: expected .* at least 1"), ({"views": "3"}, "expected CLIPSxCROPS")]
)
def test_parameters_that_cannot_be_used_are_refused(pyfunc, motion_set, params, expected):
    with pytest.raises(MlflowException, match=expected):
        pyfunc.predict(pd.DataFrame({"video": videos_of(motion_set, 1)}), params=params)


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "pipelines", "tune_spaces", "safetensors", "optuna", "plotly"}:
            raise ImportError(f"{name} is not among the model's requirements")

sys.meta_path.insert(0, Refuse())
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
(top,) = model.predict(pandas.DataFrame({"video": [sys.argv[2]]}))["top"]
import posmlp
print(posmlp.__file__, top[0]["class"], sep="\\n")
"""


def test_the_code_that_travels_along_is_small_and_enough(saved, motion_set, tmp_path):
    run, *_, folder = saved
    (video,) = videos_of(motion_set, 1)
    command = [sys.executable, "-P", "-c", ALONE, str(folder), video]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    where, best = done.stdout.splitlines()[-2:]
    assert where == str(folder / "code" / "posmlp" / "__init__.py")
    assert best == next(predict(str(run), [video])).top[0][0]
    shipped = [path for path in (folder / "code").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) < 1e6
    assert {path.suffix for path in shipped} <= {".py", ".yaml", ".typed"}
    required = (folder / "requirements.txt").read_text().split()
    assert all("==" in each and "+" not in each for each in required)
    assert {"torch", "numpy", "av", "pandas", "mlflow"} <= {each.partition("==")[0] for each in required}


def test_the_recipe_that_travels_along_tells_no_password(saved):
    texts = [path.read_text() for path in saved[-1].rglob("*.*") if path.suffix in (".yaml", ".json", ".txt")]
    assert not any("geheim" in text or "cache_dir: /" in text for text in [*texts, (saved[-1] / "MLmodel").read_text()])
