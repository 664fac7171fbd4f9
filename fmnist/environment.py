"""Where a run was computed: what could make the same spec give other numbers elsewhere."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fmnist import __version__, data

BITS = (
    "device",
    "cuda",
    "triton",
    "threads",
    "stack",
    "processor",
    "torch",
    "instructions",
    "settings",
    "code",
)  # on another of these, the same arithmetic may round otherwise
SETTINGS = (
    "ATEN_",
    "MKL_",
    "ONEDNN_",
    "DNNL_",
    "OPENBLAS_",
    "CUBLAS_",
    "NVIDIA_TF32",
    "TORCH_ALLOW_TF32",
)
"""How the environment variables begin that choose among implementations of the same arithmetic."""


def facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `collect` found, what may matter for a result."""
    plain = (*BITS, "platform", "python", "fmnist", "git_commit", "data_digest")
    packages = {
        name: environment.get("packages", {}).get(name)
        for name in ("torch", "numpy", "scikit-learn")
    }
    diff = environment.get("git_diff")
    return {
        **{key: environment.get(key) for key in plain},
        **packages,
        "git_diff": diff and hashlib.sha256(diff.encode()).hexdigest()[:8],
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between the facts of two environments, as 'before -> now'."""
    return {
        key: f"{before.get(key)} -> {value}"
        for key, value in now.items()
        if before.get(key) != value
    }


def collect(
    command: str, device: torch.device, stack: int = 1, device_check: str | None = None
) -> dict[str, Any]:
    """What could make the same spec give other numbers elsewhere; `stack`: how many runs are trained in the same steps.

    `device_check`: what was found of the device, see devices.choose.
    """
    packages = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name}
    commit = _git("rev-parse", "HEAD")
    status = commit and _git("status", "--porcelain")
    return {
        "fmnist": __version__,
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "settings": _settings(),
        "code": _code(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "triton": packages.get("triton") if device.type == "cuda" else None,
        "device_check": device_check,
        "threads": torch.get_num_threads(),
        "stack": stack,
        "data_digest": data.DIGEST,
        "git_commit": commit and commit.strip(),
        "git_dirty": None if status is None else bool(status),
        "git_diff": status and _git("diff", "HEAD"),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return (
            next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
        )
    return platform.processor()


def _settings() -> str | None:
    """The environment variables that may change bits, as one text; None where none is set."""
    found = sorted(
        f"{key}={value}" for key, value in os.environ.items() if key.startswith(SETTINGS)
    )
    return " ".join(found) or None


def _code() -> str:
    """A digest of this package's own code: a change anywhere in it may round otherwise."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _git(*arguments: str) -> str | None:
    """What git says of the working tree; None where it is in no repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", *arguments]
        return subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=True,
        ).stdout
    return None
