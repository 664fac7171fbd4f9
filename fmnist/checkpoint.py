"""Atomic save and load of a run's training state."""

import os
from pathlib import Path
from typing import Any

import torch

from fmnist import spec as specs


def save(path: Path, spec: specs.ExperimentSpec, state: dict[str, Any]) -> None:
    """Write {fingerprint, step, parameters, buffers}: the whole file or none, on the disk before its name is.

    Tensors and plain values only, so that it loads without unpickling code.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save({"fingerprint": spec.fingerprint, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path, spec: specs.ExperimentSpec) -> dict[str, Any]:
    """The state that `save` wrote for this spec; raises ValueError where it was another's."""
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if state.pop("fingerprint") != spec.fingerprint:
        raise ValueError(f"{path} belongs to another spec than {spec.name} (fingerprint {spec.fingerprint[:8]})")
    return state
