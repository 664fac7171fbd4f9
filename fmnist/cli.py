"""The command line: parse, call, print. Imports wait inside the commands, so that help and lists answer at once."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmnist import experiments, journal
from fmnist import spec as specs
from fmnist.errors import FmnistError, UserError

if TYPE_CHECKING:
    import pandas as pd

    from fmnist.runner import Outcome, Training

app = typer.Typer(
    help="Train, record and compare runs of one small model on Fashion-MNIST.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UI_START_S = 60


def main() -> None:
    try:
        app()
    except FmnistError as error:
        _tell(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # what may not be read or written, wherever that shows first
        _tell(f"{error.filename or 'a file'}: {error.strerror or error}; mend that, or set FMNIST_HOME to another folder")
        sys.exit(UserError.exit_code)


def _tell(text: str) -> None:
    """For people: on stderr, so that stdout holds results only."""
    print("\n".join(f"fmnist: {line}" if not line.startswith(" ") else line for line in text.splitlines()), file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _complete_experiment(incomplete: str) -> list[str]:
    return [name for name in experiments.names(specs.home()) if name.startswith(incomplete)]


EXPERIMENT = typer.Argument(metavar="EXP", help="An experiment: the name of a file in experiments/.", autocompletion=_complete_experiment)
Overrides = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set a field of the spec, as in optimizer.lr=0.01; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
NoSync = Annotated[bool, typer.Option("--no-sync", help="Leave the run on disk for a later `fmnist sync`.")]


# ---- run, extend, verify


@app.command()
def run(
    exp: Annotated[str | None, EXPERIMENT] = None,
    overrides: Overrides = [],
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew; an interrupted run of the same spec is given up.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this interrupted run, by its key or MLflow id.")] = None,
    no_sync: NoSync = False,
    as_json: Json = False,
) -> None:
    """Train an experiment and record it; an interrupted run of the same spec is continued."""
    root = specs.home()
    folder = None if resume is None else journal.find(root, resume)
    if fresh and resume:
        raise UserError("--fresh starts anew and --resume goes on; give one of the two")
    if exp is not None:
        resolved = experiments.load(exp, overrides, root)
    elif folder is not None:
        resolved = experiments.Resolved(folder.spec, folder.spec.name, {}, ())
    else:
        raise UserError("EXP is missing: the name of an experiment (`fmnist list` shows them), or --resume RUN")
    from fmnist import runner

    with _display(resolved.display_name, resolved.spec, as_json) as watch:
        outcome = runner.run(resolved, runner.Context(root, not no_sync, _tell, watch), fresh, folder)
    _summarise(outcome, as_json)


@app.command()
def extend(
    run: Annotated[str, typer.Argument(help="A finished run: its id, or its name if no other has it.")],
    epochs: Annotated[int, typer.Option(help="Of the longer run, those it has included.")],
    no_sync: NoSync = False,
    as_json: Json = False,
) -> None:
    """Train a finished run on, as a new run that begins with its steps."""
    from fmnist import runner

    with (
        _recorded(run, "FINISHED", runner.ARTIFACTS) as (found, folder),
        _display(f"{found['name']} epochs={epochs}", None, as_json) as watch,
    ):
        context = runner.Context(specs.home(), not no_sync, _tell, watch)
        outcome = runner.extend(folder, found["run_id"], found["name"], epochs, context)
    _summarise(outcome, as_json)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="A run: its id, or its name if no other has it.")],
    steps: Annotated[int | None, typer.Option(help="Only the first steps.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Train a run again from its stored spec and compare, bit for bit; exit 1 where it comes out otherwise."""
    from fmnist import verify as verification

    with _recorded(run, None, verification.ARTIFACTS) as (found, folder):
        result = verification.verify(folder, specs.home(), steps, _tell)
    if as_json:
        _print_json({"run_id": found["run_id"], **dataclasses.asdict(result)})
    else:
        compared = f"{result.steps:,} steps, {result.evaluations} evaluations{' and the weights' if result.weights else ''}"
        print(f"{found['name']} ({found['run_id']}): {compared} trained again")
        parted = f"NOT equal. First {result.unequal[0]}; largest {verification.largest(result.unequal)}" if result.unequal else None
        print(parted or "equal, bit for bit")
        for key, change in result.environment.items():
            print(f"environment: {key} {change}")
    raise typer.Exit(1 if result.unequal else 0)


@contextmanager
def _recorded(text: str, status: str | None, artifacts: "Sequence[str]") -> "Iterator[tuple[pd.Series, Path]]":
    """A run in the store, and a folder with these of its artifacts, each verified."""
    from fmnist import report, tracking

    store = tracking.connect(specs.home())
    found = report.select(store.runs(status), [text])
    if len(found) != 1:
        raise UserError(f"{text!r} fits {len(found)} runs; give the id of one: {', '.join(found['run_id'])}")
    with tempfile.TemporaryDirectory(prefix="fmnist-") as folder:
        store.artifacts(found["run_id"][0], artifacts, Path(folder))
        yield found.iloc[0], Path(folder)


