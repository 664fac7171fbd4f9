"""Shared by all tests: a home of its own for each, real data, the real command in a real process."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An FMNIST_HOME with the shipped experiments (copied, so that a test may add its own) and the real data (linked)."""
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copytree(REPOSITORY / "experiments", folder / "experiments")
    (folder / "data").symlink_to(REPOSITORY / "data")
    monkeypatch.setenv("FMNIST_HOME", str(folder))
    yield folder
    stop_sidecar(folder)
    shutil.rmtree(folder)


def stop_sidecar(folder: Path) -> None:
    """End the sidecar that a run in this home left behind; it would idle on for half a minute."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        pid = int((folder / "mlruns" / ".sidecar.lock").read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)


Fmnist = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def fmnist(home: Path) -> Fmnist:
    """Run the real command in this home: fmnist('run', 'baseline') gives returncode, stdout, stderr."""

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "fmnist", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)

    return run
