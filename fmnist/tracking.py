"""All of MLflow: the store, what is written of a run, what is read back. Nothing else imports mlflow, and this never imports torch.

mlflow itself is imported inside `connect`, after the settings that it reads once at import.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import shutil
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import unquote

import numpy as np

from fmnist import files, models
from fmnist import spec as specs
from fmnist.database import database, prepare, sqlite, told
from fmnist.errors import StoreError, UserError
from fmnist.journal import Point

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the sidecar tries again by itself, and tells what is wrong meanwhile
    "GIT_PYTHON_REFRESH": "quiet",
}
BATCH = 1_000
"""MLflow's limit of metrics in a request; a point costs 80 times less so than alone."""
PAGE = 1_000
DIGEST = 36
"""MLflow's limit of a dataset's digest, in characters."""
EXPERIMENT_TAGS = {
    "mlflow.note.content": "Runs of fmnist: one MLP on Fashion-MNIST, every training step logged. Compare `val/accuracy` by step; "
    "`best/*`, `last/*` and `test/*` are single values. `group` is shared by runs that differ in their seed alone.",
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "last/val_accuracy",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "true",
}
VIEW = "results"  # of MLflow's list of runs: its own shows no metric
VIEW_TAG = {
    f"mlflow.sharedViewState.{VIEW}": json.dumps(
        {
            "selectedColumns": [
                *(
                    f"metrics.`{key}`"
                    for key in (
                        "last/val_accuracy",
                        "last/val_accuracy_std",
                        "last/val_loss",
                        "test/accuracy",
                    )
                ),
                *(f"params.`{key}`" for key in ("optimizer.lr", "train.epochs")),
                *(f"tags.`{key}`" for key in ("n", "outcome")),
            ],
            "orderByKey": "attributes.start_time",
            "orderByAsc": False,
        }
    )
}
INFO = {key: key for key in ("run_id", "experiment_id", "status")} | {
    "name": "run_name",
    "start": "start_time",
    "end": "end_time",
}
CURVES = ["train/loss", "train/accuracy", "train/lr", "val/loss", "val/accuracy"]
REGISTERED, CHAMPION, MODEL_VERSIONS = "fmnist", "champion", "mlflow.modelVersions"
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
CREATE_WAITS_S = (0.2, 2.0)
"""How long to wait for the end of a request whose answer was lost, before looking for what it made."""
SERVER_ERROR = 500
UPLOADED = "uploaded"
"""The tag that says how many bytes of its journal a run holds, and their digest."""
DELETED_REASON = "the run was deleted in MLflow"
COLUMNS = {
    "curves.parquet": ["step", "epoch", "elapsed_s", *CURVES],
    "predictions.parquet": ["split", "index", "label", *(f"logit_{c}" for c in range(10))],
}
"""Of a run's tables; all hold numbers but `split`."""
DATA_URL = "https://github.com/zalandoresearch/fashion-mnist"


Thing = TypeVar("Thing")


def uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else this root's SQLite store."""
    return specs.tracking_server() or f"sqlite:///{database(root)}"


def exists(root: Path) -> bool:
    """Whether there is a store that can be asked; a server is taken to be there."""
    return specs.tracking_server() is not None or database(root).exists()


def connect(root: Path, create: bool = False) -> "Store":
    """Open the store; with `create` the local one is made if there is none. Raises StoreError where there is none, or none of use."""
    os.environ.update(SETTINGS)
    if specs.tracking_server():
        return Store(root)
    with told(
        f"{database(root)} can't be used",
        "make mlruns/ writable for you, restore the file, or move it away to start anew",
    ):
        if not create and not database(root).exists():
            raise StoreError(
                f"no runs are recorded in {root / 'mlruns'} yet; start one with: make run EXP=baseline"
            )
        prepare(root)
        return Store(root)


def server(root: Path, address: str) -> "Store":
    """The store at a server's address; raises StoreError where none answers."""
    os.environ.update(SETTINGS)
    if not re.match(r"https?://[^/]", address):
        raise StoreError(
            f"given {specs.redacted(address)!r}; give the address of an MLflow server: http://... or https://..."
        )
    with told(
        f"no MLflow server can be used at {specs.redacted(address)}",
        "start it, or see to MLFLOW_TRACKING_USERNAME and _PASSWORD",
    ):
        store = Store(root, address.rstrip("/"))
        store.identity()
        return store


