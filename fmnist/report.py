"""What `fmnist report` writes: each run's own figures, overlays of the runs, and a table of what differs between them."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmnist import plots
from fmnist.errors import StoreError, UserError
from fmnist.tracking import Store

if TYPE_CHECKING:
    import pandas as pd

RESULTS = {
    "last/val_accuracy": "last val acc",
    "best/val_accuracy": "best val acc",
    "best/step": "at step",
    "last/val_loss": "last val loss",
    "test/accuracy": "test acc",
}
OVERLAY_RUNS = 20
"""More lines than this can't be told apart."""


@dataclass(frozen=True)
class Report:
    columns: list[str]
    rows: list[list[str]]
    files: list[Path]
    notes: list[str]


def write(store: Store, folder: Path, wanted: Sequence[str]) -> Report:
    """Write the report of all finished runs, or of those named (by run name, experiment or id); raises UserError where none fits."""
    runs = select(store.runs(), wanted)
    folder.mkdir(parents=True, exist_ok=True)
    notes, files, curves = [], [], {}
    labels = _labels(runs)
    for run_id, label in zip(runs["run_id"], labels, strict=True):
        try:
            files += _copy_figures(store, run_id, folder / "runs" / _file_name(label))
            curves[label] = store.curves(run_id)
        except StoreError as error:
            notes.append(str(error))
    if curves:
        shown = dict(list(curves.items())[-OVERLAY_RUNS:])
        if len(shown) < len(curves):
            notes.append(
                f"the overlay shows the newest {OVERLAY_RUNS} of {len(curves)} runs; name the ones you want: fmnist report RUN ..."
            )
        files.append(folder / "overlay.png")
        plots.overlay(shown).savefig(files[-1])
    columns, rows = differences(runs, labels)
    files += [folder / "runs.md", folder / "runs.png"]
    files[-2].write_text(_markdown(columns, rows), encoding="utf-8")
    plots.table(rows, columns).savefig(files[-1])
    if any(validates_on_test(run) for _, run in runs.iterrows()):
        notes.append(
            "runs without data.holdout are validated on the test images: a choice made by their val figures is made on the test set"
        )
    return Report(columns, rows, files, notes)


def validates_on_test(run: "pd.Series") -> bool:
    return bool(run.get("p/data.holdout", "null") == "null")


def select(runs: "pd.DataFrame", wanted: Sequence[str]) -> "pd.DataFrame":
    """Those of these runs that fit any of the texts by name, experiment, key or the start of the id; raises UserError where one fits none."""
    if runs.empty:
        raise UserError("no run is finished yet; start one with: make run EXP=baseline")
    chosen = runs["run_id"].map(lambda _: not wanted)
    for text in wanted:
        fits = (runs["name"] == text) | (runs["t/experiment"] == text) | (runs["t/run_key"] == text)
        if len(text) >= 4:
            fits |= runs["run_id"].str.startswith(text)
        if not fits.any():
            known = ", ".join(dict.fromkeys(runs["name"]))
            raise UserError(f"no run fits {text!r} (a run's name, id or experiment); there are: {known}")
        chosen |= fits
    return runs[chosen].reset_index(drop=True)


def _labels(runs: "pd.DataFrame") -> list[str]:
    """Run names, with the start of the id where a name stands for several runs."""
    several = runs["name"].duplicated(keep=False)
    return [f"{name} {run_id[:6]}" if double else name for name, run_id, double in zip(runs["name"], runs["run_id"], several, strict=True)]


def _file_name(label: str) -> str:
    return "".join(character if character.isalnum() or character in "._=-" else "_" for character in label)[:100].lstrip(".")


def _copy_figures(store: Store, run_id: str, target: Path) -> list[Path]:
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    with tempfile.TemporaryDirectory() as folder:
        for figure in sorted(store.download(run_id, "figures", Path(folder)).glob("*.png")):
            copied.append(target / figure.name)
            shutil.copy(figure, copied[-1])
    return copied


def differences(runs: "pd.DataFrame", labels: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A row per run: its label, the parameters in which the runs differ, its results."""
    parameters = [column for column in map(str, runs) if column.startswith("p/") and runs[column].fillna("-").nunique() > 1]
    results = [column for column in RESULTS if f"m/{column}" in runs]
    columns = ["run", *(column[2:] for column in parameters), *(RESULTS[column] for column in results)]
    rows = []
    for label, (_, run) in zip(labels, runs.iterrows(), strict=True):
        values = [run[f"m/{column}"] for column in results]
        texts = [
            "-" if value != value else f"{value:,.0f}" if column == "best/step" else f"{value:.4f}"
            for column, value in zip(results, values, strict=True)
        ]
        rows.append([label, *("-" if run[column] != run[column] else str(run[column]) for column in parameters), *texts])
    return columns, rows


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
