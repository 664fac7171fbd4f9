"""The process that carries journals into MLflow while runs train, and closes each run: figures, model, true status.

One per root, by a lock; each run starts one, and the one that finds the lock taken exits. `fmnist sync` is the same
code in the foreground. It may be killed at any moment: the next one sends again what was not noted as sent, and a
point sent twice is stored once. What it sends is on the disk first, so that no store knows more than the journal does.

The invariant of all this: journal, checkpoint and predictions of a run whose points are in no store are never removed, by any
path. `Carrier.remove` alone removes a state folder, and asks the store first: what a note on this disk says was true of a store
that may have been put back from a copy since.
"""

import contextlib
import copy
import fcntl
import functools
import gc
import hashlib
import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmnist import files, groups, state, tracking
from fmnist.errors import StoreError
from fmnist.journal import Record, curves, in_words, points, read
from fmnist.spec import ExperimentSpec, redacted, store_name
from fmnist.state import StateFolder, carrier_lock, state_folders

if TYPE_CHECKING:
    import pandas as pd

IDLE_S = 30
"""How long it stays after its last work: runs in a row then share one start of MLflow."""
PERIOD_S = 0.2
SEND_S, SEND_POINTS = 2.0, 4 * tracking.BATCH
"""When points of a run that goes on are sent: after this time, as a request costs some 20 ms of a core, however few they are, or at this many."""
PNG: dict[str, Any] = {"pil_kwargs": {"compress_level": 1}}
"""How figures are saved: a third larger, in half the time."""
NICENESS = 10
LOOK_S = 0.3
"""Longer than anyone holds the lock who only looks whether it is held."""
SIGNALS = ((0.0, signal.SIGTERM), (10.0, signal.SIGKILL))
"""What `sync` sends to an uploader in its way, and when."""
WORDLESS_S = 2.0
"""How long `sync` waits for another process without saying so."""
MAX_BACKOFF_S = 10.0
OUTCOMES = {"FINISHED": "finished", "KILLED": "interrupted", "FAILED": "failed"}
SILENT_END: dict[str, Any] = {
    "status": "KILLED",
    "reason": "the process ended without a word (kill -9, out of memory or power loss)",
}
"""What is taken for the end record of a run whose trainer wrote none."""


def main() -> None:
    """`python -m fmnist.sidecar ROOT`."""
    root = Path(sys.argv[1])
    with contextlib.suppress(BlockingIOError), _sole_carrier(root):  # else another one is at work
        os.nice(NICENESS)
        _serve(root)


