"""Bring the JSON Schemas of experiments and sweeps, by which editors complete and check them, up to date; exit 1 if one was not (`make check`)."""

import json
import sys
from pathlib import Path
from typing import Any

from fmnist.spec import ExperimentSpec
from fmnist.sweeps import SweepSpec

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


def file_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file: every field optional, since a file states only what differs from its parent."""
    schema = ExperimentSpec.model_json_schema()

    def loosen(node: Any) -> Any:
        if isinstance(node, list):
            return [loosen(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {
            key: loosen(value)
            for key, value in node.items()
            if key not in ("required", "discriminator")
        }
        if "oneOf" in node:  # without its type a fragment may fit several variants
            node["anyOf"] = node.pop("oneOf")
        return node

    schema = loosen(schema)
    schema["title"] = "fmnist experiment"
    extends = {
        "type": "string",
        "title": "Extends",
        "description": "Name of the experiment whose values this file starts from.",
    }
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def sweep_schema() -> dict[str, Any]:
    """JSON Schema of a sweep file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **SweepSpec.model_json_schema(),
        "title": "fmnist sweep",
    }


def main() -> None:
    stale = []
    for path, schema in (
        (EXPERIMENTS / "schema.json", file_schema()),
        (EXPERIMENTS / "sweeps" / "schema.json", sweep_schema()),
    ):
        text = json.dumps(schema, indent=2) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            stale.append(str(path))
    if stale:
        sys.exit(f"{', '.join(stale)}: out of date, and rewritten: commit")


if __name__ == "__main__":
    main()
