"""The command line: parse, call, print. Imports wait inside the commands, so that help and lists answer at once."""

import dataclasses
import gc
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmnist.errors import FmnistError, UserError
from fmnist.words import print_plain as print
from fmnist.words import printable, warn_plainly

if TYPE_CHECKING:
    import pandas as pd

    from fmnist import sweeping
    from fmnist.experiments import Resolved
    from fmnist.runner import Context
    from fmnist.training import Outcome

app = typer.Typer(
    help="Train, record and compare runs of one small model on Fashion-MNIST.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MOST_SEEDS = 1_000


class Stream(io.FileIO):
    """Standard output or error whose reader may go away: words are not the work, so they go nowhere then and the work goes on."""

    def __init__(self, number: int, forgive: type[OSError]) -> None:
        super().__init__(number, "w", closefd=False)
        self._forgive = forgive

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except self._forgive:
            return len(data)


def _open_streams() -> None:
    """Have the three standard streams open, none of which can end the work; what their encoding lacks is replaced."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file, a journal perhaps, got its number
            os.open(os.devnull, os.O_RDWR)
    # A full disk that takes no words is forgiven; one that takes no result is told.
    for name, number, forgive in (("stdout", 1, BrokenPipeError), ("stderr", 2, OSError)):
        encoding = getattr(getattr(sys, name), "encoding", None)
        stream = io.TextIOWrapper(
            io.BufferedWriter(Stream(number, forgive)),
            encoding=encoding,
            errors="replace",
            line_buffering=True,
        )
        setattr(sys, name, stream)


def main() -> None:
    _open_streams()
    gc.set_threshold(
        100_000
    )  # the imports make half a million objects to keep, and looking through them took a seventh of their time
    code = 0
    warn_plainly()
    try:
        app()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except FmnistError as error:
        _tell(str(error))
        code = error.exit_code
    except OSError as error:  # what may not be read or written, wherever that shows first
        _tell(
            f"{error.filename or 'a file'}: {error.strerror or error}; mend that, or set FMNIST_HOME to another folder"
        )
        code = UserError.exit_code
    with suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
    os._exit(code)  # all is closed by now, and to take torch down would cost 0.3 s


def _tell(text: str) -> None:
    """For people: on stderr, so that stdout holds results only."""
    print(
        "\n".join(
            f"fmnist: {line}" if not line.startswith(" ") else line for line in text.splitlines()
        ),
        file=sys.stderr,
        flush=True,
    )


def _answer(value: dict[str, Any], lines: Iterable[str], as_json: bool, exit_code: int = 0) -> None:
    """What a command found: one JSON object, or lines for people."""
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")  # which JSON can do with
    for line in [json.dumps(value, indent=2, ensure_ascii=plain)] if as_json else lines:
        print(line, flush=True)
    if exit_code:
        raise typer.Exit(exit_code)


def _home() -> Path:
    from fmnist import spec as specs

    return specs.home()


def _complete_experiment(incomplete: str) -> list[str]:
    from fmnist import experiments

    return [name for name in experiments.names(_home()) if name.startswith(incomplete)]


EXPERIMENT = typer.Argument(
    metavar="EXP",
    help="An experiment: the name of a file in experiments/.",
    autocompletion=_complete_experiment,
)
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="A field of the spec, as in optimizer.lr=0.01; repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
NoSync = Annotated[
    bool, typer.Option("--no-sync", help="Leave the run on disk for a later `fmnist sync`.")
]


# ---- run, extend, verify


@app.command()
def run(
    exp: Annotated[str | None, EXPERIMENT] = None,
    overrides: Overrides = [],
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N|LIST", help="One run for each of the seeds 0 to N-1, or of a list: 3,7,9"
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Start anew; an interrupted run of the same spec is given up."
        ),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Continue this interrupted run, by its key or MLflow id."),
    ] = None,
    no_sync: NoSync = False,
    as_json: Json = False,
) -> None:
    """Train an experiment and record it; an interrupted run of the same spec is continued."""
    from fmnist import experiments, state

    root = _home()
    _tell_faults(root)
    folder = None if resume is None else state.find(root, resume)
    if fresh and resume:
        raise UserError("--fresh starts anew and --resume goes on; give one of the two")
    if resume and (seeds or (overrides and exp is None)):
        raise UserError("--resume goes on with a run as it was begun; leave --seeds and --set out")
    if exp is not None:
        wanted = [experiments.load(exp, [*overrides, *seed], root) for seed in _seeds(seeds)]
    elif folder is not None:
        wanted = [experiments.Resolved(folder.spec, folder.spec.name, {}, ())]
    else:
        raise UserError(
            "EXP is missing: the name of an experiment (`fmnist list` shows them), or --resume RUN"
        )
    from fmnist import database, runner

    def start(context: "Context") -> "list[Outcome]":
        if seeds is None or fresh:
            return runner.run(wanted, context, fresh, folder)
        return runner.run_missing(wanted, database.recorded(root), context)

    _train(start, no_sync, as_json, many=seeds is not None)


def _seeds(text: str | None) -> list[list[str]]:
    """The overrides that set the seed, for each run that --seeds asks for."""
    from fmnist.spec import shorten

    if text is None:
        return [[]]
    if not re.fullmatch(r"\d{1,10}(,\d{1,10})*,?", text) or text == "0":
        raise UserError(
            f"--seeds: given {shorten(text)}; give how many, as in 5 for the seeds 0 to 4, or which, as in 3,7,9 (one: 3,)"
        )
    seeds = [int(seed) for seed in text.rstrip(",").split(",")] if "," in text else range(int(text))
    if len(seeds) > MOST_SEEDS or len(set(seeds)) < len(seeds):
        raise UserError(
            f"--seeds: given {shorten(text)}; give at most {MOST_SEEDS:,} seeds, none of them twice"
        )
    return [[f"train.seed={seed}"] for seed in seeds]


@app.command()
def extend(
    run: Annotated[
        str, typer.Argument(help="A finished run: its id, or its name if no other has it.")
    ],
    epochs: Annotated[int, typer.Option(help="Of the longer run, those it has included.")],
    no_sync: NoSync = False,
    as_json: Json = False,
) -> None:
    """Train a finished run on, as a new run that begins with its steps."""
    from fmnist import runner

    _tell_faults(_home())
    with _recorded(run, "FINISHED", runner.ARTIFACTS) as (found, folder):
        _train(
            lambda context: [
                runner.extend(folder, found["run_id"], found["name"], epochs, context)
            ],
            no_sync,
            as_json,
        )


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="A run: its id, or its name if no other has it.")],
    steps: Annotated[int | None, typer.Option(help="Only the first steps.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Train a run again from its stored spec and compare, bit for bit; exit 1 where it comes out otherwise."""
    from fmnist import verify as verification

    with _recorded(run, None, verification.ARTIFACTS) as (found, folder):
        result = verification.verify(folder, _home(), steps, _tell)
    compared = f"{result.steps:,} steps, {result.evaluations} evaluations{' and the weights' if result.weights else ''}"
    lines = [f"{found['name']} ({found['run_id']}): {compared} trained again", "equal, bit for bit"]
    if result.unequal:
        lines[-1] = (
            f"NOT equal. First {result.unequal[0]}; largest {verification.largest(result.unequal)}"
        )
    lines += [f"environment: {key} {change}" for key, change in result.environment.items()]
    _answer(
        {"run_id": found["run_id"], **dataclasses.asdict(result)},
        lines,
        as_json,
        1 if result.unequal else 0,
    )


@contextmanager
def _recorded(
    text: str, status: str | None, artifacts: "Sequence[str]"
) -> "Iterator[tuple[pd.Series, Path]]":
    """A run in the store, and a folder with these of its artifacts, each verified."""
    from fmnist import files, tracking

    store = tracking.connect(_home())
    found = tracking.the_one(store.runs(status), text)
    with files.scratch() as folder:
        store.artifacts(found["run_id"], artifacts, folder)
        yield found, folder


def _train(
    start: "Callable[[Context], list[Outcome]]", no_sync: bool, as_json: bool, many: bool = False
) -> None:
    """Train, show how it goes, and tell how each run ended; exits with the worst of their codes."""
    from fmnist import display, runner, tracking

    with display.run(as_json) as watch:
        outcomes = start(runner.Context(_home(), not no_sync, _tell, watch))
    for outcome in outcomes:
        if outcome.reason and not as_json:
            _tell(outcome.reason)
    links = [
        tracking.page(outcome.experiment_id or "", outcome.run_id or "") if outcome.run_id else None
        for outcome in outcomes
    ]
    lines = [
        line
        for outcome, link in zip(outcomes, links, strict=True)
        for line in display.ended(outcome, link)
    ]
    if any(outcome.status == "FINISHED" for outcome in outcomes):
        lines += [
            "next: `make report` draws it beside the other runs; `fmnist list` shows what else there is to run"
        ]
    values = [
        {**dataclasses.asdict(outcome), "link": link}
        for outcome, link in zip(outcomes, links, strict=True)
    ]
    lines = lines or [
        "every one of these seeds is there already; `fmnist compare` and `make report` show them"
    ]
    _answer(
        {"runs": values} if many else values[0],
        lines,
        as_json,
        max((outcome.exit_code for outcome in outcomes), default=0),
    )


# ---- sweep


@app.command()
def sweep(
    name: Annotated[
        str, typer.Argument(metavar="SWEEP", help="The name of a file in experiments/sweeps/.")
    ],
    jobs: Annotated[
        int | None,
        typer.Option(
            help="How many worker processes; as many as there are cores if not given.", min=1
        ),
    ] = None,
    on: Annotated[
        str,
        typer.Option(metavar="local|ray", help="This machine, or a Ray cluster (the extra `ray`)."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Of the cluster, as Ray takes it; default: the one of RAY_ADDRESS."),
    ] = None,
    no_sync: NoSync = False,
    as_json: Json = False,
) -> None:
    """Train what is missing of a sweep: the same command goes on with it, and several at once share it."""
    from fmnist import display, sweeping, sweeps

    if on not in ("local", "ray") or (on == "local" and address):
        raise UserError(
            f"--on: given {on!r}{' with --address' if address else ''}; give local, or ray (with --address or RAY_ADDRESS)"
        )
    root = _home()
    found = sweeps.load(name, root)
    _tell_faults(root)

    def start() -> "sweeping.Workers":
        if on == "ray":
            from fmnist.cluster import Cluster

            return Cluster(root, jobs, address, found.base.spec)
        from fmnist import data, workers

        data.ensure(root, _tell)
        return workers.Pool(root, jobs or os.cpu_count() or 1, not no_sync, found.base.spec)

    # Ray has its say on stdout
    with redirect_stdout(sys.stderr), display.sweep(as_json, _tell) as watch:
        standing = sweeping.run(found, start, watch)
    sweeping.finish(found, standing, not no_sync, _tell)
    lines = [display.summary(standing)]
    lines += ["interrupted; the same command goes on with it"] if standing.interrupted else []
    code = 128 + standing.interrupted if standing.interrupted else 3 if standing.failed else 0
    best, trials = standing.best, display.rows(standing)
    value = {"sweep": name, "total": standing.total, "best": best and best.name, "trials": trials}
    _answer(value, lines, as_json, code)


# ---- show, list


@app.command()
def show(exp: Annotated[str, EXPERIMENT], overrides: Overrides = [], as_json: Json = False) -> None:
    """Print the resolved spec, where each value comes from, and what the run would do; of a sweep its trials, what they cost, what is done."""
    from fmnist import experiments, sweeps

    if exp in sweeps.names(_home()) and exp not in experiments.names(_home()):
        if overrides:
            raise UserError(
                f"{exp} is a sweep: what it varies stands in {sweeps.place(exp)}; --set is for experiments"
            )
        _show_sweep(exp, as_json)
    else:
        _show_experiment(experiments.load(exp, overrides), as_json)


def _show_experiment(resolved: "Resolved", as_json: bool) -> None:
    from fmnist import spec as specs

    spec = resolved.spec
    evaluations = sum(segment.evaluate for segment in specs.plan(spec))
    would = {
        "training_images": spec.train_images,
        "validation_images": spec.validation_images,
        "steps_per_epoch": spec.steps_per_epoch,
        "steps": spec.steps,
        "evaluations": evaluations,
        "parameters": spec.model.parameters,
        # At an evaluation: val/loss, val/accuracy, epoch, and train/lr but for step 0. Once, at the end: best/* (3), last/* (2), test/* (2).
        "points_logged": 2 * len(spec.logged_steps())
        + 4 * evaluations
        - 1
        + (5 if spec.data.holdout is None else 7),
    }
    flat, origins = spec.flat(), {"name": "the file's name", **resolved.origins}
    told = {path: json.dumps(value, ensure_ascii=False) for path, value in flat.items()}
    wide, widest = (
        max(map(len, flat)),
        max(len(text) for path, text in told.items() if path != "question"),
    )
    lines = [
        f"{path:<{wide}}  {text:<{widest}}  {origins.get(path, 'default')}"
        for path, text in told.items()
    ]
    lines += [
        "",
        *(f"{label.replace('_', ' '):<{wide}}  {value:,}" for label, value in would.items()),
    ]
    lines += [f"{'fingerprint':<{wide}}  {spec.fingerprint[:16]}  group {spec.group[:16]}"]
    identity = {"fingerprint": spec.fingerprint, "group": spec.group}
    _answer(
        {
            "spec": spec.model_dump(mode="json"),
            "origins": resolved.origins,
            **identity,
            "plan": would,
        },
        lines,
        as_json,
    )


def _show_sweep(name: str, as_json: bool) -> None:
    from fmnist import database, display, sweeping, sweeps

    found = sweeps.load(name, _home())
    standing = sweeping.look(found)
    left = standing.total - len(standing.results)
    pace = database.seconds_per_step(found.root, found.base.spec)
    cost = None if pace is None else left * found.base.spec.steps * pace
    rows = display.rows(standing)
    lines = display.table(rows)
    if standing.total > len(rows):
        lines.append(
            f"{standing.total - len(rows)} more trials, whose settings the search picks when it gets there"
        )
    told = (
        "no run of this model to tell by yet"
        if cost is None
        else f"about {display.duration(cost)} of one worker, less pruning"
    )
    lines += [
        "",
        display.summary(standing),
        f"{left} to train, {found.base.spec.steps:,} steps each or what their settings say: {told}",
    ]
    _answer(
        {"sweep": name, "total": standing.total, "missing": left, "seconds": cost, "trials": rows},
        lines,
        as_json,
    )


@app.command("list")
def list_experiments(as_json: Json = False) -> None:
    """List the experiments and sweeps with their questions."""
    from fmnist import experiments, sweeps

    root = _home()
    _look_after(root)
    names = {"experiments": experiments.names(root), "sweeps": sweeps.names(root)}
    if not names["experiments"] and not as_json:
        raise UserError(
            f"no experiments in {root / 'experiments'}; FMNIST_HOME names the folder that holds experiments/"
        )
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in names}
    lines, wide = [], max((len(name) for each in names.values() for name in each), default=0)
    for kind, name in ((kind, name) for kind, each in names.items() for name in each):
        try:
            spec = (
                experiments.load(name, root=root).spec
                if kind == "experiments"
                else sweeps.load(name, root).spec
            )
            steps, question, broken = getattr(spec, "steps", None), spec.question, None
        except UserError as error:
            steps, question, broken = None, "", str(error)
        found[kind].append({"name": name, "steps": steps, "question": question, "error": broken})
        size = "sweep" if steps is None else f"{steps:,} steps"
        lines.append(
            f"{name:<{wide}}  BROKEN: {broken}"
            if broken
            else f"{name:<{wide}}  {size:>15}  {question}"
        )
    _answer(found, lines, as_json)


# ---- runs, compare, promote


@app.command("runs")
def list_runs(as_json: Json = False) -> None:
    """List what is recorded: a line per run, oldest first."""
    from fmnist import tracking

    root = _home()
    _look_after(root)
    found = tracking.connect(root).runs(status=None)
    columns = {
        "name": "name",
        "status": "status",
        "outcome": "t/outcome",
        "seed": "t/seed",
        "val_accuracy": "m/last/val_accuracy",
    }
    columns |= {"run_id": "run_id", "fingerprint": "t/fingerprint", "group": "t/group"}
    table = found.reindex(columns=list(columns.values())).set_axis(list(columns), axis=1)
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    for row in rows:
        row["outcome"] = row["outcome"] or {"FINISHED": "finished"}.get(
            row["status"]
        )  # of before there was that tag
    wide = max((len(row["name"]) for row in rows), default=0)
    lines = [
        f"{row['run_id'][:8]}  {row['name']:<{wide}}  {row['outcome'] or row['status'].lower():<11}"
        + (f"  val accuracy {row['val_accuracy']:.4f}" if row["val_accuracy"] is not None else "")
        for row in rows
    ]
    _answer({"runs": rows}, lines, as_json)


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C ...]", help="Experiments, groups or runs (ids); A is the reference."
        ),
    ],
    detect: Annotated[
        float, typer.Option(help="The difference in accuracy that more seeds should resolve.")
    ] = 0.002,
    as_json: Json = False,
) -> None:
    """Compare the validation accuracy of settings with the first, over new seeds and new images: better, worse, or cannot tell."""
    from fmnist import api

    found = api.compare(*what, detect=detect)
    value = {
        "groups": [
            {"label": group.label, "runs": group.members["run_id"].tolist(), "seeds": group.seeds}
            for group in found.groups
        ],
        "comparisons": [{**dataclasses.asdict(each), "n": each.n} for each in found.comparisons],
        "differing": found.differing.to_dict("index"),
        "cautions": found.cautions,
    }
    _answer(value, [str(found)], as_json)


