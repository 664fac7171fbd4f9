"""Time and memory of `fmnist report` over made-up stores, the whole command: python benchmarks/report_speed.py [--runs 8 100]

The runs are as large as real ones: every step in curves.parquet, 20,000 predictions, two figures. MLflow's own histories are left out,
which a report of our runs never reads.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from fmnist import experiments, journal, plots, tracking

STEPS, EVERY, SEEDS = 37_500, 1_000, 5
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[8, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--home", type=Path, help="keep the stores here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for runs in arguments.runs:
            home = (arguments.home or Path(scratch)) / str(runs)
            if not home.exists():
                make_store(home, runs)
            for _ in range(arguments.repeats):
                seconds, peak = measure(home)
                size = (home / "reports" / "report.html").stat().st_size
                print(
                    f"{runs:>4} runs: {seconds:5.1f} s, peak {peak / 2**30:.2f} GiB, report.html {size / 1e6:.2f} MB",
                    flush=True,
                )


def measure(home: Path) -> tuple[float, int]:
    """Seconds of the command, and its largest memory in bytes."""
    started = time.perf_counter()
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(
            [sys.executable, "-m", "fmnist", "report"],
            env={**os.environ, "FMNIST_HOME": str(home)},
            stdout=nothing,
        )
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def make_store(home: Path, runs: int) -> None:
    """A home with groups of SEEDS runs that differ in their learning rate."""
    home.mkdir(parents=True)
    for name in ("data", "experiments"):
        (home / name).symlink_to(ROOT / name)
    store = tracking.connect(home, create=True)
    images = np.sort(np.random.default_rng(0).choice(60_000, 10_000, replace=False))
    hard, labels = (
        np.random.default_rng(1).normal(2, 2, 10_000),
        np.random.default_rng(2).integers(0, 10, 10_000),
    )
    for number in range(runs):
        group, seed = divmod(number, SEEDS)
        lr = float(f"{1e-4 * 1.3**group:.2g}")
        spec = experiments.load(
            "holdout", [f"optimizer.lr={lr}", f"train.seed={seed}", "train.epochs=24"], home
        ).spec
        tags = {
            "kind": "run",
            "experiment": "holdout",
            "seed": seed,
            "group": spec.group,
            "fingerprint": spec.fingerprint,
            "weights": "final",
        }
        tags |= {
            "question": spec.question,
            "outcome": "finished",
            "torch": "2",
            "device": "cpu",
            "threads": 1,
            "git_commit": "0" * 40,
        }
        tags |= {
            "command": f"fmnist run holdout --set optimizer.lr={lr} --set train.epochs=24 --set train.seed={seed}"
        }
        run_id = store.create_run(
            store.experiment("fashion-mnist"),
            f"run-{number}",
            f"holdout lr={lr} s{seed}",
            1_000 * number,
            spec,
            tags,
            "0" * 64,
        )
        curves, predictions = made_up(number, group, images, hard, labels)
        last = curves.iloc[-1]
        results = {
            "last/val_accuracy": last["val/accuracy"],
            "last/val_loss": last["val/loss"],
            "best/val_accuracy": last["val/accuracy"],
        }
        store.log_points(
            run_id,
            [journal.Point(key, float(value), 1_000 * number, 0) for key, value in results.items()],
        )
        with tempfile.TemporaryDirectory() as folder:
            digest = lay_out(Path(folder), curves, predictions)
            store.client.log_artifacts(run_id, folder)
        store.set_tags(run_id, {"manifest_sha256": digest})
        store.close_run(run_id, "FINISHED", 1_000 * number + 500)


def made_up(
    number: int, group: int, images: np.ndarray, hard: np.ndarray, labels: np.ndarray
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A run's curves and predictions: later groups are a little better."""
    generator, steps = np.random.default_rng(1_000 + number), np.arange(STEPS + 1)
    loss = 0.3 + 2 / (1 + steps / 500) + generator.gamma(2, 0.05, STEPS + 1)
    evaluated = (steps % EVERY == 0) | (steps == STEPS)
    accuracy = (
        0.88 + 0.001 * group - 0.78 / (1 + steps / 200) + generator.normal(0, 0.003, STEPS + 1)
    )
    train = np.round(np.clip(accuracy + generator.normal(0, 0.06, STEPS + 1), 0, 1) * 32) / 32
    curves = pd.DataFrame({"step": steps, "epoch": steps / 1563, "elapsed_s": steps * 1.2e-3})
    curves = curves.assign(
        **{"train/loss": loss.astype("f4"), "train/accuracy": train.astype("f4"), "train/lr": 0.001}
    )
    curves = curves.assign(
        **{
            "val/loss": np.where(evaluated, loss, np.nan),
            "val/accuracy": np.where(evaluated, accuracy, np.nan),
        }
    )
    frames = []
    for split, place in (("val", images), ("test", np.arange(10_000))):
        logits = generator.normal(0, 1, (10_000, 10)).astype("f4")
        logits[np.arange(10_000), labels] += (hard + 0.05 * group).astype("f4")
        frames.append(
            pd.DataFrame({"split": split, "index": place, "label": labels}).join(
                pd.DataFrame(logits).add_prefix("logit_")
            )
        )
    return curves, pd.concat(frames, ignore_index=True)


def lay_out(folder: Path, curves: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """A run's artifacts and their manifest; returns the manifest's SHA-256."""
    curves.to_parquet(folder / "curves.parquet", index=False)
    predictions.to_parquet(folder / "predictions.parquet", index=False)
    (folder / "figures").mkdir()
    shown = predictions[predictions["split"] == "val"]
    figure = plots.confusion_matrix(
        shown["label"].to_numpy(), shown.filter(like="logit_").to_numpy().argmax(1), "made up"
    )
    for name in ("confusion_matrix", "learning_curves"):
        figure.savefig(folder / "figures" / f"{name}.png")
    digests = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.*"))
    }
    manifest = json.dumps(digests).encode()
    (folder / "manifest.json").write_bytes(manifest)
    return hashlib.sha256(manifest).hexdigest()


if __name__ == "__main__":
    main()
