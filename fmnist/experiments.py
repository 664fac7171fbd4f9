"""From experiment files to specs: YAML, `extends`, overrides, where each value was written, and what to say of mistakes.

Pure: nothing is written; loading takes milliseconds and raises SpecError for whatever is wrong, before any work starts.
"""

import difflib
import io
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fmnist import spec as specs
from fmnist.errors import SpecError
from fmnist.spec import ExperimentSpec

MAX_FILE_BYTES, MAX_DEPTH = 100_000, 6
YAML_TAG = "tag:yaml.org,2002:"
WHOLE = "whole numbers in decimal, at most 18 digits"
SCALARS = {
    "str": "Unicode text",
    "int": WHOLE,
    "float": "numbers in decimal",
    "bool": "true or false",
    "null": "null",
}
"""The kinds of values that are taken, and what to write."""
DEFAULT_TYPES = {
    name: {"type": each.default.type}
    for name, each in ExperimentSpec.model_fields.items()
    if hasattr(each.default, "type")
}
"""Of the sections told apart by their `type`."""

Spec = TypeVar("Spec", bound=BaseModel)
Origins = dict[str, str]
"""Dotted path to where it was written: 'experiments/baseline.yaml:4', or the override as it was typed."""


@dataclass(frozen=True)
class Resolved:
    """A spec, where each value that was written down came from, and the paths that overrides set."""

    spec: ExperimentSpec
    file: str
    """The name it was loaded by."""
    origins: Origins
    overridden: tuple[str, ...]

    @property
    def command(self) -> str:
        """What a shell is told to run this again."""
        settings = dict.fromkeys(
            self.origins[path].removeprefix("--set ") for path in self.overridden
        )
        return shlex.join(
            [
                "fmnist",
                "run",
                self.file,
                *(word for setting in settings for word in ("--set", setting)),
            ]
        )

    @property
    def display_name(self) -> str:
        """The spec's name, each overridden leaf that defines the run, and the seed where it isn't the file's own: 'baseline lr=0.01 s3'."""
        flat = self.spec.flat()
        told = [
            path
            for path in self.overridden
            if path.partition(".")[0] in specs.DEFINING and path != "train.seed"
        ]
        changes = [f"{path.rpartition('.')[2]}={flat.get(path, 'on')}" for path in told]
        seed = [f"s{self.spec.train.seed}"] if "train.seed" in self.overridden else []
        return " ".join([self.spec.name, *changes, *seed])


def names(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "experiments").glob("*.yaml"))


def load(name: str, overrides: Sequence[str] = (), root: Path | None = None) -> Resolved:
    """Resolve an experiment: defaults, then its `extends` parents, its file, the overrides ('optimizer.lr=0.01').

    Raises SpecError with a line for each mistake: place, key path, what was given, what is allowed.
    """
    root = root or specs.home()
    layers = [*_file_layers(name, root / "experiments"), _override_layer(overrides)]
    tree: dict[str, Any] = {"name": name, **DEFAULT_TYPES}
    origins: Origins = {}
    for values, places in layers:
        for section in _merge(tree, values):  # what was written for another type no longer counts
            origins = {
                path: place for path, place in origins.items() if not path.startswith(f"{section}.")
            }
        origins |= places
    overridden = tuple(path for path, _ in specs.leaves(layers[-1][0]))
    return Resolved(
        validate(ExperimentSpec, tree, origins, f"experiments/{name}.yaml"),
        name,
        origins,
        overridden,
    )


def parse(text: str, place: str) -> ExperimentSpec:
    """A spec that stands alone in `text`, such as a run's stored spec.yaml; raises SpecError."""
    values, places = read_yaml(text, place)
    return validate(ExperimentSpec, values, places, place)


def dump(spec: ExperimentSpec) -> str:
    """The complete spec as YAML; `parse` gives it back."""
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)
    text = io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # the order of the fields
    yaml.dump(spec.model_dump(mode="json"), text)
    return text.getvalue()


Layer = tuple[dict[str, Any], Origins]


