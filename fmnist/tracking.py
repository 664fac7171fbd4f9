"""All of MLflow: the store, what is written of a run, what is read back. Nothing else imports mlflow, and this never imports torch.

mlflow itself is imported inside `connect`, after the settings that it reads once at import.
"""

import contextlib
import fcntl
import itertools
import os
import sqlite3
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmnist import spec as specs
from fmnist.errors import StoreError
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
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the sidecar tries again by itself, and tells what is wrong meanwhile
    "GIT_PYTHON_REFRESH": "quiet",
}
BATCH = 1_000
"""MLflow's limit of metrics in a request; a point costs 80 times less so than alone."""
PAGE = 1_000
EXPERIMENT_TAGS = {
    "mlflow.note.content": "Runs of fmnist: one MLP on Fashion-MNIST, every training step logged. Compare `val/accuracy` by step; "
    "`best/*`, `last/*` and `test/*` are single values. `group` is shared by runs that differ in their seed alone.",
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "last/val_accuracy",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "true",
}
DATA_URL = "https://github.com/zalandoresearch/fashion-mnist"


def database(root: Path) -> Path:
    return root / "mlruns" / "mlflow.db"


def uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else this root's SQLite store."""
    return specs.tracking_server() or f"sqlite:///{database(root)}"


def connect(root: Path, create: bool = False) -> "Store":
    """Open the store; with `create` the local one is made if there is none. Raises StoreError where there is nothing to open."""
    os.environ.update(SETTINGS)
    if specs.tracking_server() is None:
        if create:
            _ensure_database(root)
        elif not database(root).exists():
            raise StoreError(f"no runs are recorded in {root / 'mlruns'} yet; start one with: make run EXP=baseline")
    return Store(root)


