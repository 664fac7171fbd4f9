"""What is asked of a server before a run begins: whether it is there, and takes the password."""

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Fmnist

from fmnist import errors, runner

RIGHT = f"Basic {base64.b64encode(b'user:pass:word').decode()}"


class Answer(BaseHTTPRequestHandler):
    """As MLflow's basic-auth app: /health for anybody, all else with the right user and password."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        may = self.path == "/health" or given in (RIGHT, "Bearer token")
        self.send_response(self.server.refusal if not may else 200)  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    found.refusal = 401  # type: ignore[attr-defined]
    threading.Thread(target=found.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{found.server_port}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    yield found
    found.shutdown()
    found.server_close()


def asked() -> None:
    runner._preflight(runner.Context(Path("/nowhere")))


def refused() -> None:
    with pytest.raises(errors.StoreError, match="does not take this user and password") as error:
        asked()
    assert "wrong" not in str(error.value)


def test_a_wrong_password_is_refused_and_a_right_one_taken(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    refused()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass:word")
    asked()
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "wrong")
    refused()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    asked()
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    for pair, taken in (("user:wrong", False), ("user:pass%3Aword", True)):
        address = f"http://{pair}@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        asked() if taken else refused()


def test_what_may_be_taken_elsewhere_is_not_refused(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password pass:word\n")
    asked()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "plugin")
    asked()
    monkeypatch.delenv("MLFLOW_TRACKING_AUTH")
    for status in (403, 404, 500, 503):  # a proxy's own way, or an outage
        server.refusal = status  # type: ignore[attr-defined]
        asked()


def test_the_command_refuses_before_anything_begins(
    server: ThreadingHTTPServer, home: Path, fmnist: Fmnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    result = fmnist("run", "baseline", "-s", "train.epochs=1")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "does not take this user and password" in result.stderr
    assert not (home / "mlruns").exists()
