"""The dataset: fetched and verified whatever the source does, equal to torchvision's, split and ordered reproducibly."""

import gzip
import hashlib
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

from fmnist import data
from fmnist import spec as specs
from fmnist.errors import DataError

PUBLISHED = data.raw_folder(REPOSITORY)
CPU = torch.device("cpu")
HOLDOUT = 50_000


def load(**fields: object) -> data.Dataset:
    return data.load(specs.Data(**fields), REPOSITORY, CPU)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- the tensors


@pytest.fixture(scope="module")
def whole() -> data.Dataset:
    return load()


@pytest.fixture(scope="module")
def split() -> data.Dataset:
    return load(holdout=HOLDOUT)


@pytest.fixture(scope="module", params=[True, False], ids=["train", "t10k"])
def pair(request: pytest.FixtureRequest, whole: data.Dataset) -> tuple[data.Split, FashionMNIST]:
    theirs = FashionMNIST(REPOSITORY / "data", train=request.param, transform=ToTensor())
    return (whole.train if request.param else whole.validation), theirs


def test_images_and_labels_are_torchvisions(pair: tuple[data.Split, FashionMNIST]) -> None:
    ours, theirs = pair
    assert torch.equal(ours.labels, theirs.targets)
    for i in [*range(0, len(ours), 997), len(ours) - 1]:
        torch.testing.assert_close(ours.images[i].view(1, 28, 28), theirs[i][0], rtol=2e-7, atol=0)
    assert [*data.CLASSES] == theirs.classes
    assert np.array_equal(ours.index, np.arange(len(theirs)))


def test_raw_images_are_the_untouched_pixels() -> None:
    assert np.array_equal(data.raw_images(REPOSITORY, 7), FashionMNIST(REPOSITORY / "data", train=False).data[:7].numpy())


def test_constants_are_the_training_images_mean_and_deviation() -> None:
    pixels = FashionMNIST(REPOSITORY / "data").data.numpy() / 255
    assert (round(pixels.mean(), 5), round(pixels.std(), 5)) == (data.MEAN, data.STD)


def test_standard_normalisation_gives_mean_0_and_deviation_1() -> None:
    images = load(normalization="standard").train.images.numpy()
    assert images.mean(dtype=np.float64) == pytest.approx(0, abs=2e-5)
    assert images.std(dtype=np.float64) == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("batch_size", [32, 625, 999, 7_000])
