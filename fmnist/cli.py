"""The command line: parse, call, print. Imports wait inside the commands, so that help and lists answer at once."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmnist import experiments
from fmnist import spec as specs
from fmnist.errors import FmnistError, UserError

if TYPE_CHECKING:
    from fmnist.runner import Outcome, Progress

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


def _tell(text: str) -> None:
    """For people: on stderr, so that stdout holds results only."""
    print("\n".join(f"fmnist: {line}" if not line.startswith(" ") else line for line in text.splitlines()), file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _complete_experiment(incomplete: str) -> list[str]:
    return [name for name in experiments.names(specs.home()) if name.startswith(incomplete)]


Experiment = Annotated[
    str, typer.Argument(metavar="EXP", help="An experiment: the name of a file in experiments/.", autocompletion=_complete_experiment)
]
Overrides = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set a field of the spec, as in optimizer.lr=0.01; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


# ---- run


@app.command()
def run(
    exp: Experiment,
    overrides: Overrides = [],
    no_sync: Annotated[bool, typer.Option("--no-sync", help="Leave the run on disk for a later `fmnist sync`.")] = False,
    as_json: Json = False,
) -> None:
    """Train an experiment and record it."""
    root = specs.home()
    resolved = experiments.load(exp, overrides, root)
    from fmnist import runner

    with _display(resolved, quiet=as_json) as watch:
        outcome = runner.run(resolved, root, not no_sync, _tell, watch)
    _summarise(outcome, as_json)
    raise typer.Exit(outcome.exit_code)


@contextmanager
def _display(resolved: experiments.Resolved, quiet: bool) -> "Iterator[Callable[[Progress], None]]":
    """A live line of progress on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    shown = "ep {task.fields[epoch]:.1f} loss {task.fields[loss]} acc {task.fields[accuracy]} val {task.fields[val]} {task.fields[rate]}"
    columns = (MofNCompleteColumn(), TextColumn(shown), TimeRemainingColumn())  # no bar: all of it fits 80 characters
    unknown: dict[str, Any] = {"epoch": 0.0, "loss": "-", "accuracy": "-", "val": "-", "rate": "- steps/s"}
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(resolved.display_name, total=resolved.spec.steps, **unknown)

        def watch(progress: "Progress") -> None:
            fields: dict[str, Any] = {"epoch": progress.epoch}
            if progress.train_loss is not None:
                fields |= {"loss": f"{progress.train_loss:.3f}", "accuracy": f"{progress.train_accuracy:.3f}"}
                fields["rate"] = f"{progress.step / max(progress.elapsed_s, 1e-9):,.0f} steps/s"
            fields["val"] = f"{progress.val_loss:.3f} {progress.val_accuracy:.3f}"
            bar.update(task, completed=progress.step, **fields)

        yield watch


def _summarise(outcome: "Outcome", as_json: bool) -> None:
    from fmnist import tracking

    link = tracking.page(outcome.experiment_id, outcome.run_id) if outcome.experiment_id and outcome.run_id else None
    if as_json:
        _print_json({**dataclasses.asdict(outcome), "link": link})
        return
    metrics = outcome.metrics
    lines = []
    if metrics:
        kept = "best weights restored" if outcome.weights == "best" else "last step"
        lines += [
            f"{outcome.name}: validation accuracy {metrics['last/val_accuracy']:.4f}, loss {metrics['last/val_loss']:.4f} ({kept});"
            f" best accuracy {metrics['best/val_accuracy']:.4f} at step {metrics['best/step']:,}"
        ]
        if "test/accuracy" in metrics:
            lines += [f"test accuracy, read once: {metrics['test/accuracy']:.4f}, loss {metrics['test/loss']:.4f}"]
        else:
            lines += ["validation is the test set here (data.holdout: null): don't choose by it what you then report on it"]
    if outcome.stopped_early_at is not None:
        lines += [f"stopped early at step {outcome.stopped_early_at:,}"]
    if outcome.collapsed_at is not None:
        lines += [
            f"COLLAPSED: by step {outcome.collapsed_at:,} it only guesses (loss about ln 10 = 2.30, accuracy about 0.10); try a smaller optimizer.lr"
        ]
    rate = f" ({outcome.steps / outcome.training_s:,.0f} steps/s)" if outcome.training_s else ""
    if outcome.reason:
        _tell(outcome.reason)
    lines += [f"{outcome.status}: {outcome.steps:,} steps in {outcome.training_s:.1f} s{rate}, {outcome.total_s:.1f} s in all"]
    if outcome.unsynced:
        lines += [f"not in MLflow yet: {outcome.unsynced}; `fmnist sync` carries it over"]
    if link:
        lines += [f"run {outcome.run_id}: {link}" + ("" if specs.tracking_server() else "  (after `make ui`)")]
    if outcome.status == "FINISHED":
        lines += ["next: `make report` draws it beside the other runs; `fmnist list` shows what else there is to run"]
    print("\n".join(lines))


# ---- show, list


@app.command()
def show(exp: Experiment, overrides: Overrides = [], as_json: Json = False) -> None:
    """Print the resolved spec, where each value comes from, and what the run would do."""
    resolved = experiments.load(exp, overrides)
    spec, would = resolved.spec, _plan_summary(resolved.spec)
    if as_json:
        _print_json(
            {
                "spec": spec.model_dump(mode="json"),
                "origins": resolved.origins,
                "fingerprint": spec.fingerprint,
                "group": spec.group,
                "plan": would,
            }
        )
        return
    flat = spec.flat()
    wide, widest = (max(map(len, flat)), max(len(json.dumps(value)) for path, value in flat.items() if path != "question"))
    for path, value in flat.items():
        text = json.dumps(value, ensure_ascii=False)
        print(f"{path:<{wide}}  {text:<{widest}}  {_origin(path, resolved, value)}")
    print()
    for label, value in would.items():
        print(f"{label.replace('_', ' '):<{wide}}  {value:,}")
    print(f"{'fingerprint':<{wide}}  {spec.fingerprint[:16]}  group {spec.group[:16]}")


def _origin(path: str, resolved: experiments.Resolved, value: Any) -> str:
    if path in resolved.origins:
        return resolved.origins[path]
    return "the file's name" if path == "name" else "default"


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
        print(
            f"{row['name']:<{wide}}  "
            + (f"{row['steps']:>9,} steps  {row['question']}" if row["error"] is None else f"BROKEN: {row['error']}")
        )


# ---- data, sync, report


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
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


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


# ---- for `make check`


@app.command(hidden=True)
def schema() -> None:
    """Bring experiments/schema.json up to date; exit 1 if it was not."""
    path = specs.home() / "experiments" / "schema.json"
    text = json.dumps(experiments.file_schema(), indent=2) + "\n"
    if path.exists() and path.read_text() == text:
        return
    path.write_text(text)
    _tell(f"{path} was out of date and has been rewritten: commit it")
    raise typer.Exit(1)
