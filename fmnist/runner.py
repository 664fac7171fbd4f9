"""The story of a run, read top to bottom: refuse what can't work, train by the plan, journal, hand over, wait.

Nothing here computes and nothing here knows MLflow: the journal is carried there by another process.
"""

import base64
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from fmnist import checkpoint, devices, environment, experiments
from fmnist import engine as engines
from fmnist import spec as specs
from fmnist.errors import Diverged, SpecError, StoreError
from fmnist.journal import Result, from_curves
from fmnist.state import (
    AWAITED,
    Claims,
    Journal,
    StateFolder,
    at_hand,
    carrier_lock,
    is_locked,
    now_ms,
    signals,
    start_carrier,
    state_folder,
    state_folders,
    unwritable,
    why_unwritable,
)
from fmnist.training import Outcome, Stack, State, Training

PREFLIGHT_TIMEOUT_S = 5
PATIENCE_S = 60.0  # how long a carrier may report an error, or be gone, before the command stops waiting for it
POLL_S = 0.05
PROBE_S = 1.0  # how often to look whether the disk takes anything, while nothing is uploaded
SILENT_S = 10.0  # how long to wait for an upload without a word
INTERRUPTED = 128  # exit codes above it are of signals
ARTIFACTS = ("spec.yaml", "curves.parquet", "checkpoint.pt")  # what `extend` needs of a run


@dataclass(frozen=True)
class Context:
    """Where a run is kept and whom it tells how it goes."""

    root: Path
    sync: bool = True  # whether it goes into MLflow now; else with a later `fmnist sync`
    say: Callable[[str], None] = print
    watch: Callable[["Training"], object] = lambda training: None  # called after each segment
    prune: Callable[["Training"], bool] = lambda training: (
        False
    )  # whether to end it after this evaluation
    wait: bool = True  # for the runs to be in MLflow; else who calls sees to that
    patience_s: float = PATIENCE_S  # with a store that takes nothing

    @property
    def store(self) -> str | None:
        return specs.store_name() if self.sync else None


Beginning = tuple[Journal, State | None]  # the journal to write, and the checkpoint to go on from


class Request(NamedTuple):
    """A run that is wanted: how to take up an interrupted one of it, if that is to be, and else how to start one in an environment."""

    spec: specs.ExperimentSpec
    command: str
    take_up: Callable[[], Beginning | None]
    start: Callable[[dict[str, Any]], Beginning]


def run(
    wanted: Sequence[experiments.Resolved],
    context: Context,
    fresh: bool = False,
    resume: StateFolder | None = None,
) -> list[Outcome]:
    """Train experiments on the same data, or continue their interrupted runs, and see them into MLflow.

    Raises UserError before the first is begun.
    """
    return _train([_request(resolved, context, fresh, resume) for resolved in wanted], context)


def missing(
    wanted: Sequence[experiments.Resolved], recorded: Mapping[str, Result], context: Context
) -> list[experiments.Resolved]:
    """Those of which no run is `recorded` (database.recorded), on its way there or being trained elsewhere; of the others it says why."""
    done = {
        fingerprint: result
        for fingerprint, result in {**recorded, **at_hand(context.root)}.items()
        if result.outcome != "pruned"
    }
    for resolved in wanted:
        if result := done.get(resolved.spec.fingerprint):
            context.say(f"s{resolved.spec.train.seed}: {result.where} (--fresh trains it again)")
    return [resolved for resolved in wanted if resolved.spec.fingerprint not in done]


def run_missing(
    wanted: Sequence[experiments.Resolved], recorded: Mapping[str, Result], context: Context
) -> list[Outcome]:
    """Train those of which there is no run yet, and see to it that those on this disk get into MLflow too."""
    left = missing(wanted, recorded, context)
    outcomes = run(left, context) if left else []
    if not any(outcome.exit_code > INTERRUPTED for outcome in outcomes):
        trained = {resolved.spec.fingerprint for resolved in left}
        upload_complete({each.spec.fingerprint for each in wanted} - trained, context)
    return outcomes


