"""Kill -9 trainers and sidecars at random moments until their runs are done, and compare every result with an unbroken run's.

    make soak                                                   # 300 kills, at least 30 in each phase; some 40 minutes on 2 cores
    python benchmarks/survival.py --kills 20 --per-phase 2      # the short form

The phase of a kill is read from the state folder behind it. A result is whole when every curve, evaluation, weight, prediction and
figure of it has the unbroken run's bits and MLflow holds every point once. Exit 1 if one is not.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fmnist import checkpoint, tracking
from fmnist import spec as specs
from fmnist.state import (
    StateFolder,
    carrier_lock,
    holder,
    is_locked,
    state_folder,
    state_folders,
)

REPOSITORY = Path(__file__).resolve().parent.parent
SPEC = ["data.holdout=1000", "model.hidden=[32]", "train.epochs=3", "train.eval_every=200"]
# The command itself, but for how often it saves: a run of seconds is to have dozens of checkpoints to be hit.
COMMAND = "from fmnist import cli, training; training.CHECKPOINT_S, training.CHECKPOINT_SHARE = 0.05, 0; cli.main()"
PHASES = ("start-up", "segment", "checkpoint", "store", "end")
FIGURES = ("figures/learning_curves.png", "figures/confusion_matrix.png")


class Home:
    """A folder with a store in which the same spec is run again and again."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        shutil.copytree(REPOSITORY / "experiments", folder / "experiments")
        (folder / "data").symlink_to(REPOSITORY / "data")
        os.environ["FMNIST_HOME"] = str(folder)

    def start(self) -> "subprocess.Popen[bytes]":
        arguments = ["run", "baseline", "--json", *(f"--set={override}" for override in SPEC)]
        with open(self.folder / "trainer.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", COMMAND, *arguments], stdout=log, stderr=log
            )

    def state(self) -> StateFolder | None:
        folders = state_folders(self.folder)
        return folders[-1] if folders else None

    def path(self) -> Path | None:
        """Where that folder is; cheap enough to ask a thousand times a second beside what is measured."""
        with contextlib.suppress(OSError):
            names = [
                name for name in os.listdir(state_folder(self.folder)) if not name.startswith(".")
            ]
            return state_folder(self.folder) / names[-1] if names else None
        return None

    def sidecar(self) -> int | None:
        lock = carrier_lock(self.folder)
        found = holder(lock) if is_locked(lock) else None
        return found.pid if found else None

    def wait(
        self,
        trainer: "subprocess.Popen[bytes]",
        condition: Callable[[], object],
        seconds: float = 60,
    ) -> bool:
        """Whether it came true before the trainer ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if trainer.poll() is not None:
                return False
            time.sleep(0.0003)
        return False


def behind(state: StateFolder | None) -> bool:
    """Whether the journal holds more than its carrier has noted as sent."""
    if state is None or not state.path.exists():
        return False
    with contextlib.suppress(OSError):
        return (
            bool(state.carried)
            and state.carried.get("offset", 0) < (state.path / "journal").stat().st_size
        )
    return False


def kill_in(
    home: Home, target: str, trainer: "subprocess.Popen[bytes]", began: float
) -> str | None:
    """Wait for a random moment in a phase, kill, and tell in which phase that was; None where the run was faster."""
    victim, pause = "trainer", home.random.uniform(0, 0.3)

    def new(name: str) -> bool:
        path = home.path()
        with contextlib.suppress(OSError):
            return path is not None and (path / name).stat().st_mtime >= began
        return False

    if target == "start-up":
        time.sleep(home.random.uniform(0, 3.5))
    elif target == "segment":
        home.wait(trainer, lambda: new("journal"))
        time.sleep(home.random.uniform(0, 1.5))
    elif target == "checkpoint":
        home.wait(trainer, lambda: new("journal"))
        time.sleep(pause)
        home.wait(trainer, lambda: new("checkpoint.pt.partial"))
        time.sleep(home.random.uniform(0, 0.002))
    elif target == "store":
        victim = "sidecar"
        home.wait(trainer, lambda: home.sidecar() and behind(home.state()))
        time.sleep(home.random.uniform(0, 0.05))
    else:
        victim = home.random.choice(("trainer", "sidecar"))
        home.wait(trainer, lambda: new("predictions.npz"))
        time.sleep(pause if victim == "sidecar" else pause / 10)
    pid = trainer.pid if victim == "trainer" else home.sidecar()
    if pid is None or trainer.poll() is not None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if victim == "trainer":
        trainer.wait()
    return phase_of(home.state(), victim, began)


def phase_of(state: StateFolder | None, victim: str, began: float) -> str:
    """Where a process was when it was killed, by what it left."""
    if state is None:
        return "start-up"
    if not state.path.exists():  # closed in MLflow meanwhile
        return "end"
    files: dict[str, float] = {}
    for name in ("checkpoint.pt.partial", "predictions.npz", "journal"):
        with contextlib.suppress(FileNotFoundError):
            files[name] = (state.path / name).stat().st_mtime
    if victim == "trainer" and files.get("checkpoint.pt.partial", 0) >= began:
        return "checkpoint"
    if files.get("predictions.npz", 0) >= began:
        return "end"
    if victim == "sidecar":
        return "store" if behind(state) else "idle sidecar"
    return "segment" if files.get("journal", 0) >= began else "start-up"


def can_go_on(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return StateFolder.at(path).resumable
    return False  # its sidecar has taken it away


def run_until_done(
    home: Home, wanted: Callable[[], str | None], count: Callable[[str], None]
) -> None:
    """One run: started, killed and started again while kills are wanted (of this run at most 30), then left to finish."""
    begun: Path | None = None
    for attempt in range(40):
        began, trainer = time.time(), home.start()
        if begun is not None:
            (begun / "checkpoint.pt.partial").unlink(missing_ok=True)
        target = wanted() if attempt < 30 else None
        if target is not None and (hit := kill_in(home, target, trainer, began)) is not None:
            count(hit)
        if trainer.wait(timeout=300) == 0:
            return
        begun = home.path() or begun
        if begun is not None and not can_go_on(begun):  # it was killed behind its end
            subprocess.run(
                [sys.executable, "-m", "fmnist", "sync"], check=True, capture_output=True
            )
            return
    raise AssertionError(
        f"a run did not get done: {(home.folder / 'trainer.log').read_text()[-2000:]}"
    )


# ---- what came out


def result(home: Home, run_id: str) -> dict[str, object]:
    """All of a finished run that must not depend on how it came about."""
    store = tracking.connect(home.folder)
    with tempfile.TemporaryDirectory() as into:
        names = ("curves.parquet", "predictions.parquet", "checkpoint.pt", "spec.yaml", *FIGURES)
        store.artifacts(run_id, names, Path(into))
        curves = pd.read_parquet(Path(into) / "curves.parquet").drop(columns="elapsed_s")
        spec = store_spec(Path(into))
        state = checkpoint.load(Path(into) / "checkpoint.pt", spec)
        figures = [hashlib.sha256((Path(into) / name).read_bytes()).hexdigest() for name in FIGURES]
        predictions = pd.read_parquet(Path(into) / "predictions.parquet")
    with contextlib.closing(sqlite3.connect(tracking.database(home.folder))) as connection:
        rows = connection.execute(
            "SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY key, step, value",
            (run_id,),
        )
        points = rows.fetchall()
    run = store.client.get_run(run_id)
    return {
        "status": run.info.status,
        "points": points,
        "curves": curves,
        "state": state,
        "predictions": predictions,
        "figures": figures,
    }


def store_spec(folder: Path) -> specs.ExperimentSpec:
    from fmnist import experiments

    return experiments.parse((folder / "spec.yaml").read_text(), "spec.yaml")


def faults(found: dict[str, object], whole: dict[str, object]) -> list[str]:
    """In what a result differs from the unbroken run's."""
    wrong = []
    lost, doubled = collections.Counter(whole["points"]), collections.Counter(found["points"])
    if missing := lost - doubled:
        wrong.append(f"{missing.total()} points lost, as {next(iter(missing))}")
    if more := doubled - lost:
        wrong.append(f"{more.total()} points too many, as {next(iter(more))}")
    for name in ("curves", "predictions"):
        a, b = found[name], whole[name]
        if list(a) != list(b) or any(
            not np.array_equal(a[column], b[column], equal_nan=a[column].dtype.kind == "f")
            for column in a
        ):
            wrong.append(name)
    a, b = found["state"], whole["state"]
    same_buffers = all(torch.equal(a["buffers"][name], b["buffers"][name]) for name in b["buffers"])
    if (
        a["step"] != b["step"]
        or not torch.equal(a["parameters"], b["parameters"])
        or not same_buffers
    ):
        wrong.append("weights")
    return wrong + [name for name in ("status", "figures") if found[name] != whole[name]]


