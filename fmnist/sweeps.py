"""A sweep as a checked value: a file in experiments/sweeps/, and the runs that it stands for.

Pure: nothing is trained or written; a sweep is a set of specs, and a spec's fingerprint is what its trial is known by.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fmnist import experiments
from fmnist import spec as specs
from fmnist.errors import SpecError
from fmnist.spec import Section

MOST_TRIALS = 10_000
LOG_EVERY = 10
"""What `tracking.log_every` is in sweeps, unless the base or the sweep says otherwise: many runs share one store."""


class Dimension(Section):
    """What one field is searched over: a range, of whole numbers where both its ends are, or choices."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Whether the range is searched by ratios, not by differences."""
    choices: tuple[Any, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _one_of_two(self) -> "Dimension":
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("give low and high, or choices")
        if not self.choices and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError(f"low {self.low}, high {self.high}: give both, low below high")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log: only a range with low above 0 can be searched by ratios")
        return self


class Search(Section):
    sampler: Literal["tpe", "random", "gp"] = "tpe"
    """Optuna's: tpe and gp learn from the trials before, random doesn't."""
    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] = 30
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the sampler: trial k of a random search is the same wherever and whenever it is run."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Which trials are ended early, by their validation accuracy beside that of the others at the same evaluation."""
    space: dict[str, Dimension] = Field(min_length=1)


def _defining(path: str) -> str:
    if path.partition(".")[0] not in specs.DEFINING or "." not in path:
        raise ValueError(
            f"{path}: only fields that define a run can be swept, those of {', '.join(specs.DEFINING)}, as in optimizer.lr"
        )
    if path in ("data.holdout", "data.split_seed"):
        raise ValueError(
            f"{path}: trials that are validated on other images can't be compared; leave it to the base"
        )
    return path


class SweepSpec(Section):
    question: Annotated[str, AfterValidator(specs.readable)] = ""
    """What the sweep is to answer."""
    base: str
    """The experiment that every trial starts from; it holds out validation images (data.holdout)."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(strict=False)]] = Field(default={})
    """Dotted paths of fields and the values to try: every combination is a trial."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(default=(), strict=False)
    """Seeds to train each combination with, for a search one; none: the base's."""
    search: Search | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "SweepSpec":
        if bool(self.grid) == (self.search is not None):
            raise ValueError("grid: give either a grid or a search")
        if self.search and len(self.seeds) > 1:
            raise ValueError(
                "seeds: a search trains each trial once, give one seed; train the best with more afterwards (make run SEEDS=5)"
            )
        for path in [*self.grid, *(self.search.space if self.search else ())]:
            _defining(path)
        if self.seeds and "train.seed" in self.grid:
            raise ValueError("grid.train.seed: is what `seeds` is for; give one of the two")
        for path, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{path}: given an empty list; give at least one value")
        return self


@dataclass(frozen=True)
class Trial:
    """One run that a sweep wants."""

    number: int
    settings: Mapping[str, Any]
    """The swept fields, by dotted path."""
    resolved: experiments.Resolved

    @property
    def fingerprint(self) -> str:
        return self.resolved.spec.fingerprint

    @property
    def name(self) -> str:
        return self.resolved.display_name


@dataclass(frozen=True)
class Sweep:
    name: str
    spec: SweepSpec
    base: experiments.Resolved
    root: Path

    @property
    def paths(self) -> list[str]:
        """The swept fields."""
        return list(self.spec.search.space if self.spec.search else self.spec.grid)

    def trial(self, number: int, settings: Mapping[str, Any], seed: int | None) -> Trial:
        """The trial with these settings and this seed, or the base's; raises SpecError where they don't make an experiment."""
        overrides = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
        overrides += [] if seed is None else [f"train.seed={seed}"]
        if "tracking.log_every" not in self.base.origins:
            overrides.append(f"tracking.log_every={LOG_EVERY}")
        try:
            return Trial(number, settings, experiments.load(self.spec.base, overrides, self.root))
        except SpecError as error:
            raise SpecError(f"{place(self.name)}: {str(error).replace('--set ', '')}") from None

    def grid(self) -> list[Trial]:
        """Every trial of the grid, seed by seed, each fingerprint once; empty where the sweep is a search."""
        trials: dict[str, Trial] = {}
        for seed in self.spec.seeds or (None,):
            for values in itertools.product(*self.spec.grid.values()) if self.spec.grid else ():
                trial = self.trial(
                    len(trials), dict(zip(self.spec.grid, values, strict=True)), seed
                )
                trials.setdefault(trial.fingerprint, trial)
        return list(trials.values())

    @property
    def study(self) -> str:
        """What a search is continued by: the same base, space and sampler; asking for more trials goes on with it."""
        assert self.spec.search is not None
        searched = self.spec.search.model_dump(mode="json", exclude={"trials"})
        digest = hashlib.sha256(
            json.dumps(
                [self.base.spec.fingerprint, self.spec.seeds, searched], sort_keys=True
            ).encode()
        )
        return f"{self.name}-{digest.hexdigest()[:8]}"


def place(name: str) -> str:
    return f"experiments/sweeps/{name}.yaml"


def names(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "experiments" / "sweeps").glob("*.yaml"))


def load(name: str, root: Path) -> Sweep:
    """The sweep of this name; raises SpecError with a line for each mistake in it, in its base or in its first trial."""
    if name not in names(root):
        known = names(root)
        there = ", ".join(known) or f"none in {root / 'experiments' / 'sweeps'}"
        raise SpecError(
            f"unknown sweep {specs.shorten(name)}{experiments.nearest(name, known)}; there are: {there}"
        )
    values, origins = experiments.read_file(root / place(name), place(name))
    spec = experiments.validate(SweepSpec, values, origins, place(name))
    base = experiments.load(spec.base, root=root)
    if base.spec.data.holdout is None:
        raise SpecError(
            f"{origins.get('base', place(name))}: base: {spec.base} is validated on the test images, by which nothing may be chosen;"
            " name one that holds images out (data.holdout), as holdout does"
        )
    sizes = [len(values) for values in spec.grid.values()]
    count = len(spec.seeds or (0,))
    for size in sizes:
        count *= size
    if count > MOST_TRIALS:
        raise SpecError(
            f"{place(name)}: grid: makes {count:,} trials; a sweep has at most {MOST_TRIALS:,}"
        )
    sweep = Sweep(name, spec, base, root)
    space = spec.search.space if spec.search else {}
    ends = {
        path: dimension.choices or (dimension.low, dimension.high)
        for path, dimension in space.items()
    }
    for path, either in ends.items():
        for value in either:
            sweep.trial(
                0, {**{other: those[0] for other, those in ends.items()}, path: value}, None
            )
    return sweep
