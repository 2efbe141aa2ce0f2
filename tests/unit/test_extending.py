"""The examples of docs/extending.md: their diffs are applied to a copy of the code, in which their checks are run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from posmlp.config import Format
from posmlp.video.manifest import MANIFEST_FORMATS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r'^( *)```(\w+) title="([^"]+)"\n(.*?)^\1```$', PAGE, re.M | re.S)
CHECKS = {title: code for _, _, title, code in BLOCKS if title.startswith("check_")}


def applied(diff, text):
    """``text`` with a diff of one place applied; the lines without ``+`` say where, and occur once."""
    lines = diff.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
    after = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
    assert text.count(before) == 1, f"the page shows lines that the file does not have once:\n{before}"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the packages with everything that the page adds."""
    folder = tmp_path_factory.mktemp("extended")
    for package in ("posmlp", "pipelines", "tune_spaces"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for indent, language, title, code in BLOCKS:
        path, code = folder / title, re.sub(f"^{indent}", "", code, flags=re.M)
        path.write_text(applied(code, path.read_text()) if language == "diff" else code)
    return folder


def test_every_kind_of_extension_is_shown():
    kinds = ("format", "block", "unit", "space", "task", "metric", "recipe")
    assert list(CHECKS) == [f"check_{kind}.py" for kind in kinds]


@pytest.mark.parametrize("check", CHECKS)
def test_what_the_page_adds_works(check, extended, tmp_path):
    for name in (check, "my_space.py", "my_recipe.yaml"):
        shutil.copy(extended / name, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, check], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_recipes_accept_the_formats_that_are_read():
    assert get_args(Format) == (*MANIFEST_FORMATS, "ava")  # the lists of boxes have a reader of their own
