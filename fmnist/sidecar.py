"""The process that carries journals into MLflow while runs train, and closes each run: figures, model, true status.

One per root, by a lock; each run starts one, and the one that finds the lock taken exits. `fmnist sync` is the same
code in the foreground. It may be killed at any moment: the next one sends again what was not noted as sent, and a
point sent twice is stored once. What it sends is on the disk first, so that no store knows more than the journal does.
"""

import contextlib
import fcntl
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmnist.errors import StoreError
from fmnist.journal import Record, StateFolder, carrier_lock, curves, in_words, is_locked, points, read, state_folders
from fmnist.spec import redacted, store_name

if TYPE_CHECKING:
    import pandas as pd

    from fmnist.spec import ExperimentSpec
    from fmnist.tracking import Store

IDLE_S = 30
"""How long it stays after its last work: runs in a row then share one start of MLflow."""
PERIOD_S = 0.2
NICENESS = 10
MAX_BACKOFF_S = 10.0


def main() -> None:
    """`python -m fmnist.sidecar ROOT`."""
    root = Path(sys.argv[1])
    try:
        with _sole_carrier(root, wait=False):
            os.nice(NICENESS)
            _serve(root)
    except BlockingIOError:
        pass  # another one is at work


@contextlib.contextmanager
def _sole_carrier(root: Path, wait: bool) -> Iterator[None]:
    """Hold the root's carrier lock, with our pid in it; raises BlockingIOError where another process has it and `wait` is false."""
    with open(carrier_lock(root, store_name()), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _serve(root: Path) -> None:
    """Carry until nothing has been left to carry for a while."""
    carriers: dict[Path, Carrier] = {}
    store: Store | None = None
    idle_since, backoff, rehearsed = time.monotonic(), PERIOD_S, False
    while time.monotonic() - idle_since < IDLE_S and carrier_lock(root, store_name()).exists():
        if store is not None and store.stale:  # the database was deleted or replaced below us
            store, carriers = None, {}
        for folder in state_folders(root):
            if folder.run["store"] != store_name():
                continue
            try:
                if _settled(folder):
                    carriers.pop(folder.path, None)
                    continue
                store = store or _connect(root)
                if folder.path not in carriers:
                    carriers[folder.path] = Carrier(folder, store)
                carrier = carriers[folder.path]
                if carrier.advance():
                    idle_since, backoff = time.monotonic(), PERIOD_S
                    if not rehearsed and not carrier.closed:
                        carrier.rehearse()
                        rehearsed = True
                        gc.freeze()  # a third of the time to store points went into collecting what the imports left
                elif folder.running:
                    idle_since = time.monotonic()
            except Exception as error:  # an outage of any kind: the journal waits, training goes on
                print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {folder.path.name}: {_report(folder, error)}", flush=True)
                carriers.pop(folder.path, None)  # what it knows may be of a store that is no more
                backoff = min(2 * backoff, MAX_BACKOFF_S)
                idle_since = time.monotonic() if folder.running else idle_since
        time.sleep(backoff)


def _connect(root: Path) -> "Store":
    from fmnist import tracking

    return tracking.connect(root, create=True)


def _settled(folder: StateFolder) -> bool:
    """Whether the run is closed in MLflow with all that its journal holds; if it can't be continued either, its folder goes."""
    note = folder.carried
    if not note.get("closed") or (note["closed"] != "DELETED" and read(folder.path / "journal", note["offset"])[0]):
        return False
    if not folder.unfinished and not folder.running:  # in this order: one that is unfinished may be continued at any moment
        folder.remove()
    return True


def _report(folder: StateFolder, error: Exception) -> str:
    """Note an error where the trainer that waits for this run sees it."""
    text = redacted(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    with contextlib.suppress(OSError):
        folder.note(**{**folder.carried, "error": text})
    return text


def sync(root: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Carry every run that is meant for this store or for none yet, now, in place of a sidecar that may be at work."""
    results: list[dict[str, Any]] = []
    if all(_settled(folder) for folder in state_folders(root)):
        return results
    lock = carrier_lock(root, store_name())
    with contextlib.suppress(ValueError, ProcessLookupError):  # it may be ended at any moment, and would idle on for a while
        if is_locked(lock):
            os.kill(int(lock.read_text()), signal.SIGTERM)
    with _sole_carrier(root, wait=True):
        store = _connect(root)
        gc.freeze()
        for folder in state_folders(root):
            if folder.run["store"] not in (None, store_name()):
                say(f"{folder.path.name}: is for {folder.run['store']}; set or unset MLFLOW_TRACKING_URI accordingly and sync again")
                continue
            if _settled(folder):
                continue
            result: dict[str, Any] = {"key": folder.path.name, "run_id": None, "status": "RUNNING", "error": None}
            try:
                carrier = Carrier(folder, store)
                while not _settled(folder) and carrier.advance():
                    pass
                result |= {"run_id": carrier.run_id, "status": carrier.closed or "RUNNING"}
                say(f"{folder.path.name}: {carrier.closed or 'still running; what there is so far is stored'}")
            except Exception as error:  # one run's trouble is not the others'
                result["error"] = _report(folder, error)
                say(f"{folder.path.name}: not stored yet, it stays on disk: {result['error']}")
            results.append(result)
        return results


@dataclass(frozen=True)
class Results:
    """What a finished run left: the step of its chosen weights, these (a flat tensor), its predictions (see _predictions)."""

    step: int
    parameters: Any
    predictions: "pd.DataFrame"


class Carrier:
    """Carries one run: `advance` does what can be done now."""

    def __init__(self, folder: StateFolder, store: "Store") -> None:
        self.folder, self.store = folder, store
        self.spec: ExperimentSpec = folder.spec
        self.environment = folder.environment
        self.identity = store.identity()
        note = folder.carried
        if note.get("store", self.identity) != self.identity:
            note = {}  # the store it was in is gone; it goes whole into the one that took its place
        self.run_id: str | None = note.get("run_id")
        self.experiment_id: str | None = note.get("experiment_id")
        self.closed: str | None = note.get("closed")
        self.reason: str | None = note.get("reason")
        self.offset: int = note.get("offset", 0)
        self._ended = False
        self._expected: Counter[str] = Counter()  # points of each metric in the journal so far
        self._count(read(folder.path / "journal", end=self.offset)[0])

    def advance(self) -> bool:
        """Send what the journal has gained, close the run once it has ended; tells whether anything was done."""
        try:
            return self._carry()
        except Exception:
            if not self._is_deleted():
                raise
            self._mark_closed("DELETED", "the run was deleted in MLflow")
            return True

    def _is_deleted(self) -> bool:
        """Whether the run, and not the whole store, is surely gone."""
        with contextlib.suppress(Exception):  # in an outage it can't be told
            here = self.run_id is not None and not self.store.stale and self.store.identity() == self.identity
            return here and self.store.is_deleted(self._run_id)
        return False

    def _carry(self) -> bool:
        running = self.folder.running  # asked before reading: what was written before the end is then surely read
        if self.run_id is None:
            self._open()
        elif self.closed:
            self.store.reopen(self.run_id)
            self._mark_closed(None, None)
        records, offset = read(self.folder.path / "journal", self.offset)
        if records:
            _flush(self.folder.path / "journal")
            self.store.log_points(self._run_id, (point for record in records for point in points(self.spec, record)))
            self._count(records)  # only once they are sent: what fails is read again
            self.offset = offset
            self._note()
        if self._ended or not running:
            self._close()
            return True
        return bool(records)

    def _count(self, records: list[Record]) -> None:
        self._expected.update(point.key for record in records for point in points(self.spec, record))
        for record in records:
            if record.kind in ("end", "resume"):
                self._ended = record.kind == "end"

    @property
    def _run_id(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _note(self) -> None:
        names = ("run_id", "experiment_id", "offset", "closed", "reason")
        self.folder.note(store=self.identity, **{name: getattr(self, name) for name in names})

    def _open(self) -> None:
        run, environment, spec = self.folder.run, self.environment, self.spec
        tags = {
            "kind": "run",
            "experiment": spec.name,
            "fingerprint": spec.fingerprint,
            "group": spec.group,
            "seed": str(spec.train.seed),
            "data_digest": environment["data_digest"],
            "git_commit": environment["git_commit"] or "none",
            "git_dirty": str(environment["git_dirty"]).lower(),
            "device": environment["device"],
            "threads": str(environment["threads"]),
            "torch": environment["packages"]["torch"],
            "mlflow.note.content": spec.question,
        }
        if run.get("extends"):
            tags["extends"] = run["extends"]
        if environment["git_commit"]:
            tags["mlflow.source.git.commit"] = environment["git_commit"]
        self.experiment_id = self.store.experiment(spec.tracking.experiment)
        self.run_id = self.store.create_run(
            self.experiment_id, run["key"], run["name"], run["started_ms"], spec, tags, environment["data_digest"]
        )
        self._note()

    def _close(self) -> None:
        records, readable = read(self.folder.path / "journal")
        end = next((record.fields for record in reversed(records) if record.kind in ("end", "resume")), {}) if self._ended else {}
        if not end:
            end = {"status": "KILLED", "reason": "the process ended without a word (kill -9, out of memory or power loss)"}
        status, reason = end["status"], end["reason"]
        if readable < self.offset:
            status, reason = "FAILED", f"the journal is damaged at byte {readable:,} of the {self.offset:,} that were stored"
        status, reason = self._check_counts(records, status, reason)
        final = next((record for record in records if record.kind == "final"), None) if status == "FINISHED" else None
        results: Results | None = None
        if final:
            try:
                results = self._results(final)
            except Exception as error:  # damaged since, in whatever way
                status, reason, final = "FAILED", f"its results can't be read back: {error}", None
        tags = {"mlflow.note.content": _description(self.spec, status, reason, final, self.environment)}
        if reason:
            tags["reason"] = reason[:500]
        if resumed := [record.fields["step"] for record in records if record.kind == "resume"]:
            tags |= {"resumes": str(len(resumed)), "resumed_from_step": str(resumed[-1])}
        if final:
            told = {key: final.fields[key] for key in ("weights", "collapsed_at", "stopped_early_at", "recording_s")}
            tags |= {key: str(value) for key, value in told.items() if value is not None}
        with tempfile.TemporaryDirectory(prefix="fmnist-") as folder:
            if end.get("traceback"):
                (Path(folder) / "traceback.txt").write_text(end["traceback"], encoding="utf-8")
            tags["manifest_sha256"] = self._gather(Path(folder), records, results)
            self.store.log_artifacts(self._run_id, Path(folder))
        if final and results:
            self._log_model(final, results)
        self.store.set_tags(self._run_id, tags)
        times = [int(record.fields["t1"] if record.kind == "train" else record.fields["t"]) for record in records]
        self.store.close_run(self._run_id, status, max(times, default=self.folder.run["started_ms"]))
        if self.store.stale:  # all of this went into a file that is no more
            raise StoreError("the database was deleted or replaced meanwhile")
        self._mark_closed(status, reason)

    def _mark_closed(self, status: str | None, reason: str | None) -> None:
        self.closed, self.reason = status, reason
        self._note()

    def _check_counts(self, records: list[Record], status: str, reason: str | None) -> tuple[str, str | None]:
        """No run is FINISHED before the store holds every point: what is missing is sent again once."""
        expected = self._expected
        stored = self.store.count(self._run_id, expected)
        if stored != dict(expected):
            self.store.log_points(self._run_id, (point for record in records for point in points(self.spec, record)))
            stored = self.store.count(self._run_id, expected)
        wrong = [f"{key} {stored[key]} of {expected[key]}" for key in expected if stored[key] != expected[key]]
        if wrong and status == "FINISHED":
            return "FAILED", f"the store does not hold the points that were sent: {', '.join(wrong)}"
        return status, reason

    def _results(self, final: Record) -> Results:
        """What the trainer left beside the journal; raises whatever reading damaged files raises."""
        from fmnist import checkpoint

        state = checkpoint.load(self.folder.path / checkpoint.NEWEST, self.spec)
        chosen = state["best"] if final.fields["weights"] == "best" else state
        return Results(chosen["step"], chosen["parameters"], _predictions(self.folder.path / "predictions.npz"))

    def _gather(self, folder: Path, records: list[Record], results: Results | None) -> str:
        """Lay out a run's artifacts and their manifest; returns the manifest's SHA-256."""
        from fmnist import plots

        for name in ("spec.yaml", "environment.json", "checkpoint.pt"):
            if (self.folder.path / name).exists():
                shutil.copy(self.folder.path / name, folder / name)
        frame = curves(self.spec, records)
        frame.to_parquet(folder / "curves.parquet", index=False)
        figures = folder / "figures"
        figures.mkdir()
        if frame["val/loss"].notna().any():
            best = next((int(record.fields["metrics"]["best/step"]) for record in records if record.kind == "final"), None)
            plots.learning_curves(frame, self.folder.run["name"], self.spec.steps_per_epoch, best).savefig(figures / "learning_curves.png")
        if results is not None:
            predictions = results.predictions
            predictions.to_parquet(folder / "predictions.parquet", index=False)
            selected = predictions[predictions["split"] == "val"]
            predicted = selected.filter(like="logit_").to_numpy().argmax(1)
            plots.confusion_matrix(selected["label"].to_numpy(), predicted, self.folder.run["name"]).savefig(
                figures / "confusion_matrix.png"
            )
        digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.*"))}
        manifest = json.dumps(digests, indent=2).encode()
        (folder / "manifest.json").write_bytes(manifest)
        return hashlib.sha256(manifest).hexdigest()

    def rehearse(self) -> None:
        """Do the slow first calls of closing a run into a scratch folder: they import for seconds, best spent while it trains."""
        from fmnist import plots, tracking

        with tempfile.TemporaryDirectory(prefix="fmnist-") as folder:
            frame = curves(self.spec, read(self.folder.path / "journal")[0])
            frame.to_parquet(Path(folder) / "curves.parquet")
            plots.learning_curves(frame, "", self.spec.steps_per_epoch, None).savefig(Path(folder) / "curves.png")
            module, images = self._servable(None)
            tracking.save_model(module, images, Path(folder) / "model")

    def _log_model(self, final: Record, results: Results) -> None:
        module, images = self._servable(results.parameters)
        metrics = {key: value for key, value in final.fields["metrics"].items() if key.startswith(("last/", "test/"))}
        self.store.log_model(self._run_id, module, images, results.step, metrics, final.fields["t"])

    def _servable(self, parameters: Any) -> tuple[Any, Any]:
        """The model that takes raw images, with these parameters or fresh ones; and two such images."""
        import torch

        from fmnist import data, model

        torch.set_num_threads(1)  # the trainer is at work beside us
        network = model.build(self.spec.model, self.spec.train.seed)
        if parameters is not None:
            # vector_to_parameters would leave views of one tensor, which torch.export then has to take apart.
            with torch.no_grad():
                sizes = [parameter.numel() for parameter in network.parameters()]
                for parameter, values in zip(network.parameters(), parameters.split(sizes), strict=True):
                    parameter.copy_(values.view_as(parameter))
        return model.Servable(network, *data.normalization(self.spec.data)).eval(), data.raw_images(self.store.root, 2)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def _predictions(path: Path) -> "pd.DataFrame":
    """split, index in the original file, label, logit_0 to logit_9: a row per image."""
    import numpy as np
    import pandas as pd

    arrays = np.load(path, allow_pickle=False)
    frames = []
    for split in ("val", "test"):
        if f"{split}_logits" in arrays:
            logits = arrays[f"{split}_logits"]
            columns = {"split": split, "index": arrays[f"{split}_index"], "label": arrays[f"{split}_labels"]}
            frames.append(pd.DataFrame(columns | {f"logit_{c}": logits[:, c] for c in range(logits.shape[1])}))
    return pd.concat(frames, ignore_index=True)


def _description(spec: "ExperimentSpec", status: str, reason: str | None, final: Record | None, environment: dict[str, Any]) -> str:
    """The run's page in MLflow: what was asked, what came out, how to repeat it."""
    lines = [spec.question, ""] if spec.question else []
    if reason:
        lines += [f"**{status}**: {reason}", ""]
    if final:
        lines += [*in_words(final.fields), f"Training took {final.fields['training_s']:.1f} s.", ""]
    return "\n".join([*lines, f"Repeat: `{environment['command']}`"])


if __name__ == "__main__":
    main()
