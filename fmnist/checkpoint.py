"""Atomic save and load of a run's training state; the one before is kept, for the case that the newest is damaged."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

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
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except (
        OSError
    ):  # the disk is full: what is half written takes the room that the journal needs to say so
        partial.unlink(missing_ok=True)
        raise
    if previous and path.exists():
        path.replace(previous)
    partial.replace(path)


def load(path: Path, spec: specs.ExperimentSpec) -> dict[str, Any]:
    """The state that `save` wrote for this spec; raises ValueError where the file is damaged, StoreError where it is another spec's."""
    data = path.read_bytes()
    content, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), weights_only=True, map_location="cpu"
        )
        flat, fingerprint = state.pop("spec"), state.pop("fingerprint")
    except Exception as error:  # of many kinds: this is a whole file that `save` did not write
        raise ValueError(
            f"{path} is no checkpoint of this program: {' '.join(repr(error).split())[:200]}"
        ) from None
    if fingerprint != spec.fingerprint:
        raise StoreError(f"{path} belongs to another spec: {spec.differences(flat)}")
    return state
