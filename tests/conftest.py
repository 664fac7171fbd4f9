"""Shared by all tests: a home of its own for each, real data, the real command in a real process."""

import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fmnist import journal, state, tracking

if not Path("/dev/nvidia0").exists():
    # Triton reads it at its first import: without a CUDA device its kernels are tested by its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # mlflow.set_tracking_uri sets it


def make_home(parent: Path) -> Path:
    """A folder for FMNIST_HOME: the shipped experiments (copied, so that a test may add its own) and the real data (linked)."""
    folder = parent / "home"
    folder.mkdir()
    shutil.copytree(REPOSITORY / "experiments", folder / "experiments")
    (folder / "data").symlink_to(REPOSITORY / "data")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = make_home(tmp_path)
    monkeypatch.setenv("FMNIST_HOME", str(folder))
    yield folder
    stop_sidecar(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    tracking.connect(folder, create=True)
    return tracking.database(folder)


def give_store(home: Path, empty_store: Path) -> None:
    """A store for a home, where making one is not what is tested: it takes seconds."""
    (home / "mlruns").mkdir()
    shutil.copy(empty_store, tracking.database(home))


@pytest.fixture
def with_store(home: Path, empty_store: Path) -> None:
    """The home of this test has one."""
    give_store(home, empty_store)


def stop_sidecar(folder: Path) -> None:
    """End the sidecars that runs in this home left behind; they would idle on for half a minute."""
    for lock in (folder / "mlruns").glob(".sidecar*.lock"):
        state.end_uploader(lock)
        wait_for(lambda lock=lock: not state.is_locked(lock), seconds=10)


def command(home: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the real command in this home."""
    return subprocess.run(
        [sys.executable, "-m", "fmnist", *arguments],
        capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, env={**os.environ, "FMNIST_HOME": str(home), **environment},
    )  # fmt: skip


Fmnist = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def fmnist(home: Path) -> Fmnist:
    """fmnist('run', 'baseline') runs the real command in this test's home and gives returncode, stdout, stderr."""
    return functools.partial(command, home)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


LONG = ("run", "baseline", "-s", "train.eval_every=500")
SMALL = ("run", "baseline", "-s", "train.epochs=1", "-s", "train.batch_size=1000")


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fmnist", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def trained(home: Path) -> int:
    """Steps that the one journal in this home holds."""
    records = [
        record
        for folder in state.state_folders(home)
        for record in journal.read(folder.path / "journal")[0]
    ]
    return sum(record.fields["count"] for record in records if record.kind == "train")


def stored_steps(store: tracking.Store, run_id: str) -> list[int]:
    return [point.step for point in store.client.get_metric_history(run_id, "train/loss")]


# ---- a store with groups of seeds

QUICK = ("-s", "train.epochs=1", "-s", "train.batch_size=2000", "-s", "train.eval_every=10")
HELD_OUT = (*QUICK, "-s", "data.holdout=10000")
SLOW_LABEL = "baseline epochs=1 batch_size=2000 eval_every=10 holdout=10000"
FAST_LABEL = f"{SLOW_LABEL} lr=0.05"


def train(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    result = command(home, "run", "baseline", *arguments, "--no-sync")
    assert result.returncode in (0, 3), result.stderr
    return result


def sync(home: Path) -> None:
    from fmnist import sidecar  # scipy comes with it, and takes a second

    assert not [run["error"] for run in sidecar.sync(home, lambda text: None) if run["error"]]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A home with three seeds of a slow and of a fast setting, one run validated on the test images, and a seed that diverged."""
    home = make_home(tmp_path_factory.mktemp("groups"))
    give_store(home, empty_store)
    train(home, *HELD_OUT, "--seeds", "3")
    train(home, *HELD_OUT, "-s", "optimizer.lr=0.05", "--seeds", "0,1,2")
    train(home, *QUICK)
    train(home, *QUICK, "-s", "optimizer.lr=500", "-s", "optimizer.weight_decay=10", "--seeds", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMNIST_HOME", str(home))
        sync(home)
    return home
