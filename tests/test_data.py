"""The dataset: fetched and verified whatever the source does, equal to torchvision's, split and ordered reproducibly."""

import gzip
import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import ToTensor

from fmnist import data, plots
from fmnist import spec as specs
from fmnist.errors import DataError

PUBLISHED = data.raw_folder(REPOSITORY)
HOLDOUT = 52_000


def load(**fields: object) -> data.Dataset:
    return data.load(specs.Data(**fields), REPOSITORY, torch.device("cpu"))


# ---- the tensors


@pytest.fixture(scope="module")
def whole() -> data.Dataset:
    return load()


@pytest.fixture(scope="module")
def split() -> data.Dataset:
    return load(holdout=HOLDOUT)


@pytest.mark.parametrize("train", [True, False])
def test_images_and_labels_are_torchvisions(train: bool, whole: data.Dataset) -> None:
    theirs = FashionMNIST(REPOSITORY / "data", train=train, transform=ToTensor())
    ours = whole.train if train else whole.validation
    assert torch.equal(ours.labels, theirs.targets)
    for i in [*range(0, len(ours), 997), len(ours) - 1]:
        torch.testing.assert_close(ours.images[i].view(1, 28, 28), theirs[i][0], rtol=2e-7, atol=0)
    assert [*plots.CLASSES] == theirs.classes
    assert np.array_equal(ours.index, np.arange(len(theirs)))


def test_raw_images_are_the_untouched_pixels() -> None:
    assert np.array_equal(
        data.raw_images(REPOSITORY, 7),
        FashionMNIST(REPOSITORY / "data", train=False).data[:7].numpy(),
    )


def test_constants_are_the_training_images_mean_and_deviation() -> None:
    levels, counts = (
        np.arange(256) / 255,
        torch.bincount(FashionMNIST(REPOSITORY / "data").data.flatten(), minlength=256).numpy(),
    )
    mean = np.average(levels, weights=counts)
    assert (round(mean, 5), round(np.average((levels - mean) ** 2, weights=counts) ** 0.5, 5)) == (
        data.MEAN,
        data.STD,
    )


def test_standard_normalisation_gives_mean_0_and_deviation_1() -> None:
    images = load(normalization="standard").train.images.numpy()
    assert images.mean(dtype=np.float64) == pytest.approx(0, abs=2e-5)
    assert images.std(dtype=np.float64) == pytest.approx(1, abs=2e-5)


@pytest.fixture(scope="module")
def items(split: data.Dataset) -> list[tuple[torch.Tensor, int]]:
    theirs = FashionMNIST(REPOSITORY / "data", transform=ToTensor())
    return [theirs[i] for i in split.train.index]


@pytest.mark.parametrize("batch_size", [32, 999, 7_000])
def test_batches_are_a_data_loaders(
    batch_size: int, split: data.Dataset, items: list[tuple[torch.Tensor, int]]
) -> None:
    n, seed, epoch = len(split.train), 3, 2
    theirs = DataLoader(
        Subset(items, data.order(n, seed, epoch).tolist()), batch_size, shuffle=False
    )
    ours = list(split.batches(batch_size, seed, epoch))
    assert [len(labels) for _, labels in ours] == [batch_size] * (n // batch_size) + [
        n % batch_size
    ] * (n % batch_size > 0)
    for (images, labels), (their_images, their_labels) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(images, their_images, rtol=2e-7, atol=0)
        assert torch.equal(labels, their_labels)


def test_an_epoch_visits_every_image_once_in_its_own_order() -> None:
    n = 1_003
    numbered = data.Split(
        torch.arange(float(n))[:, None].expand(n, specs.PIXELS), torch.arange(n), np.arange(n)
    )
    dataset = data.Dataset(numbered, numbered, None)

    def visited(seed: int, epoch: int) -> list[float]:
        return torch.cat(
            [images[:, 0, 0, 0] for images, _ in dataset.batches(100, seed, epoch)]
        ).tolist()

    keys = [(seed, epoch) for seed in (0, 1, 11, 2**32 - 1) for epoch in (0, 1, 2, 11)]
    orders = [visited(*key) for key in keys]
    assert all(sorted(found) == [*range(n)] for found in orders)
    assert len({tuple(found) for found in [*orders, range(n)]}) == len(keys) + 1
    torch.manual_seed(9)  # an order that draws on the global generator would change with it
    assert [visited(*key) for key in keys] == orders


