"""The run in MLflow that stands for a sweep: its table, what mattered, the best settings as an experiment file."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmnist import files
from fmnist.journal import Point
from fmnist.sweeps import Sweep, Trial, place
from fmnist.tracking import Derived, Store

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20
"""Rows of the table in the run's page; trials.csv has all."""


def table(store: Store, trials: Sequence[Trial]) -> "pd.DataFrame":
    """The trials that are in the store, best first: number, name, seed, the swept fields, outcome, accuracy, steps, seconds, run_id.

    accuracy is that on the validation images after the last step; each trial's newest run counts, finished before diverged before pruned.
    """
    import pandas as pd

    runs, wanted = store.runs(status=None), {trial.fingerprint: trial for trial in trials}
    columns = {
        "t/outcome": "outcome",
        "m/last/val_accuracy": "accuracy",
        "t/training_s": "seconds",
        "run_id": "run_id",
    }
    columns |= {
        "experiment_id": "experiment_id",
        "start": "start",
        "end": "end",
        "t/fingerprint": "fingerprint",
    }
    found = runs.reindex(columns=list(columns)).rename(columns=columns)
    found = found[
        found["fingerprint"].isin(list(wanted))
        & found["outcome"].isin(["finished", "diverged", "pruned"])
    ]
    found = found.sort_values(
        "outcome",
        key=lambda names: names.map({"finished": 2, "diverged": 1, "pruned": 0}),
        kind="stable",
    )
    found = found.drop_duplicates("fingerprint", keep="last")
    of = [wanted[fingerprint] for fingerprint in found["fingerprint"]]
    swept = {
        path: [trial.settings[path] for trial in of] for path in (of[0].settings if of else ())
    }
    told = {
        "trial": [trial.number for trial in of],
        "name": [trial.name for trial in of],
        "seed": [trial.resolved.spec.train.seed for trial in of],
    }
    table = (
        pd.DataFrame({**told, **swept}, index=found.index).join(found).astype({"seconds": float})
    )
    return table.sort_values("accuracy", ascending=False, ignore_index=True)


def best(finished: "pd.DataFrame", trials: Sequence[Trial]) -> tuple[Trial, "pd.Series"] | None:
    """The settings with the highest mean accuracy over their seeds, by one of their trials, and the accuracies."""
    if finished.empty:
        return None
    by_number = {trial.number: trial for trial in trials}
    of = finished["trial"].map(lambda number: by_number[number].resolved.spec.group)
    accuracies = finished["accuracy"][of == finished["accuracy"].groupby(of).mean().idxmax()]
    return by_number[finished.loc[accuracies.index[0], "trial"]], accuracies


def as_experiment(sweep: Sweep, trial: Trial, accuracies: "pd.Series") -> str:
    """An experiment file of a trial's settings, ready for experiments/."""
    from ruamel.yaml import YAML

    spread = f" +- {accuracies.std():.4f}" if len(accuracies) > 1 else ""
    tree: dict[str, Any] = {"extends": sweep.spec.base}
    for path, value in trial.settings.items():
        section, _, field = path.partition(".")
        below = tree.setdefault(section, {})
        *parents, last = field.split(".")
        for parent in parents:
            below = below.setdefault(parent, {})
        below[last] = list(value) if isinstance(value, tuple) else value
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    text = io.StringIO()
    yaml.dump(tree, text)
    head = f"# The best of {place(sweep.name)}: validation accuracy {accuracies.mean():.4f}{spread} after the last step (n = {len(accuracies)}),"
    return f"{head}\n# picked as the highest of its sweep, so a little lucky; measure it with seeds of its own: SEEDS=5\n{text.getvalue()}"


def write(store: Store, sweep: Sweep, trials: Sequence[Trial], total: int) -> None:
    """Make the sweep's run from those of its trials that are in the store, unless it is up to date."""
    rows = table(store, trials)
    finished = rows[rows["outcome"] == "finished"]
    top = best(finished, trials)
    if rows.empty:
        return
    made_from = hashlib.sha256(f"{total} {sorted(rows['run_id'])}".encode()).hexdigest()
    experiment_id = rows["experiment_id"].iloc[0]
    if [*store.derived(experiment_id, "sweep", sweep.name).values()] != [made_from]:
        with files.scratch() as folder:
            importance = _lay_out(folder, sweep, rows, trials, top)
            tags = {
                "experiment": sweep.spec.base, "question": sweep.spec.question or None, "command": f"fmnist sweep {sweep.name}", "n": len(finished),
                "outcome": "finished" if len(rows) >= total else "incomplete", "mlflow.note.content": _page(sweep, rows, total, top, importance),
            }  # fmt: skip
            search = sweep.spec.search
            method = (
                search.model_dump(include={"sampler", "pruner", "trials", "seed"})
                if search
                else {"sampler": "grid"}
            )
            parameters = {
                f"sweep.{key}": str(value)
                for key, value in {"base": sweep.spec.base, **method}.items()
            }
            if top:
                parameters |= {path: str(value) for path, value in top[0].settings.items()}
            new = Derived(
                experiment_id, "sweep", sweep.name, f"sweep {sweep.name} ({len(rows)} trials)", tags, parameters, _points(rows), list(rows["run_id"]),
                int(rows["start"].min()), int(rows["end"].max()), "FINISHED", made_from,
            )  # fmt: skip
            store.replace(new, folder)