def _request(
    resolved: experiments.Resolved, context: Context, fresh: bool, resume: StateFolder | None
) -> Request:
    spec = resolved.spec
    if resume is not None and (differences := spec.differences(resume.spec.flat())):
        raise SpecError(f"{resume.path.name} can't be continued with another spec: {differences}")

    def take_up() -> Beginning | None:
        same = [
            folder
            for folder in state_folders(context.root)
            if folder.run.get("fingerprint") == spec.fingerprint
        ]
        here = [
            folder
            for folder in same
            if context.store is None or folder.run["store"] in (None, context.store)
        ]
        interrupted = [folder for folder in here if folder.resumable]
        if resume or (interrupted and not fresh):
            return _take_up(resume or interrupted[-1], spec, context)
        for folder in interrupted:
            given_up = Journal.resume(folder)
            given_up.event(
                "end", status="KILLED", reason="given up for a fresh run", resumable=False
            )
            given_up.release()
            context.say(
                f"giving up {folder.path.name}, which stopped at step {given_up.recorded.last:,}"
            )
        for folder in same:
            if folder.running:
                context.say(
                    f"{folder.path.name} has the same spec and is being trained by {folder.holder}; this is another run beside it"
                )
        return None

    def start(now: dict[str, Any]) -> Beginning:
        return Journal.create(context.root, spec, resolved.display_name, now, context.store), None

    return Request(spec, resolved.command, take_up, start)


def extend(origin: Path, run_id: str, name: str, epochs: int, context: Context) -> Outcome:
    """Train on a finished run, whose artifacts are in `origin`, as a new one; raises UserError where that would have begun otherwise."""
    import pandas as pd

    before = experiments.parse(
        (origin / "spec.yaml").read_text(encoding="utf-8"), f"run {run_id}: spec.yaml"
    )
    refuse = f"run {run_id} can't be extended to {epochs} epochs: "
    if epochs <= before.train.epochs:
        raise SpecError(f"{refuse}it has {before.train.epochs} already; give more")
    longer = before.model_copy(update={"train": before.train.model_copy(update={"epochs": epochs})})
    spec = experiments.parse(experiments.dump(longer), "--epochs")
    if not isinstance(spec.schedule, specs.Constant | specs.Step):
        raise SpecError(
            f"{refuse}its schedule ({spec.schedule.type}) sets every learning rate by the run's length, so the longer run differs from the first"
            f" step on; train it from the start: --set train.epochs={epochs}"
        )
    try:
        state, curves = (
            checkpoint.load(origin / checkpoint.NEWEST, before),
            pd.read_parquet(origin / "curves.parquet"),
        )
    except (OSError, ValueError) as error:
        raise StoreError(f"{refuse}{error}") from None
    if spec.train.early_stopping and (
        state["step"] != before.steps or before.steps % spec.train.eval_every
    ):
        raise SpecError(
            f"{refuse}early stopping ended it, or looked at its last step, where the longer run would not have looked"
        )
    if state["step"] != before.steps:
        raise SpecError(f"{refuse}it ended at step {state['step']:,} of {before.steps:,}")

    def start(now: dict[str, Any]) -> Beginning:
        records = from_curves(spec, curves, before.steps, now_ms())
        longer_name = f"{re.sub(' epochs=[0-9]+', '', name)} epochs={epochs}"
        journal = Journal.create(
            context.root, spec, longer_name, now, context.store, run_id, records
        )
        journal.flush()
        checkpoint.save(journal.folder, spec, state)
        context.say(f"extending run {run_id} from step {before.steps:,} to {spec.steps:,}")
        return journal, state

    return _train(
        [Request(spec, f"fmnist extend {run_id} --epochs {epochs}", lambda: None, start)], context
    )[0]