class Standing(NamedTuple):
    """What a store says of a run."""

    stage: str | None
    """active or deleted; None where the store doesn't know the run."""
    status: str = ""
    uploaded: str = ""
    """How much of its journal the store holds: the tag UPLOADED."""


class Derived(NamedTuple):
    """A run that stands for others, and is made anew from them: a group or a sweep."""

    experiment_id: str
    kind: str
    key: str
    """What tells it from others of its kind."""
    name: str
    tags: Mapping[str, Any]
    parameters: Mapping[str, str]
    points: Iterable[Point]
    members: Sequence[str]
    """Run ids."""
    started_ms: int
    ended_ms: int
    status: str
    made_from: str
    """Tells whether it is up to date."""


class Store:
    """An open MLflow store: the one at `address`, else that of `uri`."""

    def __init__(self, root: Path, address: str | None = None) -> None:
        from mlflow import MlflowClient, entities

        self.root, self.entities = root, entities
        self.local = address is None and specs.tracking_server() is None
        self._opened = database(root).stat() if self.local else None
        self.client = MlflowClient(
            tracking_uri=address or uri(root), registry_uri=address or uri(root)
        )

    @property
    def stale(self) -> bool:
        """Whether the local database is no longer the file that was opened: deleted, moved away, or another in its place."""
        path = database(self.root)
        return self._opened is not None and not (
            path.exists() and os.path.samestat(path.stat(), self._opened)
        )

    def identity(self) -> str:
        """What tells this store from others wherever it is moved: when its first experiment was made; empty where there is none."""
        oldest = self.client.search_experiments(
            self.entities.ViewType.ALL, max_results=1, order_by=["creation_time"]
        )
        return str(oldest[0].creation_time) if oldest else ""

    # ---- writing a run

    def experiment(self, name: str) -> str:
        """The id of an experiment, made if there is none."""
        location = (self.root / "mlruns" / "artifacts" / name).as_uri() if self.local else None
        try:
            return str(self.client.create_experiment(name, location, EXPERIMENT_TAGS | VIEW_TAG))
        except Exception:  # there is one already, perhaps made by someone else this moment
            if (found := self.client.get_experiment_by_name(name)) is None:
                raise
            for key, value in VIEW_TAG.items():
                if found.tags.get(key) != value:
                    self.client.set_experiment_tag(found.experiment_id, key, value)
            return str(found.experiment_id)

    def create_run(
        self,
        experiment: str,
        key: str,
        name: str,
        started_ms: int,
        spec: specs.ExperimentSpec,
        tags: Mapping[str, Any],
        digest: str,
    ) -> str:
        """The id of the run with this key: created with its parameters, tags and datasets unless an earlier attempt got that far."""
        all_tags = _texts(
            {**tags, "run_key": key, "mlflow.source.name": "fmnist", "mlflow.source.type": "LOCAL"}
        )

        def look() -> Any | None:
            of_key = f"tags.run_key = '{key}'"
            found = self.client.search_runs([experiment], of_key, self.entities.ViewType.ALL)
            return next(iter(sorted(found, key=lambda run: run.info.lifecycle_stage)), None)

        found = look() or made(
            lambda: self.client.create_run(experiment, started_ms, all_tags, name), look
        )
        info = found.info
        if info.lifecycle_stage == "active":  # nothing can be added to a deleted one
            values = {
                path: value
                for path, value in spec.flat().items()
                if path not in ("name", "question")
            }
            parameters = [
                self.entities.Param(path, "null" if value is None else str(value))
                for path, value in values.items()
            ]
            self.client.log_batch(info.run_id, params=parameters)
            self.client.log_inputs(
                info.run_id, self._datasets(spec, digest[:DIGEST])
            )  # the whole digest is a tag
        return str(info.run_id)

    def _datasets(self, spec: specs.ExperimentSpec, digest: str) -> list[Any]:
        from mlflow.data.http_dataset_source import HTTPDatasetSource
        from mlflow.data.meta_dataset import MetaDataset

        inputs = []
        for context, name in _dataset_names(spec).items():
            dataset = MetaDataset(
                HTTPDatasetSource(DATA_URL), name=name, digest=digest
            )._to_mlflow_entity()
            inputs.append(
                self.entities.DatasetInput(
                    dataset, [self.entities.InputTag("mlflow.data.context", context)]
                )
            )
        return inputs

    def log_points(
        self, run_id: str, points: Iterable[Point], tags: Mapping[str, Any] | None = None
    ) -> None:
        """Store points, a request per thousand, and behind the last of them these tags; a point that is stored already is left as it is."""
        metrics = (
            self.entities.Metric(point.key, point.value, point.timestamp_ms, point.step)
            for point in points
        )
        last = [self.entities.RunTag(key, value) for key, value in _texts(tags or {}).items()]
        while len(batch := list(itertools.islice(metrics, BATCH))) == BATCH:
            self.client.log_batch(run_id, metrics=batch)
        if batch or last:
            self.client.log_batch(run_id, metrics=batch, tags=last)

    def count(self, run_id: str, keys: Iterable[str]) -> dict[str, int]:
        """How many points of each metric the store holds."""
        if self.local:
            with sqlite(database(self.root)) as connection:
                stored = dict(
                    connection.execute(
                        "SELECT key, count(*) FROM metrics WHERE run_uuid = ? GROUP BY key",
                        (run_id,),
                    )
                )
            return {key: stored.get(key, 0) for key in keys}
        return {key: len(self.client.get_metric_history(run_id, key)) for key in keys}

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Set those tags of a run that are not None."""
        self.client.log_batch(
            run_id, tags=[self.entities.RunTag(key, value) for key, value in _texts(tags).items()]
        )

    def log_model(
        self, run_id: str, module: Any, example: np.ndarray, step: int, metrics: Mapping[str, float], timestamp_ms: int,
        spec: specs.ExperimentSpec, digest: str,
    ) -> None:  # fmt: skip
        """Log a module (see save_model) as the run's model, with the metrics it earned and the images that it earned them on."""
        run = self.client.get_run(run_id)
        if run.outputs and run.outputs.model_outputs:
            return  # an earlier attempt got that far
        experiment = run.info.experiment_id

        def look() -> Any | None:
            of_run = f"source_run_id = '{run_id}'"
            return next(iter(self.client.search_logged_models([experiment], of_run)), None)

        # mlflow.pytorch.log_model would read the whole metric history of the run back; the calls below it don't.
        logged = look() or made(
            lambda: self.client.create_logged_model(
                experiment, "model", run_id, None, run.data.params, "classifier"
            ),
            look,
        )
        model_id = logged.model_id
        identity = {
            "artifact_path": logged.artifact_location,
            "run_id": run_id,
            "model_uuid": model_id,
            "model_id": model_id,
        }
        with files.scratch() as folder:
            save_model(module, example, folder / "model", identity)
            self.client.log_model_artifacts(model_id, str(folder / "model"))
            self.set_tags(run_id, {models.TAG: models.digests(Path(folder) / "model")})
        self.client.finalize_logged_model(model_id, "READY")
        names, linked = _dataset_names(spec), []
        for key, value in metrics.items():
            images = names["test" if key.startswith("test/") else "validation"]
            linked.append(
                self.entities.Metric(
                    key, value, timestamp_ms, 0, model_id, images, digest[:DIGEST], run_id
                )
            )
        self.client.log_batch(run_id, metrics=linked)
        self.client.log_outputs(run_id, [self.entities.LoggedModelOutput(model_id, step)])

    def close_run(self, run_id: str, status: str, ended_ms: int) -> None:
        """Give a run its final status and its end; then refresh the statistics without which SQLite reads charts quadratically."""
        self.client.set_terminated(run_id, status, ended_ms)
        if self.local:
            with (
                contextlib.suppress(sqlite3.OperationalError),
                sqlite(database(self.root)) as connection,
            ):
                connection.executescript("PRAGMA analysis_limit=400; ANALYZE")

    def reopen(self, run_id: str) -> None:
        """Let a run that was closed go on: RUNNING, and without the reason for which it ended."""
        self.client.update_run(run_id, "RUNNING")
        if "reason" in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, "reason")

    def derived(self, experiment_id: str, kind: str, key: str) -> dict[str, str]:
        """The derived runs of this kind and key, and the digest of what each was made from."""
        found = self.client.search_runs(
            [experiment_id], f"tags.kind = '{kind}' and tags.`{kind}` = '{key}'"
        )
        return {run.info.run_id: run.data.tags.get("made_from", "") for run in found}

    def replace(self, new: Derived, files: Path) -> None:
        """Make a derived run, the parent of its members; the one that was there goes.

        MLflow can't change points that it holds, so what has grown is another run.
        """
        before = self.derived(new.experiment_id, new.kind, new.key)
        tags = _texts(
            {
                **new.tags,
                "kind": new.kind,
                new.kind: new.key,
                "mlflow.source.name": "fmnist",
                "mlflow.source.type": "LOCAL",
            }
        )

        def look() -> str | None:
            now = self.derived(new.experiment_id, new.kind, new.key)
            return next((run_id for run_id in now if run_id not in before), None)

        def create() -> str:
            run = self.client.create_run(new.experiment_id, new.started_ms, tags, new.name)
            return str(run.info.run_id)

        run_id = made(create, look)
        self.client.log_batch(
            run_id,
            params=[self.entities.Param(key, value) for key, value in new.parameters.items()],
        )
        self.log_points(run_id, new.points)
        self.client.log_artifacts(run_id, str(files))
        if new.members:
            self.client.log_inputs(
                run_id, self.client.get_run(new.members[0]).inputs.dataset_inputs
            )
        self.client.set_terminated(run_id, new.status, new.ended_ms)
        for member in new.members:
            self.set_tags(
                member,
                {"mlflow.parentRunId": run_id} if new.kind == "group" else {new.kind: new.key},
            )
        self.set_tags(
            run_id, {"made_from": new.made_from}
        )  # last: a derived run without it is made again
        for former in before:
            self.client.delete_run(former)

    def half_written(self) -> list[Any]:
        """The derived runs that say RUNNING: being written at this moment, or by a process that was killed over it."""
        ids = [experiment.experiment_id for experiment in self.client.search_experiments()]
        found = self.client.search_runs(ids, "status = 'RUNNING' and tags.kind != 'run'")
        return [run for run in found if run.data.tags.get(run.data.tags["kind"])]

    def standing(self, run_id: str) -> "Standing":
        """What the store says of a run; raises what MLflow raises where that can't be told."""
        try:
            run = self.client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return Standing(None)
            raise
        uploaded = run.data.tags.get(UPLOADED, "")
        return Standing(str(run.info.lifecycle_stage), str(run.info.status), uploaded)

    def end_deleted(self, run_id: str, ended_ms: int) -> None:
        """Give a deleted run, to which nothing can be written, the status KILLED: restored later, it would say RUNNING for ever."""
        self.client.restore_run(run_id)
        try:
            self.set_tags(run_id, {"outcome": "interrupted", "reason": DELETED_REASON})
            self.close_run(run_id, "KILLED", ended_ms)
        finally:
            self.client.delete_run(run_id)

    # ---- the registry

    def champion(self) -> Any | None:
        """The registered version that is the champion (version, run_id, tags), or None."""
        try:
            return self.client.get_model_version_by_alias(REGISTERED, CHAMPION)
        except Exception as error:
            if getattr(error, "error_code", None) in (
                "RESOURCE_DOES_NOT_EXIST",
                "INVALID_PARAMETER_VALUE",
            ):
                return None
            raise

    @told("the model can't be registered", "see that the run has a model and the store is there")
    def register(
        self, run_id: str, description: str, tags: Mapping[str, Any], champion: bool = True
    ) -> int:
        """Register a run's model with these tags, as the champion or not; returns its version."""
        model_id = self.client.get_run(run_id).outputs.model_outputs[0].model_id
        with contextlib.suppress(Exception), _sent_once():  # it is there already
            self.client.create_registered_model(
                REGISTERED, description="Models of fmnist; the alias `champion` is the one to load."
            )
        model = self.client.get_logged_model(model_id)
        before = self._versions(run_id)

        def look() -> Any | None:
            now = self._versions(run_id)
            return next((now[version] for version in now if version not in before), None)

        version = made(
            lambda: self.client.create_model_version(
                REGISTERED,
                model.artifact_location,
                run_id,
                _texts(tags),
                description=description,
                model_id=model_id,
            ),
            look,
        )
        versions = [
            *json.loads(model.tags.get(MODEL_VERSIONS, "[]")),
            {"name": REGISTERED, "version": version.version},
        ]
        self.client.set_logged_model_tags(
            model_id, {MODEL_VERSIONS: json.dumps(versions)}
        )  # what MLflow's pages link the two by
        if champion:
            self.make_champion(version.version)
        return int(version.version)

    def _versions(self, run_id: str) -> dict[str, Any]:
        """The registered versions of a run's model, by number."""
        found = self.client.search_model_versions(f"run_id = '{run_id}'")
        return {str(version.version): version for version in found}

    def make_champion(self, version: str) -> None:
        self.client.set_registered_model_alias(REGISTERED, CHAMPION, str(version))

    # ---- reading back

    @told("the runs can't be read", "see that the store is there, or restore it from a copy")
    def runs(
        self, status: str | None = "FINISHED", foreign: bool = False, group: str | None = None
    ) -> "pd.DataFrame":
        """The runs of every experiment, oldest first: run_id, experiment_id, name, status, start, end, and p/, m/, t/ + parameter, metric, tag.

        `foreign` takes in those that other programs wrote; `group` only those of one group.
        """
        import pandas as pd

        ids = [experiment.experiment_id for experiment in self.client.search_experiments()]
        wanted = {
            "attributes.status": status,
            "tags.group": group,
            "tags.kind": None if foreign else "run",
        }
        query = " and ".join(f"{key} = '{value}'" for key, value in wanted.items() if value)
        rows, page = [], None
        while page is None or page.token:
            page = self.client.search_runs(
                ids,
                query,
                max_results=PAGE,
                order_by=["attributes.start_time"],
                page_token=page and page.token,
            )
            for run in page:
                row = {column: getattr(run.info, field) for column, field in INFO.items()}
                for letter, values in (
                    ("p", run.data.params),
                    ("m", run.data.metrics),
                    ("t", run.data.tags),
                ):
                    row |= {f"{letter}/{key}": value for key, value in values.items()}
                if (
                    "t/kind" not in row
                ):  # another program's, which doesn't say what its result is: the last evaluation
                    last = {_standard_name(key): value for key, value in run.data.metrics.items()}
                    row = {
                        f"m/last/val_{name}": last[f"val/{name}"]
                        for name in ("accuracy", "loss")
                        if f"val/{name}" in last
                    } | row
                if row.get("t/kind", "run") == "run":
                    rows.append(row)
        return pd.DataFrame(rows, columns=None if rows else list(INFO))

    def curves(self, run_id: str) -> "pd.DataFrame":
        """A run's curves.parquet (see journal.curves); raises StoreError as `read` does."""
        return self._frame(run_id, "curves.parquet")

    def predictions(self, run_id: str) -> "pd.DataFrame":
        """A run's predictions.parquet: split, index, label, logit_0 to logit_9, a row per image; raises StoreError as `read` does."""
        return self._frame(run_id, "predictions.parquet")

    def _frame(self, run_id: str, name: str) -> "pd.DataFrame":
        import pandas as pd

        return pd.read_parquet(io.BytesIO(self.read(run_id, [name])[name]))

    @told("the metrics can't be read", "see that the store is there, or restore it from a copy")
    def histories(self, run_id: str) -> "pd.DataFrame":
        """What MLflow's history of a run's metrics holds of `curves`, for a run of another program: its names may be as in val_acc."""
        import pandas as pd

        columns: dict[str, pd.Series] = {}
        times: dict[int, int] = {}
        for key in self.client.get_run(run_id).data.metrics:
            if (name := _standard_name(key)) and name not in columns:
                points = self.client.get_metric_history(run_id, key)
                columns[name] = pd.Series(
                    {point.step: point.value for point in points}, dtype=float
                )
                times |= {point.step: point.timestamp for point in points}
        frame = pd.DataFrame(columns, columns=CURVES).rename_axis("step").sort_index().reset_index()
        milliseconds = frame["step"].map(times).astype(float)
        frame.insert(1, "epoch", np.nan)
        frame.insert(2, "elapsed_s", (milliseconds - milliseconds.min()) / 1000)
        return frame

    def read(self, run_id: str, names: Iterable[str]) -> dict[str, bytes]:
        """Artifacts of a run by name, and its manifest; raises StoreError where one is missing or not as the manifest has it."""
        with told(f"run {run_id}: its artifacts can't be read", "see that the store is there"):
            run, found = self.client.get_run(run_id), dict[str, bytes]()
            digests = {"manifest.json": run.data.tags.get("manifest_sha256")}
            for name in ("manifest.json", *names):
                data = b"" if {"/", ".."} & {*Path(name).parts} else self._artifact(run.info, name)
                if hashlib.sha256(data).hexdigest() != digests.get(name):
                    raise StoreError(
                        f"run {run_id}: {name} is not as it was recorded, and not usable; restore it or train again"
                    )
                if name in COLUMNS:
                    _check_columns(run_id, name, data)
                digests = json.loads(data) | digests if name == "manifest.json" else digests
                found[name] = data
            return found

    def figures(self, run_id: str) -> dict[str, bytes]:
        """The pictures that a run's manifest names, by their file names; raises StoreError as `read` does."""
        manifest = json.loads(self.read(run_id, [])["manifest.json"])
        names = [name for name in manifest if Path(name).parts[:-1] == ("figures",)]
        found = self.read(run_id, names)
        return {Path(name).name: found[name] for name in names}

    def model(self, run_id: str, registered: Any = None) -> dict[str, bytes]:
        """The files of a run's model; raises StoreError where there is none, or one is not as it was recorded, or would run code.

        `registered` is a version of it, which must have the same files.
        """
        with told(f"run {run_id}: its model can't be read", "see that the store is there"):
            run = self.client.get_run(run_id)
            if not run.outputs or not run.outputs.model_outputs:
                raise StoreError(f"run {run_id} has no model; name another, or train it again")
            model = self.client.get_logged_model(run.outputs.model_outputs[0].model_id)
            location = model.artifact_location
            if registered is not None and location != self.client.get_model_version_download_uri(
                REGISTERED, registered.version
            ):
                raise StoreError(
                    f"version {registered.version} of {REGISTERED} holds other files than its run {run_id}; promote another run"
                )
            whose = f"run {run_id}: its model"
            return models.verified(
                run.data.tags.get(models.TAG), lambda name: self._file(location, name), whose
            )

    def _file(self, location: str, name: str) -> bytes:
        """A file below an address of artifacts."""
        if location.startswith("file://"):
            return (Path(unquote(location.removeprefix("file://"))) / name).read_bytes()
        from mlflow.artifacts import download_artifacts

        with files.scratch() as folder:
            found = download_artifacts(
                artifact_uri=f"{location}/{name}",
                dst_path=folder,
                tracking_uri=self.client.tracking_uri,
            )
            return Path(found).read_bytes()

    def verify(self, run_id: str) -> None:
        """Read all that is stored of a run in files; raises StoreError where one is missing or not as it was recorded."""
        self.read(run_id, json.loads(self.read(run_id, [])["manifest.json"]))
        outputs = self.client.get_run(run_id).outputs
        if outputs and outputs.model_outputs:
            self.model(run_id)

    def _artifact(self, info: Any, name: str) -> bytes:
        with told(
            f"run {info.run_id}: {name} can't be read",
            "where it is lost, restore it or train again",
        ):
            if (place := _place(info)) is not None:  # MLflow's download takes some 20 ms each
                return (place / name).read_bytes()
            with files.scratch() as folder:
                return self.download(info.run_id, name, folder).read_bytes()

    def artifacts(self, run_id: str, names: Iterable[str], folder: Path) -> None:
        """Copy artifacts of a run, and its manifest, below `folder`; raises StoreError as `read` does, and copies none then."""
        for name, data in self.read(run_id, names).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    def download(self, run_id: str, artifact: str, folder: Path) -> Path:
        """Copy one artifact of a run below `folder`; raises StoreError where it can't be had."""
        with told(
            f"run {run_id}: {artifact} can't be read", "where it is lost, restore it or train again"
        ):
            place = _place(self.client.get_run(run_id).info)
            if place is not None:
                found = [place / artifact, *(place / artifact).rglob("*")]
                if links := [path for path in found if path.is_symlink()]:
                    raise StoreError(
                        f"run {run_id}: {links[0]} is a symbolic link, which no run records; remove it"
                    )
            if place is not None and (place / artifact).is_dir():
                return Path(
                    shutil.copytree(place / artifact, folder / artifact, dirs_exist_ok=True)
                )
            return Path(self.client.download_artifacts(run_id, artifact, str(folder)))