@contextmanager
def _display(name: str, spec: specs.ExperimentSpec | None, quiet: bool) -> "Iterator[Callable[[Training], None]]":
    """A live line of progress on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda training: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    shown = "ep {task.fields[epoch]:.1f} loss {task.fields[loss]} acc {task.fields[accuracy]} val {task.fields[val]} {task.fields[rate]}"
    columns = (MofNCompleteColumn(), TextColumn(shown), TimeRemainingColumn())  # no bar: all of it fits 80 characters
    unknown: dict[str, Any] = {"epoch": 0.0, "loss": "-", "accuracy": "-", "val": "-", "rate": "- steps/s"}
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=spec.steps if spec else None, **unknown)

        def watch(training: "Training") -> None:
            fields: dict[str, Any] = {"epoch": training.step / training.spec.steps_per_epoch}
            if training.curves is not None:
                fields |= {name: f"{training.curves[name][-200:].mean():.3f}" for name in ("loss", "accuracy")}
                fields["rate"] = f"{training.step / max(training.outcome.training_s, 1e-9):,.0f} steps/s"
            fields["val"] = "{1:.3f} {2:.3f}".format(*training.evaluations[-1])
            bar.update(task, completed=training.step, total=training.spec.steps, **fields)

        yield watch


def _summarise(outcome: "Outcome", as_json: bool) -> None:
    from fmnist import tracking

    link = tracking.page(outcome.experiment_id, outcome.run_id) if outcome.experiment_id and outcome.run_id else None
    if as_json:
        _print_json({**dataclasses.asdict(outcome), "link": link})
        raise typer.Exit(outcome.exit_code)
    lines = [outcome.name, *journal.in_words(vars(outcome))] if outcome.metrics else []
    rate = f" ({outcome.steps / outcome.training_s:,.0f} steps/s)" if outcome.training_s else ""
    if outcome.reason:
        _tell(outcome.reason)
    lines += [f"{outcome.status}: {outcome.steps:,} steps in {outcome.training_s:.1f} s{rate}, {outcome.total_s:.1f} s in all"]
    if outcome.resumable:
        lines += [f"the same command continues it, or: fmnist run --resume {outcome.key}"]
    if outcome.unsynced:
        lines += [f"not in MLflow yet: {outcome.unsynced}; `fmnist sync` carries it over"]
    if link:
        lines += [f"run {outcome.run_id}: {link}" + ("" if specs.tracking_server() else "  (after `make ui`)")]
    if outcome.status == "FINISHED":
        lines += ["next: `make report` draws it beside the other runs; `fmnist list` shows what else there is to run"]
    print("\n".join(lines))
    raise typer.Exit(outcome.exit_code)


# ---- show, list


@app.command()
def show(exp: Annotated[str, EXPERIMENT], overrides: Overrides = [], as_json: Json = False) -> None:
    """Print the resolved spec, where each value comes from, and what the run would do."""
    resolved = experiments.load(exp, overrides)
    spec, would = resolved.spec, _plan_summary(resolved.spec)
    if as_json:
        identity = {"fingerprint": spec.fingerprint, "group": spec.group}
        _print_json({"spec": spec.model_dump(mode="json"), "origins": resolved.origins, **identity, "plan": would})
        return
    flat = spec.flat()
    wide, widest = (max(map(len, flat)), max(len(json.dumps(value)) for path, value in flat.items() if path != "question"))
    for path, value in flat.items():
        origin = resolved.origins.get(path, "the file's name" if path == "name" else "default")
        print(f"{path:<{wide}}  {json.dumps(value, ensure_ascii=False):<{widest}}  {origin}")
    print()
    for label, value in would.items():
        print(f"{label.replace('_', ' '):<{wide}}  {value:,}")
    print(f"{'fingerprint':<{wide}}  {spec.fingerprint[:16]}  group {spec.group[:16]}")


def _plan_summary(spec: specs.ExperimentSpec) -> dict[str, int]:
    segments = specs.plan(spec)
    evaluations = sum(segment.evaluate for segment in segments)
    # At an evaluation: val/loss, val/accuracy, epoch, and train/lr but for step 0. Once, at the end: best/* (3), last/* (2), test/* (2).
    points = 2 * len(spec.logged_steps()) + 4 * evaluations - 1 + (5 if spec.data.holdout is None else 7)
    return {
        "training_images": spec.train_images,
        "validation_images": spec.validation_images,
        "steps_per_epoch": spec.steps_per_epoch,
        "steps": spec.steps,
        "evaluations": evaluations,
        "parameters": spec.model.parameters,
        "points_logged": points,
    }


@app.command("list")
def list_experiments(as_json: Json = False) -> None:
    """List the experiments with their questions."""
    root = specs.home()
    _look_after(root)
    rows = []
    for name in experiments.names(root):
        try:
            spec = experiments.load(name, root=root).spec
            rows.append({"name": name, "steps": spec.steps, "question": spec.question, "error": None})
        except UserError as error:
            rows.append({"name": name, "steps": None, "question": "", "error": str(error)})
    if as_json:
        _print_json({"experiments": rows})
        return
    if not rows:
        raise UserError(f"no experiments in {root / 'experiments'}; FMNIST_HOME names the folder that holds experiments/")
    wide = max(len(str(row["name"])) for row in rows)
    for row in rows:
        about = f"BROKEN: {row['error']}" if row["error"] else f"{row['steps']:>9,} steps  {row['question']}"
        print(f"{row['name']:<{wide}}  {about}")


# ---- data, sync, doctor, report


def _look_after(root: Path) -> None:
    """Tell of runs that stopped midway, and see to it that what isn't in MLflow yet gets there."""
    folders = journal.state_folders(root)
    for folder in folders:
        if folder.resumable:
            _tell(f"{folder.path.name} was interrupted; the same `fmnist run`, or `fmnist run --resume {folder.path.name}`, continues it")
    if any(not folder.carried.get("closed") and folder.run["store"] == specs.store_name() for folder in folders):
        journal.start_carrier(root)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look at environment, data, store and unfinished runs, and say what to do; exit 1 if there is anything."""
    from fmnist import doctor as doctors

    found = list(doctors.findings(specs.home()))
    if as_json:
        _print_json({"findings": [dataclasses.asdict(finding) for finding in found]})
    for finding in [] if as_json else found:
        print(f"{'ok' if finding.remedy is None else '!!'}  {finding.what}" + (f"\n      {finding.remedy}" if finding.remedy else ""))
    raise typer.Exit(1 if any(finding.remedy for finding in found) else 0)


@app.command("data")
def fetch_data(as_json: Json = False) -> None:
    """Fetch and verify Fashion-MNIST."""
    root = specs.home()
    from fmnist import data

    data.ensure(root, _tell)
    if as_json:
        _print_json({"folder": str(data.raw_folder(root)), "sha256": data.SHA256, "digest": data.DIGEST})
    else:
        print(f"Fashion-MNIST is whole in {data.raw_folder(root)} (4 files, SHA-256 checked)")


@app.command()
def sync(as_json: Json = False) -> None:
    """Carry runs that are on disk only into MLflow, now."""
    from fmnist import sidecar

    done = sidecar.sync(specs.home(), _tell if as_json else print)
    if as_json:
        _print_json({"runs": done})
    elif not done:
        print("nothing to carry over: every run is in MLflow")
    raise typer.Exit(1 if any(run["error"] for run in done) else 0)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Runs by name, id or experiment; all finished ones if none is given.")] = [],
    as_json: Json = False,
) -> None:
    """Write reports/: each run's figures, overlays, and a table of what differs."""
    from fmnist import report as reports
    from fmnist import tracking

    root = specs.home()
    _look_after(root)
    written = reports.write(tracking.connect(root), root / "reports", runs)
    if as_json:
        files = [str(path) for path in written.files]
        _print_json(
            {"runs": [dict(zip(written.columns, row, strict=True)) for row in written.rows], "files": files, "notes": written.notes}
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*written.columns)
    for row in written.rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for note in written.notes:
        print(f"note: {note}")
    print(f"{len(written.files)} files in {root / 'reports'}; begin with overlay.png and runs.md")


