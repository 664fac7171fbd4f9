"""Shared by the tests in a browser: Debian's Chromium, a page that notes what goes wrong on it, screenshots, the real `fmnist ui`."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, free_port
from playwright.sync_api import Browser, Page, expect, sync_playwright

PATIENCE_MS = 60_000
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; the test fails where there is none."""
    path = shutil.which("chromium") or pytest.fail(
        "there is no chromium; `make test-browser` installs it or says how"
    )
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(browser: Browser, script: str = "", **options: object) -> Iterator[Page]:
    """A page with nothing stored, and this script run before each of its own; fails where an error on it was left uncaught."""
    context = browser.new_context(viewport={"width": 1800, "height": 1100}, **options)
    context.set_default_timeout(PATIENCE_MS)
    context.add_init_script(script)
    page, errors = context.new_page(), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def shoot(page: Page, name: str) -> None:
    """Keep a screenshot: build/screenshots/NAME.png."""
    page.screenshot(
        path=REPOSITORY / "build" / "screenshots" / f"{name}.png", animations="disabled"
    )


@contextlib.contextmanager
def served(home: Path) -> Iterator[str]:
    """`fmnist ui` in this home: the link that it prints."""
    command = [sys.executable, "-m", "fmnist", "ui", "--port", str(free_port())]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "FMNIST_HOME": str(home)}
    )
    try:
        [link] = re.findall(r"http://\S+", server.stdout.readline())
        yield link
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
