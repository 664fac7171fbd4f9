"""Training a recorded run again from its stored spec, to see whether the same comes out, bit for bit."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fmnist import checkpoint, devices, engine, environment, experiments
from fmnist import spec as specs
from fmnist.errors import StoreError
from fmnist.journal import Recorded, Unequal, from_curves, unequal_values

ARTIFACTS = (
    "spec.yaml",
    "curves.parquet",
    "checkpoint.pt",
    "environment.json",
)  # what is needed of a run


@dataclass
class Verification:
    steps: int
    evaluations: int = 0
    weights: bool = False  # whether they were compared too: only at the end of the run
    unequal: list[Unequal] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)  # what differs from where it was run


def verify(folder: Path, root: Path, steps: int | None, say: Callable[[str], None]) -> Verification:
    """Repeat a run, given the folder with its artifacts, up to `steps` or its end; raises UserError where they don't fit together."""
    spec = experiments.parse((folder / "spec.yaml").read_text(encoding="utf-8"), "spec.yaml")
    curves = pd.read_parquet(folder / "curves.parquet")
    last = min(steps or spec.steps, int(curves["step"].max()))
    recorded = Recorded(from_curves(spec, curves, last, 0))
    place = devices.choose([spec], root, say)
    with devices.failures(place.device):
        trainer = engine.Engine([spec], place.dataset)
    before = environment.facts(
        json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    )
    found = Verification(
        last,
        environment=environment.differences(
            before, environment.facts(environment.collect("", place.device))
        ),
    )
    try:
        state = checkpoint.load(folder / "checkpoint.pt", spec)
    except ValueError as error:
        raise StoreError(str(error)) from None
    weights = {kept["step"]: kept["parameters"] for kept in (state["best"], state) if kept}
    for segment in specs.plan(spec):
        stop = min(segment.stop, last)
        if stop > trainer.step:
            found.unequal += recorded.unequal_steps(trainer.step + 1, vars(trainer.train(stop)[0]))
        if (
            segment.evaluate
            and segment.stop <= last
            and (evaluated := recorded.evaluations.get(stop))
        ):
            evaluation = trainer.evaluate(trainer.dataset.validation)
            found.unequal += unequal_values(
                stop, evaluated, {"val/loss": evaluation.loss, "val/accuracy": evaluation.accuracy}
            )
            found.evaluations += 1
        if (then := weights.pop(stop, None)) is not None and not torch.equal(
            weight := trainer.parameters[0].cpu(), then
        ):
            row = int((weight - then).abs().argmax())
            found.unequal.append(
                Unequal(stop, f"parameter {row}", float(then[row]), float(weight[row]))
            )
    found.weights = not weights
    found.unequal.sort(key=lambda difference: difference.step)
    return found


def largest(unequal: list[Unequal]) -> Unequal:
    """The difference of most weight; one to or from NaN counts most."""
    return max(
        unequal,
        key=lambda difference: np.nan_to_num(
            abs(difference.computed - difference.recorded), nan=np.inf
        ),
    )
