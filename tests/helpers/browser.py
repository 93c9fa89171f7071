"""A real browser, if there is one."""

import os
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def refuse(reason):
    """Skip the test, or fail it if FAIL_WITHOUT_BROWSER=1."""
    (pytest.fail if os.environ.get("FAIL_WITHOUT_BROWSER") == "1" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def browser():
    """Chromium; without it the test is skipped, or fails if FAIL_WITHOUT_BROWSER=1."""
    found = CHROMIUM or refuse("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