@contextlib.contextmanager
def _sole_carrier(root: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the root's upload lock; where another process has it, raise BlockingIOError, or with `say` take its place.

    An uploader in the background is ended, as it may be at any moment; any other process is waited for, and named.
    """
    path = carrier_lock(root, store_name())
    if say:
        path.parent.mkdir(parents=True, exist_ok=True)
    with open(files.open_lock(path), "r+") as lock:
        began, told, signalled = time.monotonic(), False, 0
        while True:
            waited = time.monotonic() - began
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if say is None and waited > LOOK_S:
                raise BlockingIOError
            if say and signalled < len(SIGNALS) and waited >= SIGNALS[signalled][0]:
                state.end_uploader(path, SIGNALS[signalled][1])
                signalled += 1
            if say and not told and waited > WORDLESS_S:
                say(f"waiting for {state.holder(path)}, which is uploading; if it hangs, end it")
                told = True
            time.sleep(0.02)
        state.hold(lock, state.UPLOADER if say is None else "another `fmnist sync`")
        yield


def _serve(root: Path) -> None:
    """Upload until nothing has been left to upload for a while."""
    carriers: dict[Path, Carrier] = {}
    store: tracking.Store | None = None
    grown: set[str] = set()  # groups that gained a run
    idle_since, backoff, rehearsed = time.monotonic(), PERIOD_S, False
    while time.monotonic() - idle_since < IDLE_S and carrier_lock(root, store_name()).exists():
        if store is not None and store.stale:  # the database was deleted or replaced below us
            store, carriers = None, {}
        folders = _folders(root, store_name())
        carriers = {each.path: carriers[each.path] for each in folders if each.path in carriers}
        for folder in folders:
            try:
                if store is None:
                    store = tracking.connect(root, create=True)
                    grown |= _half_written_groups(store)
                if folder.path not in carriers:
                    carriers[folder.path] = Carrier(folder, store)
                carrier = carriers[folder.path]
                before = carrier.closed
                if carrier.advance():
                    idle_since, backoff = time.monotonic(), PERIOD_S
                    grown |= {carrier.spec.group} if carrier.closed and not before else set()
                    if not rehearsed and not carrier.closed:
                        carrier.rehearse()
                        rehearsed = True
                        gc.freeze()  # a third of the time to store points went into collecting what the imports left
            except Exception as error:  # an outage of any kind: the journal waits, training goes on
                _complain(f"{folder.path.name}: {_report(folder, error)}")
                carriers.pop(folder.path, None)  # what it knows may be of a store that is no more
                backoff = min(2 * backoff, MAX_BACKOFF_S)
            if folder.running:
                idle_since = time.monotonic()
        for group in grown - {
            folder.run.get("group")
            for folder in state_folders(root)
            if not folder.carried.get("closed")
        }:
            grown.remove(group)  # once no other run of it is at work
            if store is not None:
                _regroup(store, group)
        time.sleep(backoff)


def _half_written_groups(store: tracking.Store) -> set[str]:
    """The groups whose run was not written to its end, as where the one before this process was killed over it."""
    tags = (run.data.tags for run in store.half_written())
    return {each["group"] for each in tags if each["kind"] == "group"}


def _folders(root: Path, *stores: str | None) -> list[StateFolder]:
    """The state folders of the runs that are meant for one of these stores."""
    return [folder for folder in state_folders(root) if folder.run["store"] in stores]


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # the log's disk is full
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", flush=True)


def _regroup(store: tracking.Store, key: str | None) -> None:
    """Write the runs of a group, or of all, that are behind; what fails is only put off, since everything in them is derived."""
    try:
        groups.write(store, key)
    except Exception as error:
        _complain(f"groups: {redacted(' '.join(repr(error).split())[:300])}")


def _report(folder: StateFolder, error: Exception) -> str:
    """Note an error where the trainer that waits for this run sees it."""
    text = redacted(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    with contextlib.suppress(OSError):
        folder.note(**{**folder.carried, "error": text})
    return text


def sync(root: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Carry every run that is meant for this store or for none yet, now, in place of a sidecar that may be at work; then see to the groups."""
    results: list[dict[str, Any]] = []
    if not _folders(root, None, store_name()) and not tracking.exists(root):
        return results
    with _sole_carrier(root, say):
        store = tracking.connect(root, create=True)
        gc.freeze()
        for folder in state_folders(root):
            if folder.run["store"] not in (None, store_name()):
                say(
                    f"{folder.path.name}: is for {folder.run['store']}; set or unset MLFLOW_TRACKING_URI accordingly and sync again"
                )
            elif result := _carry_whole(folder, store, say):
                results.append(result)
        _regroup(store, None)
    return results


def _carry_whole(
    folder: StateFolder, store: tracking.Store, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Upload one run as far as it goes; what came of it, or None where all of it was in the store before."""
    result: dict[str, Any] = {
        "key": folder.path.name,
        "run_id": None,
        "status": "RUNNING",
        "error": None,
    }
    try:
        carrier = Carrier(folder, store)
        if carrier.settled:
            carrier.remove()
        if carrier.settled:
            return None
        while not carrier.settled and carrier.advance():
            pass
        carrier.remove()
        result |= {"run_id": carrier.run_id, "status": carrier.closed or "RUNNING"}
        if carrier.remark:
            say(f"{folder.path.name}: {carrier.remark}")
        say(
            f"{folder.path.name}: {carrier.closed or 'still running; what there is so far is stored'}"
        )
    except Exception as error:  # one run's trouble is not the others'
        result["error"] = _report(folder, error)
        say(f"{folder.path.name}: not stored yet, it stays on disk: {result['error']}")
    return result


class Carrier:
    """The upload of one run: `advance` does what can be done now."""

    def __init__(self, folder: StateFolder, store: tracking.Store) -> None:
        self.folder, self.store = folder, store
        self.journal = folder.path / "journal"
        self.identity = store.identity()
        self._send_due = 0.0
        self._take_up(folder.carried)

    @functools.cached_property
    def spec(self) -> ExperimentSpec:
        return self.folder.spec

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        return self.folder.environment

    def _take_up(self, note: dict[str, Any]) -> None:
        """Go on where the last upload got to by its note, as far as the journal and the store bear that out."""
        known = note.get("store", self.identity) == self.identity
        self.key: str = note.get("key", self.folder.run["key"])
        self.remark: str | None = note.get("remark")
        self.run_id: str = note.get("run_id", "")
        self.experiment_id: str = note.get("experiment_id", "")
        self.closed: str | None = note.get("closed")
        self.reason: str | None = note.get("reason")
        self.offset: int = note.get("offset", 0)
        if not _is_boundary(self.journal, self.offset):
            self.offset, self.closed = 0, None
        standing = tracking.Standing(None)
        if known and self.run_id:
            standing = self.store.standing(self.run_id)
        if standing.stage is None:  # it goes whole into the store that there is now
            self.run_id, self.offset, self.closed = "", 0, None
        elif standing.stage == "active" and not self._is_of_a_copy(standing.uploaded):
            if _bytes(standing.uploaded) < self.offset:  # the store was put back from a copy
                self.offset, self.closed = 0, None
            if standing.status != self.closed:  # that, or the run was restored after it was deleted
                self.closed = None
        self._is_open = standing.status == "RUNNING"
        self._ended = _has_ended(read(self.journal, end=self.offset)[0])
        if note.get("closed") and not self.closed:
            self._note(None, None)  # who waits for the run must not take it for stored

    @property
    def settled(self) -> bool:
        """Whether the run is closed in the store with all that its journal holds."""
        if self.closed == "DELETED":
            return True
        return self.closed is not None and not read(self.journal, self.offset)[0]

    def remove(self) -> bool:
        """Remove the folder of a settled run that can't be continued, if the store holds the run now; tells whether anything was done.

        Only a run that the store says is deleted counts as deleted: one that is not found is uploaded anew.
        """
        # in this order: one that is unfinished may be continued at any moment
        if self.folder.awaited or self.folder.unfinished or self.folder.running:
            return False
        self._take_up(self.folder.carried)
        if not self.settled:
            return True
        if self.store.stale:
            raise StoreError("the database was deleted or replaced meanwhile")
        self.folder.remove()
        return True

    def advance(self) -> bool:
        """Send what the journal has gained, close the run once it has ended; tells whether anything was done."""
        if self.settled:
            return self.remove()
        try:
            return self._carry()
        except Exception:
            stage = self._stage()
            if stage == "active":
                raise
            if stage == "deleted":
                self._note("DELETED", tracking.DELETED_REASON)
                self.store.end_deleted(self.run_id, self._last_ms(read(self.journal)[0]))
            else:  # a store that was put back from a copy
                self._take_up({})
            return True

    def _stage(self) -> str | None:
        """Whether the run is deleted, or not in the store; active where that can't be told."""
        with contextlib.suppress(Exception):
            if self.run_id and not self.store.stale and self.store.identity() == self.identity:
                return self.store.standing(self.run_id).stage
        return "active"

    def _carry(self) -> bool:
        # asked before reading: what was written before the end is then surely read
        running = self.folder.running
        records, offset = read(self.journal, self.offset)
        if self._can_wait(records, running):
            return False
        if not self.run_id:
            self._open()
        if not self.store.local:  # a local store is of one folder, and so of one copy
            uploaded = self.store.standing(self.run_id).uploaded
            if self._is_of_a_copy(uploaded):
                self._branch_off(uploaded)
                return True
        if not self._is_open:
            self.store.reopen(self.run_id)
            self._is_open = True
            self._note(None, None)
        if records:
            self._send_due = time.monotonic() + SEND_S
            with open(self.journal) as file:
                os.fsync(file.fileno())
            self._send(records, offset)
            self.offset, self._ended = (
                offset,
                _has_ended(records),
            )  # only once they are sent: what fails is read again
            self._note(None, None)
        if self._ended or not running:
            self._close()
            return True
        return bool(records)

    def _can_wait(self, records: list[Record], running: bool) -> bool:
        """Tell whether there is nothing to do for this run yet, or so little that it would cost more than it is worth."""
        if not running or not self.run_id or not self._is_open:
            return False
        if _has_ended(records) or (self._ended and not records):
            return False
        steps = sum(record.fields.get("count", 0) for record in records)
        many = 2 * steps // self.spec.tracking.log_every >= SEND_POINTS
        return not records or (not many and time.monotonic() < self._send_due)

    def _is_of_a_copy(self, uploaded: str) -> bool:
        """Tell from what the store says was uploaded whether a copy of this folder was continued elsewhere: this journal lacks it."""
        count = _bytes(uploaded)
        if count <= self.offset:
            return False  # that much was uploaded from here
        size = self.journal.stat().st_size
        if read(self.journal)[1] < min(count, size):
            return False  # damaged, or cut off when the run is continued
        return size < count or _mark(self.journal, count) != uploaded

    def _branch_off(self, uploaded: str) -> None:
        """Go on as another run: in the one so far every point would be there twice from where the copies part."""
        self.remark = (
            f"another copy of this run was continued and has uploaded {_bytes(uploaded):,} bytes of its"
            f" journal to run {self.run_id[:8]}; this one is recorded as a run of its own"
        )
        self.key = f"{self.folder.run['key']}-{secrets.token_hex(3)}"
        self.run_id, self.offset, self._ended = "", 0, False
        self._note(None, None)  # before the run is made: it is then found by its key

    def _send(self, records: list[Record], end: int) -> None:
        """Store the points of records that end at this byte of the journal, and say in the store how far it holds it."""
        sent = (point for record in records for point in points(self.spec, record))
        self.store.log_points(self.run_id, sent, {tracking.UPLOADED: _mark(self.journal, end)})

    def _note(self, closed: str | None, reason: str | None) -> None:
        self.closed, self.reason = closed, reason
        names = ("run_id", "experiment_id", "key", "offset", "closed", "reason", "remark")
        self.folder.note(store=self.identity, **{name: getattr(self, name) for name in names})

    def _open(self) -> None:
        run, environment, spec = self.folder.run, self.environment, self.spec
        tags = {
            "kind": "run",
            "experiment": spec.name,
            "fingerprint": spec.fingerprint,
            "group": spec.group,
            "seed": spec.train.seed,
            **{
                key: environment.get(key)
                for key in ("data_digest", "device", "device_check", "threads", "stack")
            },
            "git_commit": environment["git_commit"] or "none",
            "git_dirty": str(environment["git_dirty"]).lower(),
            "torch": environment["packages"]["torch"],
            "extends": run.get("extends"),
            "command": environment["command"],
            "mlflow.source.git.commit": environment["git_commit"],
            "question": spec.question or None,
            "mlflow.note.content": spec.question,
        }
        self.experiment_id = self.store.experiment(spec.tracking.experiment)
        name, begun = run["name"], run["started_ms"]
        self.run_id = self.store.create_run(
            self.experiment_id, self.key, name, begun, spec, tags, environment["data_digest"]
        )
        self._is_open = True
        self._note(None, None)

    def _close(self) -> None:
        """Check the points, store artifacts, model and tags, then the final status: a run is FINISHED only with all of these."""
        records, readable = read(self.journal)
        end = records[-1].fields if _has_ended(records) else SILENT_END
        status, reason = end["status"], end["reason"]
        if readable < self.offset:
            status, reason = (
                "FAILED",
                f"the journal is damaged at byte {readable:,} of the {self.offset:,} that were stored",
            )
        wrong = self._wrong_counts(records)
        if wrong and status == "FINISHED":
            status, reason = "FAILED", f"the store does not hold the points that were sent: {wrong}"
        final, weights, predictions = None, None, None
        if status == "FINISHED":
            try:
                final, weights, predictions = self._results(records)
            except Exception as error:  # damaged since, in whatever way
                status, reason = "FAILED", f"its results can't be read back: {error}"
        with files.scratch() as scratch:
            if end.get("traceback"):
                Path(scratch, "traceback.txt").write_text(end["traceback"], encoding="utf-8")
            manifest = self._lay_out(Path(scratch), records, predictions)
            self.store.client.log_artifacts(self.run_id, str(scratch))
        if final and weights:
            metrics = {
                key: value
                for key, value in final["metrics"].items()
                if key.startswith(("last/", "test/"))
            }
            module, example = self._servable(weights["parameters"])
            data = self.environment["data_digest"]
            self.store.log_model(
                self.run_id, module, example, weights["step"], metrics, final["t"], self.spec, data
            )
        self.store.set_tags(
            self.run_id,
            {"manifest_sha256": manifest, **self._closing_tags(records, status, reason, final)},
        )
        self.store.close_run(self.run_id, status, self._last_ms(records))
        self._is_open = False
        if self.store.stale:  # all of this went into a file that is no more
            raise StoreError("the database was deleted or replaced meanwhile")
        self._note(status, reason)

    def _results(self, records: list[Record]) -> tuple[dict[str, Any], Any, "pd.DataFrame"]:
        """The `final` record of a finished run, its weights and predictions; raises where there are none, or not those on record."""
        from fmnist import checkpoint

        final = next((record.fields for record in records if record.kind == "final"), None)
        if final is None:
            raise ValueError("its journal says that it finished, and holds no results")
        loaded = checkpoint.load(self.folder.path / checkpoint.NEWEST, self.spec)
        weights = loaded["best"] if final["weights"] == "best" else loaded
        path = self.folder.path / "predictions.npz"
        found = {
            "parameters": checkpoint.digest(weights["parameters"]),
            "predictions": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for name, digest in found.items():
            if digest != final["digests"][name]:
                raise ValueError(f"the {name} on disk are not those that it recorded")
        return final, weights, _predictions(path)

    def _last_ms(self, records: list[Record]) -> int:
        """When the last of these records was written."""
        times = (
            int(record.fields["t1"] if record.kind == "train" else record.fields["t"])
            for record in records
        )
        return max(times, default=int(self.folder.run["started_ms"]))

    def _wrong_counts(self, records: list[Record]) -> str:
        """Of which metrics the store does not hold every point once, even after all were sent again."""
        expected = Counter(point.key for record in records for point in points(self.spec, record))
        if self.store.count(self.run_id, expected) != expected:
            self._send(records, self.offset)
        stored = self.store.count(self.run_id, expected)
        return ", ".join(
            f"{key} {stored[key]} of {count}"
            for key, count in expected.items()
            if stored[key] != count
        )

    def _closing_tags(
        self, records: list[Record], status: str, reason: str | None, final: dict[str, Any] | None
    ) -> dict[str, Any]:
        """How the run ended, and its page in MLflow: what was asked, what came out, how to repeat it."""
        page = [self.spec.question, ""] if self.spec.question else []
        if reason:
            page += [f"**{status}**: {reason}", ""]
        if final:
            page += [*in_words(final), f"Training took {final['training_s']:.1f} s.", ""]
        known = (
            "weights",
            "collapsed_at",
            "stopped_early_at",
            "pruned_at",
            "recording_s",
            "training_s",
        )
        tags = {key: (final or {}).get(key) for key in known}
        end = records[-1].fields if _has_ended(records) else SILENT_END
        tags["outcome"] = (
            end.get("outcome", OUTCOMES[status]) if status == end["status"] else OUTCOMES[status]
        )
        if resumed := [record.fields["step"] for record in records if record.kind == "resume"]:
            tags |= {"resumes": len(resumed), "resumed_from_step": resumed[-1]}
        page.append(f"Repeat: `{self.environment['command']}`")
        return {
            **tags,
            "reason": reason[:500] if reason else None,
            "mlflow.note.content": "\n".join(page),
        }

    def _lay_out(
        self, folder: Path, records: list[Record], predictions: "pd.DataFrame | None"
    ) -> str:
        """Lay out a run's artifacts and their manifest; returns the manifest's SHA-256."""
        from fmnist import plots

        for name in ("spec.yaml", "environment.json", "checkpoint.pt"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(self.folder.path / name, folder)
        frame, title = curves(self.spec, records), self.folder.run["name"]
        frame.to_parquet(folder / "curves.parquet", index=False)
        figures = folder / "figures"
        figures.mkdir()
        if frame["val/loss"].notna().any():
            best = next(
                (
                    int(record.fields["metrics"]["best/step"])
                    for record in records
                    if record.kind == "final"
                ),
                None,
            )
            plots.learning_curves(frame, title, self.spec.steps_per_epoch, best).savefig(
                figures / "learning_curves.png", **PNG
            )
        if predictions is not None:
            predictions.to_parquet(folder / "predictions.parquet", index=False)
            selected = predictions[predictions["split"] == "val"]
            predicted = selected.filter(like="logit_").to_numpy().argmax(1)
            plots.confusion_matrix(selected["label"].to_numpy(), predicted, title).savefig(
                figures / "confusion_matrix.png", **PNG
            )
        digests = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.*"))
        }
        manifest = json.dumps(digests, indent=2).encode()
        (folder / "manifest.json").write_bytes(manifest)
        return hashlib.sha256(manifest).hexdigest()

    def rehearse(self) -> None:
        """Do the slow first calls of closing a run into a scratch folder: they import for seconds, best spent while it trains."""
        with files.scratch() as scratch:
            self._lay_out(Path(scratch), read(self.journal)[0], None)
            tracking.save_model(*self._servable(None), Path(scratch) / "model")

    def _servable(self, parameters: Any) -> tuple[Any, Any]:
        """The model that takes raw images, with these parameters (a flat tensor) or fresh ones; and two such images."""
        import torch

        from fmnist import data, model

        torch.set_num_threads(1)  # the trainer is at work beside us
        network = model.build(self.spec.model, self.spec.train.seed)
        if parameters is not None:
            torch.nn.utils.vector_to_parameters(parameters, network.parameters())
            network = copy.deepcopy(
                network
            )  # else views of one tensor, which torch.export would have to take apart
        return model.Servable(network, *data.normalization(self.spec.data)).eval(), data.raw_images(
            self.store.root, 2
        )


def _has_ended(records: list[Record]) -> bool:
    """Whether a journal ends with these records' end: after an end record comes nothing, or the run is resumed."""
    return bool(records) and records[-1].kind == "end"


def _is_boundary(journal: Path, offset: int) -> bool:
    """Tell whether whole records end at this byte, or would if the journal were not damaged before it."""
    if read(journal, end=offset)[1] == offset or not journal.exists():
        return True
    return read(journal)[1] < min(offset, journal.stat().st_size)


def _mark(journal: Path, end: int) -> str:
    """The first bytes of a journal: how many, and their digest."""
    with open(journal, "rb") as file:
        return f"{end} {hashlib.sha256(file.read(end)).hexdigest()[:32]}"


def _bytes(mark: str) -> int:
    """How many bytes such a mark is of; 0 where there is none."""
    return int(mark.partition(" ")[0] or 0)


def _predictions(path: Path) -> "pd.DataFrame":
    """split, index in the original file, label, logit_0 to logit_9: a row per image."""
    import numpy as np
    import pandas as pd

    arrays = np.load(path, allow_pickle=False)
    frames = []
    for split in ("val", "test"):
        if f"{split}_logits" in arrays:
            images = pd.DataFrame(
                {
                    "split": split,
                    "index": arrays[f"{split}_index"],
                    "label": arrays[f"{split}_labels"],
                }
            )
            frames.append(images.join(pd.DataFrame(arrays[f"{split}_logits"]).add_prefix("logit_")))
    return pd.concat(frames, ignore_index=True)


if __name__ == "__main__":
    main()
