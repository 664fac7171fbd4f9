"""An exported program read as data: the same numbers as torch's own loader gives, and nothing of the file is run."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fmnist import data, exported, model
from fmnist import spec as specs
from fmnist.errors import StoreError

IMAGES = np.random.default_rng(0).integers(0, 256, (257, 28, 28), np.uint8)


class Everything(nn.Module):
    """What a model of another kind may hold: convolutions, norms, attention, buffers, sizes, several outputs of one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = (
            nn.Conv2d(1, 8, 3),
            nn.LayerNorm(26),
            nn.Linear(8 * 26 * 26, 10),
        )
        self.attention = nn.MultiheadAttention(26, 2, batch_first=True)
        self.register_buffer("shift", torch.arange(10.0))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.convolution(images.float().unsqueeze(1) / 255))
        hidden = functional.gelu(hidden, approximate="tanh")
        rows = hidden.flatten(1, 2)[:, :5]
        attended = self.attention(rows, rows, rows)[0].sum((1, 2))[:, None]
        first, second = (attended + self.head(hidden.view(hidden.shape[0], -1))).chunk(2, 1)
        return (torch.cat([second, first], 1) + self.shift).softmax(1)


def export(module: nn.Module) -> bytes:
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(
        module.eval(), (torch.from_numpy(IMAGES[:2]),), dynamic_shapes=shapes
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def ours() -> nn.Module:
    network = model.build(specs.MLP(), 0)
    return model.Servable(network, *data.normalization(specs.Data(normalization="standard")))


@pytest.fixture(scope="module")
def archive() -> bytes:
    return export(ours())


@pytest.mark.parametrize("build", [ours, Everything])
def test_it_gives_what_torchs_own_loader_gives(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    written = export(build())
    program = exported.load(written, "x")
    theirs = torch.export.load(io.BytesIO(written)).module()
    for count in (1, 3, 257):
        expected = theirs(torch.from_numpy(IMAGES[:count])).detach().numpy()
        np.testing.assert_array_equal(program(IMAGES[:count]), expected)


# ---- archives that mean harm


class Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.mkdir, (Path(self.folder),)


def changed(archive: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """The archive with its records changed."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        records = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    change(records)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name, content in records.items():
            new.writestr(f"model/{name}", content)
    return file.getvalue()


def program_changed(archive: bytes, change: Callable[[dict], None]) -> bytes:  # type: ignore[type-arg]
    def apply(records: dict[str, bytes]) -> None:
        program = json.loads(records["models/model.json"])
        change(program)
        records["models/model.json"] = json.dumps(program).encode()

    return changed(archive, apply)


def pickled(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def baits(archive: bytes, folder: Path) -> dict[str, bytes]:
    """Archives that make the folder when torch loads and calls them, by where the bait is."""
    mkdir = f"__import__('os').mkdir({str(folder)!r})"

    def weights(records: dict[str, bytes]) -> None:
        config = json.loads(records["data/weights/model_weights_config.json"])
        config["config"]["network.layers.0.bias"]["use_pickle"] = True
        records["data/weights/model_weights_config.json"] = json.dumps(config).encode()
        records["data/weights/weight_1"] = pickled(Bait(folder))

    def sizes(program: dict) -> None:  # type: ignore[type-arg]
        values = program["graph_module"]["graph"]["tensor_values"]
        values["softmax"]["sizes"][0]["as_expr"]["expr_str"] = mkdir

    return {
        "guards": program_changed(archive, lambda each: each["guards_code"].append(mkdir)),
        "sizes": program_changed(archive, sizes),
        "weights": changed(archive, weights),
        "sample inputs": changed(
            archive,
            lambda each: each.update({"data/sample_inputs/model.pt": pickled(Bait(folder))}),
        ),
    }


@pytest.mark.parametrize("kind", ["guards", "sizes", "weights", "sample inputs"])
def test_no_archive_runs_code(kind: str, archive: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "sprung"
    bait = baits(archive, folder)[kind]
    with pytest.raises(StoreError, match="no program as this package exports them") as error:
        exported.load(bait, "its model")
    assert "\n" not in str(error.value)
    assert not folder.exists()
    try:
        torch.export.load(io.BytesIO(bait)).module()(torch.from_numpy(IMAGES[:2]))
    except Exception as failure:  # some fail behind it
        print(failure)
    assert folder.exists()  # else the bait proves nothing


def test_what_our_own_export_does_not_write_is_refused(archive: bytes) -> None:
    nodes: Callable[[dict], list] = lambda each: each["graph_module"]["graph"]["nodes"]  # type: ignore[type-arg] # noqa: E731

    def target(name: str) -> bytes:
        return program_changed(archive, lambda each: nodes(each)[-1].update(target=name))

    text = {"name": "filename", "arg": {"as_string": "/etc/passwd"}, "kind": 1}
    strange = {
        "a file": changed(archive, lambda each: each.update({"extra/x.py": b""})),
        "a library": changed(archive, lambda each: each.update({"data/aotinductor/m/x.so": b""})),
        "a constant": changed(
            archive,
            lambda each: each.update({"data/constants/custom_obj_0": pickle.dumps(1)}),
        ),
        "a function of Python": target("torch.hub.os.getcwd"),
        "a change in place": target("torch.ops.aten.relu_.default"),
        "a private operation": target("torch.ops.aten._softmax.default"),
        "another library": target("torch.ops.prims.exp.default"),
        "no operation": target("torch.ops.aten.nonsense.default"),
        "a text": program_changed(
            archive,
            lambda each: nodes(each)[-1].update(
                target="torch.ops.aten.from_file.default", inputs=[text]
            ),
        ),
        "another schema": program_changed(
            archive, lambda each: each["schema_version"].update(major=9)
        ),
        "half": archive[: len(archive) // 2],
        "nothing": b"",
    }
    for what, written in strange.items():
        with pytest.raises(StoreError) as error:
            exported.load(written, "its model")
        assert "\n" not in str(error.value), what
    exported.load(changed(archive, lambda each: None), "its model")