# ---- ui


@app.command()
def ui(port: Annotated[int, typer.Option(help="On 127.0.0.1.", min=1, max=65535)] = 5000) -> None:
    """Show the runs in MLflow, on this machine only; Ctrl-C stops it."""
    from fmnist import tracking

    root = specs.home()
    if address := specs.tracking_server():
        raise UserError(
            f"the runs are recorded at MLFLOW_TRACKING_URI: open {specs.redacted(address)} in a browser, or unset it for the local store"
        )
    if not _is_free(port):
        other = next(candidate for candidate in (*range(port + 1, 65536), *range(1024, port)) if _is_free(candidate))
        raise UserError(f"port {port} on 127.0.0.1 is taken, perhaps by another `make ui`; port {other} is free: make ui PORT={other}")
    _look_after(root)
    experiment_id = tracking.connect(root, create=True).experiment(specs.Tracking().experiment)
    for ending in (signal.SIGINT, signal.SIGTERM):  # the server must not outlive us; a shell's `&` has SIGINT ignored
        signal.signal(ending, signal.default_int_handler)
    log = root / "mlruns" / "ui.log"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            tracking.server_command(root, port), env={**os.environ, **tracking.SETTINGS}, stdout=output, stderr=output, cwd=root
        )
    try:
        _wait_until_up(server, port, log)
        print(f"the runs: {tracking.page(experiment_id, port=port)}")
        print(f"Ctrl-C stops it; from another machine: ssh -L {port}:127.0.0.1:{port} HOST", flush=True)
        server.wait()
    finally:
        server.terminate()
        server.wait()


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def _wait_until_up(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + UI_START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    raise UserError(f"the MLflow server did not come up: {last} (all of it: {log})")