def _place(info: Any) -> Path | None:
    """The folder of a run's artifacts, where that is on this machine."""
    uri = str(info.artifact_uri)
    return Path(unquote(uri.removeprefix("file://"))) if uri.startswith("file://") else None


def _check_columns(run_id: str, name: str, data: bytes) -> None:
    """Raise StoreError where a table has not the columns that are read of it."""
    import pyarrow.parquet
    from pyarrow import types

    schema = pyarrow.parquet.read_schema(io.BytesIO(data))
    numeric = {
        field.name
        for field in schema
        if types.is_integer(field.type) or types.is_floating(field.type)
    }
    wrong = {*COLUMNS[name]} - numeric - ({"split"} & {*schema.names})
    if wrong:
        raise StoreError(
            f"run {run_id}: {name} has no numbers in {', '.join(sorted(wrong))}, and not usable; restore it or train again"
        )


def _standard_name(key: str) -> str | None:
    """The column of CURVES that another program's metric belongs to: val_acc, validation/accuracy, Train.Loss, ..."""
    split, _, name = re.sub(r"[/_. -]+", "/", key.lower()).partition("/")
    split = {"training": "train", "validation": "val", "valid": "val", "eval": "val"}.get(
        split, split
    )
    found = f"{split}/{ {'acc': 'accuracy', 'learning/rate': 'lr'}.get(name, name) }"
    return found if found in CURVES else None


