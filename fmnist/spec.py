"""An experiment as a frozen, checked value: its fields, its fingerprint, its plan; and where things are.

Pure: no torch, no MLflow, nothing read or written.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fmnist.errors import StoreError

TRAIN_IMAGES = 60_000
TEST_IMAGES = 10_000
CLASSES = 10
PIXELS = 28 * 28
SEGMENT_STEPS = 1_000
"""The most steps between two things that the host does: it bounds the delay of Ctrl-C and of the live curves to about a second."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
YAML_1_1_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
MAX_STEPS, MAX_EVALUATIONS = 100_000_000, 100_000
DEFINING = ("data", "model", "optimizer", "schedule", "train")
"""The sections that define a run; the others name, file or compute it."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Data(Section):
    holdout: Annotated[int, Field(ge=CLASSES, le=TRAIN_IMAGES - CLASSES)] | None = None
    """Training images held out for validation, stratified by class; null validates on the 10,000 test images, as the notebook does."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the held-out choice; the same for every run seed, so that all runs are validated on the same images."""
    normalization: Literal["unit", "standard"] = "unit"
    """unit: pixels / 255; standard: that minus the mean and over the standard deviation of the training images."""


class MLP(Section):
    type: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1, le=16_384)], ...] = Field(
        default=(300, 100), max_length=16, strict=False
    )
    """Units of each hidden layer, input side first."""
    activation: Literal["relu", "tanh", "sigmoid"] = "relu"

    @property
    def parameters(self) -> int:
        widths = [PIXELS, *self.hidden, CLASSES]
        return sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))


Model = MLP
"""The models there are; a second one makes this a union told apart by `type` (README, 'Add a model')."""


class Update(Section):
    lr: Annotated[float, Field(gt=0, le=1_000)] = 1e-3
    """Learning rate: the peak that the schedule starts from or climbs to."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0


class SGD(Update):
    type: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SGD":
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "nesterov needs a momentum above 0: set optimizer.momentum, or nesterov: false"
            )
        return self


class Adaptive(Update):
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False
    )
    """Decay of the running means of the gradient and of its square, per step."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8


class Adam(Adaptive):
    """Adam; weight_decay is added to the gradient (L2)."""

    type: Literal["adam"] = "adam"


