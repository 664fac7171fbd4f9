"""Fashion-MNIST: fetched and verified, as tensors on the device; its splits and the order of its batches.

Shapes: N images, B batch, P = 784 pixels.
"""

import gzip
import hashlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmnist import files
from fmnist import spec as specs
from fmnist.errors import DataError

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Of the decompressed files; the compressed ones differ between mirrors."""
DIGEST = hashlib.sha256("".join(SHA256.values()).encode()).hexdigest()
"""One digest for the whole set."""
MEAN, STD = 0.28604, 0.35302
"""Of the pixels of the 60,000 training images, scaled to 0..1."""

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_SCRIPT = """
mkdir -p lists/partial cache/archives/partial
own="-oDir::State::lists=$PWD/lists -oDir::Cache=$PWD/cache"
apt-get -q download "$1" || { apt-get -q $own update; apt-get -q $own download "$1"; }
dpkg-deb -x ./*.deb package
"""
"""The system's package list may be empty or old: then one of our own, which needs no root."""
DOWNLOAD_TIMEOUT_S = 30


# ---- the files


def raw_folder(root: Path) -> Path:
    """Where torchvision keeps the four files, and so do we."""
    return root / "data" / "FashionMNIST" / "raw"


def _torchvision(into: Path) -> None:
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(
        DOWNLOAD_TIMEOUT_S
    )  # torchvision sets none, and a dead proxy would hang it for ever
    try:
        FashionMNIST(into, download=True)
    finally:
        socket.setdefaulttimeout(before)


def _debian_package(into: Path) -> None:
    command = ["sh", "-ec", DEBIAN_SCRIPT, "sh", DEBIAN_PACKAGE]
    result = subprocess.run(
        command, cwd=into, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600
    )
    if result.returncode != 0:
        raise RuntimeError((result.stderr.strip().splitlines() or ["apt-get failed"])[-1])


Source = tuple[str, Callable[[Path], object]]
SOURCES: tuple[Source, ...] = (
    ("torchvision's download", _torchvision),
    (str(SYSTEM_FOLDER), lambda into: shutil.copytree(SYSTEM_FOLDER, into, dirs_exist_ok=True)),
    (f"the Debian package {DEBIAN_PACKAGE}", _debian_package),
)


def faults(root: Path) -> dict[str, str]:
    """For each of the four files that is missing or isn't the published one: what is wrong with it."""
    found = {}
    for name, expected in SHA256.items():
        path = raw_folder(root) / name
        try:
            actual = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            found[name] = "missing"
            continue
        except OSError as error:
            raise DataError(
                f"{path}: can't be read: {error.strerror}; mend its permissions or delete it"
            ) from None
        if actual != expected:
            found[name] = f"altered or cut short: SHA-256 {actual}, expected {expected}"
    return found


def ensure(
    root: Path, say: Callable[[str], None] = print, sources: Sequence[Source] = SOURCES
) -> None:
    """Make the four verified files present, fetching them if need be; raises DataError naming every source tried."""
    if not faults(root):
        return
    raw = raw_folder(root)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with files.locked(root / "data" / ".lock"):
            for left in raw.glob(".fetch-*"):  # by a process that was killed: we hold its lock
                shutil.rmtree(left)
            wanted = faults(root)  # again: another process may have fetched them meanwhile
            for name, fault in wanted.items():
                if fault != "missing":
                    say(f"{raw / name} is {fault}; it will be replaced")
            if wanted:
                _fetch(raw, wanted, say, sources)
    except OSError as error:
        raise DataError(f"{raw}: can't be written: {error.strerror or error}") from None


def _fetch(
    raw: Path, wanted: dict[str, str], say: Callable[[str], None], sources: Sequence[Source]
) -> None:
    failures = []
    for label, fetch in sources:
        say(f"fetching Fashion-MNIST from {label}")
        with tempfile.TemporaryDirectory(dir=raw, prefix=".fetch-") as folder:
            try:
                fetch(Path(folder))
                _take(Path(folder), raw, wanted)
                return
            except (
                Exception
            ) as error:  # whatever a source raises, the next one is tried and the reason is told
                failures.append(
                    f"  {label}: {' '.join(str(error).split())[:200] or type(error).__name__}"
                )
                say(failures[-1].strip())
    raise DataError(
        f"Fashion-MNIST is not in {raw} and could not be fetched. Tried:\n"
        + "\n".join(failures)
        + f"\nPut these four files there by hand, decompressed (gunzip): {', '.join(SHA256)}"
    )


def _take(folder: Path, raw: Path, wanted: dict[str, str]) -> None:
    """Verify the wanted files found anywhere below `folder`, decompressed or not; only then rename them into place."""
    for name in wanted:
        found = next(
            (
                path
                for path in folder.rglob(f"{name}*")
                if path.is_file() and path.suffix in ("", ".gz")
            ),
            None,
        )
        if found is None:
            raise FileNotFoundError(f"it does not hold {name}")
        content = (
            gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
        )
        if (actual := hashlib.sha256(content).hexdigest()) != SHA256[name]:
            raise ValueError(f"its {name} has SHA-256 {actual}, expected {SHA256[name]}")
        (folder / f".{name}").write_bytes(content)
    for name in wanted:
        (folder / f".{name}").replace(raw / name)


# ---- the tensors


@dataclass(frozen=True)
class Split:
    images: Tensor
    """[N, P] float32, normalised as the spec says."""
    labels: Tensor
    """[N] int64."""
    index: np.ndarray
    """[N] position of each image in its original file."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    train: Split
    validation: Split
    test: Split | None
    """None where the test images serve as validation."""

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of training batches, images [B, 1, 28, 28] and labels [B]: equal in meaning to DataLoader(shuffle=True)."""
        for rows in (
            order(len(self.train), seed, epoch).to(self.train.labels.device).split(batch_size)
        ):
            yield self.train.images[rows].view(-1, 1, 28, 28), self.train.labels[rows]


def order(n: int, seed: int, epoch: int) -> Tensor:
    """[n] the order in which an epoch visits the training images: a pure function of seed and epoch."""
    key = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:4]
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(key, "little")))


def normalization(spec: specs.Data) -> tuple[float, float]:
    """(shift, scale) such that the model sees (pixel - shift) * scale, pixel in 0..255."""
    return (0.0, 1 / 255) if spec.normalization == "unit" else (255 * MEAN, 1 / (255 * STD))


def load(
    spec: specs.Data, root: Path, device: torch.device, say: Callable[[str], None] = print
) -> Dataset:
    """The splits on the device, fetched first where need be; raises DataError."""
    ensure(root, say)
    shift, scale = normalization(spec)

    def split(images: np.ndarray, labels: np.ndarray, index: np.ndarray) -> Split:
        # One copy of the pixels, made by float(); the rest is in place.
        pixels = (
            torch.from_numpy(images[index] if len(index) < len(images) else images)
            .to(device)
            .float()
            .sub_(shift)
            .mul_(scale)
        )
        return Split(pixels, torch.from_numpy(labels[index].astype(np.int64)).to(device), index)

    images, labels = _read(root, "train")
    test_images, test_labels = _read(root, "t10k")
    everything = np.arange(len(labels))
    test = split(test_images, test_labels, np.arange(len(test_labels)))
    if spec.holdout is None:
        return Dataset(split(images, labels, everything), test, None)
    from sklearn.model_selection import train_test_split

    kept, held_out = train_test_split(
        everything, test_size=spec.holdout, random_state=spec.split_seed, stratify=labels
    )
    return Dataset(
        split(images, labels, np.sort(kept)), split(images, labels, np.sort(held_out)), test
    )


def _read(root: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """The images [N, P] and labels [N] of one file pair, both uint8; the digests were checked, so the headers are known."""
    raw = raw_folder(root)
    images = np.fromfile(raw / f"{prefix}-images-idx3-ubyte", np.uint8, offset=16)
    return images.reshape(-1, specs.PIXELS), np.fromfile(
        raw / f"{prefix}-labels-idx1-ubyte", np.uint8, offset=8
    )


def raw_images(root: Path, n: int) -> np.ndarray:
    """The first n test images as they come, uint8 [n, 28, 28]."""
    return _read(root, "t10k")[0][:n].reshape(n, 28, 28).copy()
