"""The logged model outside this package: loaded where fmnist can't be imported, and served over HTTP."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import command, free_port, make_home, stop_sidecar
from PIL import Image

from fmnist import data, plots, tracking

pytestmark = pytest.mark.slow
REFUSE_FMNIST = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fmnist":
            raise ImportError("fmnist must not be needed")
sys.meta_path.insert(0, Refuse())
"""
LOAD = (
    REFUSE_FMNIST
    + """
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
images = np.load(sys.argv[3])
model = mlflow.pyfunc.load_model(sys.argv[2])
network = mlflow.pytorch.load_model(sys.argv[2])
import torch
parts = {}
for n in (1, 3, 257, len(images)):
    parts[f"pyfunc_{n}"] = model.predict(images[:n])
    parts[f"pytorch_{n}"] = network(torch.from_numpy(images[:n])).detach().numpy()
np.savez(sys.argv[4], **parts)
"""
)
STRANGE = [
    ("text/csv", b'a,b\n1,"2'),
    ("text/csv", b"a,b\n1,2\n"),
    ("application/vnd.apache.parquet", b"nonsense"),
    ("application/json", b'{"inputs": [[[1, 2], [3, 4]]]}'),
    ("application/json", b'{"inputs": "text"}'),
    ("application/json", b'{"inputs": []}'),
    ("application/json", b"nonsense"),
    ("nonsense", b""),
]
"""Requests that the model server can't answer."""
SAFE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, np.ndarray]:
    """A home, the model's URI, and the probabilities that the run itself stored for the first test images."""
    home = make_home(tmp_path_factory.mktemp("model"))
    patch = pytest.MonkeyPatch()
    patch.setenv("FMNIST_HOME", str(home))
    settings = (
        "-s",
        "train.epochs=2",
        "-s",
        "train.batch_size=500",
        "-s",
        "data.normalization=standard",
    )
    run_id = json.loads(command(home, "run", "baseline", *settings, "--json").stdout)["run_id"]
    store = tracking.connect(home)
    model_id = store.client.get_run(run_id).outputs.model_outputs[0].model_id
    predictions = pd.read_parquet(store.download(run_id, "predictions.parquet", home))
    logits = predictions.filter(like="logit_").to_numpy().astype(float)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    yield home, f"models:/{model_id}", expected
    stop_sidecar(home)
    shutil.rmtree(home)
    patch.undo()


def test_loads_without_fmnist_and_without_pickle_for_any_batch_size(
    logged: tuple[Path, str, np.ndarray], tmp_path: Path
) -> None:
    home, model, expected = logged
    np.save(tmp_path / "images.npy", data.raw_images(home, 1000))
    arguments = [tracking.uri(home), model, str(tmp_path / "images.npy"), str(tmp_path / "out.npz")]
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **SAFE},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for name, probabilities in np.load(tmp_path / "out.npz").items():
        assert np.allclose(probabilities, expected[: len(probabilities)], atol=1e-5), name


def test_signature_takes_raw_images_and_gives_ten_probabilities(
    logged: tuple[Path, str, np.ndarray],
) -> None:
    import mlflow
    from mlflow.models import get_model_info

    mlflow.set_tracking_uri(tracking.uri(logged[0]))
    signature = get_model_info(logged[1]).signature.to_dict()
    assert json.loads(signature["inputs"]) == [
        {"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, 28, 28]}}
    ]
    assert json.loads(signature["outputs"]) == [
        {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 10]}}
    ]


def test_model_carries_the_metrics_it_earned(logged: tuple[Path, str, np.ndarray]) -> None:
    store = tracking.connect(logged[0])
    model = store.client.get_logged_model(logged[1].removeprefix("models:/"))
    assert {"last/val_accuracy", "last/val_loss"} <= {metric.key for metric in model.metrics}
    assert model.status == "READY"


def test_predict_names_the_class_of_each_picture(
    logged: tuple[Path, str, np.ndarray], tmp_path: Path
) -> None:
    home, _, expected = logged
    run_id = tracking.connect(home).runs()["run_id"].iloc[0]
    pictures = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, image in zip(pictures, data.raw_images(home, 3), strict=True):
        Image.fromarray(image).save(path)
    found = json.loads(command(home, "predict", run_id, *pictures, "--json").stdout)["predictions"]
    assert [each["image"] for each in found] == pictures
    for each, row in zip(found, expected, strict=False):
        assert each["class"] == plots.CLASSES[row.argmax()]
        assert np.allclose(list(each["probabilities"].values()), row, atol=1e-5)
    lines = command(home, "predict", run_id, *pictures).stdout.splitlines()
    assert [line.split()[0] for line in lines] == pictures
    assert plots.CLASSES[expected[0].argmax()] in lines[0]
    refused = command(home, "predict", "champion", *pictures)
    assert (refused.returncode, refused.stderr) == (
        2,
        "fmnist: there is no champion yet; fmnist promote RUN makes one, or name a run\n",
    )


def test_serve_answers_over_http_until_its_command_is_ended(
    logged: tuple[Path, str, np.ndarray],
) -> None:
    home, _, expected = logged
    port, run_id = free_port(), tracking.connect(home).runs()["run_id"].iloc[0]
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join(
        part for part in os.environ["PATH"].split(os.pathsep) if part != here
    )  # as without an activated environment
    command = [sys.executable, "-m", "fmnist", "serve", run_id, "--port", str(port)]
    server = subprocess.Popen(
        command,
        env={**os.environ, "FMNIST_HOME": str(home), "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = server.stdout.readline()
        assert said.startswith(
            f"the model of run {run_id} answers at http://127.0.0.1:{port}/invocations"
        ), server.communicate(timeout=30)[1]
        body = json.dumps({"inputs": data.raw_images(home, 3).tolist()}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        assert np.allclose(answer["predictions"], expected[:3], atol=1e-5)
        for kind, body in STRANGE:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": kind}
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=30)
            told = refused.value.read().decode()
            assert 400 <= refused.value.code < 500, (kind, told)
            assert "Traceback" not in told
            assert sys.prefix not in told
            assert "site-packages" not in told
        assert (
            subprocess.run(
                [*command[:-1], str(port)],
                env={**os.environ, "FMNIST_HOME": str(home)},
                capture_output=True,
            ).returncode
            == 2
        )
    finally:
        server.send_signal(signal.SIGINT)
        _, error = server.communicate(timeout=30)
    assert (server.returncode, error) == (130, "")
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