def _train(requests: Sequence[Request], context: Context) -> list[Outcome]:
    """Train these runs, as many at once as `compute.stack` has it; a signal ends those at work and keeps the rest from beginning."""
    began, first = time.monotonic(), requests[0].spec
    _preflight(context)
    place = devices.choose([request.spec for request in requests], context.root, context.say)
    size, outcomes = engines.stack_size(first.compute, place.device), list[Outcome]()
    carrier, awaited = None, None
    for start in range(0, len(requests), size):
        chosen = requests[start : start + size]
        if len(requests) > 1:
            context.say(
                f"{', '.join(f's{request.spec.train.seed}' for request in chosen)}: {start + len(chosen)} of {len(requests)} runs"
            )
        stacks = _begin(chosen, place, context)
        carrier = start_carrier(context.root) if context.sync else None
        if context.sync and context.wait and awaited is None:
            awaited = Claims(context.root, AWAITED)
        with signals() as caught:
            for stack in stacks:
                stack.train(context.watch, caught, context.prune)
        for stack in stacks:
            for training in stack.trainings:
                outcomes.append(training.outcome)
                if awaited is not None:
                    awaited.take(training.outcome.key, patience_s=0.25)
                training.journal.release()
            stack.trainings.clear()  # each holds its stack: without this circle the engine goes at once
        if caught:
            break
    if context.wait:
        hand_over(outcomes, context, carrier)
    if awaited is not None:
        awaited.close()
    for outcome in outcomes:
        outcome.total_s = time.monotonic() - began
    return outcomes


def _begin(requests: Sequence[Request], place: devices.Place, context: Context) -> list[Stack]:
    """Begin these runs, or continue them; those that are at the same step are one stack."""
    together: dict[int, list[tuple[Request, Beginning | None]]] = {}
    try:
        for request in requests:
            taken = request.take_up()
            together.setdefault(taken[1]["step"] if taken and taken[1] else 0, []).append(
                (request, taken)
            )
        return [_stack(members, place, context) for members in together.values()]
    except BaseException as error:
        for taken in [taken for members in together.values() for _, taken in members if taken]:
            taken[0].release()
        if not isinstance(error, OSError):
            raise
        raise unwritable(context.root, error) from None


def _stack(
    members: Sequence[tuple[Request, Beginning | None]], place: devices.Place, context: Context
) -> Stack:
    begun = list[tuple[Request, Journal, State | None]]()
    for request, taken in members:
        now = environment.collect(request.command, place.device, len(members), place.finding)
        if taken:
            _go_on(*taken, request.spec, now, context)
        begun.append((request, *(taken or request.start(now))))
    with devices.failures(place.device):
        stack = Stack(engines.Engine([request.spec for request, _, _ in begun], place.dataset))
    for member, (request, journal, state) in enumerate(begun):
        outcome = Outcome(journal.folder.name, StateFolder.at(journal.folder).run["name"])
        stack.trainings.append(Training(request.spec, stack, member, journal, outcome))
        if state is not None:
            stack.trainings[-1].go_on_from(state)
    return stack


def _take_up(folder: StateFolder, spec: specs.ExperimentSpec, context: Context) -> Beginning:
    """Take up an interrupted run at the newest checkpoint that is whole and that its journal reaches."""
    store = folder.run["store"]
    if context.store is not None and store not in (None, context.store):
        raise StoreError(
            f"{folder.path.name} is for {store}: set or unset MLFLOW_TRACKING_URI accordingly, or give --no-sync"
        )
    journal = Journal.resume(folder)
    try:
        state = _newest_checkpoint(journal, spec, context.say)
        if context.store is not None or folder.recovered:
            folder.assign(context.store or store)
    except BaseException:
        journal.release()
        raise
    return journal, state


def _go_on(
    journal: Journal,
    state: State | None,
    spec: specs.ExperimentSpec,
    now: dict[str, Any],
    context: Context,
) -> None:
    """Record that a run goes on in this environment; where that is another than before, its last bits are not compared."""
    folder, here, step = (
        StateFolder.at(journal.folder),
        environment.facts(now),
        state["step"] if state else 0,
    )
    resumed = (
        record.fields.get("environment", {})
        for record in journal.records
        if record.kind == "resume"
    )
    changed = [
        environment.differences(place, here)
        for place in (environment.facts(folder.environment), *resumed)
    ]
    other = sorted(
        {f"{key} {change[key]}" for change in changed for key in environment.BITS if key in change}
    )
    context.say(
        f"continuing {folder.path.name} at step {step:,} of {spec.steps:,} (--fresh would start anew)"
    )
    if other:
        context.say(
            f"it began elsewhere, so what is computed from here on may differ in its last bits: {', '.join(other)}"
        )
    journal.exact = not other
    journal.event("resume", step=step, environment=here)


