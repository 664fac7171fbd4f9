"""Frames to matplotlib Figures; writes no file."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    import pandas as pd

SMOOTHING = 50
"""The smoothed training curve has about this many independent windows over a run."""
DRAWN_POINTS = 2_000
"""Points drawn of a training curve; more can't be told apart in print and take seconds to draw."""
TRAIN, VALIDATION = "#1f77b4", "#d95f02"
DPI = 120
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def learning_curves(frame: "pd.DataFrame", title: str, steps_per_epoch: int, best_step: int | None) -> Figure:
    """Loss and accuracy by step, training and validation, of one run's curves (journal.curves)."""
    figure = Figure(figsize=(12, 5), dpi=DPI)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.1, top=0.83, wspace=0.16)  # a layout engine draws everything twice
    figure.suptitle(title)
    by_step = frame.set_index("step")
    for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("cross-entropy, nats", "fraction"), strict=True):
        train, val = by_step[f"train/{name}"].dropna(), by_step[f"val/{name}"].dropna()
        window = max(1, len(train) // SMOOTHING)
        smooth = _smoothed(train, window)
        axes.plot(_thinned(train), color=TRAIN, alpha=0.18, linewidth=0.6)
        axes.plot(_thinned(smooth), color=TRAIN, label=f"train, mean of {window} steps")
        axes.plot(val, color=VALIDATION, marker="o", markersize=3, label="validation")
        if best_step is not None and best_step in val.index:
            star = {"color": VALIDATION, "marker": "*", "markersize": 13, "markeredgecolor": "black", "linestyle": "none"}
            axes.plot(best_step, val[best_step], **star, label=f"best: {val[best_step]:.4f} at step {best_step:,}")
        _fit_axes(axes, name, [smooth, val])
        axes.set_ylabel(f"{name} ({unit})")
        axes.legend()
        epochs = axes.secondary_xaxis("top", functions=(lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch))
        epochs.set_xlabel("epoch")
        epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _smoothed(curve: "pd.Series", window: int) -> "pd.Series":
    """Trailing mean over `window` values, over fewer at the start: no step shows anything of a later one."""
    return curve.rolling(window, min_periods=1).mean()


def _thinned(curve: "pd.Series") -> "pd.Series":
    return curve[:: max(1, len(curve) // DRAWN_POINTS)]


def _fit_axes(axes: Axes, name: str, curves: Sequence["pd.Series"]) -> None:
    """Label the steps, and fit the values' axis to these curves, not to the raw one's noise."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step else "0")
    axes.grid(alpha=0.3)
    axes.margins(x=0.01)
    shown = np.concatenate(curves)
    shown = shown[np.isfinite(shown)]
    if len(shown):
        low, high = float(shown.min()), float(np.quantile(shown, 0.995) if name == "loss" else shown.max())
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
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=9, color=colour)
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
    window = max(1, max(map(len, curves.values())) // SMOOTHING)
    figure = Figure(figsize=(14, 9), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 2)
    # Of a product the right factor changes first: a line style for each ten colours.
    styles = cycler(linestyle=("-", "--", ":", "-.")) * cycler(color=matplotlib.color_sequences["tab10"])
    for axes, key in zip(panels.flat, ("train/loss", "train/accuracy", "val/loss", "val/accuracy"), strict=True):
        split, name = key.split("/")
        axes.set_prop_cycle(styles)
        by_run = {label: frame.set_index("step")[key].dropna() for label, frame in curves.items()}
        if split == "train":
            by_run = {label: _smoothed(curve, window) for label, curve in by_run.items()}
        for label, curve in by_run.items():
            axes.plot(_thinned(curve), label=label, linewidth=1.3)
        _fit_axes(axes, name, [curve[len(curve) // 10 :] for curve in by_run.values()])
        axes.set_title(f"training {name}, mean of {window} steps" if split == "train" else f"validation {name}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9)
    return figure


def table(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> Figure:
    """A table of texts as a picture, larger than its figure: save it with bbox_inches="tight"."""
    figure = Figure(figsize=(1, 0.1), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    drawn = axes.table(cellText=rows, colLabels=columns, colColours=["#eeeeee"] * len(columns), cellLoc="left", colLoc="left", loc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.auto_set_column_width(list(range(len(columns))))
    for (row, _), cell in drawn.get_celld().items():
        cell.set_edgecolor("#cccccc")
        cell.set_text_props(weight="normal" if row else "bold")
    return figure
