"""Files in folders that others may write to: only regular ones are read, and what is written goes to no other place by a planted link."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SETTLED_S = 60.0
"""How old what was left behind has to be: who makes such a folder locks it only a moment later."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raises OSError where it is a folder, a device or a pipe, which would be waited for without end."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(file, "rb")


def read(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def replace(path: Path, content: bytes | memoryview, previous: Path | None = None) -> None:
    """Replace a file, whole or not at all, also where the power fails; what was there goes to `previous`."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # left by a kill, or a link: the new one is surely a file
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(partial, flags, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # the disk is full: half a file takes the room that the journal needs to say so
        partial.unlink(missing_ok=True)
        raise
    if previous and path.exists():
        path.replace(previous)
    partial.replace(path)


def open_lock(path: Path) -> int:
    """The descriptor of a lock file, made if there is none; raises OSError where a link or anything but a file is in its place."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, against other processes."""
    file = open_lock(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a moment, locked as long as who made it lives; those that killed processes left behind are swept out first."""
    parent = Path(tempfile.gettempdir())
    for path in parent.glob("fmnist-scratch-*"):
        sweep_out(path)
    with tempfile.TemporaryDirectory(prefix="fmnist-scratch-", dir=parent) as folder:
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(lock)


def sweep_out(folder: Path, lock: str = "") -> None:
    """Remove a folder of ours that nobody holds by its lock (the folder itself, or this file in it), unless it is quite new."""
    with contextlib.suppress(OSError):
        found = folder.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if not ours or time.time() - found.st_mtime < SETTLED_S:
            return
        with contextlib.suppress(FileNotFoundError):
            held = os.open(folder / lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else who made it is at work
            finally:
                os.close(held)
        shutil.rmtree(folder)
