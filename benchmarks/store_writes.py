"""How many points a second stores take from 1, 2, 4 and 8 writers at once, by the calls of the sidecar: a thousand points each.

    .venv-services/bin/python benchmarks/store_writes.py sqlite:////tmp/it.db postgresql+psycopg://me@127.0.0.1/it http://127.0.0.1:5000

Each store gets an experiment of its own; medians of --repeats, in turn, and the spread.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from multiprocessing.synchronize import Barrier

from fmnist import tracking
from fmnist.journal import Point

WRITERS = (1, 2, 4, 8)


def write(uri: str, experiment: str, batches: int, ready: Barrier) -> None:
    """One writer's points, into a run of its own."""
    from mlflow import MlflowClient, entities

    client = MlflowClient(tracking_uri=uri)
    run_id = client.create_run(experiment).info.run_id
    now = time.time_ns() // 1_000_000
    points = [
        Point(key, 0.5, now + step, step)
        for step in range(batches * tracking.BATCH // 2)
        for key in ("train/loss", "train/accuracy")
    ]
    metrics = [
        entities.Metric(point.key, point.value, point.timestamp_ms, point.step) for point in points
    ]
    ready.wait()
    for start in range(0, len(metrics), tracking.BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + tracking.BATCH])


def rate(uri: str, writers: int, batches: int) -> float:
    """Points a second of all writers together."""
    from mlflow import MlflowClient

    experiment = MlflowClient(tracking_uri=uri).create_experiment(
        f"writes-{writers}-{time.time_ns()}"
    )
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(writers + 1)
    processes = [
        spawn.Process(target=write, args=(uri, experiment, batches, ready)) for _ in range(writers)
    ]
    for process in processes:
        process.start()
    ready.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
        assert process.exitcode == 0, f"{uri}: a writer ended with {process.exitcode}"
    return writers * batches * tracking.BATCH / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uris", nargs="+", metavar="URI")
    parser.add_argument("--batches", type=int, default=20, help="of each writer")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.update(tracking.SETTINGS)
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.repeats):
        for uri in arguments.uris:
            for writers in WRITERS:
                found.setdefault((uri, writers), []).append(rate(uri, writers, arguments.batches))
    print(
        "| points a second | "
        + " | ".join(f"{writers} writers" for writers in WRITERS)
        + " |\n|---|"
        + "---|" * len(WRITERS)
    )
    for uri in arguments.uris:
        cells = (found[uri, writers] for writers in WRITERS)
        told = (
            f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            for rates in cells
        )
        print(f"| {uri.partition(':')[0]} | {' | '.join(told)} |")


if __name__ == "__main__":
    main()