@pytest.mark.parametrize("holdout", [10, 5_000, 12_345])
def test_the_holdout_is_stratified_and_disjoint(holdout: int, whole: data.Dataset) -> None:
    found = load(holdout=holdout)
    assert (len(found.train), len(found.validation)) == (60_000 - holdout, holdout)
    assert sorted([*found.train.index, *found.validation.index]) == [*range(60_000)]
    counts = torch.bincount(found.validation.labels, minlength=10)
    assert counts.max() - counts.min() <= (holdout % 10 > 0)
    for part in (found.train, found.validation):
        assert torch.equal(part.images, whole.train.images[part.index])
        assert torch.equal(part.labels, whole.train.labels[part.index])


def test_the_split_seed_alone_chooses_the_holdout(split: data.Dataset) -> None:
    again, other = load(holdout=HOLDOUT), load(holdout=HOLDOUT, split_seed=1)
    assert np.array_equal(again.validation.index, split.validation.index)
    assert not np.array_equal(other.validation.index, split.validation.index)


def test_the_test_split_is_the_t10k_file(whole: data.Dataset, split: data.Dataset) -> None:
    assert whole.test is None
    assert split.test is not None
    assert torch.equal(split.test.images, whole.validation.images)
    assert torch.equal(split.test.labels, whole.validation.labels)


# ---- the files


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def whole_and_alone(root: Path) -> bool:
    """Whether the four published files are there, and nothing else is."""
    return {path.name: digest(path) for path in data.raw_folder(root).iterdir()} == data.SHA256


def plain(into: Path) -> None:
    for name in data.SHA256:
        shutil.copy(PUBLISHED / name, into)


def packed(into: Path) -> None:
    (into / "a" / "b").mkdir(parents=True)
    for name in data.SHA256:
        with gzip.open(into / "a" / "b" / f"{name}.gz", "wb", compresslevel=1) as file:
            file.write((PUBLISHED / name).read_bytes())


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def altered(into: Path) -> None:
    plain(into)
    flip(into / "t10k-labels-idx1-ubyte")


def unreachable(into: Path) -> None:
    raise OSError("no route\nto host")


def test_nothing_is_fetched_or_written_when_the_files_are_there(tmp_path: Path) -> None:
    (tmp_path / "data" / ".lock").mkdir(
        parents=True
    )  # so that nobody can lock it, as in a folder that is read-only
    (tmp_path / "data" / "FashionMNIST").symlink_to(REPOSITORY / "data" / "FashionMNIST")
    said: list[str] = []
    data.ensure(tmp_path, said.append, [("none", unreachable)])
    assert said == []


@pytest.mark.parametrize("source", [plain, packed])
def test_a_source_leaves_the_four_verified_files(
    source: Callable[[Path], None], tmp_path: Path
) -> None:
    data.ensure(tmp_path, sources=[("good", source)])
    assert whole_and_alone(tmp_path)