def test_batches_are_a_data_loaders(split: data.Dataset, batch_size: int) -> None:
    n, seed, epoch = len(split.train), 3, 2
    visited = split.train.index[data.order(n, seed, epoch).numpy()]
    theirs = DataLoader(Subset(FashionMNIST(REPOSITORY / "data", transform=ToTensor()), visited.tolist()), batch_size, shuffle=False)
    ours = list(split.batches(batch_size, seed, epoch))
    assert [len(labels) for _, labels in ours] == [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    for (images, labels), (their_images, their_labels) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(images, their_images, rtol=2e-7, atol=0)
        assert torch.equal(labels, their_labels)


def test_an_epoch_visits_every_image_once_in_its_own_order() -> None:
    n = 1_003
    numbered = data.Split(torch.arange(float(n))[:, None].expand(n, specs.PIXELS), torch.arange(n), np.arange(n))
    dataset = data.Dataset(numbered, numbered, None)

    def visited(seed: int, epoch: int) -> list[int]:
        return [int(image[0, 0, 0]) for images, _ in dataset.batches(100, seed, epoch) for image in images]

    keys = [(seed, epoch) for seed in (0, 1, 11, 2**32 - 1) for epoch in (0, 1, 2, 11)]
    orders = [visited(*key) for key in keys]
    assert all(sorted(found) == [*range(n)] for found in orders)
    assert len({tuple(found) for found in [*orders, list(range(n))]}) == len(keys) + 1
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


def plain(into: Path) -> None:
    for name in data.SHA256:
        shutil.copy(PUBLISHED / name, into)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """A source whose files are compressed, some folders down."""
    folder = tmp_path_factory.mktemp("packed")
    for name in data.SHA256:
        with gzip.open(folder / f"{name}.gz", "wb", compresslevel=1) as file:
            file.write((PUBLISHED / name).read_bytes())
    return lambda into: shutil.copytree(folder, into / "a" / "b") and None


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def altered(into: Path) -> None:
    plain(into)
    flipped(into / "t10k-labels-idx1-ubyte")


def unreachable(into: Path) -> None:
    raise OSError("no route\nto host")


def whole_and_alone(root: Path) -> bool:
    """Whether the four published files are there, and nothing else is."""
    return {path.name: digest(path) for path in data.raw_folder(root).iterdir()} == data.SHA256


def test_nothing_is_fetched_when_the_files_are_there() -> None:
    said: list[str] = []
    data.ensure(REPOSITORY, said.append, [("none", unreachable)])
    assert said == []


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_source_leaves_the_four_verified_files(kind: str, packed: Callable[[Path], None], tmp_path: Path) -> None:
    data.ensure(tmp_path, print, [("good", plain if kind == "plain" else packed)])
    assert whole_and_alone(tmp_path)


@pytest.mark.parametrize("name", ["t10k-labels-idx1-ubyte", "train-images-idx3-ubyte"])
@pytest.mark.parametrize("damage", [flipped, cut])
def test_a_damaged_file_is_told_and_replaced(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
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
    said: list[str] = []
    data.ensure(tmp_path, said.append, [("a bad mirror", altered), ("nothing at all", lambda into: None), ("good", plain)])
    assert whole_and_alone(tmp_path)
    text = "\n".join(said)
    assert data.SHA256["t10k-labels-idx1-ubyte"] in text, "the bad mirror's altered file is passed over in silence"
    assert "does not hold" in text


def test_without_a_source_the_error_tells_each_reason_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.ensure(tmp_path, print, [("a bad mirror", altered), ("a dead one", unreachable)])
    message = str(caught.value)
    mirror, dead = (
        next(line for line in message.splitlines() if line.startswith(f"  {label}:")) for label in ("a bad mirror", "a dead one")
    )
    assert data.SHA256["t10k-labels-idx1-ubyte"] in mirror
    assert "no route to host" in dead
    assert all(text in message for text in (str(data.raw_folder(tmp_path)), "by hand", *data.SHA256))
    assert list(data.raw_folder(tmp_path).iterdir()) == []


FETCH = """
import os, shutil, sys, time
from pathlib import Path
from fmnist import data
root, published = Path(sys.argv[1]), Path(sys.argv[2])
def slow(into):
    with open(root / "fetched", "a") as file:
        file.write("x")
    for name in data.SHA256:
        shutil.copy(published / name, into)
    time.sleep(0.3)
(root / f"ready-{os.getpid()}").touch()
while len(list(root.glob("ready-*"))) < 2:
    time.sleep(0.01)
data.ensure(root, sources=[("a slow copy", slow)])
"""


def test_two_processes_at_once_fetch_once_and_both_succeed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FETCH, str(tmp_path), str(PUBLISHED)]
    processes = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "fetched").read_text() == "x"
    assert whole_and_alone(tmp_path)


@pytest.mark.parametrize("obstacle", ["data", "data/FashionMNIST/raw"])
def test_a_file_where_the_folder_should_be_is_a_data_error(obstacle: str, tmp_path: Path) -> None:
    (tmp_path / obstacle).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / obstacle).write_text("")
    with pytest.raises(DataError, match="can't be"):
        data.ensure(tmp_path, print, [("good", plain)])


def test_a_data_folder_that_cant_be_written_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "data" / ".lock").mkdir(parents=True)  # root may write wherever permissions forbid it, but not into this
    with pytest.raises(DataError, match=r"can't be written"):
        data.ensure(tmp_path, print, [("good", plain)])


@pytest.mark.skipif(not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="no Debian package tools here")
def test_the_debian_package_holds_the_files(tmp_path: Path) -> None:
    try:
        data.ensure(tmp_path, print, [("Debian", data._debian_package)])
    except DataError as error:
        (tmp_path / "lists" / "partial").mkdir(parents=True)
        private = ["-oDir::State::lists=" + str(tmp_path / "lists"), "-oAPT::Update::Error-Mode=any"]
        if subprocess.run(["apt-get", "-q", *private, "update"], capture_output=True, timeout=120).returncode != 0:
            pytest.skip(f"the package index can't be reached: {error}")
        raise
    assert whole_and_alone(tmp_path)
