"""A model that torch.export wrote, read as data: its weights as bytes, its graph as a list of
operations on tensors.

torch.export.load does what a file says: it unpickles, it looks operators up by any name in torch,
it evaluates the text of sizes and of guards as Python. Here nothing is unpickled or evaluated, and
only operations of `torch.ops.aten` are called that change nothing. What our own export does not
write is refused, as others may load the file with torch.
"""

import io
import json
import operator
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmnist.errors import StoreError

SCHEMA = 8
"""The major version of torch's schema of exported programs (torch/_export/serde/schema.py)."""
RECORD = re.compile(
    r"(archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id"
    r"|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|weight_\d+|tensor_\d+))"
)
TYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""The schema's ScalarType."""
SIZES: dict[str, Callable[..., Any]] = {
    f"_operator.{each.__name__}": each
    for each in (operator.add, operator.sub, operator.mul, operator.floordiv)
}
"""What is done with sizes."""
WORDS = {"none", "tanh", "floor", "trunc"}
"""The texts that an operation may be given: of gelu and of division. Others may name files."""
ASSERTIONS = {
    f"torch.ops.aten.{name}.default"
    for name in ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size")
}
"""Operations that give nothing; they are left out."""
SIZE = re.compile(r"[\w(), '=-]*")
FUNCTIONS = {"Symbol", "Integer", "Add", "Mul", "Pow", "FloorDiv", "Mod", "Min", "Max"}
"""What the text of a size is made of; torch.export.load evaluates it."""


class Program:
    """An exported program: raw images, uint8 [B, 28, 28], to probabilities, float32 [B, 10]."""

    def __init__(self, records: Mapping[str, bytes]) -> None:
        program = json.loads(records["models/model.json"])
        if program["schema_version"]["major"] != SCHEMA or program["guards_code"]:
            raise ValueError("it is of another schema, or holds guards")
        _check_expressions(program)
        graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
        tensors = _tensors(records, "weights") | _tensors(records, "constants")
        self.values: dict[str, Any] = {}
        entries = []
        for each in signature["input_specs"]:
            [(kind, given)] = each.items()
            if kind == "user_input":
                entries.append(given["arg"]["as_tensor"]["name"])
            else:
                self.values[given["arg"]["name"]] = tensors[given[f"{kind}_name"]]
        [self.entry], [leaving] = entries, graph["outputs"]
        self.leaving = leaving["as_tensor"]["name"]
        self.nodes = [
            (_operation(node["target"]), node["inputs"], [_names(each) for each in node["outputs"]])
            for node in graph["nodes"]
            if node["target"] not in ASSERTIONS
        ]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        values = {**self.values, self.entry: torch.from_numpy(images)}
        for operation, inputs, outputs in self.nodes:
            given = [(each["name"], each["kind"], _value(each["arg"], values)) for each in inputs]
            result = operation(
                *(value for _, kind, value in given if kind == 1),
                **{name: value for name, kind, value in given if kind != 1},
            )
            results = [result] if len(outputs) == 1 else result
            for names, value in zip(outputs, results, strict=True):
                values |= {names: value} if isinstance(names, str) else _each(names, value)
        found: np.ndarray = values[self.leaving].numpy()
        return found


def load(data: bytes, whose: str) -> Program:
    """Read a model.pt2; raises StoreError if it holds what our own export does not write."""
    try:
        program = Program(_records(data))
        if program(np.zeros((3, 28, 28), np.uint8)).shape != (3, 10):
            raise ValueError("it gives something else than ten probabilities")
        return program
    except Exception as error:  # a file has many ways to be wrong
        why = " ".join(str(error).split())[:200]
        raise StoreError(
            f"{whose}: model.pt2 is no program as this package exports them: {why}; train it again"
        ) from None


def _records(data: bytes) -> dict[str, bytes]:
    """The files of the archive, below its own folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        records = {name.partition("/")[2]: archive.read(name) for name in names}
    if strange := [name for name in records if not RECORD.fullmatch(name)]:
        raise ValueError(f"it holds {strange[0]!r}")
    if len(records) != len(names):
        raise ValueError("it holds two files of one name")
    torch.load(io.BytesIO(records["data/sample_inputs/model.pt"]), weights_only=True)
    return records


def _tensors(records: Mapping[str, bytes], kind: str) -> dict[str, Tensor]:
    """The weights or the constants, by name."""
    config = json.loads(records[f"data/{kind}/model_{kind}_config.json"])["config"]
    found = {}
    for name, each in config.items():
        meta = each["tensor_meta"]
        if each["use_pickle"] is not False:
            raise ValueError(f"{name} is pickled")
        data = bytearray(records[f"data/{kind}/{each['path_name']}"])
        sizes, strides = ([_size(size, {}) for size in meta[key]] for key in ("sizes", "strides"))
        flat = torch.frombuffer(data, dtype=TYPES[meta["dtype"]])
        found[name] = flat.as_strided(sizes, strides, _size(meta["storage_offset"], {}))
    return found


def _check_expressions(tree: Any) -> None:
    """Raise ValueError where the text of a size is more than arithmetic."""
    if isinstance(tree, dict):
        size = str(tree.get("expr_str", ""))
        called = set(re.findall(r"([\w)']+)\s*\(", size))
        if not SIZE.fullmatch(size) or not called <= FUNCTIONS:
            raise ValueError(f"a size is {size!r}")
        for each in tree.values():
            _check_expressions(each)
    elif isinstance(tree, list):
        for each in tree:
            _check_expressions(each)


def _operation(target: str) -> Callable[..., Any]:
    """The operation of this name, if it is one on tensors that changes none."""
    if target in SIZES:
        return SIZES[target]
    named = re.fullmatch(r"torch\.ops\.aten\.([a-z]\w*)\.(\w+)", target)
    found = named and getattr(getattr(torch.ops.aten, named[1]), named[2])
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        raise ValueError(f"it calls {target!r}")
    return found


def _names(output: Mapping[str, Any]) -> str | list[str]:
    """What an output of an operation is called from then on."""
    [(kind, given)] = output.items()
    if kind == "as_tensors":
        return [each["name"] for each in given]
    name: str = given["as_name"] if kind == "as_sym_int" else given["name"]
    return name


def _each(names: Sequence[str], value: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names, value, strict=True))


def _size(given: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    return int(values[given["as_name"]] if "as_name" in given else given["as_int"])


def _value(argument: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """What an operation is given."""
    [(kind, given)] = argument.items()
    match kind:
        case "as_tensor":
            return values[given["name"]]
        case "as_tensors":
            return [values[each["name"]] for each in given]
        case "as_none":
            return None
        case "as_int" | "as_float" | "as_bool" | "as_ints" | "as_floats" | "as_bools":
            return given
        case "as_sym_int":
            return _size(given, values)
        case "as_sym_ints":
            return [_size(each, values) for each in given]
        case "as_scalar_type":
            return TYPES[given]
        case "as_device":
            return torch.device("cpu")
        case "as_layout":
            return torch.strided
        case "as_memory_format":
            return torch.contiguous_format
        case "as_string" if given in WORDS:
            return given
    raise ValueError(f"an operation is given {kind}")
