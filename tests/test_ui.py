"""`fmnist ui`: the real server, on this machine only."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Fmnist, free_port

from fmnist import tracking

pytestmark = pytest.mark.slow


@pytest.fixture
def server(fmnist: Fmnist, home: Path) -> Iterator[tuple[int, "subprocess.Popen[str]"]]:
    assert (
        fmnist("run", "baseline", "-s", "train.epochs=1", "-s", "train.batch_size=2000").returncode
        == 0
    )
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "fmnist", "ui", "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert f"http://127.0.0.1:{port}/#/experiments/1/runs" in process.stdout.readline()
    yield port, process
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def ask(
    port: int,
    path: str,
    host: str | None = None,
    origin: str | None = None,
    body: dict | None = None,
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {
        "Host": host or f"127.0.0.1:{port}",
        **({"Origin": origin} if origin else {}),
        "Content-Type": "application/json",
    }
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    response = connection.getresponse()
    return response.status, response.read()


def test_ui_shows_the_runs_to_this_machine_only_and_stops_with_ctrl_c(
    server: tuple[int, "subprocess.Popen[str]"], home: Path
) -> None:
    port, process = server
    status, body = ask(port, "/api/2.0/mlflow/runs/search", body={"experiment_ids": ["1"]})
    runs = json.loads(body)["runs"]
    assert (status, [run["info"]["run_name"] for run in runs]) == (
        200,
        ["baseline epochs=1 batch_size=2000"],
    )
    run_id = runs[0]["info"]["run_id"]
    assert ask(port, "/")[0] == 200
    assert ask(port, f"/get-artifact?path=figures/learning_curves.png&run_uuid={run_id}")[
        1
    ].startswith(b"\x89PNG")
    for path in ("../../../mlflow.db", "%2e%2e/%2e%2e/mlflow.db", "/etc/passwd"):
        assert ask(port, f"/get-artifact?path={path}&run_uuid={run_id}")[0] >= 400
    for host in ("evil.com", "10.evil.com", "192.168.evil.example", "10.1.2.3"):
        assert ask(port, "/", host=host)[0] == 403
    for origin in ("http://evil.com", "null"):
        assert (
            ask(
                port, "/api/2.0/mlflow/experiments/create", origin=origin, body={"name": "planted"}
            )[0]
            == 403
        )
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    time.sleep(0.5)
    with pytest.raises(OSError, match="refused"):
        ask(port, "/health")


def test_server_binds_to_loopback_with_explicit_hosts() -> None:
    command = tracking.server_command(Path("root"), 5000)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--allowed-hosts") + 1] == "127.0.0.1:5000,localhost:5000"
    assert "--no-serve-artifacts" in command
    assert os.environ.get("MLFLOW_TRACKING_URI") is None
