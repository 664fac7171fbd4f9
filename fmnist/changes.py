"""What changed between two groups of runs on the same images: exploratory, never a verdict. Pure functions on predictions.

Shapes: n runs of a group (one per seed), N images, C = 10 classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import special

from fmnist import compare

CLASSES = 10
BINS = 15
"""Equal-width bins of confidence, as in Guo et al. 2017."""
PAIRED_SEEDS = 3
"""From this many common seeds on runs are compared as pairs, as in a verdict."""


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
            raise ValueError(
                "runs that were validated on different images can't be compared image by image"
            )
        logits = np.stack([frame.filter(like="logit_").to_numpy(np.float32) for frame in kept])
        return cls(tuple(seeds), *first, special.softmax(logits, axis=2))

    def __len__(self) -> int:
        return len(self.probabilities)

    @cached_property
    def predicted(self) -> np.ndarray:
        """[n, N] the class that each run takes each image for."""
        return np.asarray(self.probabilities.argmax(2))

    @cached_property
    def consensus(self) -> np.ndarray:
        """[N] the class that most runs take each image for; of several, the first."""
        return np.asarray((self.predicted[..., None] == np.arange(CLASSES)).sum(0).argmax(1))

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
    columns = {
        "index": reference.index,
        "label": reference.labels,
        "before": reference.consensus,
        "after": other.consensus,
    }
    change = other.label_probability - reference.label_probability
    frame = pd.DataFrame({**columns, "gained": other.right, "change": change})
    flipped: pd.DataFrame = frame[reference.right != other.right]
    return flipped.sort_values("change", key=np.abs, ascending=False, ignore_index=True)


def never_right(groups: Sequence[Predictions]) -> pd.DataFrame:
    """Images that every run of these groups gets wrong, suspects of a wrong label: index, label, predicted (by most runs), agreeing (share
    of the runs), probability (of the label); the least probable labels come first."""
    every = Predictions(
        (),
        groups[0].index,
        groups[0].labels,
        np.concatenate([group.probabilities for group in groups]),
    )
    agreeing = (every.predicted == every.consensus).mean(0)
    columns = {
        "index": every.index,
        "label": every.labels,
        "predicted": every.consensus,
        "agreeing": agreeing,
    }
    frame = pd.DataFrame({**columns, "probability": every.label_probability})
    wrong: pd.DataFrame = frame[(every.predicted != every.labels).all(0)]
    return wrong.sort_values("probability", ignore_index=True)


def confusion(group: Predictions) -> np.ndarray:
    """[C, C] how often each true class (rows) was taken for each class, the mean over the runs."""
    cells = CLASSES * np.broadcast_to(group.labels, group.predicted.shape) + group.predicted
    return np.bincount(cells.ravel(), minlength=CLASSES**2).reshape(CLASSES, CLASSES) / len(group)


# ---- per-class metrics


METRICS = ("accuracy", "precision", "recall", "F1")


def per_class(reference: Predictions, other: Predictions) -> pd.DataFrame:
    """Accuracy (one class against the rest), precision, recall and F1 of each class: a row per class and metric, with columns reference,
    other, difference, low, high.

    The 95 % interval is a verdict's (compare.paired, compare.unpaired), over new seeds and new images, of the linearised ratios (Cochran,
    Sampling Techniques, 1977, ch. 6); with one run in a group it is over new images only. There are 40 of them: two miss by chance.
    """
    common = [seed for seed in reference.seeds if seed in other.seeds]
    frames = []
    for metric, before, after in zip(
        METRICS, _contributions(reference), _contributions(other), strict=True
    ):
        low, high = _interval(
            before,
            after,
            [[group.seeds.index(seed) for seed in common] for group in (reference, other)],
        )
        columns = {
            "reference": before.mean((1, 2)),
            "other": after.mean((1, 2)),
            "difference": (low + high) / 2,
            "low": low,
            "high": high,
        }
        frames.append(pd.DataFrame({"class": np.arange(CLASSES), "metric": metric, **columns}))
    return pd.concat(frames).sort_values("class", kind="stable").set_index(["class", "metric"])


def _interval(
    before: np.ndarray, after: np.ndarray, common: Sequence[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The ends [C] of the interval of after - before, each [C, n, N]; `common` are the places of the seeds that both have."""
    if len(common[0]) >= PAIRED_SEEDS:
        return compare.paired(before[:, common[0]], after[:, common[1]]).interval
    if min(before.shape[1], after.shape[1]) > 1:
        return compare.unpaired(before, after).interval
    images = after.mean(1) - before.mean(1)
    half = special.ndtri(0.975) * images.std(1, ddof=1) / np.sqrt(images.shape[1])
    return images.mean(1) - half, images.mean(1) + half


def _contributions(group: Predictions) -> Iterator[np.ndarray]:
    """For each of METRICS [C, n, N]: what each image adds, such that a run's mean over the images is its value of the metric.

    Each is a ratio of two sums over the images, Σa / Σb = R; an image's linearised share in it is R + (a - R b) / mean(b).
    """
    classes = np.arange(CLASSES)[:, None, None]
    predicted = (group.predicted == classes).astype(float)
    true = np.broadcast_to(group.labels == classes, predicted.shape).astype(float)
    hit = true * predicted
    for above, below in (
        (1 - np.abs(true - predicted), np.ones_like(hit)),
        (hit, predicted),
        (hit, true),
        (2 * hit, true + predicted),
    ):
        mean = np.maximum(
            below.mean(2, keepdims=True), 1e-12
        )  # a class that is never predicted: 0, as in scikit-learn
        ratio = above.mean(2, keepdims=True) / mean
        yield ratio + (above - ratio * below) / mean


# ---- calibration


@dataclass(frozen=True)
class Calibration:
    table: (
        pd.DataFrame
    )  # BINS rows: low, high, images (of all runs), confidence, accuracy (NaN where there are none)
    ece: np.ndarray  # [n] expected calibration error of each run
    nll: np.ndarray  # [n] mean negative log-likelihood of the labels, nats


def calibration(group: Predictions) -> Calibration:
    """Whether the largest probability tells how often a run is right: reliability over all runs, and each run's ECE (Guo et al., On
    Calibration of Modern Neural Networks, 2017) and NLL."""
    n, runs = len(group), np.arange(len(group))[:, None]
    confidence, right = group.probabilities.max(2).astype(float), group.predicted == group.labels
    cells = BINS * runs + np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count, sure, hits = (
        np.bincount(cells.ravel(), weight.ravel(), n * BINS).reshape(n, BINS)
        for weight in (np.ones(cells.shape), confidence, right)
    )
    edges = np.arange(BINS + 1) / BINS
    total = np.where(count.sum(0) > 0, count.sum(0), np.nan)
    binned = {
        "images": count.sum(0).astype(int),
        "confidence": sure.sum(0) / total,
        "accuracy": hits.sum(0) / total,
    }
    likelihood = group.probabilities[:, np.arange(len(group.labels)), group.labels].astype(float)
    nll = -np.log(np.maximum(likelihood, np.finfo(np.float32).tiny)).mean(1)
    return Calibration(
        pd.DataFrame({"low": edges[:-1], "high": edges[1:], **binned}),
        np.abs(hits - sure).sum(1) / right.shape[1],
        nll,
    )
