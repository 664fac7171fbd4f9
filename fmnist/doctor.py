"""What `fmnist doctor` looks at: the environment, the data, the store, runs that stopped and runs that are not in MLflow yet."""

import contextlib
import importlib.metadata
import re
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmnist import data, database, state, tracking
from fmnist import spec as specs
from fmnist.errors import UserError
from fmnist.journal import Recorded, read
from fmnist.state import StateFolder, is_locked, state_folder, state_folders

if TYPE_CHECKING:
    import pandas as pd

FREE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Finding:
    what: str
    remedy: str | None = None  # what to do; None where all is well


def findings(root: Path, deep: bool = False) -> Iterator[Finding]:
    """Everything there is to say, sound things first within each part; `deep` reads every file that is stored of a run."""
    yield from _environment(Path(__file__).parent.parent)
    faults = data.faults(root)
    yield from (Finding(f"data: {name} is {fault}", "make data") for name, fault in faults.items())
    if not faults:
        yield Finding("data: 4 files, SHA-256 as published")
    free = shutil.disk_usage(root).free
    yield Finding(
        f"disk: {free / 1e9:.1f} GB free",
        None if free > FREE_BYTES else "make room: a run of 20 epochs takes 25 MB",
    )
    yield from _store(root, deep)
    yield from (Finding(fault.what, fault.remedy) for fault in state.faults(root))
    yield from map(describe, state_folders(root))
    for path in state_folder(root).glob(".*"):
        if not is_locked(path / "lock"):
            yield Finding(f"left over by a process that was killed: {path}", f"rm -r {path}")


def _environment(repository: Path) -> Iterator[Finding]:
    lock = repository / "requirements.lock"
    if not lock.exists():
        return
    pins = set(
        re.findall(
            r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock.read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    locked = {name for name, _ in pins}  # some have several pins, for one Python or another
    installed = {
        distribution.name.lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
    }
    wrong = sorted(
        f"{name} {version}"
        for name, version in installed.items()
        if name in locked and (name, version) not in pins
    )
    absent = [
        name for name in ("torch", "mlflow-skinny", "pandas", "matplotlib") if name not in installed
    ]
    if wrong or absent:
        yield Finding(
            f"environment: not as requirements.lock has it: {', '.join(wrong + absent)}",
            "make clean setup",
        )
    else:
        yield Finding(
            f"environment: {len(locked)} packages, none off its version in requirements.lock"
        )


def _store(root: Path, deep: bool) -> Iterator[Finding]:
    if server := specs.tracking_server():
        yield Finding(f"store: {specs.redacted(server)}")
    elif not database.database(root).exists():
        yield Finding("store: none yet, the first run makes it")
        return
    try:
        store = tracking.connect(root)
        runs = store.runs(status=None)
        if store.local:
            with contextlib.closing(sqlite3.connect(database.database(root))) as connection:
                damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                remedy = "restore it from a copy, or move it away: the next run makes a new one"
                yield Finding(f"store: {database.database(root)} is damaged: {damage}", remedy)
        known = [folder.carried.get("run_id") for folder in state_folders(root)]
        for _, run in runs[(runs["status"] == "RUNNING") & ~runs["run_id"].isin(known)].iterrows():
            what = f"store: run {run['run_id']} ({run['name']}) says RUNNING; nothing of it is on this disk"
            yield Finding(what, "if no other machine trains it, delete it in MLflow")
        for run in store.half_written():
            kind, name = run.data.tags["kind"], run.info.run_name
            what = f"store: the run of {kind} {name} says RUNNING: who wrote it was killed, or is still at it"
            sweep = run.data.tags.get("sweep")
            yield Finding(what, "fmnist sync" if kind == "group" else f"fmnist sweep {sweep}")
        for folder in state_folders(root):
            run_id = folder.carried.get("run_id")
            here = folder.run["store"] in (None, specs.store_name())
            if here and run_id and store.standing(run_id).stage is None:
                yield Finding(
                    f"{folder.path.name}: its run {run_id[:8]} is not in the store any more",
                    "fmnist sync  (it uploads all of it again)",
                )
        yield Finding(f"store: {len(runs)} runs")
        if deep:
            yield from _files(store, runs)
    except UserError as error:
        yield Finding("store: can't be used", str(error))
    except Exception as error:  # a server has many ways to fail
        yield Finding(
            "store: can't be used", specs.redacted((str(error) or repr(error)).splitlines()[0])
        )


def _files(store: tracking.Store, runs: "pd.DataFrame") -> Iterator[Finding]:
    """What is wrong with the artifacts and models of the runs that have ended."""
    noted = runs["t/manifest_sha256"].notna() if "t/manifest_sha256" in runs else False
    whole = 0
    for run_id in runs.loc[(runs["status"] == "FINISHED") | noted, "run_id"]:
        try:
            store.verify(run_id)
            whole += 1
        except UserError as error:
            what, _, remedy = str(error).rpartition("; ")
            yield Finding(f"store: {what}", remedy)
    yield Finding(f"store: artifacts and model of {whole} runs, SHA-256 as recorded")


def describe(folder: StateFolder) -> Finding:
    """Where a run that is on disk stands, and what can be done about it."""
    name, note = folder.path.name, folder.carried
    step = Recorded(read(folder.path / "journal")[0]).last
    try:
        where = f"at step {step:,} of {folder.spec.steps:,}"
    except (UserError, OSError) as error:
        return Finding(
            f"{name}: can't be read: {error}",
            f"restore its spec.yaml, or give the run up: rm -r {folder.path}",
        )
    if folder.running:
        return Finding(f"{name}: being trained by {folder.holder}, {where}")
    if folder.resumable:
        return Finding(
            f"{name}: interrupted {where}",
            f"fmnist run --resume {name}  (or give it up: rm -r {folder.path})",
        )
    trouble = f" ({note['error']})" if note.get("error") else ""
    return Finding(f"{name}: ended, not all of it in MLflow{trouble}", "fmnist sync")
