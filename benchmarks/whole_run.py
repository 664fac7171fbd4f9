"""What recording a run costs: `fmnist run baseline` beside the same with --no-sync, in turn, whole processes, warm.

    make bench        # or: python benchmarks/whole_run.py --repeats 3 --set train.epochs=20

Prints the median and range of each, their ratio, and the time from the command to the first training step.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fmnist import journal, state, tracking

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shutil.copytree(REPOSITORY / "experiments", home / "experiments")
        (home / "data").symlink_to(REPOSITORY / "data")
        os.environ["FMNIST_HOME"] = folder
        tracking.connect(
            home, create=True
        )  # warm: the store exists, as for every run but the first
        seconds: dict[str, list[float]] = {"recorded": [], "--no-sync": []}
        first_step = []
        for repeat in range(-1, arguments.repeats):
            for name, times in seconds.items():
                options = [
                    *(["--no-sync"] if name == "--no-sync" else []),
                    *(f"--set={override}" for override in arguments.overrides),
                ]
                wall, before_first = timed_run(home, options, name == "recorded")
                if repeat >= 0:  # the first pair warms the file cache
                    times.append(wall)
                    first_step += [before_first] if before_first is not None else []
                    print(f"{name:<10} {wall:6.1f} s", flush=True)
    print_summary(seconds, first_step, arguments.overrides)


def timed_run(home: Path, options: list[str], recorded: bool) -> tuple[float, float | None]:
    """Wall seconds of one run; for one that stays on disk also those to its first training step."""
    stop_sidecar(
        home
    )  # else a run would begin with one that is warm, or compete with one that still carries
    began, clock = time.time(), time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "fmnist", "run", "baseline", *options, "--json"],
        capture_output=True,
        check=True,
    )
    wall = time.monotonic() - clock
    outcome = json.loads(result.stdout)
    if recorded:
        assert (outcome["status"], outcome["unsynced"]) == ("FINISHED", None), outcome
        return wall, None
    folder = state.state_folder(home) / outcome["key"]
    first = next(record for record in journal.read(folder / "journal")[0] if record.kind == "train")
    shutil.rmtree(folder)
    return wall, first.fields["t0"] / 1000 - began


def stop_sidecar(home: Path) -> None:
    state.end_uploader(state.carrier_lock(home))
    while state.is_locked(state.carrier_lock(home)):
        time.sleep(0.05)


def print_summary(
    seconds: dict[str, list[float]], first_step: list[float], overrides: list[str]
) -> None:
    import torch

    print(
        f"\nbaseline {' '.join(overrides)}: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    )
    for name, times in [*seconds.items(), ("first step", first_step)]:
        print(
            f"{name:<10} median {statistics.median(times):.1f} s, range {min(times):.1f} to {max(times):.1f} s, n = {len(times)}"
        )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(
        f"recorded / --no-sync, pair by pair: median {statistics.median(ratios):.3f}, range {min(ratios):.3f} to {max(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
