"""Stores that were moved, deleted, damaged or tampered with: real files, real MLflow; nothing is taken for right that is not."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from conftest import SMALL, command, free_port, make_home, stop_sidecar

from fmnist import database, experiments, tracking
from fmnist.errors import StoreError

pytestmark = pytest.mark.slow
NEWEST = "SELECT version_num FROM alembic_version"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A home with one run in it, made once for this file; each test takes a copy."""

    home: Path
    run_id: str
    model_id: str

    def copy(self, target: Path) -> Path:
        return Path(shutil.copytree(self.home, target, symlinks=True))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    home = make_home(tmp_path_factory.mktemp("first place"))
    result = command(home, *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    stop_sidecar(home)
    run_id = json.loads(result.stdout)["run_id"]
    model_id = tracking.connect(home).client.get_run(run_id).outputs.model_outputs[0].model_id
    with sqlite(home) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    yield Recorded(home, run_id, model_id)
    shutil.rmtree(home)


@pytest.fixture
def place(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recorded home, for one test."""
    copy = recorded.copy(tmp_path / "place")
    monkeypatch.setenv("FMNIST_HOME", str(copy))
    return copy


def sqlite(home: Path) -> "contextlib.closing[sqlite3.Connection]":
    return contextlib.closing(sqlite3.connect(tracking.database(home), isolation_level=None))


def artifacts_of(recorded: Recorded, home: Path) -> Path:
    return home / "mlruns" / "artifacts" / "fashion-mnist" / recorded.run_id / "artifacts"


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(action: Callable[[], object]) -> str:
    """The one line of the StoreError that this raises."""
    with pytest.raises(StoreError) as caught:
        action()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


# ---- moved and copied


def locations(home: Path) -> set[str]:
    """Every artifact path that the database holds."""
    columns = (
        ("experiments", "artifact_location"),
        ("runs", "artifact_uri"),
        ("logged_models", "artifact_location"),
    )
    columns += (("model_versions", "storage_location"),)
    with sqlite(home) as connection:
        return {
            value
            for table, column in columns
            for (value,) in connection.execute(f"SELECT {column} FROM {table}")
        }


@pytest.mark.parametrize("copied", [False, True], ids=["moved", "copied"])
def test_a_store_works_where_its_folder_is_now(
    copied: bool, recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.tracking._tracking_service import utils as mlflow_utils

    before = recorded.copy(tmp_path / "before")
    old = tracking.connect(before)
    identity = old.identity()
    monkeypatch.setattr(
        mlflow_utils, "_tracking_uri", tracking.uri(before)
    )  # the registry looks there for the model
    old.client.create_registered_model("best")
    old.client.create_model_version("best", f"models:/{recorded.model_id}", recorded.run_id)
    foreign = {
        "s3://bucket/mlruns/artifacts/theirs",
        f"file://{tmp_path}/elsewhere/mlruns/artifacts/theirs",
        f"{before.as_uri()}/mlruns/artifacts-too/x",
    }
    for location in foreign:
        old.client.create_experiment(location.replace("/", "-"), artifact_location=location)
    here = tmp_path / "a new place, ümläut & 'quote'"
    if copied:
        shutil.copytree(before, here, symlinks=True)
    else:
        before.rename(here)
    store = tracking.connect(here)
    assert store.identity() == identity
    assert tracking.connect(recorded.home).identity() == identity
    assert store.runs()["run_id"].tolist() == [recorded.run_id]
    names = [name for name in files_below(artifacts_of(recorded, here)) if name != "manifest.json"]
    assert len(names) >= 6
    store.artifacts(recorded.run_id, names, tmp_path / "got")
    assert store.curves(recorded.run_id)["step"].tolist() == list(range(61))
    ours = locations(here) - foreign
    assert (
        len(ours) == 4
    )  # the default experiment's, ours, the run's, the model's; and the registered version's is the model's
    artifacts = here / "mlruns" / "artifacts"
    assert all(
        location.startswith((f"{artifacts}/", f"{artifacts.as_uri()}/")) for location in ours
    )
    assert foreign <= locations(here)
    for experiment in (store.experiment("fashion-mnist"), store.experiment("another"), "0"):
        run_id = store.client.create_run(experiment).info.run_id
        store.client.log_artifacts(run_id, str(tmp_path / "got" / "figures"))
        assert len([*artifacts.glob(f"*/{run_id}/artifacts/learning_curves.png")]) == 1
    monkeypatch.setattr(mlflow_utils, "_tracking_uri", tracking.uri(here))
    if copied:
        shutil.rmtree(before / "mlruns" / "artifacts")
    images = np.zeros((3, 28, 28), "uint8")
    for uri in (f"models:/{recorded.model_id}", "models:/best/1"):
        assert mlflow.pyfunc.load_model(uri).predict(images).shape == (3, 10)
    if copied:
        assert all(
            str(before) in location
            for location in locations(before) - foreign - {"s3://bucket/mlruns/artifacts/theirs"}
        )
    assert (before / "mlruns" / "artifacts").exists() is False


def test_opening_what_was_not_moved_writes_nothing(recorded: Recorded, place: Path) -> None:
    tracking.connect(place)
    with sqlite(place) as connection:
        version = connection.execute("PRAGMA data_version").fetchall()
        tracking.connect(place)
        tracking.connect(place, create=True)
        assert connection.execute("PRAGMA data_version").fetchall() == version


def test_a_store_that_lost_its_default_experiment_can_be_moved(
    recorded: Recorded, tmp_path: Path
) -> None:
    here = recorded.copy(tmp_path / "with a space")
    with sqlite(here) as connection:
        connection.execute("DELETE FROM experiments WHERE experiment_id = 0")  # as `mlflow gc` does
    tracking.connect(here).artifacts(recorded.run_id, ["spec.yaml"], tmp_path / "got")
    assert sum(location.startswith(here.as_uri()) for location in locations(here)) == 3


def test_report_of_a_moved_folder(recorded: Recorded, place: Path) -> None:
    result = command(place, "report", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert not [note for note in report["notes"] if recorded.run_id in note]
    assert (place / "reports" / "overlay.png").exists()


def test_a_folder_whose_name_would_lead_sqlalchemy_elsewhere_is_refused(tmp_path: Path) -> None:
    names = ["50%25", "what?", os.fsdecode(b"latin-\xfc")]
    for name in names:
        (tmp_path / name).mkdir()
        assert "rename the folder" in refused(
            lambda name=name: tracking.connect(tmp_path / name, create=True)
        )
    assert {path.name for path in tmp_path.rglob("*")} == {*names}


def test_such_a_folder_is_refused_before_the_training(tmp_path: Path) -> None:
    for name in ("50%25", "what?", os.fsdecode(b"latin-\xfc"), "it's"):
        (tmp_path / name).mkdir()
        home = make_home(tmp_path / name)
        run = ("run", "baseline", "-s", "train.epochs=1", "-s", "train.batch_size=2000")
        result = command(home, *run)
        if name == "it's":
            assert result.returncode == 0, result.stderr
            stop_sidecar(home)
        else:
            assert (result.returncode, result.stderr.count("\n")) == (2, 1)
            assert "rename the folder" in result.stderr
            assert not list((home / "mlruns").glob("state/*"))


# ---- of no use


def execute(statements: str) -> Callable[[Path], object]:
    def change(database: Path) -> None:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.executescript(statements)

    return change


def before_the_last_migration(database: Path) -> None:
    """Make a store as the MLflow before the last change of its schema would."""
    import sqlalchemy
    from alembic import command as alembic
    from mlflow.store.db.utils import InitialBase, _get_alembic_config

    database.unlink()
    engine = sqlalchemy.create_engine(f"sqlite:///{database}")
    InitialBase.metadata.create_all(engine)
    with engine.begin() as connection:
        config = _get_alembic_config(str(engine.url))
        config.attributes["connection"] = connection
        alembic.upgrade(config, "head-1")
    engine.dispose()


def damage_deep(database: Path) -> None:
    """Zero the start of every page but those that opening by hand would read."""
    content = bytearray(database.read_bytes())
    for page in range(len(content) // 4096 // 2, len(content) // 4096):
        content[page * 4096 : page * 4096 + 200] = bytes(200)
    database.write_bytes(content)


NEWER = execute("UPDATE alembic_version SET version_num = 'f00f00f00f00'")
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer": (NEWER, "newer MLflow"),
    "newer, a table gone": (
        execute("UPDATE alembic_version SET version_num = 'f00f00f00f00'; DROP TABLE webhooks"),
        "newer MLflow",
    ),
    "older": (before_the_last_migration, "mlflow db upgrade"),
    "no database": (lambda path: path.write_text("hello\n" * 1000), "not a database"),
    "empty": (lambda path: path.write_bytes(b""), "restore the file"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "malformed"),
    "head": (lambda path: os.truncate(path, 60), "restore the file"),
    "no schema": (execute("DELETE FROM alembic_version"), "newer MLflow"),
    "another's": (execute("DROP TABLE alembic_version"), "restore the file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "restore the file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_database_of_no_use_is_told_in_one_line_and_left_as_it_is(
    fault: str, place: Path
) -> None:
    change, told = FAULTS[fault]
    database = tracking.database(place)
    change(database)
    before = files_below(place / "mlruns")
    for create in (False, True):
        text = refused(lambda create=create: tracking.connect(place, create=create))
        assert told in text
        assert str(database) in text
    after = files_below(place / "mlruns")
    kept = [name for name in before if not name.endswith(("-wal", "-shm"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_damage_further_in_is_told_in_one_line(recorded: Recorded, place: Path) -> None:
    damage_deep(tracking.database(place))
    text = refused(lambda: tracking.connect(place).runs())
    assert "malformed" in text


def test_the_remedy_for_an_older_store_works(place: Path) -> None:
    before_the_last_migration(tracking.database(place))
    text = refused(lambda: tracking.connect(place))
    subprocess.run(
        shlex.split(text.partition("then: ")[2]), check=True, capture_output=True, cwd=place
    )
    assert tracking.connect(place).runs().empty


@pytest.mark.parametrize("fault", ["newer", "half", "older", "no database"])
def test_commands_tell_it_in_one_line(fault: str, place: Path) -> None:
    FAULTS[fault][0](tracking.database(place))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "fmnist", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in (["report"], ["ui", "--port", str(free_port())])
    ]
    for process in processes:
        output, errors = process.communicate(timeout=100)
        assert (process.returncode, output) == (2, "")
        assert len(errors.splitlines()) == 1, errors
        assert FAULTS[fault][1] in errors
        assert "Traceback" not in errors


AS_NOBODY = """
import os, sys
from pathlib import Path
import alembic.command, mlflow.store.tracking.sqlalchemy_store  # before the change of user: Python may lie where others may not read
from fmnist import tracking
from fmnist.errors import StoreError
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for home in map(Path, sys.argv[1:]):
    for create in (False, True):
        try:
            tracking.connect(home, create)
        except StoreError as error:
            print(home.name, error)
"""


def test_a_store_that_may_not_be_written_is_told_in_one_line(recorded: Recorded) -> None:
    parent = Path(
        tempfile.mkdtemp(prefix="fmnist-readonly-")
    )  # pytest's own folders are closed to other users
    parent.chmod(0o755)
    used: list[sqlite3.Connection] = []

    def use_and_close(mlruns: Path) -> None:
        used.append(sqlite3.connect(mlruns / "mlflow.db"))
        used[0].execute(NEWEST).fetchall()
        for suffix in ("-wal", "-shm"):
            (mlruns / f"mlflow.db{suffix}").chmod(0o666)
        (mlruns / "mlflow.db").chmod(0o444)

    closed: dict[str, Callable[[Path], object]] = {
        "open": lambda mlruns: None,
        "folder": lambda mlruns: ((mlruns / ".lock").unlink(), mlruns.chmod(0o555)),
        "folder-with-lock": lambda mlruns: mlruns.chmod(0o555),
        "database": lambda mlruns: (mlruns / "mlflow.db").chmod(0o444),
        "database-in-use": use_and_close,
        "unreadable": lambda mlruns: (mlruns / "mlflow.db").chmod(0o000),
        "beside": lambda mlruns: (
            (mlruns / "mlflow.db-wal").touch(mode=0o444),
            (mlruns / "mlflow.db-shm").touch(mode=0o444),
        ),
        "closed": lambda mlruns: mlruns.chmod(0o000),
    }
    try:
        for name, close in closed.items():
            mlruns = recorded.copy(parent / name) / "mlruns"
            with sqlite(parent / name) as connection:
                database._relocate(
                    connection, mlruns / "artifacts"
                )  # else every one of them would have to be written to
            for suffix in ("-wal", "-shm"):
                Path(f"{mlruns}/mlflow.db{suffix}").unlink(missing_ok=True)
            for path in [mlruns, *mlruns.rglob("*")]:
                path.chmod(0o777 if path.is_dir() else 0o666)
            close(mlruns)
        arguments = [sys.executable, "-c", AS_NOBODY, *(str(parent / name) for name in closed)]
        environment = {**os.environ, "HOME": str(parent)}
        result = subprocess.run(
            arguments, capture_output=True, text=True, env=environment, cwd=parent
        )
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert [line.split()[0] for line in lines] == [
            name for name in closed if name != "open" for _ in range(2)
        ]
        assert all("make mlruns/ writable for you" in line for line in lines)
    finally:
        used[0].close()
        for name in closed:
            (parent / name / "mlruns").chmod(0o777)
        shutil.rmtree(parent)


# ---- deleted and replaced


def test_a_deleted_or_replaced_database_is_noticed_and_made_anew(
    recorded: Recorded, place: Path, tmp_path: Path
) -> None:
    first = tracking.connect(place)
    assert not first.stale
    for number in range(50):
        first.client.set_tag(recorded.run_id, f"left {number}", "in the write-ahead log" * 10)
    database = tracking.database(place)
    assert Path(f"{database}-wal").stat().st_size > 0
    database.unlink()
    assert first.stale
    second = tracking.connect(place, create=True)
    assert first.stale
    assert not second.stale
    assert second.identity() not in (
        "",
        first_identity := tracking.connect(recorded.home).identity(),
    )
    assert second.runs(status=None).empty
    with sqlite(place) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM tags").fetchall() == [(0,)]
    shutil.copy(tracking.database(recorded.home), tmp_path / "other.db")
    (tmp_path / "other.db").replace(database)
    for suffix in ("-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
    assert second.stale
    third = tracking.connect(place)
    assert (third.stale, third.identity()) == (False, first_identity)
    assert third.runs()["run_id"].tolist() == [recorded.run_id]
    place.rename(tmp_path / "gone")
    assert third.stale


def test_a_server_is_never_stale(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    store = tracking.connect(place)
    tracking.database(place).unlink()
    assert store.stale is False


def test_statistics_of_a_deleted_database_leave_no_empty_one(
    recorded: Recorded, place: Path
) -> None:
    store = tracking.connect(place)
    tracking.database(place).unlink()
    with contextlib.suppress(Exception):
        store.close_run(recorded.run_id, "FINISHED", 1)
    assert not tracking.database(place).exists()


# ---- runs that go on


def test_reopen(recorded: Recorded, place: Path) -> None:
    store = tracking.connect(place)
    store.set_tags(recorded.run_id, {"reason": "the power went"})
    store.close_run(recorded.run_id, "KILLED", 5)
    for _ in range(2):
        store.reopen(recorded.run_id)
        run = store.client.get_run(recorded.run_id)
        assert run.info.status == "RUNNING"
        assert "reason" not in run.data.tags
        assert run.data.tags["kind"] == "run"
    store.close_run(recorded.run_id, "FINISHED", 6)
    run = store.client.get_run(recorded.run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", 6)


def test_a_run_deleted_meanwhile_is_found_and_left_alone(recorded: Recorded, place: Path) -> None:
    store = tracking.connect(place)
    spec = experiments.load("baseline", ["train.seed=7"], place).spec
    arguments = (
        store.experiment("fashion-mnist"),
        "a-key",
        "name",
        1,
        spec,
        {"kind": "run"},
        "0" * 64,
    )
    run_id = store.create_run(*arguments)
    assert store.create_run(*arguments) == run_id
    assert store.client.get_run(run_id).data.params["train.seed"] == "7"
    store.client.delete_run(run_id)
    assert store.create_run(*arguments) == run_id
    assert store.standing(run_id).stage == "deleted"


def test_a_model_begun_and_not_ended_is_made_whole_by_the_next_attempt(
    recorded: Recorded, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    class Module(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :10].float() / 255

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    store = tracking.connect(place)
    experiment = store.experiment("fashion-mnist")
    run_id = store.client.create_run(experiment, tags={"kind": "run"}).info.run_id
    spec = experiments.load("holdout", root=place).spec
    arguments = (
        run_id,
        Module(),
        np.zeros((2, 28, 28), "uint8"),
        3,
        {"last/val_loss": 0.5, "test/loss": 0.6},
        1,
        spec,
        "0" * 64,
    )
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            store.log_model(*arguments)
    store.log_model(*arguments)
    store.log_model(*arguments)
    (model,) = store.client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    assert model.status == "READY"
    assert [output.model_id for output in store.client.get_run(run_id).outputs.model_outputs] == [
        model.model_id
    ]
    found = store.client.get_logged_model(model.model_id).metrics
    assert sorted((metric.key, metric.value, metric.dataset_name) for metric in found) == [
        ("last/val_loss", 0.5, "fashion-mnist-train-held-out"), ("test/loss", 0.6, "fashion-mnist-test"),
    ]  # fmt: skip


# ---- artifacts that are not what was recorded


def positions(size: int) -> list[int]:
    return sorted({int(position) for position in np.linspace(0, size - 1, 20)})


def test_no_damaged_artifact_is_taken_for_right(
    recorded: Recorded, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder, got = tracking.connect(place), artifacts_of(recorded, place), tmp_path / "got"
    whole = files_below(folder)
    assert {
        "spec.yaml",
        "curves.parquet",
        "checkpoint.pt",
        "figures/learning_curves.png",
        "manifest.json",
    } <= set(whole)

    for name, content in whole.items():
        wanted = ["spec.yaml"] if name == "manifest.json" else [name]
        damaged = [content[:position] for position in positions(len(content))]
        damaged += [
            content[:p] + bytes([content[p] ^ 1 << p % 8]) + content[p + 1 :]
            for p in positions(len(content))
        ]
        for changed in damaged:
            (folder / name).write_bytes(changed)
            text = refused(lambda wanted=wanted: store.artifacts(recorded.run_id, wanted, got))
            assert (
                f"run {recorded.run_id}: {name} is not as it was recorded, and not usable; restore it or train again"
                in text
            )
        (folder / name).unlink()
        text = refused(lambda wanted=wanted: store.artifacts(recorded.run_id, wanted, got))
        assert f"run {recorded.run_id}: {name} can't be read: " in text
        assert "restore it or train again" in text
        assert not got.exists()
        (folder / name).write_bytes(content)
    store.artifacts(recorded.run_id, [*whole], got)
    assert files_below(got) == whole


def test_manifest_and_artifact_changed_together_are_noticed(
    recorded: Recorded, place: Path, tmp_path: Path
) -> None:
    store, folder = tracking.connect(place), artifacts_of(recorded, place)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "spec.yaml").write_text("name: mine\n")
    manifest["spec.yaml"] = hashlib.sha256(b"name: mine\n").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    assert "manifest.json is not as it was recorded" in refused(
        lambda: store.artifacts(recorded.run_id, ["spec.yaml"], tmp_path / "got")
    )


def test_what_the_manifest_does_not_name_is_refused(
    recorded: Recorded, place: Path, tmp_path: Path
) -> None:
    store = tracking.connect(place)
    (artifacts_of(recorded, place) / "extra.txt").write_text("x")
    for name in ("extra.txt", "figures", "../fashion-mnist", "/etc/hostname", "..", ""):
        refused(
            lambda name=name: store.artifacts(
                recorded.run_id, ["spec.yaml", name], tmp_path / "got"
            )
        )
    refused(lambda: store.artifacts("0" * 32, ["spec.yaml"], tmp_path / "got"))
    assert not (tmp_path / "got").exists()


def test_curves_are_verified_and_a_run_without_a_manifest_has_none(
    recorded: Recorded, place: Path
) -> None:
    store, path = tracking.connect(place), artifacts_of(recorded, place) / "curves.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-500] + bytes([content[-500] ^ 1]) + content[-499:])
    assert "curves.parquet is not as it was recorded" in refused(
        lambda: store.curves(recorded.run_id)
    )
    path.write_bytes(content)
    assert len(store.curves(recorded.run_id)) == 61
    store.client.delete_tag(recorded.run_id, "manifest_sha256")
    refused(lambda: store.curves(recorded.run_id))
    running = store.client.create_run(store.experiment("fashion-mnist")).info.run_id
    assert running in refused(lambda: store.curves(running))


# ---- a server that means harm

EVIL = b"evil"
RUN = "a" * 32


class Foreign(ThreadingHTTPServer):
    """Answers MLflow's calls for a run and its artifacts as a test tells it to."""

    daemon_threads = True

    def __init__(
        self,
        names: list[str],
        is_dir: bool = False,
        artifact_uri: str = f"mlflow-artifacts:/1/{RUN}/artifacts",
    ) -> None:
        self.names, self.is_dir, self.artifact_uri, self.page = names, is_dir, artifact_uri, b""
        self.manifest = json.dumps(
            {name: hashlib.sha256(EVIL).hexdigest() for name in names}
        ).encode()
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def run(self) -> dict:
        info = {
            "run_id": RUN,
            "run_uuid": RUN,
            "experiment_id": "1",
            "status": "FINISHED",
            "lifecycle_stage": "active",
        }
        tags = [{"key": "manifest_sha256", "value": hashlib.sha256(self.manifest).hexdigest()}]
        return {
            "run": {"info": {**info, "artifact_uri": self.artifact_uri}, "data": {"tags": tags}}
        }


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        listing = parse_qs(url.query).get("path")
        if self.server.page:
            self.answer(self.server.page, 404)
        elif url.path.endswith("/runs/get"):
            self.answer(json.dumps(self.server.run).encode())
        elif url.path.endswith("/mlflow-artifacts/artifacts"):
            files = [] if listing and listing[0].endswith("manifest.json") else self.server.names
            self.answer(
                json.dumps(
                    {
                        "files": [
                            {"path": name, "is_dir": self.server.is_dir, "file_size": 4}
                            for name in files
                        ]
                    }
                ).encode()
            )
        elif "/mlflow-artifacts/artifacts/" in url.path:
            self.answer(self.server.manifest if url.path.endswith("manifest.json") else EVIL)
        else:
            self.answer(b"{}")

    do_POST = do_GET

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(
    server: Foreign, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tracking.Store]:
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    try:
        yield tracking.connect(home)
    finally:
        server.shutdown()
        server.server_close()


def test_the_foreign_server_is_believed_where_it_means_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Foreign(["fair.txt"]), tmp_path, monkeypatch) as store:
        assert files_below(store.download(RUN, "figures", tmp_path / "got")) == {"fair.txt": EVIL}
    server = Foreign(["fair.txt"])
    with serving(server, tmp_path, monkeypatch) as store:
        server.names = []
        store.artifacts(RUN, ["fair.txt"], tmp_path / "verified")
    assert files_below(tmp_path / "verified") == {
        "fair.txt": EVIL,
        "manifest.json": server.manifest,
    }


def test_no_name_from_a_server_leads_outside_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.chdir(outside)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    names = [
        "../../evil.txt",
        "../evil.txt",
        "figures/../../../evil.txt",
        f"{outside}/evil.txt",
        f"file://{outside}/evil.txt",
        "/evil.txt",
    ]
    names += [
        "%2e%2e/%2e%2e/evil.txt",
        "..%2f..%2fevil.txt",
        "%252e%252e/%252e%252e/evil.txt",
        "..",
        "x/../../..",
    ]
    for is_dir in (False, True):
        for number, name in enumerate(names):
            (tmp_path / "temporary").mkdir()
            folder = tmp_path / f"wanted-{is_dir}-{number}" / "into" / "here"
            with serving(Foreign([name], is_dir), tmp_path, monkeypatch) as store:
                refused(lambda: store.download(RUN, "figures", folder))  # noqa: B023
                refused(lambda: store.artifacts(RUN, [name], folder))  # noqa: B023
                refused(lambda: store.artifacts(RUN, ["figures"], folder))  # noqa: B023
            shutil.rmtree(tmp_path / "temporary")
            shutil.rmtree(folder, ignore_errors=True)
            found = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert not found, name
            assert not list(tmp_path.rglob("evil*")), name


def test_no_name_leads_outside_the_folder_even_if_mlflow_took_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(_: tracking.Store, __: str, name: str, into: Path) -> Path:
        (into / "taken").write_bytes(server.manifest if name == "manifest.json" else EVIL)
        return into / "taken"

    monkeypatch.setattr(tracking.Store, "download", take)
    for name in ("../../evil.txt", f"{tmp_path}/outside/evil.txt", "x/../../evil.txt"):
        server = Foreign([name])
        with serving(server, tmp_path, monkeypatch) as store:
            refused(lambda: store.artifacts(RUN, [name], tmp_path / "into" / "here"))  # noqa: B023
    assert not files_below(tmp_path)


def test_nonsense_from_a_server_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uri in ("s3://bucket/x", "ftp://127.0.0.1:9/x", "nonsense://x", ""):
        with serving(Foreign(["fair.txt"], artifact_uri=uri), tmp_path, monkeypatch) as store:
            refused(lambda: store.download(RUN, "figures", tmp_path / "got"))
            refused(lambda: store.artifacts(RUN, ["fair.txt"], tmp_path / "got"))
    for manifest in (b"[1]", b"", b"\xff\xfe", b"[" * 100_000, b'{"figures": 1}', b"null"):
        server = Foreign([])
        server.manifest = manifest
        with serving(server, tmp_path, monkeypatch) as store:
            refused(lambda: store.artifacts(RUN, ["figures"], tmp_path / "got"))
    server = Foreign([])
    server.page = b"<html>\nNo such page\n</html>"
    with serving(server, tmp_path, monkeypatch) as store:
        assert "404" in refused(store.runs)
        assert "404" in refused(lambda: store.artifacts(RUN, ["figures"], tmp_path / "got"))
    assert not files_below(tmp_path)


# ---- a model that means harm


class Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.makedirs, (self.folder, 0o777, True)


LOAD = """
import json, shutil, sys
from pathlib import Path
import mlflow
bait, told = Path(sys.argv[1]), {}
for uri in sys.argv[2:]:
    for load in (mlflow.pyfunc.load_model, mlflow.pytorch.load_model):
        error = ""
        try:
            load(uri)
        except Exception as failure:
            error = str(failure)
        told[f"{load.__module__} {uri}"] = [error, bait.exists()]
        shutil.rmtree(bait, ignore_errors=True)
print(json.dumps(told))
"""


def put_bait_in_sample_inputs(archive: Path, bait: bytes) -> None:
    changed = archive.with_suffix(".new")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(changed, "w") as new:
        assert sum("sample_inputs" in record.filename for record in old.infolist()) == 1
        for record in old.infolist():
            new.writestr(record, bait if "sample_inputs" in record.filename else old.read(record))
    changed.replace(archive)


def test_a_model_that_would_unpickle_code_is_refused(
    recorded: Recorded, place: Path, tmp_path: Path
) -> None:
    import mlflow.pytorch
    import torch

    store, folder = tracking.connect(place), tmp_path / "sprung"
    bait = pickle.dumps(Bait(folder))
    model = (
        place
        / "mlruns"
        / "artifacts"
        / "fashion-mnist"
        / "models"
        / recorded.model_id
        / "artifacts"
    )
    put_bait_in_sample_inputs(model / "data" / "model.pt2", bait)
    mlflow.pytorch.save_model(
        torch.nn.Linear(1, 1),
        tmp_path / "pickled",
        serialization_format="pickle",
        pip_requirements=[],
    )
    (tmp_path / "pickled" / "data" / "model.pth").write_bytes(bait)
    pickled = store.client.create_logged_model(
        store.experiment("fashion-mnist"), "pickled"
    ).model_id
    store.client.log_model_artifacts(pickled, str(tmp_path / "pickled"))
    store.client.finalize_logged_model(pickled, "READY")
    uris = [f"models:/{recorded.model_id}", f"models:/{pickled}"]
    environment = {**os.environ, **tracking.SETTINGS, "MLFLOW_TRACKING_URI": tracking.uri(place)}

    def load(**settings: str) -> dict[str, tuple[str, bool]]:
        arguments = [sys.executable, "-c", LOAD, str(folder), *uris]
        result = subprocess.run(
            arguments, capture_output=True, text=True, env={**environment, **settings}, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    for name, (error, sprung) in load().items():
        assert "pickle is disallowed" in error, name
        assert not sprung, name
    unprotected = load(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="true")
    assert len(unprotected) == 4
    assert all(sprung for _, sprung in unprotected.values()), (
        unprotected
    )  # else the bait proves nothing
