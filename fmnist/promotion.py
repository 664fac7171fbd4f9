"""The champion: the registered model that others load. A run's model takes its place only if it is better beyond the noise."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fmnist import compare, groups, models, tracking
from fmnist.errors import UserError
from fmnist.tracking import Store

if TYPE_CHECKING:
    import pandas as pd

PROVENANCE = ("run_key", "fingerprint", "git_commit", "data_digest", "torch", "device", "command")


@dataclass(frozen=True)
class Promotion:
    champion: str | None
    """Id of the run whose model became champion; None where it was refused."""
    version: int | None = None
    lines: list[str] = field(default_factory=list)
    """What was found and done."""


def promote(store: Store, text: str, because: str | None = None) -> Promotion:
    """Register a finished run's model and make it the champion, if it is right on more of the same held-out images (exact McNemar).

    That is a statement about two trained models, which is what is served; settings are compared over seeds. `because` promotes it
    whatever comes out, and stands in the version. Raises UserError where no reason can be left out, or the run is the champion already.
    """
    runs = store.runs()
    run, current = tracking.the_one(runs, text), store.champion()
    if current and current.run_id == run["run_id"]:
        raise UserError(
            f"{run['name']} ({run['run_id'][:8]}) is the champion already, as version {current.version}"
        )
    if run.get("p/data.holdout") == "null" and because is None:
        raise UserError(
            f"{run['name']} was validated on the test images, by which no model may be chosen; promote a run with data.holdout,"
            ' or say why all the same: --because "..."'
        )
    _see_that_it_can_be_used(store, run["run_id"])
    verdict = "the first champion"
    if current is not None:
        verdict, better = _verdict(store, runs, current.run_id, run["run_id"])
        if not better and because is None:
            return Promotion(
                None,
                None,
                [
                    verdict,
                    f'version {current.version} stays champion; --because "..." promotes it all the same',
                ],
            )
    provenance = {
        key: run[f"t/{key}"] for key in PROVENANCE if isinstance(run.get(f"t/{key}"), str)
    }
    tags = {
        **provenance,
        "verdict": verdict,
        "because": because,
        "replaced": current and current.version,
    }
    known = run.dropna()
    accuracy = {
        key: known[f"m/{key}"]
        for key in ("last/val_accuracy", "test/accuracy")
        if f"m/{key}" in known
    }
    about = [
        f"{run['name']}: " + ", ".join(f"{key} {value:.4f}" for key, value in accuracy.items()),
        verdict,
    ]
    version = store.register(
        run["run_id"],
        "\n\n".join([*about, f"Promoted because: {because}"] if because else about),
        tags,
    )
    return Promotion(
        run["run_id"],
        version,
        [verdict, f"{run['name']} is champion now: {tracking.champion_uri()} is version {version}"],
    )


def _see_that_it_can_be_used(store: Store, run_id: str, registered: Any = None) -> None:
    """Raise StoreError where a run's model is not as it was recorded, or does more than our own: others load the champion with MLflow."""
    from fmnist import exported  # torch comes with it

    exported.load(store.model(run_id, registered)[models.PROGRAM], f"run {run_id}: its model")


def _verdict(
    store: Store, runs: "pd.DataFrame", champion: str, challenger: str
) -> tuple[str, bool]:
    """What a comparison of the two trained models says, and whether the challenger is better."""
    if champion not in set(runs["run_id"]):
        return (
            f"the champion's run {champion[:8]} is no longer in the store, so nothing can be compared",
            False,
        )
    found = [groups.alone(runs, run_id) for run_id in (champion, challenger)]
    try:
        [result] = compare.compare([groups.sample(store, group) for group in found])
    except UserError as error:  # other images
        return str(error), False
    better = (
        result.mcnemar_p is not None
        and result.mcnemar_p < compare.LEVEL
        and (result.difference or 0) > 0
    )
    return result.sentence.partition("; one seed each")[0], better


def roll_back(store: Store) -> Promotion:
    """Make the champion that the present one replaced champion again; raises UserError where there is none."""
    current = store.champion()
    if current is None:
        raise UserError("there is no champion; fmnist promote RUN makes one")
    before = current.tags.get("replaced")
    if before is None:
        raise UserError(
            f"version {current.version} is the first champion, there is none before it to go back to"
        )
    former = store.client.get_model_version(tracking.REGISTERED, before)
    _see_that_it_can_be_used(store, former.run_id, former)
    store.make_champion(before)
    restored = store.champion()
    assert restored is not None
    return Promotion(
        restored.run_id,
        int(before),
        [f"version {before} is champion again, in place of version {current.version}"],
    )