class AdamW(Adaptive):
    """Adam; weight_decay shrinks the weights directly."""

    type: Literal["adamw"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.01


class Schedule(Section):
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate climbs linearly to the schedule's first; the schedule itself runs over the steps that follow."""


class Constant(Schedule):
    type: Literal["constant"] = "constant"


class Step(Schedule):
    type: Literal["step"] = "step"
    every_epochs: Annotated[int, Field(ge=1)] = 10
    """Epochs between two drops."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What the learning rate is multiplied by at each drop."""


class Cosine(Schedule):
    type: Literal["cosine"] = "cosine"
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The learning rate after the last step, as a fraction of optimizer.lr."""


class Linear(Schedule):
    type: Literal["linear"] = "linear"
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The learning rate after the last step, as a fraction of optimizer.lr."""


class OneCycle(Schedule):
    type: Literal["one_cycle"] = "one_cycle"
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Fraction of the steps spent climbing to optimizer.lr."""
    initial_divisor: Annotated[float, Field(ge=1)] = 25.0
    """The first learning rate is optimizer.lr divided by this."""
    final_divisor: Annotated[float, Field(ge=1)] = 1e4
    """The last learning rate is the first one divided by this."""


class EarlyStopping(Section):
    metric: Literal["loss", "accuracy"] = "loss"
    """Validation metric that has to improve; the weights of its best evaluation are restored."""
    patience: Annotated[int, Field(ge=1)] = 5
    """Evaluations without improvement before the run stops."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """The least change that counts as an improvement."""


class Train(Section):
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 32
    eval_every: Annotated[int, Field(ge=1)] = 1_000
    """Steps between two evaluations; there is one before the first step and one after the last too."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights and of the order of the batches."""
    loss: Literal["cross_entropy"] = "cross_entropy"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the matrix products; weights, sums and updates are float32. tf32: needs a CUDA device; bf16: by torch.autocast."""
    early_stopping: EarlyStopping | None = None


class Tracking(Section):
    experiment: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = (
        "fashion-mnist"
    )
    """The MLflow experiment that the run is filed under."""
    log_every: Annotated[int, Field(ge=1)] = 1
    """Steps between two training points in MLflow; curves.parquet always has every step."""


Device = Literal[
    "auto", "cpu", "cuda",
    "cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:5", "cuda:6", "cuda:7",
]  # fmt: skip


class Compute(Section):
    device: Device = "auto"
    """auto: a CUDA device where there is one that computes what the CPU does; cuda:1: the second."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """CPU threads of the trainer; for matrices this small one is the fastest."""
    stack: Literal["auto", "off"] | Annotated[int, Field(ge=1, le=4_096)] = "auto"
    """Runs of one shape that are trained in the same steps; auto: many on a CUDA device, one on the CPU."""


def valid_name(name: str) -> str:
    if not NAME.fullmatch(name) or name in YAML_1_1_WORDS or ".." in name:
        raise ValueError(
            f"experiment name: given {shorten(name)}; allowed are a to z, 0 to 9 and . _ - (at most 64, a letter or digit first, no path separators,"
            " none of the YAML words yes, no, on, off, true, false, null)"
        )
    return name


def readable(text: str) -> str:
    if not text.replace("\n", "").isprintable():
        raise ValueError(
            f"given {shorten(text)}; only characters that can be printed, and line ends, are taken"
        )
    return text


class ExperimentSpec(Section):
    name: Annotated[str, AfterValidator(valid_name)]
    """The file's name, unless given."""
    question: Annotated[str, AfterValidator(readable)] = ""
    """What the run is to answer."""
    data: Data = Data()
    model: Model = MLP()
    optimizer: Annotated[SGD | Adam | AdamW, Field(discriminator="type")] = SGD()
    schedule: Annotated[
        Constant | Step | Cosine | Linear | OneCycle, Field(discriminator="type")
    ] = Constant()
    train: Train = Train()
    tracking: Tracking = Tracking()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _fits_together(self) -> "ExperimentSpec":
        if self.train.batch_size > self.train_images:
            raise ValueError(
                f"train.batch_size: {self.train.batch_size} exceeds the {self.train_images} images trained on; give at most that"
            )
        if self.steps > MAX_STEPS:
            raise ValueError(
                f"train.epochs: {self.train.epochs} makes {self.steps:,} steps; a run has at most {MAX_STEPS:,} steps"
            )
        if self.steps // self.train.eval_every > MAX_EVALUATIONS:
            raise ValueError(
                f"train.eval_every: {self.train.eval_every} is too small; a run has at most {MAX_EVALUATIONS:,} evaluations"
            )
        if (warmup := self.schedule.warmup_steps) >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps: {warmup} leaves nothing of the run's {self.steps} steps; give fewer, or more epochs"
            )
        return self

    @property
    def train_images(self) -> int:
        return TRAIN_IMAGES - (self.data.holdout or 0)

    @property
    def validation_images(self) -> int:
        return self.data.holdout or TEST_IMAGES

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.train_images / self.train.batch_size)

    @property
    def steps(self) -> int:
        return self.train.epochs * self.steps_per_epoch

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what defines the run: the fields off their defaults, less name, question, tracking and compute."""
        return _digest(self._definition())

    @property
    def group(self) -> str:
        """The fingerprint without the seed: runs that share it differ by chance alone."""
        return _digest(self._definition(without_seed=True))

    @property
    def shape(self) -> str:
        """What runs that are trained in the same steps share: all but seeds, early stopping, the schedule and the optimizer's rates."""
        train = self.train.model_dump(exclude={"seed", "early_stopping"})
        optimizer = self.optimizer.model_dump(exclude={"lr", "momentum", "weight_decay"})
        return _digest(
            {
                "data": self.data.model_dump(),
                "model": self.model.model_dump(),
                "train": train,
                "optimizer": optimizer,
            }
        )

    def _definition(self, without_seed: bool = False) -> dict[str, Any]:
        changed = self.model_dump(mode="json", include=set(DEFINING), exclude_defaults=True)
        if without_seed:
            changed.get("train", {}).pop("seed", None)
        for section in ("model", "optimizer", "schedule"):
            changed.setdefault(section, {})["type"] = getattr(self, section).type
        return {section: fields for section, fields in changed.items() if fields}

    def flat(self) -> dict[str, Any]:
        """Dotted path to value, for every field."""
        return dict(leaves(self.model_dump(mode="json")))

    def differences(self, other: Mapping[str, Any]) -> str:
        """What differs in the defining fields from another spec's `flat`, in words; empty where nothing does."""
        here = self.flat()
        paths = sorted(
            path
            for path in {*here, *other}
            if path.partition(".")[0] in DEFINING and here.get(path) != other.get(path)
        )
        return ", ".join(
            f"{path} {shorten(other.get(path))} there, {shorten(here.get(path))} here"
            for path in paths
        )

    def logged_steps(self, last: int | None = None) -> range:
        """The steps up to `last` whose training loss and accuracy go to MLflow."""
        return range(
            self.tracking.log_every,
            (self.steps if last is None else last) + 1,
            self.tracking.log_every,
        )


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _digest(definition: Mapping[str, Any]) -> str:
    canonical = json.dumps(definition, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


# ---- the plan of a run


@dataclass(frozen=True)
class Segment:
    """Training steps start + 1 to stop, then an evaluation or none."""

    start: int
    stop: int
    evaluate: bool


def plan(spec: ExperimentSpec) -> list[Segment]:
    """Every step of the run once, cut where it is evaluated and at least each SEGMENT_STEPS; the first segment evaluates at step 0."""
    evaluations = {*range(0, spec.steps, spec.train.eval_every), spec.steps}
    cuts = sorted(evaluations | set(range(0, spec.steps, SEGMENT_STEPS)))
    return [Segment(0, 0, True)] + [
        Segment(start, stop, stop in evaluations) for start, stop in pairwise(cuts)
    ]


# ---- the surroundings


def home() -> Path:
    """The folder that holds experiments/, data/, mlruns/ and reports/: FMNIST_HOME, else the one above this package."""
    given = os.environ.get("FMNIST_HOME")
    return Path(given).resolve() if given else Path(__file__).resolve().parent.parent


def check_folder(root: Path) -> None:
    """Raise StoreError where no local store can lie: SQLAlchemy reads ? and % in a path as parts of a URL, and wants UTF-8."""
    given = os.fsencode(root).decode(errors="backslashreplace")
    if set("?%") & set(given) or given != str(root):
        raise StoreError(
            f"{given}: no store can be below a folder with ? or % in its name, or a name that isn't UTF-8; rename the folder"
        )


def tracking_server() -> str | None:
    """The MLflow server of MLFLOW_TRACKING_URI, or None for the local store; raises StoreError where it is no http(s) address."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if given == f"sqlite:///{home() / 'mlruns' / 'mlflow.db'}":
        return None  # set for mlflow's own commands; it is the local store by its other name
    if given and not re.match(r"https?://[^/]", given):
        raise StoreError(
            f"MLFLOW_TRACKING_URI: given {redacted(given)!r}; give an http:// or https:// server, or unset it (local store)"
        )
    return given or None


def redacted(uri: str) -> str:
    """A text without the users and passwords of the URIs in it."""
    return re.sub(r"//[^/\s]*@", "//", uri)  # to the last @: a password may hold one


def store_name() -> str:
    """What tells one record of runs from another: 'local', or a server's address."""
    return redacted(tracking_server() or "local")
