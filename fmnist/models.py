"""The files of a logged model: what they are called, their SHA-256, and whether loading them would run code of theirs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from fmnist.errors import StoreError

TAG = "model_sha256"
"""The run's tag with the SHA-256 of each file of its model, as JSON."""
DESCRIPTION, PROGRAM = "MLmodel", "data/model.pt2"
FILES = {
    DESCRIPTION,
    PROGRAM,
    "conda.yaml",
    "input_example.json",
    "python_env.yaml",
    "requirements.txt",
    "serving_input_example.json",
}
"""All that MLflow writes of a model of ours."""
FLAVORS = {
    "python_function": {
        "config",
        "data",
        "env",
        "loader_module",
        "pickle_module_name",
        "python_version",
    },
    "pytorch": {"code", "model_data", "pytorch_version"},
}
"""What a description of ours says of each way to load the model."""
LOADER = "mlflow.pytorch"


def digests(folder: Path) -> str:
    """The value of TAG for the model in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return json.dumps(
        {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }
    )


def verified(noted: str | None, read: Callable[[str], bytes], whose: str) -> dict[str, bytes]:
    """The files that a TAG names, as `read` gives each; raises StoreError where one is not as it was recorded, or would run code."""
    remedy = "restore it from a copy or train again"
    if noted is None:
        raise StoreError(f"{whose} has no checksums, so it is not used; train the run again")
    try:
        known = {str(name): str(digest) for name, digest in json.loads(noted).items()}
    except (ValueError, AttributeError, RecursionError):
        known = {}
    if not {DESCRIPTION, PROGRAM} <= set(known) <= FILES:
        raise StoreError(f"{whose} is not one that this package wrote: tag {TAG}; {remedy}")
    files = {name: read(name) for name in known}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != known[name]:
            raise StoreError(f"{whose}: {name} is not as it was recorded; {remedy}")
    _refuse_code(files[DESCRIPTION], whose)
    return files


def _refuse_code(description: bytes, whose: str) -> None:
    """Raise StoreError where MLflow, loading a model by this description, would run more than MLflow's own loader."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        flavors = YAML(typ="safe", pure=True).load(description)["flavors"]
        strange = {*flavors} ^ {*FLAVORS} | {
            key for name in FLAVORS for key in {*flavors[name]} - FLAVORS[name]
        }
        function, torch = flavors["python_function"], flavors["pytorch"]
        found = (function["loader_module"], function["data"], torch["model_data"], torch["code"])
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise StoreError(f"{whose}: {DESCRIPTION} can't be read: {why}; train it again") from None
    if strange or found != (LOADER, "data", "data", None):
        told = ", ".join(sorted(map(str, strange))) or f"loader_module {found[0]!r}"
        raise StoreError(
            f"{whose}: {DESCRIPTION} would run code of the model's own ({told[:100]}), which is refused; train it again"
        )
