"""The pages name files and headings that exist, and show the messages that a user gets."""

import re
import shlex
from pathlib import Path

import pytest

from pipelines.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FOLDERS = r"(?:posmlp|pipelines|tune_spaces|benchmarks|deploy|docs|examples|tests)/"
MESSAGES = re.findall(r"```\n\$ posmlp ([^\n]+)\n(posmlp: .+?)```", (ROOT / "docs/quickstart.md").read_text(), re.S)


def anchors(page):
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    named = set(re.findall(rf"`(?:python )?({FOLDERS}[\w/.-]+)", page.read_text()))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            assert (ROOT / path).exists(), target
            assert not anchor or anchor in anchors(ROOT / path), target


@pytest.mark.parametrize(("command", "shown"), MESSAGES)
def test_messages_are_those_that_are_printed(command, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.csv").write_text("path,label\na.mp4,0\nb.mp4,zero\na.mp4,1\n")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    assert main(shlex.split(command)) == 1
    printed = capsys.readouterr().err
    for folder, stands_for in ((ROOT, "/home/me/posmlp-video"), (tmp_path, "/home/me")):
        printed = printed.replace(f"{folder}/", f"{stands_for}/")
    assert printed == shown


def test_the_quick_start_shows_a_wrong_recipe_and_a_wrong_list():
    assert len(MESSAGES) == 2
