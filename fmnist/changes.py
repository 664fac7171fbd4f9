"""What changed between two groups of runs on the same images: exploratory, never a verdict. Pure functions on predictions.

Shapes: n runs of a group (one per seed), N images, C = 10 classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import special, stats

CLASSES = 10
BINS = 15
"""Equal-width bins of confidence, as in Guo et al. 2017."""
PAIRED_SEEDS = 3
"""Runs of the same seeds are compared as pairs from this many on, as in a verdict."""


@dataclass(frozen=True)
class Predictions:
    """What the runs of a group say of the same images, in the order of the images' original file."""

    seeds: tuple[int, ...]
    index: np.ndarray  # [N] position in the original file
    labels: np.ndarray  # [N]
    probabilities: np.ndarray  # [n, N, C]

    @classmethod
    def of(cls, seeds: Sequence[int], frames: Sequence[pd.DataFrame]) -> "Predictions":
        """From a frame per seed with split, index, label and logit_0 to logit_9; raises ValueError where the validation images differ."""
        kept = [frame[frame["split"] == "val"].sort_values("index") for frame in frames]
        first, *others = ((frame["index"].to_numpy(), frame["label"].to_numpy()) for frame in kept)
        if not all(np.array_equal(first, other) for other in others):
            raise ValueError("runs that were validated on different images can't be compared image by image")
        logits = np.stack([frame.filter(like="logit_").to_numpy(np.float32) for frame in kept])
        return cls(tuple(seeds), *first, special.softmax(logits, axis=2))

    @cached_property
    def predicted(self) -> np.ndarray:
        """[n, N] the class that each run takes each image for."""
        return np.asarray(self.probabilities.argmax(2))

    @cached_property
    def consensus(self) -> np.ndarray:
        """[N] the class that most runs take each image for; of several, the first."""
        return np.asarray(stats.mode(self.predicted).mode)

    @cached_property
    def right(self) -> np.ndarray:
        """[N] whether more than half of the runs are right."""
        return np.asarray((self.predicted == self.labels).mean(0) > 0.5)

    @cached_property
    def label_probability(self) -> np.ndarray:
        """[N] the probability that the runs give to the true class, on average."""
        return np.asarray(self.probabilities[:, np.arange(len(self.labels)), self.labels].mean(0))


def flip_table(reference: Predictions, other: Predictions) -> np.ndarray:
    """[2, 2] how many images the reference (rows: wrong, right) and the other (columns) get right, by majority over their seeds."""
    return np.bincount(2 * reference.right + other.right, minlength=4).reshape(2, 2)


def flips(reference: Predictions, other: Predictions) -> pd.DataFrame:
    """Images that flipped, by majority over the seeds: index, label, before, after (classes), gained (bool), change (of the label's
    probability); those that changed most come first."""
    columns = {"index": reference.index, "label": reference.labels, "before": reference.consensus, "after": other.consensus}
    change = other.label_probability - reference.label_probability
    frame = pd.DataFrame({**columns, "gained": other.right, "change": change})
    return frame.loc[reference.right != other.right].sort_values("change", key=np.abs, ascending=False, ignore_index=True)


def never_right(groups: Sequence[Predictions]) -> pd.DataFrame:
    """Images that every run of these groups gets wrong, suspects of a wrong label: index, label, predicted (by most runs), agreeing (share
    of the runs), probability (of the label); the least probable labels come first."""
    every = Predictions((), groups[0].index, groups[0].labels, np.concatenate([group.probabilities for group in groups]))
    agreeing = (every.predicted == every.consensus).mean(0)
    columns = {"index": every.index, "label": every.labels, "predicted": every.consensus, "agreeing": agreeing}
    frame = pd.DataFrame({**columns, "probability": every.label_probability})
    return frame.loc[(every.predicted != every.labels).all(0)].sort_values("probability", ignore_index=True)


def confusion(group: Predictions) -> np.ndarray:
    """[C, C] how often each true class (rows) was taken for each class, the mean over the runs."""
    cells = CLASSES * np.broadcast_to(group.labels, group.predicted.shape) + group.predicted
    return np.bincount(cells.ravel(), minlength=CLASSES**2).reshape(CLASSES, CLASSES) / len(group.predicted)


# ---- per-class metrics