def _ensure_database(root: Path) -> None:
    """Create the SQLite store once, whole or not at all; MLflow's own creation is not safe when several processes begin at once."""
    path = database(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        partial = path.with_suffix(".db.partial")
        partial.unlink(missing_ok=True)
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(f"sqlite:///{partial}", str(path.parent / "artifacts")).engine.dispose()
        with contextlib.closing(sqlite3.connect(partial)) as connection:
            # Readers and the writer no longer wait for each other; the setting stays with the file.
            connection.execute("PRAGMA journal_mode=WAL")
        partial.rename(path)


class Store:
    """An open MLflow store, local or a server."""

    def __init__(self, root: Path) -> None:
        from mlflow import MlflowClient

        self.root = root
        self.local = specs.tracking_server() is None
        self.client = MlflowClient(tracking_uri=uri(root))

    # ---- writing a run

    def experiment(self, name: str) -> str:
        """The id of an experiment, made if there is none."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = (self.root / "mlruns" / "artifacts" / name).as_uri() if self.local else None
            try:
                return str(self.client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))
            except MlflowException:  # someone else has made it meanwhile
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def create_run(
        self,
        experiment_id: str,
        key: str,
        name: str,
        started_ms: int,
        spec: specs.ExperimentSpec,
        tags: Mapping[str, str],
        data_digest: str,
    ) -> str:
        """The id of the run with this key: created with its parameters, tags and datasets unless an earlier attempt got that far."""
        from mlflow.entities import Param, ViewType

        earlier = self.client.search_runs([experiment_id], f"tags.run_key = '{key}'", ViewType.ALL, max_results=1)
        if earlier:
            run_id = earlier[0].info.run_id
        else:
            all_tags = {**tags, "run_key": key, "mlflow.source.name": "fmnist", "mlflow.source.type": "LOCAL"}
            run_id = self.client.create_run(experiment_id, started_ms, all_tags, name).info.run_id
        parameters = [Param(path, _text(value)) for path, value in spec.flat().items() if path not in ("name", "question")]
        self.client.log_batch(run_id, params=parameters)
        self.client.log_inputs(run_id, self._datasets(spec, data_digest))
        return str(run_id)

    def _datasets(self, spec: specs.ExperimentSpec, digest: str) -> list[Any]:
        from mlflow.data.http_dataset_source import HTTPDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        holdout = spec.data.holdout
        splits = {
            "train": f"fashion-mnist-train-{spec.train_images}",
            "validation": f"fashion-mnist-{'train-held-out' if holdout else 'test'}",
        }
        if holdout:
            splits["test"] = "fashion-mnist-test"
        inputs = []
        for context, name in splits.items():
            # MLflow takes 36 characters of digest; the whole one is a tag of the run.
            dataset = MetaDataset(HTTPDatasetSource(DATA_URL), name=name, digest=digest[:36])
            inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)]))
        return inputs

    def log_points(self, run_id: str, points: Iterable[Point]) -> None:
        """Store points, a request per thousand; one that is stored already is left as it is."""
        from mlflow.entities import Metric

        metrics = (Metric(point.key, point.value, point.timestamp_ms, point.step) for point in points)
        while batch := list(itertools.islice(metrics, BATCH)):
            self.client.log_batch(run_id, metrics=batch)

    def count(self, run_id: str, keys: Iterable[str]) -> dict[str, int]:
        """How many points of each metric the store holds."""
        if self.local:
            with contextlib.closing(sqlite3.connect(f"file:{database(self.root)}?mode=ro", uri=True, timeout=20)) as connection:
                rows = connection.execute("SELECT key, count(*) FROM metrics WHERE run_uuid = ? GROUP BY key", (run_id,))
                stored = dict(rows.fetchall())
            return {key: stored.get(key, 0) for key in keys}
        return {key: len(self.client.get_metric_history(run_id, key)) for key in keys}

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_artifacts(self, run_id: str, folder: Path) -> None:
        self.client.log_artifacts(run_id, str(folder))

    def log_model(self, run_id: str, module: Any, example: np.ndarray, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        """Log a module (see save_model) as the run's model, with the metrics it earned."""
        from mlflow.entities import LoggedModelOutput, Metric

        run = self.client.get_run(run_id)
        if run.outputs and run.outputs.model_outputs:
            return  # an earlier attempt got that far
        # mlflow.pytorch.log_model would read the whole metric history of the run back; the calls below it don't.
        logged = self.client.create_logged_model(run.info.experiment_id, "model", run_id, params=run.data.params, model_type="classifier")
        with tempfile.TemporaryDirectory() as folder:
            identity = {
                "artifact_path": logged.artifact_location,
                "run_id": run_id,
                "model_uuid": logged.model_id,
                "model_id": logged.model_id,
            }
            save_model(module, example, Path(folder) / "model", identity)
            self.client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
        self.client.finalize_logged_model(logged.model_id, "READY")
        linked = [Metric(key, value, timestamp_ms, 0, model_id=logged.model_id, run_id=run_id) for key, value in metrics.items()]
        self.client.log_batch(run_id, metrics=linked)
        self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])

    def close_run(self, run_id: str, status: str, ended_ms: int) -> None:
        """Give a run its final status and its end; then refresh the statistics without which SQLite reads charts quadratically."""
        self.client.set_terminated(run_id, status, ended_ms)
        if self.local:
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(database(self.root))) as connection:
                connection.execute("PRAGMA analysis_limit=400")
                connection.execute("ANALYZE")

    def is_deleted(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return True
            raise

    # ---- reading back

    def runs(self, status: str | None = "FINISHED") -> "pd.DataFrame":
        """The runs of every experiment, oldest first: run_id, experiment_id, name, status, start, and p/, m/, t/ + parameter, metric, tag."""
        import pandas as pd

        ids = [experiment.experiment_id for experiment in self.client.search_experiments()]
        rows = []
        for run in self._pages(ids, "tags.kind = 'run'" + (f" and attributes.status = '{status}'" if status else "")):
            info, values = run.info, run.data
            row = {
                "run_id": info.run_id,
                "experiment_id": info.experiment_id,
                "name": info.run_name,
                "status": info.status,
                "start": info.start_time,
            }
            row |= {f"p/{key}": value for key, value in values.params.items()}
            row |= {f"m/{key}": value for key, value in values.metrics.items()}
            row |= {f"t/{key}": value for key, value in values.tags.items()}
            rows.append(row)
        return pd.DataFrame(rows, columns=None if rows else ["run_id", "experiment_id", "name", "status", "start"])

    def _pages(self, experiment_ids: list[str], query: str) -> Iterator[Any]:
        token = None
        while True:
            page = self.client.search_runs(experiment_ids, query, max_results=PAGE, order_by=["attributes.start_time"], page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def curves(self, run_id: str) -> "pd.DataFrame":
        """A run's curves.parquet (see journal.curves); raises StoreError where it has none."""
        import pandas as pd

        with tempfile.TemporaryDirectory() as folder:
            return pd.read_parquet(self.download(run_id, "curves.parquet", Path(folder)))

    def download(self, run_id: str, artifact: str, folder: Path) -> Path:
        """Copy one artifact of a run below `folder`; raises StoreError where it can't be had."""
        from mlflow.exceptions import MlflowException

        try:
            return Path(self.client.download_artifacts(run_id, artifact, str(folder)))
        except (MlflowException, OSError) as error:
            raise StoreError(f"run {run_id}: {artifact} can't be read: {str(error).splitlines()[0]}") from None


def save_model(module: Any, example: np.ndarray, path: Path, identity: Mapping[str, str] | None = None) -> None:
    """Save a torch module that takes raw images as an exported program: it loads without this package and without unpickling code.

    `example` is uint8 [B, 28, 28] with B above 1, else torch.export would freeze the batch size; `identity` ties it to a run.
    """
    import importlib.metadata

    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    images, probabilities = (TensorSpec(np.dtype(np.uint8), (-1, 28, 28)), TensorSpec(np.dtype(np.float32), (-1, specs.CLASSES)))
    requirements = [f"{package}=={importlib.metadata.version(package)}" for package in ("mlflow", "torch", "numpy")]
    mlflow.pytorch.save_model(
        module,
        path,
        mlflow_model=Model(**(identity or {})),
        signature=ModelSignature(Schema([images]), Schema([probabilities])),
        input_example=example,
        pip_requirements=requirements,
        serialization_format="pt2",
    )


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def page(experiment_id: str, run_id: str = "", port: int = 5000) -> str:
    """Where a run, or all of an experiment, is seen: on the server, or on the one that `make ui` starts."""
    server = specs.redacted(specs.tracking_server() or f"http://127.0.0.1:{port}")
    # Without the type MLflow's pages open as for language models, with no run's metrics in sight.
    return f"{server}/#/experiments/{experiment_id}/runs{f'/{run_id}' if run_id else ''}?workflowType=machine_learning"


def server_command(root: Path, port: int) -> list[str]:
    """The command of `make ui`: this machine only, explicit hosts and origins, no proxied writes to artifacts."""
    here = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri(root)]
    command += ["--default-artifact-root", str(root / "mlruns" / "artifacts"), "--no-serve-artifacts"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--allowed-hosts", f"{here},localhost:{port}", "--cors-allowed-origins", f"http://{here}"]
    return [*command, "--x-frame-options", "DENY"]
