"""Move the runs of the local store to a server: parameters, tags, every point, data sets, artifacts, models, the registry; then count."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from fmnist import files, groups, models
from fmnist.errors import StoreError
from fmnist.journal import Point
from fmnist.tracking import REGISTERED, Store, made

ORIGIN, WHOLE = "moved_from", "moved_whole"
"""Tags of a moved run: the id it had, and that all of it is there."""
LEFT = {"mlflow.parentRunId", "mlflow.log-model.history", ORIGIN, WHOLE}
"""Tags that speak of ids in the store that is left."""


class Moved(NamedTuple):
    run_id: str
    """In the local store."""
    name: str
    there: str | None
    """The id on the server; None where it did not get there."""
    points: int
    files: int
    problem: str | None


def move(here: Store, there: Store) -> Iterator[Moved]:
    """Copy each run that has ended, but for those that are there already; groups are written anew there from their members.

    What breaks off is begun again by the next call. Raises StoreError where the server can't be used at all.
    """
    names = {
        experiment.experiment_id: experiment.name for experiment in here.client.search_experiments()
    }
    moved: dict[str, str] = {}
    for run in _runs(here, list(names)):
        if run.data.tags.get("kind") == "group" or run.info.status == "RUNNING":
            continue
        try:
            found = _move_run(here, there, run, names[run.info.experiment_id])
            moved[found.run_id] = found.there or ""
        except Exception as error:  # one run's trouble is not the others'
            found = Moved(
                run.info.run_id, run.info.run_name, None, 0, 0, " ".join(str(error).split())[:300]
            )
        yield found
    _move_registry(here, there, moved)
    groups.write(there)


def _runs(store: Store, ids: list[str], query: str = "") -> Iterator[Any]:
    page = None
    while page is None or page.token:
        page = store.client.search_runs(
            ids, query, order_by=["attributes.start_time"], page_token=page and page.token
        )
        yield from page


def _move_run(here: Store, there: Store, run: Any, experiment: str) -> Moved:
    target = there.experiment(experiment)
    for earlier in _runs(there, [target], f"tags.{ORIGIN} = '{run.info.run_id}'"):
        if earlier.data.tags.get(WHOLE):
            return _compared(here, there, run, earlier.info.run_id)
        there.client.delete_run(earlier.info.run_id)
    tags = {key: value for key, value in run.data.tags.items() if key not in LEFT} | {
        ORIGIN: run.info.run_id
    }
    of_origin = f"tags.{ORIGIN} = '{run.info.run_id}'"
    created = made(
        lambda: there.client.create_run(target, run.info.start_time, tags, run.info.run_name),
        lambda: next(_runs(there, [target], of_origin), None),
    )
    run_id = created.info.run_id
    there.client.log_batch(
        run_id, params=[there.entities.Param(key, value) for key, value in run.data.params.items()]
    )
    for key in run.data.metrics:
        history = here.client.get_metric_history(run.info.run_id, key)
        there.log_points(
            run_id, (Point(key, point.value, point.timestamp, point.step) for point in history)
        )
    there.client.log_inputs(run_id, run.inputs.dataset_inputs)
    with files.scratch() as folder:
        if here.client.list_artifacts(run.info.run_id):
            there.client.log_artifacts(run_id, str(here.download(run.info.run_id, "", folder)))
    for output in run.outputs.model_outputs if run.outputs else ():
        model_id = _move_model(here, there, output.model_id, target, run_id)
        there.client.log_outputs(run_id, [there.entities.LoggedModelOutput(model_id, output.step)])
    there.client.set_terminated(run_id, run.info.status, run.info.end_time)
    found = _compared(here, there, run, run_id)
    if found.problem is None:
        there.set_tags(run_id, {WHOLE: "true"})
    return found


def _move_model(here: Store, there: Store, model_id: str, experiment_id: str, run_id: str) -> str:
    """Copy a logged model; its new id."""
    model = here.client.get_logged_model(model_id)
    of_run = f"source_run_id = '{run_id}'"
    new = made(
        lambda: there.client.create_logged_model(
            experiment_id, model.name, run_id, None, model.params, model.model_type
        ),
        lambda: next(iter(there.client.search_logged_models([experiment_id], of_run)), None),
    )
    with files.scratch() as folder:
        for name, data in here.model(model.source_run_id).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        described = folder / models.DESCRIPTION
        text = described.read_text(encoding="utf-8").replace(
            model.artifact_location, new.artifact_location
        )
        described.write_text(
            text.replace(model_id, new.model_id).replace(model.source_run_id, run_id),
            encoding="utf-8",
        )
        there.client.log_model_artifacts(new.model_id, str(folder))
        there.set_tags(run_id, {models.TAG: models.digests(folder)})
    there.client.finalize_logged_model(new.model_id, "READY")
    return str(new.model_id)


def _compared(here: Store, there: Store, run: Any, run_id: str) -> Moved:
    """What is there of a run, and in what that differs from what is here."""
    keys = list(run.data.metrics)
    points, expected = there.count(run_id, keys), here.count(run.info.run_id, keys)
    files, wanted = _files(there, run_id), _files(here, run.info.run_id)
    wrong = [
        f"{key}: {points[key]} points of {expected[key]}"
        for key in keys
        if points[key] != expected[key]
    ]
    wrong += [
        f"{path}: {files.get(path, 'no')} bytes of {size}"
        for path, size in wanted.items()
        if files.get(path) != size
    ]
    return Moved(
        run.info.run_id,
        run.info.run_name,
        run_id,
        sum(points.values()),
        len(files),
        "; ".join(wrong) or None,
    )


def _files(store: Store, run_id: str, path: str | None = None) -> dict[str, int]:
    """A run's artifacts and their sizes in bytes."""
    found: dict[str, int] = {}
    for each in store.client.list_artifacts(run_id, path):
        found |= _files(store, run_id, each.path) if each.is_dir else {each.path: each.file_size}
    return found


def _move_registry(here: Store, there: Store, moved: dict[str, str]) -> None:
    """Register what is registered here, version by version, and point the champion at the same."""
    champion = here.champion()
    for version in sorted(
        here.client.search_model_versions(f"name = '{REGISTERED}'"),
        key=lambda each: int(each.version),
    ):
        if any(
            each.tags.get(ORIGIN) == version.run_id
            for each in there.client.search_model_versions(f"name = '{REGISTERED}'")
        ):
            continue
        if not moved.get(version.run_id):
            raise StoreError(
                f"version {version.version} of {REGISTERED}: its run {version.run_id} is not there; mend that and sync again"
            )
        number = there.register(
            moved[version.run_id],
            version.description or "",
            {**version.tags, ORIGIN: version.run_id},
            champion=False,
        )
        if champion and champion.version == version.version:
            there.make_champion(str(number))
