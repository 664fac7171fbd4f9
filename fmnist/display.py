"""What a terminal shows while something trains: a live line for a run, a few for a sweep; elsewhere a line per trial that ends."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from fmnist.sweeping import Standing
    from fmnist.training import Outcome, Training


@contextmanager
def run(quiet: bool) -> "Iterator[Callable[[Training], None]]":
    """A live line of progress on a terminal, nothing elsewhere."""
    columns = (
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )  # no bar: all of it fits 80 characters
    with Progress(
        *columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task("", total=None)

        def watch(training: "Training") -> None:
            told = [f"ep {training.step / training.spec.steps_per_epoch:.1f}"]
            if training.curves is not None:
                told += [
                    "loss {:.3f} acc {:.3f}".format(
                        *(training.curves[name][-200:].mean() for name in ("loss", "accuracy"))
                    )
                ]
            told += ["val {1:.3f} {2:.3f}".format(*training.evaluations[-1])]
            if training.outcome.training_s:
                told += [f"{training.step / training.outcome.training_s:,.0f} steps/s"]
            progress.update(
                task, completed=training.step, total=training.spec.steps, description=" ".join(told)
            )

        yield watch


@contextmanager
def sweep(quiet: bool, say: Callable[[str], None]) -> "Iterator[Callable[[Standing], None]]":
    """On a terminal the trials that run, the best so far and the time left, live; elsewhere a line for each trial that ends."""
    live = not quiet and sys.stderr.isatty()
    with (
        Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        if live
        else nullcontext() as shown
    ):
        pace, told = Pace(), set[int]()

        def watch(standing: "Standing") -> None:
            pace.note(standing)
            for number in [*standing.results, *standing.failed] if not quiet else ():
                if number not in told:
                    told.add(number)
                    if number in pace.seen:
                        say(_ended(standing, number))
            if live and shown is not None:
                shown.update(
                    Group(
                        *map(Text, (summary(standing, pace.left_s(standing)), *_running(standing)))
                    ),
                    refresh=True,
                )

        yield watch


class Pace:
    """How fast a sweep goes, by the steps that its workers have done since it was first looked at."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seen: dict[
            int, tuple[int, int]
        ] = {}  # of the trials that ran here: the first step seen, and the last

    def note(self, standing: "Standing") -> None:
        for number, progress in standing.running.items():
            step = progress.step if progress else 0
            self.seen[number] = (self.seen.get(number, (step, 0))[0], step)

    def left_s(self, standing: "Standing") -> float | None:
        """Seconds to the end, if all goes on as it did; None before that can be told."""
        done = sum(last - first for first, last in self.seen.values())
        if not done or not standing.trials:
            return None
        steps = next(iter(standing.trials.values())).resolved.spec.steps
        waiting = (
            standing.total - len(standing.results) - len(standing.failed) - len(standing.running)
        )
        left = waiting * steps + sum(
            steps - (progress.step if progress else 0) for progress in standing.running.values()
        )
        return left * (time.monotonic() - self.began) / done


def summary(standing: "Standing", left_s: float | None = None) -> str:
    """How a sweep stands, in a line."""
    outcomes = Counter(result.outcome for result in standing.results.values())
    told = [f"{len(standing.results)} of {standing.total} trials are there"]
    told += [
        f"{count} of them {outcome}" for outcome, count in outcomes.items() if outcome != "finished"
    ]
    told += [f"{len(standing.failed)} failed"] if standing.failed else []
    told += [f"{len(standing.elsewhere)} trained elsewhere"] if standing.elsewhere else []
    if (best := standing.best) is not None:
        told.append(f"best so far {standing.results[best.number].accuracy:.4f}: {best.name}")
    told += [f"about {duration(left_s)} left"] if left_s is not None and left_s >= 1 else []
    return "; ".join(told)


def _running(standing: "Standing") -> Iterator[str]:
    for number, progress in standing.running.items():
        trial = standing.trials[number]
        how = "starting"
        if progress is not None:
            loss = "" if progress.loss is None else f"loss {progress.loss:.3f}  "
            how = f"{progress.step:,} of {trial.resolved.spec.steps:,}  {loss}val accuracy {progress.accuracy:.4f}"
        yield f"  {trial.name}: {how}"


def _ended(standing: "Standing", number: int) -> str:
    name = standing.trials[number].name
    if number in standing.failed:
        return f"{name}: FAILED: {standing.failed[number]}"
    result, there = standing.results[number], len(standing.results) + len(standing.failed)
    accuracy = "" if result.accuracy is None else f", val accuracy {result.accuracy:.4f}"
    return f"{name}: {result.outcome}{accuracy} ({there} of {standing.total})"


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def rows(standing: "Standing") -> list[dict[str, Any]]:
    """What is known of each trial, for programs."""
    found = []
    for number, trial in sorted(standing.trials.items()):
        result, failed = standing.results.get(number), standing.failed.get(number)
        found.append({
            "trial": number, "name": trial.name, "settings": trial.settings, "fingerprint": trial.fingerprint,
            "outcome": result.outcome if result else "failed" if failed else None,
            "val_accuracy": result.accuracy if result else None, "reason": failed,
        })  # fmt: skip
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The same for people, a line per trial."""
    wide = max((len(row["name"]) for row in rows), default=0)
    return [
        f"{row['trial']:>4}  {row['name']:<{wide}}  {row['fingerprint'][:8]}  {row['outcome'] or 'missing'}"
        + ("" if row["val_accuracy"] is None else f"  val accuracy {row['val_accuracy']:.4f}")
        for row in rows
    ]


def ended(outcome: "Outcome", link: str | None) -> "Iterator[str]":
    """How a run ended, and its link, in words."""
    from fmnist import journal
    from fmnist import spec as specs

    if outcome.metrics:
        yield from (outcome.name, *journal.in_words(vars(outcome)))
    rate = f" ({outcome.steps / outcome.training_s:,.0f} steps/s)" if outcome.training_s else ""
    yield f"{outcome.status}: {outcome.steps:,} steps in {outcome.training_s:.1f} s{rate}; the command took {outcome.total_s:.1f} s"
    if outcome.resumable:
        yield f"the same command continues it, or: fmnist run --resume {outcome.key}"
    if outcome.unsynced:
        yield f"not in MLflow yet: {outcome.unsynced}; `fmnist sync` carries it over"
    if link:
        yield f"run {outcome.run_id}: {link}" + (
            "" if specs.tracking_server() else "  (after `make ui`)"
        )