@pytest.mark.parametrize(
    ("damage", "name"), [(flip, "t10k-labels-idx1-ubyte"), (cut, "train-images-idx3-ubyte")]
)
def test_a_damaged_file_is_told_and_replaced(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    raw = data.raw_folder(tmp_path)
    raw.mkdir(parents=True)
    plain(raw)
    damage(raw / name)
    actual, said = digest(raw / name), []
    data.ensure(tmp_path, said.append, [("good", plain)])
    told = [line for line in said if "replaced" in line]
    assert len(told) == 1
    assert all(text in told[0] for text in (str(raw / name), actual, data.SHA256[name]))
    assert whole_and_alone(tmp_path)


def test_a_wrong_source_is_refused_and_the_next_one_tried(tmp_path: Path) -> None:
    data.ensure(
        tmp_path,
        sources=[("a bad mirror", altered), ("an empty one", lambda into: None), ("good", plain)],
    )
    assert whole_and_alone(tmp_path)


def test_what_a_killed_fetch_left_is_swept_out(tmp_path: Path) -> None:
    left = data.raw_folder(tmp_path) / ".fetch-killed"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    data.ensure(tmp_path, sources=[("good", plain)])
    assert whole_and_alone(tmp_path)


def test_why_a_source_was_passed_over_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    data.ensure(tmp_path, said.append, [("a bad mirror", altered), ("good", plain)])
    assert data.SHA256["t10k-labels-idx1-ubyte"] in "\n".join(said)


def test_without_a_source_the_error_tells_each_reason_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.ensure(tmp_path, sources=[("a bad mirror", altered), ("a dead one", unreachable)])
    lines = str(caught.value).splitlines()
    assert any(
        "a bad mirror" in line and data.SHA256["t10k-labels-idx1-ubyte"] in line for line in lines
    )
    assert "  a dead one: no route to host" in lines
    assert str(data.raw_folder(tmp_path)) in lines[0]
    assert all(text in lines[-1] for text in ("by hand", *data.SHA256))
    assert list(data.raw_folder(tmp_path).iterdir()) == []


FETCH_TWICE = """
import os, shutil, sys, time
from pathlib import Path
from fmnist import data
root, published = map(Path, sys.argv[1:])
def slow(into):
    with open(root / "fetched", "a") as file:
        file.write("x")
    for name in data.SHA256:
        shutil.copy(published / name, into)
    time.sleep(0.3)
child = os.fork()
data.ensure(root, sources=[("a slow copy", slow)])
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)
"""


def test_two_processes_at_once_fetch_once_and_both_succeed(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", FETCH_TWICE, str(tmp_path), str(PUBLISHED)],
        cwd=REPOSITORY,
        timeout=60,
        check=True,
    )
    assert (tmp_path / "fetched").read_text() == "x"
    assert whole_and_alone(tmp_path)


@pytest.mark.parametrize("obstacle", ["data", "data/FashionMNIST/raw"])
def test_a_file_where_the_folder_should_be_is_a_data_error(obstacle: str, tmp_path: Path) -> None:
    (tmp_path / obstacle).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / obstacle).touch()
    with pytest.raises(DataError, match="can't be"):
        data.ensure(tmp_path, sources=[("good", plain)])


def test_a_data_folder_that_cant_be_written_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "data" / ".lock").mkdir(parents=True)  # permissions don't hold root back, this does
    with pytest.raises(DataError, match="can't be written"):
        data.ensure(tmp_path, sources=[("good", plain)])


@pytest.mark.skipif(
    not (shutil.which("apt-get") and shutil.which("dpkg-deb")),
    reason="no Debian package tools here",
)
def test_the_debian_package_holds_the_files(tmp_path: Path) -> None:
    try:
        data.ensure(tmp_path, sources=[("Debian", data._debian_package)])
    except DataError as error:
        (tmp_path / "lists" / "partial").mkdir(parents=True)
        update = [
            "apt-get",
            "-q",
            f"-oDir::State::lists={tmp_path / 'lists'}",
            "-oAPT::Update::Error-Mode=any",
            "update",
        ]
        if subprocess.run(update, capture_output=True, timeout=120).returncode != 0:
            pytest.skip(f"the package index can't be reached: {error}")
        raise
    assert whole_and_alone(tmp_path)


def test_a_file_cut_or_altered_anywhere_is_never_taken_for_right(tmp_path: Path) -> None:
    raw = data.raw_folder(tmp_path)
    shutil.copytree(data.raw_folder(REPOSITORY), raw)
    positions = random.Random(0)
    for name in data.SHA256:
        path = raw / name
        size = path.stat().st_size
        with open(path, "r+b") as file:
            for place in [0, 15, size - 1, *(positions.randrange(size) for _ in range(17))]:
                file.seek(place)
                byte = file.read(1)
                file.seek(place)
                file.write(bytes([byte[0] ^ 1 << positions.randrange(8)]))
                file.flush()
                assert list(data.faults(tmp_path)) == [name], f"{name}, byte {place}"
                file.seek(place)
                file.write(byte)
        whole = path.read_bytes()
        for length in sorted(
            [0, 1, size - 1, *(positions.randrange(size) for _ in range(17))], reverse=True
        ):
            os.truncate(path, length)
            assert list(data.faults(tmp_path)) == [name], f"{name}, {length} bytes"
        path.write_bytes(whole)
    assert data.faults(tmp_path) == {}