def the_one(runs: "pd.DataFrame", text: str) -> "pd.Series":
    """The run among these with this name, experiment or key, or whose id begins like this; raises UserError where that isn't one."""
    named = [
        runs[column] == text for column in ("name", "t/experiment", "t/run_key") if column in runs
    ]
    fits = (
        runs[np.logical_or.reduce([runs["run_id"].str.startswith(text), *named])]
        if len(runs)
        else runs
    )
    if len(fits) != 1:
        known = ", ".join(
            f"{run_id[:8]} ({name})"
            for run_id, name in zip(fits["run_id"], fits["name"], strict=True)
        )
        raise UserError(
            f"{text!r} fits {len(fits)} runs{f'; give the id of one: {known}' if known else '; `fmnist runs` lists them'}"
        )
    return fits.iloc[0]


@contextlib.contextmanager
def _sent_once() -> Iterator[None]:
    """Keep MLflow from sending a request again by itself: one whose answer was lost may have made what it asks for."""
    before = os.environ.get(RETRIES)
    os.environ[RETRIES] = "0"
    try:
        yield
    finally:
        os.environ.pop(RETRIES)
        if before is not None:
            os.environ[RETRIES] = before


def made(create: Callable[[], Thing], look: Callable[[], Thing | None]) -> Thing:
    """What `create` makes; where its answer is lost, what `look` finds is taken before it is tried again."""
    for wait_s in CREATE_WAITS_S:
        try:
            with _sent_once():
                return create()
        except Exception as error:
            status = getattr(error, "get_http_status_code", lambda: SERVER_ERROR)()
            if status < SERVER_ERROR:  # the request was understood and refused
                raise
        time.sleep(wait_s)
        if (found := look()) is not None:
            return found
    with _sent_once():
        return create()


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items() if value is not None}


