"""Fashion-MNIST: fetched and verified, as tensors on the device; its splits and the order of its batches.

Shapes: N images, B batch, P = 784 pixels.
"""

import contextlib
import fcntl
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
DOWNLOAD_TIMEOUT_S = 30


# ---- the files


def raw_folder(root: Path) -> Path:
    """Where torchvision keeps the four files, and so do we."""
    return root / "data" / "FashionMNIST" / "raw"


def _torchvision(into: Path) -> None:
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none, and a dead proxy would hang it for ever
    try:
        FashionMNIST(str(into), download=True)
    finally:
        socket.setdefaulttimeout(before)


def _system_folder(into: Path) -> None:
    files = sorted(SYSTEM_FOLDER.glob("*ubyte*"))
    if not files:
        raise FileNotFoundError(f"{SYSTEM_FOLDER} holds no such files")
    for file in files:
        shutil.copy(file, into)


def _debian_package(into: Path) -> None:
    private = [f"-oDir::State::lists={into}/lists", f"-oDir::Cache={into}/cache"]
    (into / "lists" / "partial").mkdir(parents=True)
    (into / "cache" / "archives" / "partial").mkdir(parents=True)
    try:
        _command("apt-get", "-q", "download", DEBIAN_PACKAGE, cwd=into)
    except RuntimeError:  # the system's package list may be empty or old: refresh one of our own, which needs no root
        _command("apt-get", "-q", *private, "update", cwd=into)
        _command("apt-get", "-q", *private, "download", DEBIAN_PACKAGE, cwd=into)
    package = next(into.glob("*.deb"))
    _command("dpkg-deb", "-x", str(package), str(into / "package"), cwd=into)


def _command(*command: str, cwd: Path) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    if result.returncode != 0:
        raise RuntimeError((result.stderr.strip().splitlines() or [f"{command[0]} failed"])[-1])


Source = tuple[str, Callable[[Path], None]]
SOURCES: tuple[Source, ...] = (
    ("torchvision's download", _torchvision),
    (str(SYSTEM_FOLDER), _system_folder),
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
            raise DataError(f"{path}: can't be read: {error.strerror}; mend its permissions or delete it") from None
        if actual != expected:
            found[name] = f"altered or cut short: SHA-256 {actual}, expected {expected}"
    return found


def ensure(root: Path, say: Callable[[str], None] = print, sources: Sequence[Source] = SOURCES) -> None:
    """Make the four verified files present, fetching them if need be; raises DataError naming every source tried."""
    if not faults(root):
        return
    raw = raw_folder(root)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with open(root / "data" / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            wanted = faults(root)  # again: another process may have fetched them meanwhile
            for name, fault in wanted.items():
                if fault != "missing":
                    say(f"{raw / name} is {fault}; it will be replaced")
            if wanted:
                _fetch(raw, wanted, say, sources)
    except OSError as error:
        raise DataError(f"{raw}: can't be written: {error.strerror or error}") from None


def _fetch(raw: Path, wanted: dict[str, str], say: Callable[[str], None], sources: Sequence[Source]) -> None:
    failures = []
    for label, fetch in sources:
        say(f"fetching Fashion-MNIST from {label}")
        with tempfile.TemporaryDirectory(dir=raw, prefix=".fetch-") as folder:
            try:
                fetch(Path(folder))
                _take(Path(folder), raw, wanted)
                return
            except Exception as error:  # whatever a source raises, the next one is tried and the reason is told
                failures.append(f"  {label}: {' '.join(str(error).split())[:200] or type(error).__name__}")
                say(failures[-1].strip())
    raise DataError(
        f"Fashion-MNIST is not in {raw} and could not be fetched. Tried:\n"
        + "\n".join(failures)
        + f"\nPut these four files there by hand, decompressed (gunzip): {', '.join(SHA256)}"
    )


def _take(folder: Path, raw: Path, wanted: dict[str, str]) -> None:
    """Verify the wanted files found anywhere below `folder`, decompressed or not; only then rename them into place."""
    ready = []
    for name in wanted:
        plain = next((path for path in folder.rglob(name) if path.is_file()), None)
        if plain is None:
            packed = next(folder.rglob(f"{name}.gz"), None)
            if packed is None:
                raise FileNotFoundError(f"it does not hold {name}")
            plain = folder / f"{name}.unpacked"
            with gzip.open(packed) as source, open(plain, "wb") as target:
                shutil.copyfileobj(source, target)
        actual = hashlib.sha256(plain.read_bytes()).hexdigest()
        if actual != SHA256[name]:
            raise ValueError(f"its {name} has SHA-256 {actual}, expected {SHA256[name]}")
        ready.append((plain, raw / name))
    for found, destination in ready:
        found.replace(destination)


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
        for rows in order(len(self.train), seed, epoch).to(self.train.labels.device).split(batch_size):
            yield self.train.images[rows].view(-1, 1, 28, 28), self.train.labels[rows]


def order(n: int, seed: int, epoch: int) -> Tensor:
    """[n] the order in which an epoch visits the training images: a pure function of seed and epoch."""
    key = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:4]
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(key, "little")))


def normalization(spec: specs.Data) -> tuple[float, float]:
    """(shift, scale) such that the model sees (pixel - shift) * scale, pixel in 0..255."""
    return (0.0, 1 / 255) if spec.normalization == "unit" else (255 * MEAN, 1 / (255 * STD))


def load(spec: specs.Data, root: Path, device: torch.device, say: Callable[[str], None] = print) -> Dataset:
    """The splits on the device, fetched first where need be; raises DataError."""
    ensure(root, say)
    shift, scale = normalization(spec)

    def split(images: np.ndarray, labels: np.ndarray, index: np.ndarray) -> Split:
        # One copy of the pixels, made by float(); the rest is in place.
        pixels = torch.from_numpy(images[index] if len(index) < len(images) else images).to(device).float().sub_(shift).mul_(scale)
        return Split(pixels, torch.from_numpy(labels[index].astype(np.int64)).to(device), index)

    images, labels = _read(root, "train")
    test_images, test_labels = _read(root, "t10k")
    test = split(test_images, test_labels, np.arange(len(test_labels)))
    if spec.holdout is None:
        return Dataset(split(images, labels, np.arange(len(labels))), test, None)
    kept, held_out = _stratified(labels, spec.holdout, spec.split_seed)
    return Dataset(split(images, labels, kept), split(images, labels, held_out), test)


def _read(root: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """The images [N, P] and labels [N] of one file pair, both uint8; the digests were checked, so the headers are known."""
    raw = raw_folder(root)
    with contextlib.ExitStack() as stack:
        image_file = stack.enter_context(open(raw / f"{prefix}-images-idx3-ubyte", "rb"))
        label_file = stack.enter_context(open(raw / f"{prefix}-labels-idx1-ubyte", "rb"))
        images = np.fromfile(image_file, np.uint8)[16:].reshape(-1, specs.PIXELS)
        return images, np.fromfile(label_file, np.uint8)[8:]


def _stratified(labels: np.ndarray, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    kept, held_out = train_test_split(np.arange(len(labels)), test_size=holdout, random_state=seed, stratify=labels)
    return np.sort(kept), np.sort(held_out)


def raw_images(root: Path, n: int) -> np.ndarray:
    """The first n test images as they come, uint8 [n, 28, 28]."""
    return _read(root, "t10k")[0][:n].reshape(n, 28, 28).copy()