@app.command()
def promote(
    run: Annotated[
        str | None, typer.Argument(help="A finished run: its id, or its name if no other has it.")
    ] = None,
    because: Annotated[
        str | None, typer.Option(help="Promote it whatever the comparison says, for this reason.")
    ] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Make the champion before this one champion again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Register a run's model, and make it the champion if it beats the champion on the same held-out images; exit 1 if it does not."""
    from fmnist import promotion, tracking

    if rollback == (run is not None):
        raise UserError("give a run to promote, or --rollback to undo the last promotion")
    store = tracking.connect(_home())
    found = promotion.roll_back(store) if run is None else promotion.promote(store, run, because)
    _answer(dataclasses.asdict(found), found.lines, as_json, 0 if found.champion else 1)


# ---- data, sync, doctor, report


def _tell_faults(root: Path) -> bool:
    """Name the runs on disk of which something can't be read; whether there are any."""
    if not any((root / "mlruns" / "state").glob("[!.]*")):
        return False
    from fmnist import state  # numpy comes with it

    found = list(state.faults(root))
    for fault in found:
        _tell(f"{fault.what}; {fault.remedy}")
    return bool(found)


def _look_after(root: Path) -> None:
    """Tell of runs that stopped midway or are damaged, and see to it that what isn't in MLflow yet gets there."""
    from fmnist import spec as specs

    _tell_faults(root)
    if not any((root / "mlruns" / "state").glob("[!.]*")):
        return
    from fmnist import state

    folders = state.state_folders(root)
    for folder in folders:
        if folder.resumable:
            _tell(
                f"{folder.path.name} was interrupted; the same `fmnist run`, or `fmnist run --resume {folder.path.name}`, continues it"
            )
    if any(
        not folder.carried.get("closed") and folder.run["store"] == specs.store_name()
        for folder in folders
    ):
        state.start_carrier(root)


@app.command()
def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Read and check every stored file and model too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Look at environment, data, store and unfinished runs, and say what to do; exit 1 if there is anything."""
    from fmnist import doctor as doctors

    found = list(doctors.findings(_home(), deep))
    lines = [
        f"ok  {finding.what}"
        if finding.remedy is None
        else f"!!  {finding.what}\n      {finding.remedy}"
        for finding in found
    ]
    troubled = any(finding.remedy for finding in found)
    _answer(
        {"findings": [dataclasses.asdict(finding) for finding in found]},
        lines,
        as_json,
        1 if troubled else 0,
    )


@app.command("data")
def fetch_data(as_json: Json = False) -> None:
    """Fetch and verify Fashion-MNIST."""
    from fmnist import data

    folder = data.raw_folder(_home())
    data.ensure(_home(), _tell)
    lines = [f"Fashion-MNIST is whole in {folder} (4 files, SHA-256 checked)"]
    _answer({"folder": str(folder), "sha256": data.SHA256, "digest": data.DIGEST}, lines, as_json)


@app.command()
def sync(
    to: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Then copy the local store's runs to this MLflow server."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Carry runs that are on disk only into MLflow, now."""
    from fmnist import sidecar
    from fmnist import spec as specs

    if to is not None and specs.tracking_server() is not None:
        raise UserError(
            "--to copies the local store, and MLFLOW_TRACKING_URI names a server: unset it"
        )
    done = sidecar.sync(specs.home(), _tell if as_json else print)
    damaged = _tell_faults(specs.home())
    lines = [] if done or damaged else ["nothing to carry over: every run is in MLflow"]
    moved = [] if to is None else _move(to, as_json)
    troubled = damaged or any(run["error"] for run in done) or any(run["problem"] for run in moved)
    _answer({"runs": done, "moved": moved}, [] if moved else lines, as_json, 1 if troubled else 0)


def _move(to: str, quiet: bool) -> list[dict[str, Any]]:
    from fmnist import moving, tracking
    from fmnist import spec as specs

    here = tracking.connect(specs.home())
    there = tracking.server(specs.home(), to)
    moved = []
    for run in moving.move(here, there):
        moved.append(run._asdict())
        state = run.problem or f"{run.points:,} points, {run.files} files, as they are here"
        _tell(f"{run.name} ({run.run_id[:8]}): {state}") if quiet else print(
            f"{run.name} ({run.run_id[:8]}): {state}"
        )
    bad = sum(run["problem"] is not None for run in moved)
    _tell(
        f"{len(moved) - bad} of {len(moved)} runs are at {specs.redacted(to)}"
        + (f", {bad} are not: see above" if bad else "")
    )
    return moved


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(help="Runs by name, id or experiment; all finished ones if none is given."),
    ] = [],
    update_readme: Annotated[
        bool,
        typer.Option("--update-readme", help="Write the results into README.md and the headers."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write reports/: report.html, each run's figures, overlays, and a table of what differs."""
    from fmnist import report as reports
    from fmnist import tracking

    root = _home()
    _look_after(root)
    written = reports.write(
        tracking.connect(root), root / "reports", runs, update_readme=update_readme
    )
    if not as_json:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for column in written.columns:
            table.add_column(Text(printable(column)))
        for row in written.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    rows = [dict(zip(written.columns, row, strict=True)) for row in written.rows]
    lines = [f"note: {note}" for note in written.notes]
    lines += [f"{len(written.files)} files in {root / 'reports'}; begin with report.html"]
    _answer(
        {"runs": rows, "files": [str(path) for path in written.files], "notes": written.notes},
        lines,
        as_json,
    )


# ---- servers, predictions


@app.command()
def ui(port: Annotated[int, typer.Option(help="On 127.0.0.1.", min=1, max=65535)] = 5000) -> None:
    """Show the runs in MLflow, on this machine only; Ctrl-C stops it."""
    from fmnist import serving, tracking
    from fmnist import spec as specs

    root = specs.home()
    if address := specs.tracking_server():
        raise UserError(
            f"the runs are at MLFLOW_TRACKING_URI: open {specs.redacted(address)} in a browser, or unset it (local store)"
        )
    with serving.listen(port, "ui") as listener:
        _look_after(root)
        experiment_id = tracking.connect(root, create=True).experiment(specs.Tracking().experiment)
        pages = serving.pages(root, port)
        print(f"the runs: {tracking.page(experiment_id, port=port, key=pages.key)}")
        print(
            "the link holds a key, for you only; Ctrl-C stops it; from another machine:"
            f" ssh -L {port}:127.0.0.1:{port} HOST",
            flush=True,
        )
        serving.serve(pages, listener, root / "mlruns" / "ui.log")


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(help="`champion`, or a run: its id, or its name if no other has it.")
    ] = "champion",
    port: Annotated[int, typer.Option(help="On 127.0.0.1.", min=1, max=65535)] = 5001,
) -> None:
    """Answer requests with a model's predictions, on this machine only; Ctrl-C stops it."""
    from fmnist import serving, tracking

    root = _home()
    with serving.listen(port, "serve") as listener:
        run_id, program = serving.model(tracking.connect(root), model)
        answers = tracking.scoring(program)
        print("\n".join(serving.how_to_ask(run_id, port)), flush=True)
        serving.serve(answers, listener, root / "mlruns" / "serve.log")


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(help="`champion`, or a run: its id, or its name if no other has it.")
    ],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Pictures, of any size: PNG, JPEG, ...")
    ],
    invert: Annotated[
        bool,
        typer.Option(
            "--invert", help="For something dark on a bright ground; the data is bright on dark."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a model takes pictures for."""
    from fmnist import serving, tracking

    found = serving.predict(tracking.connect(_home()), model, images, invert)
    wide = max(len(each["image"]) for each in found)
    lines = [
        f"{each['image']:<{wide}}  {each['class']:<12} {each['probabilities'][each['class']]:.3f}"
        for each in found
    ]
    _answer({"predictions": found}, lines, as_json)