def _newest_checkpoint(
    journal: Journal, spec: specs.ExperimentSpec, say: Callable[[str], None]
) -> State | None:
    for path in (journal.folder / checkpoint.NEWEST, journal.folder / checkpoint.PREVIOUS):
        try:
            state = checkpoint.load(path, spec)
            if state["step"] <= journal.recorded.last:
                return state
            say(
                f"{path} is of step {state['step']:,}; the journal is whole up to step {journal.recorded.last:,}"
            )
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            say(f"{error}; what there is before it is taken")
    return None


def _preflight(context: Context) -> None:
    """Refuse a tracker that can't be reached or used now; what fails later is an outage, and training goes on."""
    if not context.sync:
        return
    if (uri := specs.tracking_server()) is None:
        specs.check_folder(context.root)
        return
    try:
        urllib.request.urlopen(specs.redacted(uri) + "/health", timeout=PREFLIGHT_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # it is there and speaks HTTP; a proxy may hide /health
    except (OSError, ValueError) as error:
        raise StoreError(
            f"no MLflow server answers at {specs.redacted(uri)} ({error}); start it, unset MLFLOW_TRACKING_URI for the local store, or give --no-sync"
        ) from None

    if (credentials := _credentials(uri)) is not None:
        _log_in(specs.redacted(uri), credentials)


def _credentials(uri: str) -> dict[str, str] | None:
    """The header by which MLflow will tell the server who it is; None where it may find that in other places."""
    given = re.match(r"https?://([^/]*)@", uri)
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    user, password, token = (os.environ.get(name) for name in names)
    if given or (user and password):
        pair = unquote(given[1]) if given else f"{user}:{password}"
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    if token:
        return {"Authorization": f"Bearer {token}"}
    elsewhere = (".netrc", "_netrc", ".mlflow/credentials")
    settings = {"NETRC", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4"}
    if settings & {*os.environ} or any((Path.home() / name).exists() for name in elsewhere):
        return None
    return {}


def _log_in(address: str, credentials: Mapping[str, str]) -> None:
    """Refuse a user or password that the server does not take."""
    question = f"{address}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        request = urllib.request.Request(question, headers=dict(credentials))
        urllib.request.urlopen(request, timeout=PREFLIGHT_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.UNAUTHORIZED:
            raise StoreError(
                f"the MLflow server at {address} does not take this user and password; set MLFLOW_TRACKING_USERNAME and _PASSWORD, or give --no-sync"
            ) from None
    except (OSError, ValueError):
        pass  # an outage that began this moment


def hand_over(
    outcomes: Sequence[Outcome], context: Context, carrier: "subprocess.Popen[bytes] | None" = None
) -> None:
    """Wait until the runs are in MLflow; what a carrier fails to do for long, or Ctrl-C, leaves them to a later `fmnist sync`."""
    if not context.sync:
        for outcome in outcomes:
            outcome.unsynced = "--no-sync was given"
        return
    waiting, patience_s = (
        [outcome for outcome in outcomes if outcome.unsynced is None],
        context.patience_s,
    )
    try:
        while waiting:
            _wait_for_carrier(context, waiting[0], carrier, patience_s)
            if waiting.pop(0).unsynced:
                patience_s = 0.0  # the others are in the same trouble
    except KeyboardInterrupt:
        for outcome in waiting:
            outcome.unsynced = "interrupted while it was being stored; it goes on in the background"


def _wait_for_carrier(
    context: Context, outcome: Outcome, carrier: "subprocess.Popen[bytes] | None", patience_s: float
) -> None:
    try:
        folder = StateFolder.at(state_folder(context.root) / outcome.key)
        end = (folder.path / "journal").stat().st_size
    except FileNotFoundError:  # nobody holds its lock any more, and all of it is in MLflow
        return
    lock, wait = carrier_lock(context.root, specs.store_name()), _Wait(context, patience_s)
    note = folder.carried
    while True:
        before, note = note, folder.carried
        outcome.run_id, outcome.experiment_id = note.get("run_id"), note.get("experiment_id")
        if note.get("remark"):
            wait.say(note["remark"])
        closed = note.get("closed")
        if closed == "DELETED" or (closed and note["offset"] >= end):
            if (
                closed != outcome.status
            ):  # FAILED although training ended well, if the store lost points
                outcome.status, outcome.reason = closed, note.get("reason")
                outcome.exit_code = Diverged.exit_code if closed == "FAILED" else outcome.exit_code
            return
        held = is_locked(lock)
        if wait.is_over(note.get("offset") != before.get("offset"), note.get("error"), held):
            outcome.unsynced = wait.why
            return
        gone = not held and (carrier is None or carrier.poll() is not None)
        if gone and not wait.full:  # on a full disk it would only end at once
            carrier = start_carrier(context.root)
        if not folder.path.exists():
            return
        if outcome.resumable and folder.running:
            outcome.unsynced = f"it is being continued by {folder.holder}"
            return
        time.sleep(POLL_S)


class _Wait:
    """The wait for an upload: for how long nothing has come of it, why, and what was said of that."""

    def __init__(self, context: Context, patience_s: float) -> None:
        self.context, self.patience_s = context, patience_s
        self.trouble: str | None = None
        self.full: str | None = None
        self._began = self._looked = time.monotonic()
        self._spent_s, self._probed = 0.0, -PROBE_S
        self._said: set[str] = set()

    def is_over(self, progressed: bool, error: str | None, held: bool) -> bool:
        """Take in how things stand, say what is new, and tell whether to wait no longer."""
        now = time.monotonic()
        if progressed:
            self._began, self._spent_s = now, 0.0
        if now - self._probed > PROBE_S:  # an uploader can't note its trouble on a full disk
            self._probed, self.full = now, why_unwritable(self.context.root)
        self.trouble = self.full or error
        # to close a run at a slow server can take minutes
        self._spent_s += (now - self._looked) * (1.0 if self.trouble or not held else 0.1)
        self._looked = now
        if self._spent_s > self.patience_s:
            return True
        if self.trouble:
            what = f"the run can't be uploaded: {self.trouble}"
            self.say(
                f"training is over; {what}; trying for {self.patience_s:.0f} s (Ctrl-C: later)"
            )
        elif now - self._began > SILENT_S:
            self.say("training is over; the upload takes its time (Ctrl-C: it goes on by itself)")
        return False

    @property
    def why(self) -> str:
        """Why the run is not in MLflow, after a wait that is over."""
        waited_s = time.monotonic() - self._began
        what = self.trouble or "nothing was uploaded"
        return f"{what}; waited for {waited_s:.0f} s; mlruns/sidecar.log may say more"

    def say(self, text: str) -> None:
        """Say something once."""
        if text not in self._said:
            self._said.add(text)
            self.context.say(text)


def upload_complete(fingerprints: Collection[str], context: Context) -> None:
    """See runs into MLflow that were complete on this disk before, as where their upload was killed; what fails is said."""
    if not context.sync:
        return
    complete = [
        folder
        for folder in state_folders(context.root)
        if folder.run.get("fingerprint") in fingerprints
        and folder.run["store"] in (None, context.store)
        and (result := folder.result)
        and result.outcome != "running"
    ]
    if not complete:
        return
    for folder in complete:
        folder.assign(context.store or "")
    context.say(f"{len(complete)} of the runs are complete on this disk; waiting for their upload")
    outcomes = [Outcome(folder.path.name, folder.run["name"]) for folder in complete]
    hand_over(outcomes, context)
    for outcome in outcomes:
        if outcome.reason:
            context.say(f"{outcome.key}: {outcome.reason}")
        if outcome.unsynced:
            context.say(
                f"{outcome.key} is not in MLflow yet: {outcome.unsynced}; `fmnist sync` uploads it"
            )
