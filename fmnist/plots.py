"""Frames to matplotlib Figures; writes no file."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    import pandas as pd

SMOOTHING = 50
"""The smoothed training curve has about this many independent windows over a run."""
RAW_POINTS = 2_000
"""Raw points drawn behind it; more can't be told apart in print and take seconds to draw."""
TRAIN, VALIDATION = "#1f77b4", "#d95f02"
DPI = 120
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def learning_curves(frame: "pd.DataFrame", title: str, steps_per_epoch: int, best_step: int | None) -> Figure:
    """Loss and accuracy by step, training and validation, of one run's curves (journal.curves)."""
    figure = Figure(figsize=(12, 5), dpi=DPI)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.1, top=0.83, wspace=0.16)  # a layout engine draws everything twice
    figure.suptitle(title)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        train = frame[["step", f"train/{name}"]].dropna() if f"train/{name}" in frame else frame[:0].assign(**{f"train/{name}": []})
        window = smoothing_window(len(train))
        values = train[f"train/{name}"].to_numpy()
        smooth = smoothed(values, window)
        thin = max(1, len(train) // RAW_POINTS)
        axes.plot(train["step"][::thin], values[::thin], color=TRAIN, alpha=0.18, linewidth=0.6)
        axes.plot(train["step"][::thin], smooth[::thin], color=TRAIN, label=f"train, mean of {window} steps")
        val = frame[["step", f"val/{name}"]].dropna()
        axes.plot(val["step"], val[f"val/{name}"], color=VALIDATION, marker="o", markersize=3, label="validation")
        best = val[val["step"] == best_step]
        if len(best):
            value = best[f"val/{name}"].iloc[0]
            label = f"best: {value:.4f} at step {best_step:,}"
            axes.plot(
                best["step"], [value], color=VALIDATION, marker="*", markersize=13, markeredgecolor="black", linestyle="none", label=label
            )
        _limits(axes, name, np.concatenate([smooth, val[f"val/{name}"].to_numpy()]))
        _step_axis(axes, steps_per_epoch)
        axes.set_ylabel(f"{name}{' (cross-entropy, nats)' if name == 'loss' else ' (fraction)'}")
        axes.legend()
    return figure


def smoothing_window(steps: int) -> int:
    return max(1, steps // SMOOTHING)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Trailing mean over `window` values, over fewer at the start: no step shows anything of a later one."""
    if not len(values):
        return values
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _limits(axes: Axes, name: str, shown: np.ndarray) -> None:
    """Fit the axis to what is to be read, not to the raw curve's noise."""
    shown = shown[np.isfinite(shown)]
    if len(shown):
        low, high = float(shown.min()), float(np.quantile(shown, 0.995) if name == "loss" else shown.max())
        margin = 0.06 * (high - low) or 0.05
        axes.set_ylim(max(0.0, low - margin), high + margin)


def _step_axis(axes: Axes, steps_per_epoch: int | None) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / 1000:g}k" if step else "0"))
    axes.grid(alpha=0.3)
    axes.margins(x=0.01)
    if steps_per_epoch:

        def to_epoch(step: Any) -> Any:
            return step / steps_per_epoch

        def to_step(epoch: Any) -> Any:
            return epoch * steps_per_epoch

        top = axes.secondary_xaxis("top", functions=(to_epoch, to_step))
        top.set_xlabel("epoch")
        top.xaxis.set_major_locator(MaxNLocator(integer=True))


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, title: str) -> Figure:
    """How often each class was taken for each, counts with the share of the true class as colour."""
    counts = np.zeros((len(CLASSES), len(CLASSES)), int)
    np.add.at(counts, (labels, predicted), 1)
    figure = Figure(figsize=(8, 7), dpi=DPI)
    figure.subplots_adjust(left=0.13, right=1.0, bottom=0.13, top=0.92)
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        if counts[row, column]:
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if shares[row, column] > 0.5 else "black",
            )
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{title}\naccuracy {np.trace(counts) / max(1, counts.sum()):.4f} on {counts.sum():,} validation images")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def overlay(curves: Mapping[str, "pd.DataFrame"]) -> Figure:
    """Training and validation loss and accuracy of several runs by step, one colour each; training curves smoothed alike.

    The axes fit what comes after each run's first tenth: the start, from chance level, is alike and would hide the rest.
    """
    window = smoothing_window(max(len(frame) for frame in curves.values()))
    figure = Figure(figsize=(14, 9), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 2)
    for row, split in enumerate(("train", "val")):
        for column, name in enumerate(("loss", "accuracy")):
            axes, key, shown = panels[row][column], f"{split}/{name}", []
            for index, (label, frame) in enumerate(curves.items()):
                points = frame[["step", key]].dropna()
                values = points[key].to_numpy()
                if split == "train":
                    values = smoothed(values, window)
                thin = max(1, len(values) // RAW_POINTS)
                colour, line = _style(index)
                axes.plot(points["step"][::thin], values[::thin], color=colour, linestyle=line, label=label, linewidth=1.3)
                shown.append(values[len(values) // 10 :])
            _limits(axes, name, np.concatenate(shown))
            _step_axis(axes, None)
            axes.set_title(f"{f'training {name}, mean of {window} steps' if split == 'train' else f'validation {name}'}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9)
    return figure


def _style(index: int) -> tuple[Any, str]:
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    return colours[index % len(colours)], ("-", "--", ":", "-.")[index // len(colours) % 4]


def table(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> Figure:
    """A table of texts as a picture."""
    widths = [max(len(str(cell)) for cell in column) + 2 for column in zip(columns, *rows, strict=True)]
    figure = Figure(figsize=(max(6.0, 0.095 * sum(widths)), 0.35 * (len(rows) + 1) + 0.2), dpi=DPI)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.axis("off")
    drawn = axes.table(
        cellText=[list(row) for row in rows],
        colLabels=list(columns),
        colWidths=[width / sum(widths) for width in widths],
        cellLoc="left",
        bbox=Bbox.unit(),
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (row, _), cell in drawn.get_celld().items():
        cell.set_edgecolor("#cccccc")
        if row == 0:
            cell.set_text_props(weight="bold")
            cell.set_facecolor("#eeeeee")
    return figure
