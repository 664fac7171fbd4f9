"""`fmnist ui`: the real server, on this machine only."""

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Fmnist, free_port
from starlette.applications import Starlette

from fmnist import tracking
from fmnist.guard import Guard

pytestmark = pytest.mark.slow


class Ui(NamedTuple):
    port: int
    process: "subprocess.Popen[str]"
    link: str
    cookie: str


def start(port: int) -> Ui:
    process = subprocess.Popen(
        [sys.executable, "-m", "fmnist", "ui", "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    [link] = re.findall(r"http://\S+", process.stdout.readline())
    assert link.startswith(f"http://127.0.0.1:{port}/?key=")
    assert "#/experiments/1/runs" in link
    return Ui(port, process, link, enter(port, link))


def enter(port: int, link: str) -> str:
    """The cookie that the link leads to."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", link.partition(f":{port}")[2].partition("#")[0])
    response = connection.getresponse()
    assert (response.status, response.headers["Location"]) == (303, "/")
    cookie, *flags = response.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=strict"} <= set(flags)
    return cookie


def stop(ui: Ui) -> None:
    if ui.process.poll() is None:
        ui.process.send_signal(signal.SIGINT)
        ui.process.wait(timeout=30)


@pytest.fixture
def server(fmnist: Fmnist, home: Path) -> Iterator[Ui]:
    result = fmnist("run", "baseline", "-s", "train.epochs=1", "-s", "train.batch_size=2000")
    assert result.returncode == 0
    ui = start(free_port())
    yield ui
    stop(ui)


def ask(
    ui: Ui,
    path: str,
    body: object = None,
    method: str | None = None,
    **headers: str | None,
) -> tuple[int, bytes]:
    """Status and body; with the key unless `cookie` is given."""
    connection = http.client.HTTPConnection("127.0.0.1", ui.port, timeout=20)
    sent = {"Host": f"127.0.0.1:{ui.port}", "Cookie": ui.cookie, "Content-Type": "application/json"}
    sent |= {name.title(): value for name, value in headers.items()}
    method = method or ("GET" if body is None else "POST")
    connection.request(
        method,
        path,
        None if body is None else json.dumps(body),
        {name: value for name, value in sent.items() if value is not None},
    )
    response = connection.getresponse()
    return response.status, response.read()


CALLS = "/ajax-api/2.0/mlflow"


def run_ids(ui: Ui) -> list[str]:
    status, body = ask(ui, f"{CALLS}/runs/search", {"experiment_ids": ["1"]})
    assert status == 200
    return [run["info"]["run_id"] for run in json.loads(body).get("runs", [])]


def test_ui_shows_the_runs_to_this_machine_only_and_stops_with_ctrl_c(server: Ui) -> None:
    [run_id] = run_ids(server)
    assert ask(server, "/")[0] == 200
    image = ask(server, f"/get-artifact?path=figures/learning_curves.png&run_uuid={run_id}")[1]
    assert image.startswith(b"\x89PNG")
    for path in ("../../../mlflow.db", "%2e%2e/%2e%2e/mlflow.db", "/etc/passwd"):
        assert ask(server, f"/get-artifact?path={path}&run_uuid={run_id}")[0] >= 400
    for host in ("evil.com", "10.evil.com", "192.168.evil.example", "10.1.2.3", "127.0.0.1"):
        assert ask(server, "/", host=host)[0] == 403
    rename = {"run_id": run_id, "run_name": "planted"}
    for origin in ("http://evil.com", "null", "http://127.0.0.1:1", "http://localhost"):
        assert ask(server, f"{CALLS}/runs/update", rename, origin=origin)[0] == 403
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=30) == 130
    time.sleep(0.5)
    with pytest.raises(OSError, match="refused"):
        ask(server, "/health")


def test_without_the_key_of_this_start_nothing_is_answered(server: Ui, home: Path) -> None:
    [run_id] = run_ids(server)
    wrong = (None, "", "nonsense", f"fmnist-{server.port}=", f"fmnist-{server.port}=\u00e9")
    for cookie in (*wrong, server.cookie[:-1], server.cookie + "x"):
        for path in ("/", f"{CALLS}/experiments/get?experiment_id=1", "/api/2.0/mlflow/x", "/x"):
            status, body = ask(server, path, cookie=cookie)
            assert (status, b"open the link that `fmnist ui` printed" in body) == (403, True), path
        assert ask(server, f"{CALLS}/runs/search", {}, cookie=cookie)[0] == 403
        assert ask(server, f"{CALLS}/runs/delete", {"run_id": run_id}, cookie=cookie)[0] == 403
    assert ask(server, "/?key=nonsense", cookie=None)[0] == 403
    assert ask(server, "/health", cookie=None)[0] == 200
    key = server.cookie.partition("=")[2]
    written = (home / "mlruns" / "ui.log").read_text()
    arguments = Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert key not in written + arguments  # which others may read
    stop(server)
    again = start(server.port)
    try:
        assert again.cookie != server.cookie
        assert ask(again, "/", cookie=server.cookie)[0] == 403
    finally:
        stop(again)


def test_what_the_pages_do_not_need_is_refused(server: Ui, home: Path) -> None:
    [run_id] = run_ids(server)
    before = [
        path for path in (home / "mlruns").rglob("*") if path.suffix not in (".db-wal", ".db-shm")
    ]
    planted = {"name": "fmnist", "alias": "champion", "version": "1", "source": "file:///tmp"}
    for path in (
        f"upload-artifact?run_uuid={run_id}&path=MLmodel",
        "runs/create",
        "runs/log-metric",
        "runs/log-batch",
        "runs/log-parameter",
        "registered-models/create",
        "registered-models/alias",
        "model-versions/create",
        "experiments/create",
        "logged-models",
        f"logged-models/{run_id}/artifacts",
        "runs//update",
        "gateway-proxy",
    ):
        for base in (CALLS, "/api/2.0/mlflow"):
            for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE"):
                status, body = ask(server, f"{base}/{path}", planted, method)
                assert (status, body) == (403, b"this is not changed through `fmnist ui`"), path
    artifacts = f"/api/2.0/mlflow-artifacts/artifacts/1/{run_id}/x"
    assert ask(server, artifacts, {}, "PUT")[0] == 403
    assert set(before) >= {
        path for path in (home / "mlruns").rglob("*") if path.suffix not in (".db-wal", ".db-shm")
    }
    assert tracking.connect(home).champion() is None


def test_runs_are_renamed_deleted_and_described_in_the_pages(server: Ui, home: Path) -> None:
    [run_id] = run_ids(server)
    origin = f"http://127.0.0.1:{server.port}"
    for path, body in (
        ("runs/update", {"run_id": run_id, "run_name": "renamed"}),
        ("runs/set-tag", {"run_id": run_id, "key": "mlflow.note.content", "value": "mine"}),
        ("runs/delete", {"run_id": run_id}),
        ("runs/restore", {"run_id": run_id}),
    ):
        assert ask(server, f"{CALLS}/{path}", body, origin=origin)[0] == 200
    run = tracking.connect(home).client.get_run(run_id)
    assert (run.info.run_name, run.data.tags["mlflow.note.content"]) == ("renamed", "mine")


def test_a_browser_leaves_out_https_own_port(home: Path, with_store: None) -> None:
    guard = Guard(Starlette(), 80)
    assert {"127.0.0.1", "localhost", "127.0.0.1:80"} <= set(guard.hosts)
    assert "http://127.0.0.1" in guard.origins
    try:
        ui = start(80)
    except ValueError:
        pytest.skip("port 80 is taken, or not for this account")
    try:
        for host in ("127.0.0.1", "localhost", "127.0.0.1:80"):
            assert ask(ui, "/", host=host)[0] == 200
            for origin in ("http://127.0.0.1", "http://localhost"):
                status, _ = ask(
                    ui, f"{CALLS}/runs/search", {"experiment_ids": ["1"]}, host=host, origin=origin
                )
                assert status == 200
        assert ask(ui, "/", host="127.0.0.1:5000")[0] == 403
    finally:
        stop(ui)
