"""What `fmnist report` writes: each run's own figures, overlays of the runs, and a table of what differs between them."""

import re
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
    several = runs["name"].duplicated(keep=False)
    labels = runs["name"].where(~several, runs["name"] + " " + runs["run_id"].str[:6])
    notes, files, curves = [], [], {}
    for run_id, label in zip(runs["run_id"], labels, strict=True):
        try:
            files += _copy_figures(store, run_id, folder / "runs" / re.sub(r"[^\w.=-]", "_", label)[:100].lstrip("."))
            curves[label] = store.curves(run_id)
        except StoreError as error:
            notes.append(str(error))
    if len(curves) > OVERLAY_RUNS:
        notes.append(f"the overlay shows the newest {OVERLAY_RUNS} of {len(curves)} runs; name the ones you want: fmnist report RUN ...")
    if curves:
        files.append(folder / "overlay.png")
        plots.overlay(dict(list(curves.items())[-OVERLAY_RUNS:])).savefig(files[-1])
    table = differences(runs)
    table.insert(0, "run", labels)
    columns, rows = [str(column) for column in table], table.to_numpy().tolist()
    files += [folder / "runs.md", folder / "runs.png"]
    lines = [" | ".join(line) for line in (columns, ["---"] * len(columns), *rows)]
    files[-2].write_text("".join(f"| {line} |\n" for line in lines), encoding="utf-8")
    plots.table(rows, columns).savefig(files[-1], bbox_inches="tight")
    if "null" in set(runs.get("p/data.holdout", ["null"])):
        notes.append(
            "runs without data.holdout are validated on the test images: a choice made by their val figures is made on the test set"
        )
    return Report(columns, rows, files, notes)


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


def _copy_figures(store: Store, run_id: str, target: Path) -> list[Path]:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        figures = sorted(store.download(run_id, "figures", Path(folder)).glob("*.png"))
        return [Path(shutil.copy(figure, target)) for figure in figures]


def differences(runs: "pd.DataFrame") -> "pd.DataFrame":
    """A row of texts per run: the parameters in which the runs differ, their results; "-" where one has none."""
    parameters = runs.filter(regex="^p/").fillna("-")
    table = parameters.loc[:, parameters.nunique() > 1].rename(columns=lambda column: column.removeprefix("p/"))
    for key, title in RESULTS.items():
        if f"m/{key}" in runs:
            as_text = ("{:,.0f}" if key == "best/step" else "{:.4f}").format
            table[title] = runs[f"m/{key}"].map(as_text, na_action="ignore").fillna("-")
    return table