def per_class(reference: Predictions, other: Predictions) -> pd.DataFrame:
    """Accuracy (one class against the rest), precision, recall and F1 of each class: a row per class and metric, with columns reference,
    other, difference, low, high.

    The 95 % interval is that of a verdict, over new seeds and new images: t with the variance of the seeds' values plus that of the images,
    two-way random effects (Searle, Casella & McCulloch, Variance Components, 1992), on the linearised ratios (Cochran, Sampling Techniques,
    1977, ch. 6). With one run in a group it is over new images only.
    """
    common = [seed for seed in reference.seeds if seed in other.seeds]
    frames = []
    for metric, before, after in zip(METRICS, _contributions(reference), _contributions(other), strict=True):
        parts = [after, -before]
        if len(common) >= PAIRED_SEEDS:
            parts = [after[[other.seeds.index(seed) for seed in common]] - before[[reference.seeds.index(seed) for seed in common]]]
        difference, low, high = _interval(parts)
        columns = {"reference": before.mean((0, 1)), "other": after.mean((0, 1)), "difference": difference, "low": low, "high": high}
        frames.append(pd.DataFrame({"class": np.arange(CLASSES), "metric": metric, **columns}))
    return pd.concat(frames).sort_values("class", kind="stable").set_index(["class", "metric"])


METRICS = ("accuracy", "precision", "recall", "F1")


def _contributions(group: Predictions) -> Iterator[np.ndarray]:
    """For each of METRICS [n, N, C]: what each image adds, such that a run's mean over the images is its value of the metric.

    Each is a ratio of two sums over the images, Σa / Σb = R; an image's linearised share in it is R + (a - R b) / mean(b).
    """
    true, predicted = np.eye(CLASSES)[group.labels], np.eye(CLASSES)[group.predicted]
    hit = true * predicted
    ratios = (
        (1 - np.abs(true - predicted), np.ones_like(hit)),
        (hit, predicted),
        (hit, np.broadcast_to(true, hit.shape)),
        (2 * hit, true + predicted),
    )
    for above, below in ratios:
        mean = np.maximum(below.mean(1, keepdims=True), 1e-12)  # a class that is never predicted: 0, as in scikit-learn
        ratio = above.mean(1, keepdims=True) / mean
        yield ratio + (above - ratio * below) / mean


def _interval(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean [C], and the ends of its 95 % interval, of the sum of independent samples of runs, each [n, N, C], on the same images."""
    by_image = sum(part.mean(0) for part in parts)
    mean, images = by_image.mean(0), by_image.var(0, ddof=1) / len(by_image)
    if min(map(len, parts)) == 1:
        half = stats.norm.ppf(0.975) * np.sqrt(images)
        return mean, mean - half, mean + half
    seeds = [part.mean(1).var(0, ddof=1) / len(part) for part in parts]
    residual = sum(_residual_variance(part) / part[..., 0].size for part in parts)
    variance = sum(seeds)
    freedom = variance**2 / np.maximum(sum(term**2 / (len(part) - 1) for term, part in zip(seeds, parts, strict=True)), 1e-300)
    half = stats.t.ppf(0.975, np.maximum(freedom, 1)) * np.sqrt(variance + np.maximum(0, images - residual))
    return mean, mean - half, mean + half


def _residual_variance(part: np.ndarray) -> np.ndarray:
    """[C] mean square of what neither the run nor the image explains."""
    residual = part - part.mean(0) - part.mean(1, keepdims=True) + part.mean((0, 1))
    return np.asarray((residual**2).sum((0, 1)) / ((part.shape[0] - 1) * (part.shape[1] - 1)))


# ---- calibration


@dataclass(frozen=True)
class Calibration:
    table: pd.DataFrame  # BINS rows: low, high, images (of all runs), confidence, accuracy (NaN where there are none)
    ece: np.ndarray  # [n] expected calibration error of each run
    nll: np.ndarray  # [n] mean negative log-likelihood of the labels, nats


def calibration(group: Predictions) -> Calibration:
    """Whether the largest probability tells how often a run is right: reliability over all runs, and each run's ECE (Guo et al., On
    Calibration of Modern Neural Networks, 2017) and NLL."""
    n, runs = len(group.predicted), np.arange(len(group.predicted))[:, None]
    confidence, right = group.probabilities.max(2).astype(float), group.predicted == group.labels
    cells = BINS * runs + np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count, sure, hits = (
        np.bincount(cells.ravel(), weight.ravel(), n * BINS).reshape(n, BINS) for weight in (np.ones(cells.shape), confidence, right)
    )
    edges = np.arange(BINS + 1) / BINS
    total = np.where(count.sum(0) > 0, count.sum(0), np.nan)
    binned = {"images": count.sum(0).astype(int), "confidence": sure.sum(0) / total, "accuracy": hits.sum(0) / total}
    likelihood = group.probabilities[:, np.arange(len(group.labels)), group.labels].astype(float)
    nll = -np.log(np.maximum(likelihood, np.finfo(np.float32).tiny)).mean(1)
    return Calibration(pd.DataFrame({"low": edges[:-1], "high": edges[1:], **binned}), np.abs(hits - sure).sum(1) / right.shape[1], nll)
