"""What runs do when the store is in trouble: a real MLflow server stopped and started again in the middle, and eight first runs at once.

    make soak                                               # after the kills of survival.py
    python benchmarks/outages.py --repeats 1 --set train.epochs=6 --set train.eval_every=500    # the short form

Exit 1 where a point is missing or a run is not FINISHED.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fmnist import state, tracking

REPOSITORY = Path(__file__).resolve().parent.parent
OUTAGES = 3
CROWD = 8
CROWD_RUN = ["train.epochs=2", "train.batch_size=50"]


class Server:
    """`mlflow server` on a free port of this machine, with its files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        stores = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination",
            str(self.folder / "kept"),
        ]
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            *stores,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **tracking.SETTINGS},
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.2)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(REPOSITORY / "experiments", folder / "experiments")
        (folder / "data").symlink_to(REPOSITORY / "data")
        os.environ["FMNIST_HOME"] = name
        yield folder
        for lock in (folder / "mlruns").glob(
            ".sidecar*.lock"
        ):  # a sidecar idles on; it must not compete with what is timed next
            while state.is_locked(lock):
                state.end_uploader(lock)
                time.sleep(0.05)


def start(overrides: list[str]) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "fmnist",
        "run",
        "baseline",
        "--json",
        *(f"--set={override}" for override in overrides),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome_of(process: "subprocess.Popen[str]") -> dict:
    result, said = process.communicate(timeout=900)
    assert result, f"the run told no outcome; it said: {said}"
    return json.loads(result)


def whole(folder: Path, outcome: dict) -> bool:
    """Whether a run is FINISHED in its store with every step once."""
    store = tracking.connect(folder)
    history = store.client.get_metric_history(outcome["run_id"], "train/loss")
    finished = (
        store.client.get_run(outcome["run_id"]).info.status == outcome["status"] == "FINISHED"
    )
    return finished and [point.step for point in history] == list(range(1, outcome["steps"] + 1))


def begun(folder: Path, before: dict) -> bool:
    """Whether points of another run than the one before, whose folder may still lie there, have reached the store."""
    notes = [each.carried for each in state.state_folders(folder)]
    return any(note.get("offset") and note["run_id"] != before["run_id"] for note in notes)


def outages(repeats: int, overrides: list[str]) -> bool:
    """Pairs of runs on a server: one left in peace, one that loses it three times; their training times and their points."""
    ratios, good = [], True
    with home() as folder:
        server = Server(folder)
        server.start()
        os.environ["MLFLOW_TRACKING_URI"] = server.uri
        try:
            for repeat in range(-1, repeats):
                calm = outcome_of(start(overrides))
                process = start(overrides)
                while process.poll() is None and not begun(folder, calm):
                    time.sleep(0.1)
                for _ in range(OUTAGES):
                    server.stop()
                    time.sleep(2)
                    server.start()
                    time.sleep(1)
                struck = outcome_of(process)
                if not struck["run_id"] or struck["unsynced"]:
                    subprocess.run(
                        [sys.executable, "-m", "fmnist", "sync"], check=True, capture_output=True
                    )
                good = good and whole(folder, calm) and whole(folder, struck)
                if repeat >= 0:  # the first pair warms the file cache
                    ratios.append(struck["training_s"] / calm["training_s"])
                    print(
                        f"training {calm['training_s']:.1f} s in peace, {struck['training_s']:.1f} s with {OUTAGES} outages",
                        flush=True,
                    )
        finally:
            server.stop()
            del os.environ["MLFLOW_TRACKING_URI"]
    spread = f"median {statistics.median(ratios):.3f}, range {min(ratios):.3f} to {max(ratios):.3f}, n = {len(ratios)}"
    print(
        f"outages: all points {'there' if good else 'NOT there'}; training time struck / in peace: {spread}"
    )
    return good


def crowd() -> bool:
    """Eight first runs at the same moment on a store that does not exist, and the same eight in a row."""
    with home() as folder:
        clock = time.monotonic()
        processes = [start([*CROWD_RUN, f"train.seed={seed}"]) for seed in range(CROWD)]
        reports = 0
        while any(process.poll() is None for process in processes):  # reading goes on meanwhile
            if tracking.database(folder).exists():
                reports += (
                    subprocess.run(
                        [sys.executable, "-m", "fmnist", "list"], capture_output=True
                    ).returncode
                    == 0
                )
                tracking.connect(folder).runs(status=None)
            time.sleep(0.5)
        together = time.monotonic() - clock
        outcomes = [outcome_of(process) for process in processes]
        good = (
            all(whole(folder, outcome) for outcome in outcomes)
            and len({outcome["run_id"] for outcome in outcomes}) == CROWD
        )
        locked = (folder / "mlruns" / "sidecar.log").read_text().count("locked")
    with home() as folder:
        clock = time.monotonic()
        outcomes = [outcome_of(start([*CROWD_RUN, f"train.seed={seed}"])) for seed in range(CROWD)]
        in_a_row = time.monotonic() - clock
        good = good and all(whole(folder, outcome) for outcome in outcomes)
    print(
        f"crowd: {CROWD} first runs at once {together:.0f} s, in a row {in_a_row:.0f} s; all points {'there' if good else 'NOT there'};"
    )
    print(f"       'locked' in the sidecar's log {locked} times; read {reports} times meanwhile")
    return good and locked == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    results = [outages(arguments.repeats, arguments.overrides), crowd()]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