def _file_layers(name: str, folder: Path) -> list[Layer]:
    """The layers of a file and its parents, furthest parent first."""
    layers: list[Layer] = []
    chain: list[str] = []
    parent, place = name, ""
    while parent is not None:
        if not isinstance(parent, str):
            raise SpecError(f"{place}given {parent!r}; the name of one experiment is needed")
        if parent in chain:
            cycle = " -> ".join([*chain[chain.index(parent) :], parent])
            raise SpecError(f"{place}{cycle} is a cycle; an experiment can't extend itself")
        try:
            file = folder / f"{specs.valid_name(parent)}.yaml"
        except ValueError as error:
            raise SpecError(f"{place}{error}") from None
        if not file.is_file():
            known = names(folder.parent)
            there = ", ".join(known) or f"none in {folder}"
            raise SpecError(
                f"{place}unknown experiment {parent!r}{nearest(parent, known)}; there are: {there}"
            )
        place = f"experiments/{file.name}"
        values, origins = read_file(file, place)
        if chain:  # these two speak of one file only
            for key in ("name", "question"):
                values.pop(key, None)
                origins.pop(key, None)
        chain.append(parent)
        layers.insert(0, (values, origins))
        parent, place = values.pop("extends", None), f"{origins.get('extends')}: extends: "
    return layers


def read_file(file: Path, place: str) -> Layer:
    """Plain values and the place of each key path in a file that is called `place`; raises SpecError."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise SpecError(
                f"{place}: {file.stat().st_size} bytes; an experiment has at most {MAX_FILE_BYTES}"
            )
        return read_yaml(file.read_text(encoding="utf-8"), place)
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{place}: can't be read: {error}") from None


def _override_layer(overrides: Sequence[str]) -> Layer:
    values: dict[str, Any] = {}
    origins: Origins = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or not override.isprintable():
            raise SpecError(
                f"--set {_printable(override)}: write key.path=value on one line, as in optimizer.lr=0.01"
            )
        if keys == ["extends"]:
            raise SpecError(
                f"--set {override}: only a file can extend an experiment; run the parent itself, or add a file"
            )
        nested = "\n".join(f"{' ' * depth}{json.dumps(key)}:" for depth, key in enumerate(keys))
        written, places = read_yaml(f"{nested} {text}", f"--set {override}", numbered=False)
        _merge(values, written)
        origins |= places
    return values, origins


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> list[str]:
    """Lay `layer` over `into`: mappings merge, all else is replaced.

    A section of another `type` starts from that type's defaults; returns the top-level sections for which that was so.
    """
    changed = []
    for key, value in layer.items():
        below = into.get(key)
        if isinstance(value, Mapping):
            kept = dict(below) if isinstance(below, Mapping) else {}
            if "type" in kept and value.get("type", kept["type"]) != kept["type"]:
                kept = {}
                changed.append(key)
            into[key] = kept
            _merge(kept, value)
        else:
            into[key] = value
    return changed


def read_yaml(text: str, place: str, numbered: bool = True) -> Layer:
    """Plain values and the place of each key path: YAML 1.2, so 1e-3 is a number; no tags, anchors or merge keys.

    The parsed nodes are read as they are, so that nothing is built that the text did not spell out, and every mistake has a line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

    yaml: Any = YAML(typ="safe", pure=True)
    origins: Origins = {}

    def at(mark: Any) -> str:
        return f"{place}:{mark.line + 1}" if numbered and mark is not None else place

    def plain(node: Any, path: str, depth: int = 0) -> Any:
        here = f"{at(node.start_mark)}: {_printable(path)[:80] or 'spec'}"
        kind = node.tag.removeprefix(YAML_TAG)
        if (
            node.anchor
            or depth > MAX_DEPTH
            or kind not in (SCALARS if isinstance(node, ScalarNode) else ("map", "seq"))
        ):
            raise SpecError(
                f"{here}: only plain mappings, lists, texts, numbers, true, false and null are taken, up to {MAX_DEPTH} deep"
            )
        if isinstance(node, SequenceNode):
            return [plain(item, path, depth + 1) for item in node.value]
        if isinstance(node, MappingNode):
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                below = f"{path}.{key}" if path else key
                origins[_printable(below)] = at(key_node.start_mark)
                if key in values:
                    raise SpecError(
                        f"{at(key_node.start_mark)}: {_printable(below)}: duplicate key; keep one of the two"
                    )
                values[key] = plain(value_node, below, depth + 1)
            return values
        try:
            node.value.encode()  # not everything that can be escaped is text
            if kind == "int" and not re.fullmatch(r"[-+]?[0-9]{1,18}", node.value):
                raise ValueError
            return yaml.constructor.construct_object(node)
        except (ValueError, KeyError):
            raise SpecError(
                f"{here}: given {specs.shorten(node.value)}; write {SCALARS[kind]}"
            ) from None

    root = _compose(yaml, text, at)
    tree = {} if root is None or root.tag == f"{YAML_TAG}null" else plain(root, "")
    if not isinstance(tree, dict):
        raise SpecError(
            f"{place}: given {specs.shorten(tree)}; an experiment is a mapping of sections, as in experiments/baseline.yaml"
        )
    return tree, origins