def _dataset_names(spec: specs.ExperimentSpec) -> dict[str, str]:
    """What each split is called in MLflow, by its context."""
    held_out = {"validation": "fashion-mnist-train-held-out", "test": "fashion-mnist-test"}
    return {
        "train": f"fashion-mnist-train-{spec.train_images}",
        **(held_out if spec.data.holdout else {"validation": "fashion-mnist-test"}),
    }


def save_model(
    module: Any, example: np.ndarray, path: Path, identity: Mapping[str, str] | None = None
) -> None:
    """Save a torch module that takes raw images as an exported program: it loads without this package and without unpickling code.

    `example` is uint8 [B, 28, 28] with B above 1, else torch.export would freeze the batch size; `identity` ties it to a run.
    """
    import mlflow.pytorch
    from mlflow.models import Model

    requirements = [
        f"{package}=={importlib.metadata.version(package)}"
        for package in ("mlflow", "torch", "numpy")
    ]
    options = {
        "input_example": example,
        "pip_requirements": requirements,
        "serialization_format": "pt2",
    }
    mlflow.pytorch.save_model(
        module, path, mlflow_model=Model(**(identity or {})), signature=signature(), **options
    )


def signature() -> Any:
    """What a model takes and gives: raw images, and a probability for each class."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = TensorSpec(np.dtype(np.uint8), (-1, 28, 28))
    probabilities = TensorSpec(np.dtype(np.float32), (-1, specs.CLASSES))
    return ModelSignature(Schema([images]), Schema([probabilities]))


def champion_uri() -> str:
    return f"models:/{REGISTERED}@{CHAMPION}"


def page(experiment_id: str, run_id: str = "", port: int = 5000, key: str = "") -> str:
    """Where a run, or all of an experiment, is seen: on the server, or on the one that `make ui` starts and opens with a key."""
    server = specs.redacted(specs.tracking_server() or f"http://127.0.0.1:{port}")
    place = f"/{run_id}?" if run_id else f"?viewStateShareKey={VIEW}&"
    # Without the type MLflow's pages open as for language models, with no run's metrics in sight.
    door = f"?key={key}" if key else ""
    return f"{server}/{door}#/experiments/{experiment_id}/runs{place}workflowType=machine_learning"


def pages(root: Path, hosts: Sequence[str]) -> Any:
    """MLflow's server of the local store as an ASGI application, for these addresses only.

    It has no access check of its own, and takes uploads of artifacts even where it serves none.
    """
    os.environ.update(SETTINGS)
    os.environ |= {
        "MLFLOW_TRACKING_URI": uri(root),
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(hosts),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{host}" for host in hosts),
        "MLFLOW_SERVER_X_FRAME_OPTIONS": "DENY",
    }
    from mlflow.server import constants

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = uri(root)
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = str(root / "mlruns" / "artifacts")
    with warnings.catch_warnings():  # what MLflow is made of is not for who looks at runs
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        from mlflow.server.fastapi_app import app

    return app


class Served:
    """A model as MLflow's model server asks it."""

    metadata = None

    def __init__(self, program: Callable[[np.ndarray], np.ndarray]) -> None:
        self.program = program

    def predict(self, data: Any) -> np.ndarray:
        from mlflow.exceptions import MlflowException

        if getattr(data, "dtype", None) != np.uint8 or data.shape[1:] != (28, 28):
            raise MlflowException.invalid_parameter_value(
                'give images as JSON: {"inputs": [[[0, ...], ...]]}, 28 x 28 pixels each, 0 to 255'
            )
        return self.program(data)


def scoring(program: Callable[[np.ndarray], np.ndarray]) -> Any:
    """An ASGI application that answers by the protocol of MLflow's model server; what it says of errors holds no stack trace."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    async def ping(request: Request) -> Response:
        return PlainTextResponse("\n")

    async def invocations(request: Request) -> Response:
        body, kind = await request.body(), request.headers.get("content-type", "")
        schema = signature().inputs
        try:
            found = await run_in_threadpool(
                scoring_server.invocations, body, kind, Served(program), schema
            )
        except MlflowException as error:
            told = {"error_code": error.error_code, "message": error.message}
            return JSONResponse(told, error.get_http_status_code())
        return Response(found.response, found.status, media_type=found.mimetype)

    return Starlette(
        routes=[
            Route("/ping", ping),
            Route("/health", ping),
            Route("/invocations", invocations, methods=["POST"]),
        ]
    )
