"""From experiment files to specs: YAML, `extends`, overrides, where each value was written, and what to say of mistakes.

Pure: nothing is written; loading takes milliseconds and raises SpecError for whatever is wrong, before any work starts.
"""

import difflib
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fmnist import spec as specs
from fmnist.errors import SpecError
from fmnist.spec import ExperimentSpec

MAX_FILE_BYTES, MAX_DEPTH = 100_000, 6
YAML_TAG = "tag:yaml.org,2002:"
YAML_TAGS = {f"{YAML_TAG}{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
UNIONS = ("model", "optimizer", "schedule")
"""The sections told apart by their `type`."""

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
        settings = dict.fromkeys(self.origins[path].removeprefix("--set ") for path in self.overridden)
        return shlex.join(["fmnist", "run", self.file, *(word for setting in settings for word in ("--set", setting))])

    @property
    def display_name(self) -> str:
        """The spec's name, each overridden leaf, and the seed where it isn't the file's own: 'baseline lr=0.01 s3'."""
        flat = self.spec.flat()
        told = [path for path in self.overridden if path not in ("train.seed", "name", "question")]
        changes = [f"{path.rpartition('.')[2]}={flat.get(path, 'on')}" for path in told]
        seed = [f"s{self.spec.train.seed}"] if "train.seed" in self.overridden else []
        return " ".join([self.spec.name, *changes, *seed])


def check_name(name: str, place: str = "") -> str:
    """Return an experiment's name, or raise SpecError where it could be a path or a YAML word."""
    try:
        return specs.valid_name(name)
    except ValueError as error:
        raise SpecError(f"{place}{error}") from None


def names(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "experiments").glob("*.yaml"))


def load(name: str, overrides: Sequence[str] = (), root: Path | None = None) -> Resolved:
    """Resolve an experiment: defaults, then its `extends` parents, its file, the overrides ('optimizer.lr=0.01').

    Raises SpecError with a line for each mistake: place, key path, what was given, what is allowed.
    """
    root = root or specs.home()
    layers = [*_file_layers(check_name(name), root / "experiments"), _override_layer(overrides)]
    tree: dict[str, Any] = {"name": name, **{section: {"type": _variants(section)[0]} for section in UNIONS}}
    origins: Origins = {}
    for values, places in layers:
        for section in _merge(tree, values):  # what was written for another type no longer counts
            origins = {path: place for path, place in origins.items() if not path.startswith(f"{section}.")}
        origins |= places
    overridden = tuple(path for path, _ in specs.leaves(layers[-1][0]))
    return Resolved(_validate(tree, origins, f"experiments/{name}.yaml"), name, origins, overridden)


def parse(text: str, place: str) -> ExperimentSpec:
    """A spec that stands alone in `text`, such as a run's stored spec.yaml; raises SpecError."""
    values, places = _read_yaml(text, place)
    return _validate(values, places, place)


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


