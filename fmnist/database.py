"""The local store's SQLite database past MLflow: made whole, checked, moved with its folder, and asked what takes MLflow seconds.

mlflow itself is imported inside `prepare`, after the settings that it reads once at import.
"""

import contextlib
import json
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from fmnist import files
from fmnist import spec as specs
from fmnist.errors import StoreError
from fmnist.journal import Result

PATHS = (
    "experiments.artifact_location",
    "runs.artifact_uri",
    "logged_models.artifact_location",
    "model_versions.storage_location",
)
RECORDED = """
SELECT print.value, coalesce(outcome.value, CASE status WHEN 'FINISHED' THEN 'finished' END), run.run_uuid, accuracy.value FROM runs AS run
JOIN tags AS print ON print.run_uuid = run.run_uuid AND print.key = 'fingerprint'
LEFT JOIN tags AS outcome ON outcome.run_uuid = run.run_uuid AND outcome.key = 'outcome'
LEFT JOIN latest_metrics AS accuracy ON accuracy.run_uuid = run.run_uuid AND accuracy.key = 'last/val_accuracy'
WHERE lifecycle_stage = 'active' ORDER BY start_time
"""
PACES = """
SELECT CAST(seconds.value AS REAL) / last.step FROM runs AS run
JOIN tags AS seconds ON seconds.run_uuid = run.run_uuid AND seconds.key = 'training_s'
JOIN latest_metrics AS last ON last.run_uuid = run.run_uuid AND last.key = 'train/lr' AND last.step > 0
JOIN params AS width ON width.run_uuid = run.run_uuid AND width.key = 'model.hidden' AND width.value = :hidden
JOIN params AS batch ON batch.run_uuid = run.run_uuid AND batch.key = 'train.batch_size' AND batch.value = :batch_size
WHERE lifecycle_stage = 'active' ORDER BY start_time DESC LIMIT 20
"""


def database(root: Path) -> Path:
    return root / "mlruns" / "mlflow.db"


@contextlib.contextmanager
def told(problem: str, remedy: str) -> Iterator[None]:
    """Make one line of whatever MLflow, a database damaged anywhere or a server that answers anything leads to."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        [cause, *_] = str(error).splitlines() or [type(error).__name__]
        raise StoreError(f"{problem}: {specs.redacted(cause)[:300]}; {remedy}") from None


def sqlite(path: Path) -> "contextlib.closing[sqlite3.Connection]":
    """A database past MLflow; it is never created."""
    return contextlib.closing(
        sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=20, isolation_level=None)
    )


def prepare(root: Path) -> None:
    """See to it that there is a local database, whole, which this MLflow can use where it lies now."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    specs.check_folder(root)
    path, artifacts = database(root), root / "mlruns" / "artifacts"
    path.parent.mkdir(parents=True, exist_ok=True)
    # MLflow's own creation is not safe when several processes begin at once
    with files.locked(path.parent / ".lock"):
        if not path.exists():
            partial = path.with_suffix(".db.partial")
            partial.unlink(missing_ok=True)
            SqlAlchemyStore(f"sqlite:///{partial}", str(artifacts)).engine.dispose()
            with sqlite(partial) as connection:
                connection.execute(
                    "PRAGMA journal_mode=WAL"
                )  # it stays with the file: readers and the writer don't wait for each other
            for left in path.parent.glob(
                "mlflow.db-[sw][ah][lm]"
            ):  # by a database that is gone; SQLite would take it for the new one's
                left.rename(f"{left}.old")
            partial.rename(path)
        with sqlite(path) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "DELETE FROM alembic_version WHERE 0"
            )  # fails where nothing can be written, which BEGIN doesn't
            _check_schema(
                path, *connection.execute("SELECT max(version_num) FROM alembic_version").fetchone()
            )
            _relocate(connection, artifacts)
            connection.execute("COMMIT")
        SqlAlchemyStore._get_or_create_engine(
            f"sqlite:///{path}"
        ).dispose()  # it keeps connections by path, to a file that is gone too


def _check_schema(path: Path, found: str) -> None:
    """Refuse the database of another MLflow: an older one would be migrated in place without a word."""
    from mlflow.store.db.utils import ScriptDirectory, _get_alembic_config

    newest, *older = (
        script.revision
        for script in ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions()
    )
    if found in older:
        upgrade = shlex.join([sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{path}"])
        raise StoreError(
            f"{path} is of an older MLflow (schema {found}, not {newest}); make a copy of it, then: {upgrade}"
        )
    if found != newest:
        raise StoreError(
            f"{path} is of a newer MLflow (schema {found}, here {newest}); use the fmnist that wrote it"
        )


def _relocate(connection: sqlite3.Connection, here: Path) -> None:
    """Where mlruns/ was moved or copied, turn the paths in its database to its place now; its oldest experiment tells the former."""
    locations = connection.execute(
        "SELECT artifact_location FROM experiments ORDER BY experiment_id"
    )
    folders = (Path(unquote(location.removeprefix("file://"))).parent for (location,) in locations)
    there = next(
        (
            folder
            for folder in folders
            if folder.is_absolute() and folder.parts[-2:] == here.parts[-2:]
        ),
        here,
    )
    moves = [
        {"old": f"{old}/", "new": f"{new}/"}
        for old, new in ((there, here), (there.as_uri(), here.as_uri()))
        if old != new
    ]
    for table, column in (place.split(".") for place in PATHS):
        changed = f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) WHERE instr({column}, :old) = 1"
        connection.executemany(changed, moves)


def recorded(root: Path) -> dict[str, Result]:
    """Fingerprints of the runs that are finished, diverged or pruned, and what is known of each; raises StoreError where the store can't be asked.

    A store that does not answer may hold every one of them, so that is never taken for none. This process stays without MLflow.
    """
    if specs.tracking_server():
        rows = _recorded_on_server()
    elif database(root).exists():
        with (
            told(f"{database(root)} can't be read", "`fmnist doctor` says more"),
            sqlite(database(root)) as connection,
        ):
            rows = connection.execute(RECORDED).fetchall()
    else:
        rows = []
    counted = (row for row in rows if row[1] in ("finished", "diverged", "pruned"))
    return {
        key: Result(outcome, f"{outcome} already, as run {run_id[:8]}", accuracy)
        for key, outcome, run_id, accuracy in counted
    }


def _recorded_on_server() -> list[tuple[str, str, str, float | None]]:
    """The same columns as RECORDED, of the runs at MLFLOW_TRACKING_URI, by a process that imports MLflow."""
    command = [sys.executable, "-m", "fmnist", "runs", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, errors="replace")
    with told(
        "what is recorded already can't be asked",
        "see that the server answers (`fmnist runs`), and give the same command again",
    ):
        if answer.returncode != 0:
            lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
            raise RuntimeError(lines[-1].removeprefix("fmnist: "))
        return [
            (run["fingerprint"], run["outcome"], run["run_id"], run["val_accuracy"])
            for run in json.loads(answer.stdout)["runs"]
        ]


def seconds_per_step(root: Path, spec: specs.ExperimentSpec) -> float | None:
    """Of training this model at this batch size, the median of the local store's last runs; None where there is none."""
    if not database(root).exists() or specs.tracking_server() is not None:
        return None
    flat = spec.flat()
    with (
        told(f"{database(root)} can't be read", "`fmnist doctor` says more"),
        sqlite(database(root)) as connection,
    ):
        found = connection.execute(
            PACES,
            {"hidden": str(flat["model.hidden"]), "batch_size": str(flat["train.batch_size"])},
        ).fetchall()
    return float(np.median(found)) if found else None
