"""For notebooks and scripts: load a spec, run it, list what is recorded, compare. The same objects as the command line's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmnist import compare as comparing
from fmnist import database, groups, tracking
from fmnist import spec as specs
from fmnist.experiments import Resolved, load

if TYPE_CHECKING:
    import pandas as pd

    from fmnist.training import Outcome

__all__ = ["Compared", "Resolved", "compare", "load", "run", "runs"]


@dataclass(frozen=True, eq=False)
class Compared:
    """Groups of runs, and each but the first compared with the first."""

    groups: list[comparing.Group]
    comparisons: list[comparing.Comparison]
    differing: "pd.DataFrame"
    """The parameters in which they differ: a row per group."""
    cautions: list[str]
    """What anyone who reads the verdicts has to know."""

    def __str__(self) -> str:
        lines = [
            f"{group.label}: validation accuracy after the last step {group.stated()}"
            for group in self.groups
        ]
        lines += [self.differing.to_string()] if len(self.differing.columns) else []
        shared = (
            set.intersection(*({*comparison.notes} for comparison in self.comparisons))
            if len(self.comparisons) > 1
            else set()
        )
        for comparison in self.comparisons:
            lines += [
                "",
                comparison.sentence,
                *(f"  note: {note}" for note in comparison.notes if note not in shared),
            ]
        remarks = [note for note in self.comparisons[0].notes if note in shared] + self.cautions
        return "\n".join([*lines, "", *(f"note: {remark}" for remark in remarks)]).rstrip()


def run(
    experiment: str | Resolved,
    *overrides: str,
    seeds: Sequence[int] | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> "list[Outcome]":
    """Train and record an experiment, or one run for each of `seeds` that is not recorded yet; an interrupted run is continued.

    Raises UserError before any work starts; what goes wrong later is in the outcomes. Overrides are as in 'optimizer.lr=0.01'.
    """
    from fmnist import runner

    context = runner.Context(specs.home(), say=say)
    if isinstance(experiment, Resolved):
        wanted = [experiment]
    else:
        each = [[f"train.seed={seed}"] for seed in seeds] if seeds is not None else [[]]
        wanted = [load(experiment, [*overrides, *seed]) for seed in each]
    if seeds is not None and not fresh:
        return runner.run_missing(wanted, database.recorded(context.root), context)
    return runner.run(wanted, context, fresh) if wanted else []


def runs() -> "pd.DataFrame":
    """Every run of the store, a row each; see tracking.Store.runs. Raises StoreError where there is none."""
    return tracking.connect(specs.home()).runs(status=None)


def compare(*what: str, detect: float = 0.002) -> Compared:
    """Compare experiments, groups or single runs with the first of them; see groups.find and compare.compare for what is raised."""
    store = tracking.connect(specs.home())
    found = groups.find(store.runs(status=None, foreign=True), what, store.root)
    comparisons = comparing.compare([groups.sample(store, group) for group in found], detect)
    return Compared(found, comparisons, comparing.differing(found), comparing.cautions(found))
