"""Kill -9 trainers and sidecars at random moments until their runs are done, and compare every result with an unbroken run's.

    make soak                                                   # 300 kills, at least 30 in each phase; some 40 minutes on 2 cores
    python benchmarks/survival.py --kills 20 --per-phase 2 --harms 1    # the short form

The phase of a kill is read from the state folder behind it. A result is whole when every curve, evaluation, weight, prediction and
figure of it has the unbroken run's bits and MLflow holds every point once.

Then harm of three other kinds is done to interrupted and complete runs (--harms of each): the database is put back from a copy that
was made before the run, the whole home is copied and continued in both places, and a bit is flipped in a file of a state folder.
After each, the points that the journal held are in the store, or the journal is still on disk. Exit 1 if anything is not as said.
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

from fmnist import checkpoint, journal, state, tracking
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

    def start(self, *more: str) -> "subprocess.Popen[bytes]":
        arguments = ["run", "baseline", "--json", *(f"--set={override}" for override in SPEC)]
        arguments += more
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


# ---- other harm


def interrupted(
    home: Home, known: set[str], prepare: Callable[[], object] = lambda: None
) -> StateFolder:
    """A run that was killed midway, and no process at work on it; `prepare` is done before it begins.

    Runs that end before they are killed are recorded, and become `known`.
    """
    for _ in range(20):
        prepare()
        began, trainer = time.time(), home.start()
        kill_in(home, "segment", trainer, began)
        trainer.wait()
        end_uploader(home)
        if (folder := home.state()) is not None and folder.resumable:
            return folder
        sync()
        known |= set(tracking.connect(home.folder).runs(status=None)["run_id"])
    raise AssertionError("no run was killed midway in 20 tries")


def end_uploader(home: Home) -> None:
    lock = carrier_lock(home.folder)
    while is_locked(lock):
        state.end_uploader(lock)
        time.sleep(0.05)


def journalled(folder: StateFolder) -> set[tuple[str, int, float]]:
    """The points that a journal holds."""
    spec, (records, _) = folder.spec, journal.read(folder.path / "journal")
    found = (point for record in records for point in journal.points(spec, record))
    return {(point.key, point.step, point.value) for point in found}


def is_kept(home: Path, name: str, points: set[tuple[str, int, float]]) -> bool:
    """Whether a run is on this disk, or one in the store holds these points of it: what must be so whatever happens."""
    if any((state_folder(home) / each).exists() for each in (name, f".removed-{name}")):
        return True
    stored = collections.defaultdict(set)
    with contextlib.closing(sqlite3.connect(tracking.database(home))) as connection:
        for run_id, *point in connection.execute("SELECT run_uuid, key, step, value FROM metrics"):
            stored[run_id].add(tuple(point))
    return any(points <= found for found in stored.values())


def copy_of(home: Home) -> Home:
    """A copy of the home as it is, to be removed by who asked for it."""
    into = home.folder.with_name(f"{home.folder.name}-copy")
    # by another process: to close a file that was read here drops SQLite's locks on it, and with
    # them what keeps others from removing the log that this process's connections still read
    subprocess.run(["cp", "-a", home.folder, into], check=True)
    copied = Home.__new__(Home)
    copied.folder, copied.random = into, home.random
    os.environ["FMNIST_HOME"] = str(into)
    return copied


def sync() -> None:
    subprocess.run([sys.executable, "-m", "fmnist", "sync"], capture_output=True)


def new_run(home: Home, known: set[str], whole: dict[str, object]) -> list[str]:
    """Let the run be done that is on disk, and tell what is wrong with the one that the store has gained."""
    folder = home.state()
    if folder is not None and not folder.resumable:
        folder.assign("local")
        sync()
    else:
        run_until_done(home, lambda: None, lambda phase: None)
    runs = tracking.connect(home.folder).runs(status=None)
    gained = sorted(set(runs["run_id"]) - known)
    if len(gained) != 1:
        return [f"{len(gained)} runs more, not one"]
    return faults(result(home, gained[0]), whole)


def put_back(home: Home, known: set[str], whole: dict[str, object]) -> list[str]:
    """Put the database back from a copy that was made before the run, then go on with it."""
    before, database = home.folder / "before.db", tracking.database(home.folder)

    def copy() -> None:
        before.unlink(missing_ok=True)
        back_up(database, before)

    folder = interrupted(home, known, copy)
    points = journalled(folder)
    if home.random.random() < 0.5:
        back_up(before, database)
    else:
        for left in database.parent.glob("mlflow.db-*"):
            left.unlink()
        before.replace(database)
    wrong = new_run(home, known, whole)
    kept = is_kept(home.folder, folder.path.name, points)
    return wrong if kept else [*wrong, "points are in no store and not on disk"]


def back_up(source: Path, target: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(source)) as here,
        contextlib.closing(sqlite3.connect(target)) as there,
    ):
        here.backup(there)


def copy_home(home: Home, known: set[str], whole: dict[str, object]) -> list[str]:
    """Copy the home of an interrupted run, and go on in both."""
    interrupted(home, known)
    copied = copy_of(home)
    try:
        wrong = [f"in the copy: {each}" for each in new_run(copied, known, whole)]
        end_uploader(copied)
    finally:
        os.environ["FMNIST_HOME"] = str(home.folder)
        shutil.rmtree(copied.folder)
    return wrong + new_run(home, known, whole)


def flip(home: Home, known: set[str], whole: dict[str, object]) -> list[str]:
    """Flip a bit in each file of a copied state folder in turn, and have the same command and `sync` meet it."""
    if complete := home.random.random() < 0.5:
        home.start("--no-sync").wait()
    folder = home.state() if complete else interrupted(home, known)
    assert folder is not None
    points, wrong = journalled(folder), []
    for name in sorted(path.name for path in folder.path.iterdir() if path.stat().st_size):
        copied = copy_of(home)
        try:
            path = state_folder(copied.folder) / folder.path.name / name
            content = bytearray(path.read_bytes())
            bit = home.random.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            if not complete:
                copied.start().wait(timeout=300)
                end_uploader(copied)
            sync()
            if not is_kept(copied.folder, folder.path.name, points):
                wrong.append(f"bit {bit} of {name}: points are in no store and not on disk")
        finally:
            os.environ["FMNIST_HOME"] = str(home.folder)
            shutil.rmtree(copied.folder)
    return wrong + new_run(home, known, whole)


# ---- the soak


def work(
    folder: str,
    seed: int,
    kills: "multiprocessing.managers.DictProxy[str, int]",
    lock: object,
    goal: tuple[int, int],
    harms: int,
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
    for harm in (put_back, copy_home, flip):
        for _ in range(harms):
            end_uploader(home)
            known = set(tracking.connect(home.folder).runs(status=None)["run_id"])
            results.append([f"{harm.__name__}: {each}" for each in harm(home, known, whole)])
            print(f"{harm.__name__}: {results[-1] or 'nothing lost'}", flush=True)
    if (pid := home.sidecar()) is not None:
        os.kill(pid, signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--per-phase", type=int, default=30)
    parser.add_argument("--harms", type=int, default=3, help="of each kind, in each worker")
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
                    args=(
                        str(home),
                        arguments.seed + number,
                        kills,
                        lock,
                        goal,
                        arguments.harms,
                        results,
                    ),
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
