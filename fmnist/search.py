"""The trials of a search, by Optuna: which settings come next, which trials are not worth going on with.

A study is kept in mlruns/searches.db, by name; it belongs to no process, and several may ask it at once. Who only looks gets a copy of it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from fmnist import files
from fmnist import spec as specs
from fmnist.database import sqlite, told
from fmnist.journal import Result
from fmnist.sweeps import Dimension, Search, Sweep, Trial

GUESSING = 1 / specs.CLASSES
"""The accuracy that a diverged trial counts with: what it would be by chance."""
LEAST_TRIALS = 10
"""Of fewer trials nothing is said about what matters."""
STARTUP = 5
"""Trials that the median pruner lets run to their end first; nor does it look at a trial's first half, where schedules that end low lag behind."""


class Study:
    """The study of a sweep that is a search."""

    def __init__(self, sweep: Sweep, search: Search, copy: bool = False) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.search, self.total = sweep, search, search.trials
        self._known: dict[int, Trial] = {}
        self._folder = sweep.root / "mlruns"
        self._space = {path: _distribution(dimension) for path, dimension in search.space.items()}
        self._evaluations = sum(segment.evaluate for segment in specs.plan(sweep.base.spec))
        self._file = self._folder / "searches.db"
        with told(
            f"{self._file} can't be used",
            "restore it from a copy, or move it away: the search begins anew",
        ):
            self._study = optuna.create_study(
                storage=self._copied() if copy else self._stored(),
                study_name=sweep.study,
                direction="maximize",
                load_if_exists=True,
                pruner=self._pruner(),
            )

    def _stored(self) -> optuna.storages.BaseStorage:
        self._folder.mkdir(exist_ok=True)
        with self._locked():  # SQLAlchemy's tables are not made safely by several at once
            if self._file.exists():
                with sqlite(self._file) as connection:
                    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                if damage != "ok":
                    raise ValueError(damage)
            return optuna.storages.RDBStorage(
                f"sqlite:///{self._file}", {"connect_args": {"timeout": 60}}
            )

    def _copied(self) -> optuna.storages.BaseStorage:
        memory = optuna.storages.InMemoryStorage()
        if self._file.exists():
            with contextlib.suppress(KeyError):  # other studies are in it
                optuna.copy_study(
                    from_study_name=self.sweep.study, from_storage=self._stored(), to_storage=memory
                )
        return memory

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of all studies, against other processes."""
        with files.locked(self._folder / ".searches.lock"):
            yield

    def _pruner(self) -> optuna.pruners.BasePruner:
        match self.search.pruner:
            case "median":
                return optuna.pruners.MedianPruner(
                    n_startup_trials=STARTUP, n_warmup_steps=self._evaluations // 2
                )
            case "hyperband":
                return optuna.pruners.HyperbandPruner(
                    min_resource=max(1, self._evaluations // 9), max_resource=self._evaluations
                )
            case "none":
                return optuna.pruners.NopPruner()

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """One for each trial, so that what it draws depends on the trials before and not on which process asks."""
        seed = self.search.seed * 100_003 + number
        match self.search.sampler:
            case "tpe":
                return optuna.samplers.TPESampler(seed=seed)
            case "gp":
                return optuna.samplers.GPSampler(seed=seed)
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)

    def ask(self) -> Trial | None:
        """The next trial; None once all were asked for."""
        with self._locked():
            there = self._study.get_trials(deepcopy=False)
            for each in there:
                if each.state == TrialState.RUNNING and set(each.params) != set(
                    self._space
                ):  # who asked for it was killed over it
                    self._study.tell(each.number, state=TrialState.FAIL)
            if sum(set(each.params) == set(self._space) for each in there) >= self.search.trials:
                return None
            self._study.sampler = self._sampler(len(there))
            asked = self._study.ask(self._space)
        return self._trial(asked.number, asked.params)

    def _trial(self, number: int, parameters: Mapping[str, Any]) -> Trial:
        if number not in self._known:
            choices = {path for path, dimension in self.search.space.items() if dimension.choices}
            settings = {
                path: json.loads(value) if path in choices else _rounded(value)
                for path, value in parameters.items()
            }
            self._known[number] = self.sweep.trial(
                number, settings, next(iter(self.sweep.spec.seeds), None)
            )
        return self._known[number]

    def open(self) -> list[Trial]:
        """Those that were asked for and have no result yet."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [
            self._trial(each.number, each.params)
            for each in running
            if set(each.params) == set(self._space)
        ]

    def settled(self) -> list[tuple[Trial, Result]]:
        """Those that have a result."""
        ended = self._study.get_trials(
            deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)
        )
        names = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}
        return [
            (
                self._trial(each.number, each.params),
                Result(names[each.state], "in the study", each.value),
            )
            for each in ended
        ]

    def tell(self, number: int, result: Result) -> None:
        """Note how a trial ended; what is known already is left as it is."""
        value = GUESSING if result.outcome == "diverged" else result.accuracy
        state = TrialState.PRUNED if result.outcome == "pruned" else TrialState.COMPLETE
        self._study.tell(
            number,
            None if state is TrialState.PRUNED else value,
            state=state,
            skip_if_finished=True,
        )

    def prune(self, number: int, step: int, accuracy: float) -> bool:
        """Whether a trial that is this far is not worth going on with."""
        if self.search.pruner == "none":
            return False
        identity = next(
            each._trial_id
            for each in self._study.get_trials(deepcopy=False)
            if each.number == number
        )
        trial = optuna.trial.Trial(self._study, identity)
        trial.report(accuracy, step // self.sweep.base.spec.train.eval_every)
        return trial.should_prune()


def importances(
    sweep: Sweep, results: Sequence[tuple[Mapping[str, Any], float]]
) -> dict[str, float]:
    """The share of each swept field in how the accuracy varies (Optuna's fANOVA), of settings and accuracies; empty where that can't be told."""
    space: dict[str, BaseDistribution] = {}
    for path in sweep.paths:
        values = sorted({json.dumps(settings[path]) for settings, _ in results})
        if len(values) > 1:
            space[path] = (
                _distribution(sweep.spec.search.space[path])
                if sweep.spec.search
                else CategoricalDistribution(values)
            )
    if not space or len(results) < LEAST_TRIALS or len({accuracy for _, accuracy in results}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for settings, accuracy in results:
        parameters = {
            path: json.dumps(settings[path])
            if isinstance(each, CategoricalDistribution)
            else settings[path]
            for path, each in space.items()
        }
        study.add_trial(
            optuna.trial.create_trial(params=parameters, distributions=space, value=accuracy)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(
        seed=0
    )  # shares of the variance, as the words here say
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _rounded(value: float) -> float:
    """To four digits: what more would say is noise, and the settings are to be read."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.choices:
        return CategoricalDistribution([json.dumps(choice) for choice in dimension.choices])
    if isinstance(dimension.low, int) and isinstance(dimension.high, int):
        return IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return FloatDistribution(
        float(dimension.low or 0.0), float(dimension.high or 0.0), log=dimension.log
    )
