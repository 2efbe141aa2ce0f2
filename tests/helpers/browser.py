"""A headless browser for looking at web pages."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# It asks nobody outside of this machine, and runs as root too.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


@contextmanager
def open_browser():
    """A page of a headless browser, wide enough for MLflow's tables. Skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport={"width": 1800, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def keep(page, folder, name):
    """A picture of the page, in ``POSMLP_SCREENSHOTS`` if that is set."""
    page.screenshot(path=str(Path(os.environ.get("POSMLP_SCREENSHOTS", folder), f"{name}.png")))