def _lay_out(
    folder: Path,
    sweep: Sweep,
    rows: "pd.DataFrame",
    trials: Sequence[Trial],
    top: "tuple[Trial, pd.Series] | None",
) -> dict[str, float]:
    """Lay out the sweep run's artifacts; returns the importances."""
    from fmnist import plots
    from fmnist.search import importances

    (folder / "sweep.yaml").write_text(
        (sweep.root / place(sweep.name)).read_text(encoding="utf-8"), encoding="utf-8"
    )
    rows.drop(columns=["experiment_id", "start", "end"]).to_csv(folder / "trials.csv", index=False)
    finished = rows[rows["outcome"] == "finished"]
    by_number = {trial.number: trial for trial in trials}
    accuracies = zip(finished["trial"], finished["accuracy"], strict=True)
    importance = importances(
        sweep, [(by_number[number].settings, value) for number, value in accuracies]
    )
    if top:
        (folder / "best.yaml").write_text(as_experiment(sweep, *top), encoding="utf-8")
        plots.sweep(
            {path: list(rows[path]) for path in sweep.paths},
            _logarithmic(sweep),
            rows["accuracy"],
            rows["outcome"],
            importance,
        ).savefig(folder / "sweep.png")
    return importance


def _logarithmic(sweep: Sweep) -> list[str]:
    """The swept fields that are drawn on a logarithmic axis."""
    from fmnist import plots

    if sweep.spec.search:
        return [path for path, dimension in sweep.spec.search.space.items() if dimension.log]
    numeric = {
        path: values
        for path, values in sweep.spec.grid.items()
        if all(isinstance(value, int | float) for value in values)
    }
    return [path for path, values in numeric.items() if plots.logarithmic(values)]


def _points(rows: "pd.DataFrame") -> Iterator[Point]:
    """By trial: its accuracy, and the best so far; the best of all as single values."""
    ended = int(rows["end"].max())
    by_trial = rows[rows["outcome"] == "finished"].set_index("trial")["accuracy"].sort_index()
    for key, column in (("trial/val_accuracy", by_trial), ("trial/best_so_far", by_trial.cummax())):
        yield from (
            Point(key, float(value), ended, int(number))
            for number, value in zip(column.index, column, strict=True)
        )
    if len(by_trial):
        yield Point("best/val_accuracy", float(by_trial.max()), ended, 0)


def _page(
    sweep: Sweep,
    rows: "pd.DataFrame",
    total: int,
    top: "tuple[Trial, pd.Series] | None",
    importance: dict[str, float],
) -> str:
    """The page of the sweep's run."""
    counted = ", ".join(
        f"{count} {outcome}" for outcome, count in rows["outcome"].value_counts().items()
    )
    lines = [sweep.spec.question, "", f"{len(rows)} of {total} trials: {counted}.", ""]
    if top:
        lines += [
            "Best settings, by the mean over their seeds (`best.yaml`):",
            "",
            "```yaml",
            as_experiment(sweep, *top),
            "```",
            "",
        ]
    if importance:
        lines += [
            "Share of each field in how the accuracy varies: "
            + ", ".join(f"{path} {share:.2f}" for path, share in importance.items()),
            "",
        ]
    header = ["trial", "name", "outcome", "accuracy"]
    lines += [f"| {' | '.join(header)} |", "|---|---|---|---|"]
    lines += [
        f"| {row.trial} | {row.name_} | {row.outcome} | {row.accuracy:.4f} |"
        for row in rows.rename(columns={"name": "name_"}).head(SHOWN).itertuples()
    ]
    return "\n".join([*lines, "", f"Repeat, or go on: `fmnist sweep {sweep.name}`"])