# ---- the soak


def work(
    folder: str,
    seed: int,
    kills: "multiprocessing.managers.DictProxy[str, int]",
    lock: object,
    goal: tuple[int, int],
    results: list,
) -> None:
    home = Home(Path(folder), seed)
    total, per_phase = goal

    def wanted() -> str | None:
        with lock:
            short = [phase for phase in PHASES if kills.get(phase, 0) < per_phase]
            if not short and sum(kills.values()) >= total:
                return None
        return home.random.choice(
            short or ("start-up", "segment", "checkpoint")
        )  # those that cost no start of MLflow

    def count(phase: str) -> None:
        with lock:
            kills[phase] = kills.get(phase, 0) + 1

    known: set[str] = set()
    run_until_done(home, lambda: None, count)
    whole = None
    while True:
        runs = tracking.connect(home.folder).runs(status=None)
        (run_id,) = set(runs["run_id"]) - known
        known.add(run_id)
        found = result(home, run_id)
        if whole is None:
            whole = found
        else:
            results.append(faults(found, whole))
            print(
                f"{dict(kills)} {len(results)} runs: {'equal' if not results[-1] else results[-1]}",
                flush=True,
            )
        if wanted() is None:
            break
        run_until_done(home, wanted, count)
    if (pid := home.sidecar()) is not None:
        os.kill(pid, signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--per-phase", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Manager() as manager:
        kills, results, lock = manager.dict(), manager.list(), manager.Lock()
        goal = (arguments.kills, arguments.per_phase)
        workers = []
        for number in range(arguments.workers):
            home = Path(folder) / str(number)
            home.mkdir()
            workers.append(
                context.Process(
                    target=work,
                    args=(str(home), arguments.seed + number, kills, lock, goal, results),
                )
            )
            workers[-1].start()
        for worker in workers:
            worker.join()
        bad = [wrong for wrong in results if wrong]
        total = sum(kills.values())
        print(json.dumps({"kills": total, **kills, "runs": len(results), "not equal": len(bad)}))
        if not bad and total:
            print(
                f"{total} kills without a fault: at 95 % confidence, fewer than {100 * (1 - 0.05 ** (1 / total)):.2f} % of kills do harm"
            )
        print(
            f"{time.monotonic() - began:.0f} s; {bad or 'every result equal to the unbroken run'}"
        )
        sys.exit(1 if bad or any(worker.exitcode for worker in workers) else 0)


if __name__ == "__main__":
    main()
