"""Uploads to a server: one put back from a copy, answers that are lost on their way, and two copies of a folder."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import free_port, stored_steps, wait_for
from test_uploads import begin, end, failed, train

from fmnist import moving, sidecar, state, tracking
from fmnist.journal import Point
from fmnist.state import Journal, StateFolder

pytestmark = pytest.mark.slow


@dataclasses.dataclass
class Server:
    """An MLflow server of this test, whose database can be put back."""

    folder: Path
    empty: Path
    port: int
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = f"sqlite:///{self.folder}/server.db"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        command += ["--artifacts-destination", str(self.folder / "kept"), "--workers", "1"]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                env={**os.environ, **tracking.SETTINGS},
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        wait_for(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
            return True
        return False

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "server.db")
    made = Server(folder, empty_store, free_port())
    made.start()
    yield made
    made.stop()


@pytest.fixture
def server(shared: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared.uri)
    (home / "mlruns").mkdir()
    return shared


def runs_of(key: str, home: Path) -> dict[str, tuple[str, list[int]]]:
    """Status and steps of the runs whose key begins like this."""
    store = tracking.connect(home)
    runs = store.runs(status=None)
    of = runs[runs["t/run_key"].str.startswith(key)] if len(runs) else runs
    return {
        run["run_id"]: (run["status"], stored_steps(store, run["run_id"]))
        for _, run in of.iterrows()
    }


STEPS = [*range(1, 11)]


def test_a_server_put_back_from_a_copy_gets_the_whole_run_again(server: Server, home: Path) -> None:
    server.stop()
    before = shutil.copy(server.folder / "server.db", home / "before.db")
    server.start()
    folder = failed(home, resumable=True)
    sidecar.sync(home, lambda text: None)
    [(before_id, found)] = runs_of(folder.path.name, home).items()
    assert found == ("FAILED", STEPS)
    server.stop()
    shutil.copy(before, server.folder / "server.db")
    server.start()
    assert runs_of(folder.path.name, home) == {}
    sidecar.sync(home, lambda text: None)
    [(run_id, found)] = runs_of(folder.path.name, home).items()
    assert (run_id != before_id, found) == (True, ("FAILED", STEPS))
    assert folder.resumable


# ---- answers that are lost


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server; the answer to the first request of each of these calls gets lost."""

    daemon_threads = True

    def __init__(self, behind: str, calls: set[str]) -> None:
        self.behind, self.calls = behind, set(calls)
        super().__init__(("127.0.0.1", 0), Pass)


class Pass(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        request = urllib.request.Request(
            self.server.behind + self.path, body or None, headers, method=self.command
        )
        try:
            with urllib.request.urlopen(request) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        call = self.path.partition("?")[0].partition("/mlflow/")[2]
        if self.command == "POST" and call in self.server.calls:
            self.server.calls.remove(call)
            status, content = 502, b"bad gateway"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def losing(server: Server, monkeypatch: pytest.MonkeyPatch, *calls: str) -> Iterator[Proxy]:
    proxy = Proxy(server.uri, set(calls))
    threading.Thread(target=proxy.serve_forever, args=[0.01], daemon=True).start()
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.server_port}")
        yield proxy
    proxy.shutdown()
    proxy.server_close()
    assert not proxy.calls, "not every answer that was to be lost was asked for"


