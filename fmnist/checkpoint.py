"""Atomic save and load of a run's training state; the one before is kept, for the case that the newest is damaged."""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from fmnist import files, optim
from fmnist import spec as specs
from fmnist.errors import StoreError

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DIGEST_BYTES = 32


def save(folder: Path, spec: specs.ExperimentSpec, state: dict[str, Any]) -> None:
    """Write {fingerprint, spec, step, parameters, buffers, best} as checkpoint.pt: the whole file or none, on the disk before its name is.

    A file that torch.load reads, with the SHA-256 of it behind; tensors and plain values only, so that no code is unpickled.
    """
    content = io.BytesIO()
    torch.save({"fingerprint": spec.fingerprint, "spec": spec.flat(), **state}, content)
    content.write(hashlib.sha256(content.getbuffer()).digest())
    write(folder / NEWEST, content, folder / PREVIOUS)


def digest(parameters: torch.Tensor) -> str:
    """The SHA-256 of a flat tensor's bytes, by which weights are told from others."""
    return hashlib.sha256(parameters.numpy().tobytes()).hexdigest()


def write(path: Path, content: io.BytesIO, previous: Path | None = None) -> None:
    """Replace a file, whole or not at all, also where the power fails; what was there goes to `previous`."""
    files.replace(path, content.getbuffer(), previous)


def load(path: Path, spec: specs.ExperimentSpec) -> dict[str, Any]:
    """The state that `save` wrote for this spec; raises ValueError where the file is damaged, StoreError where it is another spec's."""
    data = files.read(path)
    content, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), weights_only=True, map_location="cpu"
        )
        flat, fingerprint = state.pop("spec"), state.pop("fingerprint")
        differences = None if fingerprint == spec.fingerprint else spec.differences(flat)
        if differences is None:
            _check(state, spec)
    except Exception as error:  # of many kinds: this is a whole file that `save` did not write
        raise ValueError(
            f"{path} is no checkpoint of this program: {' '.join(repr(error).split())[:200]}"
        ) from None
    if differences is not None:
        raise StoreError(f"{path} belongs to another spec: {differences}")
    return state


def _check(state: dict[str, Any], spec: specs.ExperimentSpec) -> None:
    """Raise ValueError or KeyError where a state is not what an engine of this spec has."""
    flat = {"parameters": state["parameters"], **state["buffers"]}
    steps, best = [state["step"]], state.get("best")
    if best is not None:
        flat["best"] = best["parameters"]
        steps.append(best["step"])
    if not all(type(step) is int and 0 <= step <= spec.steps for step in steps):
        raise ValueError(f"its steps are {steps}, those of the run 0 to {spec.steps:,}")
    if (found := set(state["buffers"])) != (wanted := set(optim.buffer_names(spec.optimizer))):
        raise ValueError(f"its buffers are {sorted(found)}, those of the run {sorted(wanted)}")
    size = spec.model.parameters
    for name, tensor in flat.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype != torch.float32 or tensor.shape != (size,):
            raise ValueError(
                f"its {name} are {tensor.dtype} {list(tensor.shape)}, those of the run {size:,} float32"
            )
