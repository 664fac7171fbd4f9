"""Bring experiments/schema.json, by which editors complete and check experiment files, up to date; exit 1 if it was not (`make check`)."""

import json
import sys
from pathlib import Path
from typing import Any

from fmnist.spec import ExperimentSpec

PATH = Path(__file__).resolve().parent.parent / "experiments" / "schema.json"


def file_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file: every field optional, since a file states only what differs from its parent."""
    schema = ExperimentSpec.model_json_schema()

    def loosen(node: Any) -> Any:
        if isinstance(node, list):
            return [loosen(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {key: loosen(value) for key, value in node.items() if key not in ("required", "discriminator")}
        if "oneOf" in node:  # without its type a fragment may fit several variants
            node["anyOf"] = node.pop("oneOf")
        return node

    schema = loosen(schema)
    schema["title"] = "fmnist experiment"
    extends = {"type": "string", "title": "Extends", "description": "Name of the experiment whose values this file starts from."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def main() -> None:
    text = json.dumps(file_schema(), indent=2) + "\n"
    if not PATH.exists() or PATH.read_text() != text:
        PATH.write_text(text)
        sys.exit(f"{PATH} was out of date and has been rewritten: commit it")


if __name__ == "__main__":
    main()