def test_a_lost_answer_makes_no_second_run(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with losing(server, monkeypatch, "runs/create"):
        folder = failed(home)
        assert [run["error"] for run in sidecar.sync(home, lambda text: None)] == [None]
    assert [*runs_of(folder.path.name, home).values()] == [("FAILED", STEPS)]


def test_a_lost_answer_makes_no_second_derived_run(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with losing(server, monkeypatch, "runs/create"):
        store = tracking.connect(home)
        points = [Point("last/val_loss", 0.5, 1, 0)]
        experiment = store.experiment("derived")
        new = tracking.Derived(experiment, "group", "key", "name", {}, {}, points, [], 1, 2, "FINISHED", "x")  # fmt: skip
        store.replace(new, tmp_path)
    assert len(tracking.connect(home).derived(experiment, "group", "key")) == 1


def test_a_lost_answer_makes_no_second_model_or_version(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import torch

    from fmnist import experiments

    class Module(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :10].float() / 255

    with losing(server, monkeypatch, "logged-models", "model-versions/create"):
        store = tracking.connect(home)
        experiment = store.experiment("models")
        run_id = store.client.create_run(experiment).info.run_id
        spec = experiments.load("baseline", root=home).spec
        images = np.zeros((2, 28, 28), "uint8")
        store.log_model(run_id, Module(), images, 1, {"last/val_loss": 1.0}, 1, spec, "0" * 64)
        version = store.register(run_id, "for a test", {})
    store = tracking.connect(home)
    [model] = store.client.search_logged_models([experiment])
    assert model.status == "READY"
    assert [*store._versions(run_id)] == [str(version)]


def test_a_lost_answer_makes_no_second_run_where_a_store_is_moved(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as local:
        local.delenv("MLFLOW_TRACKING_URI")
        folder = failed(home)
        sidecar.sync(home, lambda text: None)
        here = tracking.connect(home)
        with losing(server, monkeypatch, "runs/create") as proxy:
            there = tracking.server(home, f"http://127.0.0.1:{proxy.server_port}")
            assert [each.problem for each in moving.move(here, there)] == [None]
    assert [*runs_of(folder.path.name, home).values()] == [("FAILED", STEPS)]


def test_a_request_that_is_refused_is_not_repeated() -> None:
    class Refused(Exception):
        def get_http_status_code(self) -> int:
            return 403

    asked: list[int] = []

    def create() -> int:
        asked.append(1)
        raise Refused

    with pytest.raises(Refused):
        tracking.made(create, lambda: None)
    assert asked == [1]


# ---- two copies of a folder


def interrupted(home: Path) -> StateFolder:
    written = begin(home, state.specs.store_name())
    train(written, 1, 6)
    end(written, resumable=True)
    written.release()
    return StateFolder.at(written.folder)


def go_on(folder: StateFolder) -> None:
    """Continue a run to its end, at another time than any other that does so."""
    written = Journal.resume(folder)
    written.event("resume", step=6, environment={})
    train(written, 7, 4)
    end(written)
    written.release()


@pytest.mark.parametrize("uploaded_before", [True, False])
def test_a_copy_that_was_continued_too_is_a_run_of_its_own(
    uploaded_before: bool, server: Server, home: Path, tmp_path: Path
) -> None:
    folder = interrupted(home)
    if uploaded_before:
        sidecar.sync(home, lambda text: None)
    other = Path(shutil.copytree(home, tmp_path / "copy", symlinks=True))
    [copied] = state.state_folders(other)
    go_on(folder)
    sidecar.sync(home, lambda text: None)
    [(first, found)] = runs_of(folder.path.name, home).items()
    assert found == ("FAILED", STEPS)
    said: list[str] = []
    if uploaded_before:  # there is nothing new in it: the run that others continued is left alone
        assert sidecar.sync(other, said.append) == []
    go_on(copied)
    sidecar.sync(other, said.append)
    both = runs_of(folder.path.name, home)
    assert len(both) == 2
    assert set(both) > {first}
    assert [*both.values()] == [("FAILED", STEPS)] * 2
    assert f"to run {first[:8]}; this one is recorded as a run of its own" in said[0]
    assert not folder.path.exists()
    assert not copied.path.exists()


def test_two_copies_that_train_at_once_part(server: Server, home: Path, tmp_path: Path) -> None:
    folder = interrupted(home)
    sidecar.sync(home, lambda text: None)
    other = Path(shutil.copytree(home, tmp_path / "copy", symlinks=True))
    [copied] = state.state_folders(other)
    written = {each.path: Journal.resume(each) for each in (folder, copied)}
    carriers = [
        sidecar.Carrier(folder, tracking.connect(home)),
        sidecar.Carrier(copied, tracking.connect(other)),
    ]
    act: list[Callable[[Journal], None]] = [
        lambda journal: journal.event("resume", step=6, environment={}),
        lambda journal: train(journal, 7, 4),
        end,
    ]
    for each in act:
        for carrier in carriers:
            each(written[carrier.folder.path])
            carrier._send_due = 0
            carrier.advance()
            carrier.advance()
    for journal in written.values():
        journal.release()
    assert [*runs_of(folder.path.name, home).values()] == [("FAILED", STEPS)] * 2