def _compose(yaml: Any, text: str, at: Callable[[Any], str]) -> Any:
    """The root node of a YAML text, or None; raises SpecError where it can't be read."""
    from ruamel.yaml.error import YAMLError

    try:
        return yaml.compose(text)
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or str(error) or "nested too deep"
        raise SpecError(f"{at(mark)}: not readable as YAML: {problem.splitlines()[0]}") from None


# ---- messages


def validate(schema: type[Spec], tree: Mapping[str, Any], origins: Origins, fallback: str) -> Spec:
    """The spec that these values are; raises SpecError with a line for each mistake, at its origin or the `fallback`."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = (
            _describe(schema, detail, origins, fallback)
            for detail in error.errors(include_url=False)
        )
        raise SpecError("\n".join(dict.fromkeys(lines))) from None


def _describe(schema: type[BaseModel], detail: Any, origins: Origins, fallback: str) -> str:
    """One line for one of Pydantic's errors."""
    path, sections = _locate(schema, detail["loc"])
    given, message = detail["input"], detail["msg"]
    match detail["type"]:
        case "value_error":
            text = str(detail["ctx"]["error"])
            if named := re.match(
                r"([a-z_]+\.[a-z_]+): ", text
            ):  # a check of the whole spec names the field itself
                path, text = named[1], text[named.end() :]
        case "extra_forbidden":
            _, [section] = _locate(schema, detail["loc"][:-1])
            allowed = [*(["extends"] if section is ExperimentSpec else []), *section.model_fields]
            text = f"unknown key{nearest(path.rpartition('.')[2], allowed)}; allowed here: {', '.join(allowed)}"
        case "union_tag_invalid" | "union_tag_not_found":
            path, tag = f"{path}.type", given.get("type")
            types = [section.model_fields["type"].default for section in sections]
            text = f"given {tag!r}{nearest(str(tag), types)}; allowed: {', '.join(types)}"
        case kind:
            expected = re.sub("^(Input|String) should ", "", message).replace(
                "be a valid tuple", "be a list"
            )
            expected = re.sub("be a valid dictionary.*", "be a mapping of fields", expected)
            hint = (
                nearest(str(given), re.findall(r"'([^']+)'", message))
                if kind == "literal_error"
                else ""
            )
            text = f"given {specs.shorten(given)}{hint}; it should {expected}"
    written = path
    while written and written not in origins:
        written = written.rpartition(".")[0]
    return ": ".join(part for part in (origins.get(written, fallback), path, text) if part)


def _locate(
    schema: type[BaseModel], location: Sequence[int | str]
) -> tuple[str, list[type[BaseModel]]]:
    """The key path of one of Pydantic's locations, and the sections that may stand there: several where `type` tells them apart."""
    path: list[str] = []
    sections: list[Any] = [schema]
    named = False  # whether the next part is a key of a mapping, whose sections those are
    for part in location:
        if named:
            path.append(str(part))
            named = False
            continue
        if (
            len(sections) > 1
        ):  # Pydantic puts the type into the location, and nobody wrote that as a key
            sections = [
                section for section in sections if section.model_fields["type"].default == part
            ]
            continue
        path.append(str(part))
        field = sections[0].model_fields.get(part) if sections else None
        named = field is not None and get_origin(field.annotation) in (dict,)
        options = get_args(field.annotation) or (field.annotation,) if field else ()
        sections = [
            option
            for option in options
            if isinstance(option, type) and issubclass(option, BaseModel)
        ]
    return _printable(".".join(path)), sections


def nearest(given: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, allowed, n=3, cutoff=0.6)
    return f", did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]
