"""Frames to matplotlib Figures; writes no file."""

import base64
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy import special

SMOOTHING = 50
"""The smoothed training curve has about this many independent windows over a run."""
DRAWN_POINTS = 2_000
"""Points drawn of a training curve; more can't be told apart in print and take seconds to draw."""
TRAIN, VALIDATION = "#1f77b4", "#d95f02"
DPI = 120
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#6b5fc7", "#8f7300", "#b35a90", "#707070")
"""Okabe and Ito's colours for all kinds of colour vision, those too light darkened: 3:1 or more against white and against near-black."""
DASHES = ("-", "--", ":", "-.")
POINTS = 400
"""Points drawn of a group's curve."""
LEAST_RUNS = 3
"""Of fewer runs the t interval is so wide that it would hide everything else."""
METRICS = ("val/accuracy", "val/loss", "train/accuracy", "train/loss")
TITLES = {
    "val/accuracy": "validation accuracy",
    "val/loss": "validation loss",
    "train/accuracy": "training accuracy, trailing mean",
    "train/loss": "training loss, trailing mean",
}
AXES = {"step": "step", "epoch": "epoch", "examples": "examples", "seconds": "elapsed_s"}
"""What curves are drawn by, and the column it is in."""
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def learning_curves(
    frame: pd.DataFrame, title: str, steps_per_epoch: int, best_step: int | None
) -> Figure:
    """Loss and accuracy by step, training and validation, of one run's curves (journal.curves)."""
    figure = Figure(figsize=(12, 5), dpi=DPI)
    figure.subplots_adjust(
        left=0.06, right=0.985, bottom=0.1, top=0.83, wspace=0.16
    )  # a layout engine draws everything twice
    figure.suptitle(title)
    by_step = frame.set_index("step")
    for axes, name, unit in zip(
        figure.subplots(1, 2),
        ("loss", "accuracy"),
        ("cross-entropy, nats", "fraction"),
        strict=True,
    ):
        train, val = by_step[f"train/{name}"].dropna(), by_step[f"val/{name}"].dropna()
        window = max(1, len(train) // SMOOTHING)
        smooth = _smoothed(train, window)
        axes.plot(_thinned(train), color=TRAIN, alpha=0.18, linewidth=0.6)
        axes.plot(_thinned(smooth), color=TRAIN, label=f"train, mean of {window} steps")
        axes.plot(val, color=VALIDATION, marker="o", markersize=3, label="validation")
        if best_step is not None and best_step in val.index:
            star = {
                "color": VALIDATION,
                "marker": "*",
                "markersize": 13,
                "markeredgecolor": "black",
                "linestyle": "none",
            }
            axes.plot(
                best_step,
                val[best_step],
                **star,
                label=f"best: {val[best_step]:.4f} at step {best_step:,}",
            )
        _fit_axes(axes, name, [smooth, val])
        axes.set_ylabel(f"{name} ({unit})")
        axes.legend()
        epochs = axes.secondary_xaxis(
            "top",
            functions=(lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch),
        )
        epochs.set_xlabel("epoch")
        epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _smoothed(curve: pd.Series, window: int) -> pd.Series:
    """Trailing mean over `window` values, over fewer at the start: no step shows anything of a later one."""
    return curve.rolling(window, min_periods=1).mean()


def _thinned(curve: pd.Series) -> pd.Series:
    return curve[:: max(1, len(curve) // DRAWN_POINTS)]


def _fit_axes(axes: Axes, name: str, curves: Sequence[pd.Series | np.ndarray]) -> None:
    """Label the steps, and fit the values' axis to these curves, not to the raw one's noise."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step else "0")
    axes.grid(alpha=0.3)
    axes.margins(x=0.01)
    shown = np.concatenate(curves)
    shown = shown[np.isfinite(shown)]
    if len(shown):
        low, high = (
            float(shown.min()),
            float(np.quantile(shown, 0.995) if name == "loss" else shown.max()),
        )
        margin = 0.06 * (high - low) or 0.05
        axes.set_ylim(max(0.0, low - margin), high + margin)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, title: str) -> Figure:
    """How often each class was taken for each, counts with the share of the true class as colour."""
    counts = np.zeros((len(CLASSES), len(CLASSES)), int)
    np.add.at(counts, (labels, predicted), 1)
    figure = Figure(figsize=(8, 7), dpi=DPI)
    figure.subplots_adjust(left=0.13, right=1.0, bottom=0.13, top=0.92)
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(
            column,
            row,
            str(counts[row, column]),
            ha="center",
            va="center",
            fontsize=9,
            color=colour,
        )
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(
        f"{title}\naccuracy {np.trace(counts) / max(1, counts.sum()):.4f} on {counts.sum():,} validation images"
    )
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure


# ---- groups of runs


@dataclass(frozen=True)
class Traces:
    """One metric of a group's runs as it is drawn: frames with a column per axis and `value`, at most POINTS rows."""

    mean: pd.DataFrame  # over the runs, with low and high: its 95 % t interval at each step, over new seeds; NaN below LEAST_RUNS
    runs: list[pd.DataFrame]

    @property
    def singles(self) -> list[pd.DataFrame]:
        """The runs that are drawn beside the mean: none where it is the only one itself."""
        return [] if len(self.runs) == 1 and len(self.mean) else self.runs


def traces(
    finished: Sequence[pd.DataFrame], others: Sequence[pd.DataFrame] = ()
) -> dict[str, Traces]:
    """For each of METRICS the traces of these runs (journal.curves, where they are known with `examples`); the mean leaves `others` out.

    Training curves are trailing means over `smoothing` steps; the mean has the steps that all of its runs have.
    """
    found = {}
    for key in METRICS:
        runs = [_trace(frame, key) for frame in (*finished, *others)]
        mean = (
            _mean(runs[: len(finished)])
            if finished
            else pd.DataFrame(columns=[*AXES, "value", "low", "high"], dtype=float)
        )
        found[key] = Traces(_thinned_extremes(mean), [_thinned_extremes(run) for run in runs])
    return found


def _trace(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    curve = frame[np.isfinite(frame[key].astype(float))]
    values = _smoothed(curve[key], smoothing(frame)) if key.startswith("train/") else curve[key]
    axes = {axis: curve.get(column, np.nan) for axis, column in AXES.items()}
    return pd.DataFrame({**axes, "value": values}, index=curve.index, dtype=float)


def smoothing(frame: pd.DataFrame) -> int:
    """Over how many steps a drawn point of this run's training curves is the mean."""
    return max(1, int(frame["train/loss"].notna().sum()) // SMOOTHING)


def _mean(runs: Sequence[pd.DataFrame]) -> pd.DataFrame:
    together = pd.concat([run.set_index("step", drop=False) for run in runs], axis=1, join="inner")
    n, mean = (
        len(runs),
        pd.DataFrame({axis: together[[axis]].mean(axis=1) for axis in (*AXES, "value")}),
    )
    half = (
        special.stdtrit(n - 1, 0.975) * together[["value"]].std(axis=1) / np.sqrt(n)
        if n >= LEAST_RUNS
        else np.nan
    )
    return mean.assign(low=mean["value"] - half, high=mean["value"] + half)


def _thinned_extremes(trace: pd.DataFrame) -> pd.DataFrame:
    """At most POINTS rows: the least and the greatest value of each stretch, the first and the last."""
    if len(trace) <= POINTS:
        return trace
    values, edges = trace["value"].to_numpy(), np.linspace(0, len(trace), POINTS // 2, dtype=int)
    extremes = [
        start + np.array([values[start:stop].argmin(), values[start:stop].argmax()])
        for start, stop in pairwise(edges)
    ]
    return trace.iloc[np.unique([0, len(trace) - 1, *np.concatenate(extremes)])]


def groups(curves: Mapping[str, Sequence[pd.DataFrame]]) -> Figure:
    """The `overlay` of groups by step, from their runs' journal.curves."""
    return overlay({label: traces(runs) for label, runs in curves.items()})


def overlay(groups: Mapping[str, Mapping[str, Traces]], axis: str = "step") -> Figure:
    """Each group's `traces` by one of AXES: the mean as a line, its interval as a band, single runs faint.

    The axes fit what comes after each curve's first tenth: the start, from chance level, is alike and would hide the rest.
    """
    figure = Figure(figsize=(14, 9), dpi=DPI)
    rows = -(-len(groups) // 4)
    figure.subplots_adjust(
        left=0.05, right=0.99, top=0.965, bottom=0.075 + 0.025 * rows, hspace=0.22, wspace=0.12
    )
    for axes, key in zip(figure.subplots(2, 2).flat, METRICS, strict=True):
        fitted = []
        for (dash, colour), label, traced in zip(styles(), groups, groups.values(), strict=False):
            mean, singles = traced[key].mean, traced[key].singles
            axes.plot(
                mean[axis], mean["value"], color=colour, linestyle=dash, linewidth=1.6, label=label
            )
            axes.fill_between(
                mean[axis], mean["low"], mean["high"], color=colour, alpha=0.18, linewidth=0
            )
            lines = [np.column_stack([run[axis], run["value"]]) for run in singles]
            axes.add_collection(LineCollection(lines, colors=colour, alpha=0.3, linewidths=0.6))
            fitted += [run["value"].to_numpy()[len(run) // 10 :] for run in (mean, *singles)]
        _fit_axes(axes, key.split("/")[1], fitted)
        axes.set_xlabel(axis)
        axes.set_title(TITLES[key], fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower center",
        ncols=min(4, max(1, len(labels))),
        fontsize=9,
        frameon=False,
    )
    return figure


def styles() -> Iterator[tuple[str, str]]:
    """Line style and colour of one group after the other: a new style once the colours are used up, and from the start after the last."""
    return itertools.cycle(itertools.product(DASHES, PALETTE))


def response(parameter: str, log: bool, points: Sequence[Mapping[str, Any]]) -> Figure:
    """Final validation accuracy by the one parameter that groups differ in: at each x the mean, the interval low to high, the runs' values."""
    figure = Figure(figsize=(7, 4.5), dpi=DPI)
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.12, top=0.97)
    axes = figure.subplots()
    x, mean, low, high = np.transpose(
        [[point[name] for name in ("x", "mean", "low", "high")] for point in points]
    )
    axes.errorbar(
        x,
        mean,
        yerr=[mean - low, high - mean],
        color=PALETTE[0],
        marker="o",
        capsize=4,
        linewidth=1.4,
    )
    for point in points:
        axes.plot(
            [point["x"]] * len(point["values"]),
            point["values"],
            "o",
            color=PALETTE[0],
            alpha=0.3,
            markersize=4,
        )
    axes.set_xscale("log" if log else "linear")
    axes.set_xticks(x, [f"{at:g}" for at in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set(xlabel=parameter, ylabel="validation accuracy after the last step (fraction)")
    return figure


def sweep(
    values: Mapping[str, Sequence[Any]],
    log: Sequence[str],
    accuracies: pd.Series,
    outcomes: pd.Series,
    importance: Mapping[str, float],
) -> Figure:
    """Validation accuracy by each swept field, a dot per trial, those that were ended early hollow; the fields by how much they matter.

    The axis leaves out the worst sixth of the trials, which would hide how the others differ.
    """
    paths = sorted(values, key=lambda path: -importance.get(path, 0.0))
    columns, rows = min(3, len(paths)), -(-len(paths) // 3)
    figure = Figure(figsize=(4.6 * columns + 0.6, 3.7 * rows + 0.3), dpi=DPI, layout="constrained")
    finished = outcomes == "finished"
    for axes, path in zip(
        figure.subplots(rows, columns, squeeze=False, sharey=True).flat, paths, strict=False
    ):
        numeric = all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in values[path]
        )
        x = pd.Series(
            values[path] if numeric else [str(value) for value in values[path]],
            index=accuracies.index,
        )
        axes.plot(
            x[finished],
            accuracies[finished],
            "o",
            color=PALETTE[0],
            markersize=5,
            label="trained to its end",
        )
        if (~finished).any():
            axes.plot(
                x[~finished],
                accuracies[~finished],
                "o",
                color=PALETTE[1],
                markersize=5,
                fillstyle="none",
                label="ended early",
            )
        if path in log:
            axes.set_xscale("log")
        share = f", {importance[path]:.0%} of what varies" if path in importance else ""
        axes.set(xlabel=path + share)
        axes.grid(alpha=0.3)
    low, high = float(accuracies.quantile(1 / 6)), float(accuracies.max())
    figure.axes[0].set_ylim(low - 0.1 * (high - low or 0.1), high + 0.1 * (high - low or 0.1))
    figure.axes[0].set_ylabel("validation accuracy (fraction)")
    figure.axes[0].legend(fontsize=8)
    for axes in figure.axes[len(paths) :]:
        axes.set_visible(False)
    return figure


def logarithmic(values: Sequence[float]) -> bool:
    """Whether these are better told apart on a logarithmic axis."""
    return min(values) > 0 and max(values) >= 5 * min(values)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and the ends of its 95 % t interval over new seeds; of fewer values than LEAST_RUNS there is none, and they are the mean."""
    n, mean = len(values), float(np.mean(values))
    half = (
        float(special.stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))
        if n >= LEAST_RUNS
        else 0.0
    )
    return mean, mean - half, mean + half


def reliability(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """How often groups are right at each confidence (changes.calibration's tables); on the diagonal they are as sure as they should be."""
    figure = Figure(figsize=(5.5, 5), dpi=DPI)
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.11, top=0.97)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    for (dash, colour), label, table in zip(styles(), tables, tables.values(), strict=False):
        axes.plot(
            table["confidence"],
            table["accuracy"],
            color=colour,
            linestyle=dash,
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set(
        xlabel="confidence (largest probability)",
        ylabel="accuracy (fraction)",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def confusion_difference(difference: np.ndarray, title: str) -> Figure:
    """How much more often each class is taken for each than by the reference, in images; `difference` is [C, C], true by predicted."""
    figure = Figure(figsize=(8, 7), dpi=DPI)
    figure.subplots_adjust(left=0.13, right=1.0, bottom=0.13, top=0.94)
    axes = figure.subplots()
    limit = float(np.abs(difference).max()) or 1.0
    image = axes.imshow(difference, cmap="PuOr_r", vmin=-limit, vmax=limit)
    for row, column in np.argwhere(np.abs(difference) >= 0.5):
        value = difference[row, column]
        axes.text(
            column,
            row,
            f"{value:+.0f}",
            ha="center",
            va="center",
            size=9,
            color="white" if abs(value) > 0.7 * limit else "black",
        )
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(image, ax=axes, label="images more than by the reference", shrink=0.8)
    return figure


def data_uri(image: np.ndarray) -> str:
    """A grey picture, uint8 [height, width], as a PNG for the `src` of an <img>."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
