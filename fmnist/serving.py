"""Servers that run as long as their command does, on this machine only: MLflow's pages, and the champion's predictions; and predictions at once."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from fmnist import tracking
from fmnist.errors import StoreError, UserError

START_S = 60


def check_port(port: int, target: str) -> None:
    """Raise UserError where a port is taken, with one that is free."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            free = listener.getsockname()[1]
        why = f"port {port} on 127.0.0.1 is taken, perhaps by another `make {target}`"
        raise UserError(f"{why}; port {free} is free: make {target} PORT={free}") from None


def serve(command: Sequence[str], root: Path, log: Path, health: str, told: Sequence[str]) -> None:
    """Run a server until a signal comes; once `health` answers, print what is `told`. Raises UserError where it doesn't come up."""
    for ending in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the server must not outlive us; a shell's `&` has SIGINT ignored
        signal.signal(ending, signal.default_int_handler)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # MLflow starts uvicorn by its name
    environment = {
        **os.environ,
        **tracking.SETTINGS,
        "MLFLOW_TRACKING_URI": tracking.uri(root),
        "PATH": path,
    }
    with open(log, "wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, cwd=root, start_new_session=True
        )
    try:
        _wait_until_up(server, health, log)
        print("\n".join(told), flush=True)
        server.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # with the workers that it started
            server.wait()
            for _ in range(100):  # until the last of them is gone: as long as it lives it listens
                os.killpg(server.pid, 0)
                time.sleep(0.05)


def _wait_until_up(server: "subprocess.Popen[bytes]", health: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urlopen(health, timeout=1):
            return
        time.sleep(0.2)
    last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    raise UserError(f"the server did not come up: {last} (all of it: {log})")


def how_to_ask(uri: str, port: int) -> list[str]:
    """What a model server at this port takes and gives, in words."""
    return [
        f"{uri} answers at http://127.0.0.1:{port}/invocations; Ctrl-C stops it",
        f"""curl http://127.0.0.1:{port}/invocations -H 'Content-Type: application/json' -d '{{"inputs": [[[0, ...], ...]]}}'""",
        "inputs: images of 28 x 28 pixels, 0 to 255, bright on dark; predictions: a probability for each of the ten classes",
    ]


def model_uri(store: tracking.Store, text: str) -> str:
    """MLflow's address of a model: of the `champion`, or of the run that `text` names; raises UserError where there is none."""
    if text == tracking.CHAMPION:
        if store.champion() is None:
            raise UserError("there is no champion yet; fmnist promote RUN makes one, or name a run")
        return tracking.champion_uri()
    run = tracking.the_one(store.runs(), text)
    outputs = store.client.get_run(run["run_id"]).outputs
    if not outputs or not outputs.model_outputs:
        raise StoreError(f"run {run['run_id']} has no model; name another, or train it again")
    return f"models:/{outputs.model_outputs[0].model_id}"


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
    store: tracking.Store, model: str, paths: Sequence[Path], invert: bool
) -> list[dict[str, Any]]:
    """What a model takes each picture for: its class, and the probability of each class."""
    import numpy as np

    from fmnist.plots import CLASSES

    images = np.stack([np.asarray(read_image(path, invert), np.uint8) for path in paths])
    probabilities = store.load_model(model_uri(store, model)).predict(images)
    found = []
    for path, row in zip(paths, np.asarray(probabilities, float), strict=True):
        by_class = dict(zip(CLASSES, row.tolist(), strict=True))
        found.append(
            {"image": str(path), "class": CLASSES[int(row.argmax())], "probabilities": by_class}
        )
    return found
