"""Servers that run as long as their command does, on this machine only: MLflow's pages, and the champion's predictions; and predictions at once."""

import signal
import socket
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmnist import models, tracking
from fmnist.errors import UserError
from fmnist.guard import Guard, addresses

if TYPE_CHECKING:
    from fmnist.exported import Program


def listen(port: int, target: str) -> socket.socket:
    """Take a port of 127.0.0.1; raises UserError where it is taken, with one that is free."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except PermissionError:
        why = f"port {port} on 127.0.0.1 may not be used by this account"
    except OSError:
        why = f"port {port} on 127.0.0.1 is taken, perhaps by another `make {target}`"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    raise UserError(f"{why}; port {free} is free: make {target} PORT={free}")


def serve(app: Any, listener: socket.socket, log: Path) -> None:
    """Answer with an ASGI application until a signal comes; what it says goes to `log`."""
    import uvicorn

    for ending in (signal.SIGINT, signal.SIGTERM):  # a shell's `&` has SIGINT ignored
        signal.signal(ending, signal.default_int_handler)
    with open(log, "w") as output, redirect_stdout(output), redirect_stderr(output):
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # it would hold the key
            proxy_headers=False,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run([listener])


def pages(root: Path, port: int) -> Guard:
    """MLflow's pages of the local store, behind a key."""
    return Guard(tracking.pages(root, addresses(port)), port)


def how_to_ask(run_id: str, port: int) -> list[str]:
    """What a model server at this port takes and gives, in words."""
    return [
        f"the model of run {run_id} answers at http://127.0.0.1:{port}/invocations; Ctrl-C stops it",
        f"""curl http://127.0.0.1:{port}/invocations -H 'Content-Type: application/json' -d '{{"inputs": [[[0, ...], ...]]}}'""",
        "inputs: images of 28 x 28 pixels, 0 to 255, bright on dark; predictions: a probability for each of the ten classes",
    ]


def model(store: tracking.Store, text: str) -> "tuple[str, Program]":
    """The model of the `champion`, or of the run that `text` names, and the run's id; raises UserError where none can be used."""
    from fmnist import exported  # torch comes with it, which MLflow's pages don't need

    champion = None
    if text == tracking.CHAMPION:
        if (champion := store.champion()) is None:
            raise UserError("there is no champion yet; fmnist promote RUN makes one, or name a run")
        run_id = champion.run_id
    else:
        run_id = tracking.the_one(store.runs(), text)["run_id"]
    files = store.model(run_id, champion)
    return run_id, exported.load(files[models.PROGRAM], f"run {run_id}: its model")


def read_image(path: Path, invert: bool) -> Any:
    """A picture, upright, as the model takes it: uint8 [28, 28], bright on dark as in the data; `invert` for dark on bright."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            grey = (
                ImageOps.exif_transpose(picture)
                .convert("L")
                .resize((28, 28), Image.Resampling.LANCZOS)
            )
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: can't be read as a picture: {why}; give PNG or JPEG files"
        ) from None
    return ImageOps.invert(grey) if invert else grey


def predict(
    store: tracking.Store, text: str, paths: Sequence[Path], invert: bool
) -> list[dict[str, Any]]:
    """What a model takes each picture for: its class, and the probability of each class."""
    import numpy as np

    from fmnist.plots import CLASSES

    images = np.stack([np.asarray(read_image(path, invert), np.uint8) for path in paths])
    _, program = model(store, text)
    found = []
    for path, row in zip(paths, program(images).astype(float), strict=True):
        by_class = dict(zip(CLASSES, row.tolist(), strict=True))
        found.append(
            {"image": str(path), "class": CLASSES[int(row.argmax())], "probabilities": by_class}
        )
    return found