def _file_layers(name: str, folder: Path, children: tuple[str, ...] = (), place: str = "") -> list[Layer]:
    """The layers of a file and its parents, furthest parent first."""
    if name in children:
        chain = " -> ".join((*children[children.index(name) :], name))
        raise SpecError(f"{place}{chain} is a cycle; an experiment can't extend itself")
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = names(folder.parent)
        raise SpecError(f"{place}unknown experiment {name!r}{_nearest(name, known)}; there are: {', '.join(known) or f'none in {folder}'}")
    file = f"experiments/{path.name}"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SpecError(f"{file}: {path.stat().st_size} bytes; an experiment has at most {MAX_FILE_BYTES}")
        values, origins = _read_yaml(path.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: can't be read: {error}") from None
    parent = values.pop("extends", None)
    if parent is None:
        return [(values, origins)]
    if not isinstance(parent, str):
        raise SpecError(f"{origins['extends']}: extends: given {parent!r}; the name of one experiment is needed")
    place = f"{origins['extends']}: extends: "
    inherited = _file_layers(check_name(parent, place), folder, (*children, name), place)
    for part in (part for layer in inherited for part in layer):  # these two speak of one file only
        part.pop("name", None)
        part.pop("question", None)
    return [*inherited, (values, origins)]


def _override_layer(overrides: Sequence[str]) -> Layer:
    values: dict[str, Any] = {}
    origins: Origins = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or not override.isprintable():
            raise SpecError(f"--set {_printable(override)}: write key.path=value on one line, as in optimizer.lr=0.01")
        if keys == ["extends"]:
            raise SpecError(f"--set {override}: only a file can extend an experiment; run the parent itself, or add a file")
        place = f"--set {override}"
        branch: Any = _read_yaml(f"value: {text}", place)[0].get("value")
        for depth in range(len(keys), 0, -1):
            origins[".".join(keys[:depth])] = place
            branch = {keys[depth - 1]: branch}
        origins |= dict.fromkeys((leaf for leaf, _ in specs.leaves(branch)), place)
        _merge(values, branch)
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


def _read_yaml(text: str, place: str) -> Layer:
    """Plain values and the place of each key path: YAML 1.2, so 1e-3 is a number; no tags, anchors or merge keys.

    The parsed nodes are read as they are, so that nothing is built that the text did not spell out, and every mistake has a line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise SpecError(f"{place}{line}: not readable as YAML: {(error.problem or str(error)).splitlines()[0]}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{place}: not readable as YAML: {(str(error).splitlines() or ['nested too deep'])[0]}") from None
    origins: Origins = {}

    def plain(node: Any, path: str, depth: int = 0) -> Any:
        here = f"{place}:{node.start_mark.line + 1}: {_printable(path)[:80] or 'spec'}"
        if node.anchor or node.tag not in YAML_TAGS or depth > MAX_DEPTH:
            raise SpecError(
                f"{here}: only plain mappings, lists, texts, numbers, true, false and null, at most {MAX_DEPTH} deep, are taken"
            )
        if isinstance(node, SequenceNode):
            return [plain(item, path, depth + 1) for item in node.value]
        if not isinstance(node, MappingNode):
            return _scalar(node, here)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            below = f"{path}.{key}" if path else key
            if key in values:
                raise SpecError(f"{place}:{key_node.start_mark.line + 1}: {_printable(below)}: duplicate key; keep one of the two")
            origins[_printable(below)] = f"{place}:{key_node.start_mark.line + 1}"
            values[key] = plain(value_node, below, depth + 1)
        return values

    tree = {} if root is None or root.tag == f"{YAML_TAG}null" else plain(root, "")
    if not isinstance(tree, dict):
        raise SpecError(f"{place}: given {specs.shorten(tree)}; an experiment is a mapping of sections, as in experiments/baseline.yaml")
    return tree, origins


def _scalar(node: Any, here: str) -> str | int | float | bool | None:
    text = node.value
    match node.tag.removeprefix(YAML_TAG):
        case "null":
            return None
        case "bool":
            return bool(text.lower() == "true")
        case "int":
            if not re.fullmatch(r"[-+]?[0-9]{1,18}", text):
                raise SpecError(f"{here}: given {specs.shorten(text)}; write whole numbers in decimal, at most 18 digits")
            return int(text)
        case "float":
            return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").replace(".Inf", "inf").replace(".NaN", "nan"))
        case _:
            if any(0xD800 <= ord(character) < 0xE000 for character in text):
                raise SpecError(f"{here}: given {specs.shorten(text)}, which isn't Unicode text")
            return str(text)


# ---- messages


def _variants(section: str) -> list[str]:
    """The allowed values of a section's `type`, the default first."""
    annotation = ExperimentSpec.model_fields[section].annotation
    return [variant.model_fields["type"].default for variant in get_args(annotation) or (annotation,)]


def _validate(tree: Mapping[str, Any], origins: Origins, fallback: str) -> ExperimentSpec:
    try:
        return ExperimentSpec.model_validate(tree)
    except ValidationError as error:
        lines = (_describe(detail, tree, origins, fallback) for detail in error.errors(include_url=False))
        raise SpecError("\n".join(dict.fromkeys(lines))) from None


def _describe(detail: Any, tree: Mapping[str, Any], origins: Origins, fallback: str) -> str:
    """One line for one of Pydantic's errors."""
    section, *rest = [str(part) for part in detail["loc"]] or [""]
    if section in UNIONS and rest and len(_variants(section)) > 1 and rest[0] in _variants(section):
        rest = rest[1:]  # the union's tag is not a key that anyone wrote
    path = _printable(".".join([section, *rest]))
    kind, context = detail["type"], detail.get("ctx", {})
    message = str(context.get("error", detail["msg"])) if kind == "value_error" else detail["msg"]
    if kind == "value_error":
        named = re.match(r"[a-z_]+\.[a-z_]+(?=:)", message)
        place = _place(named[0] if named else path, origins, fallback)
        return f"{place}: {message}" if named or not path else f"{place}: {path}: {message}"
    place = _place(path, origins, fallback)
    if kind == "extra_forbidden":
        allowed = _keys_at([section, *rest[:-1]] if rest else [], tree)
        return f"{place}: {path}: unknown key{_nearest(path.rpartition('.')[2], allowed)}; allowed here: {', '.join(allowed)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = tree[section].get("type")
        place = _place(f"{path}.type", origins, fallback)
        return f"{place}: {path}.type: given {tag!r}{_nearest(str(tag), _variants(section))}; allowed: {', '.join(_variants(section))}"
    expected = re.sub("^(Input|String) should ", "", message).replace("be a valid tuple", "be a list")
    expected = re.sub("be a valid dictionary.*", "be a mapping of fields", expected)
    hint = _nearest(str(detail["input"]), re.findall(r"'([^']+)'", message)) if kind == "literal_error" else ""
    return f"{place}: {path}: given {specs.shorten(detail['input'])}{hint}; it should {expected}"


def _place(path: str, origins: Origins, fallback: str) -> str:
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return origins.get(path, fallback)


def _keys_at(keys: Sequence[str], tree: Mapping[str, Any]) -> list[str]:
    """The fields allowed in the section that `keys` lead to."""
    model: type[BaseModel] = ExperimentSpec
    values: Any = tree
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
        annotation = model.model_fields[key].annotation
        sections = [part for part in get_args(annotation) or (annotation,) if isinstance(part, type) and issubclass(part, BaseModel)]
        tag = values.get("type") if isinstance(values, Mapping) else None
        model = next((part for part in sections if "type" in part.model_fields and part.model_fields["type"].default == tag), sections[0])
    return [*(["extends"] if not keys else []), *model.model_fields]


def _nearest(given: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, allowed, n=3, cutoff=0.6)
    return f", did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]
