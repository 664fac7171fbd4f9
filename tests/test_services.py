"""Against real services: MLflow with passwords on PostgreSQL and an S3 store, started by deploy/server.sh, and a Ray cluster of two nodes."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPOSITORY, command, free_port, make_home, start, stop_sidecar, wait_for

from fmnist import journal, moving, state, sweeps, tracking

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
TINY = "extends: holdout\ntrain:\n  epochs: {epochs}\n  batch_size: {batch}\n  eval_every: {every}\nmodel:\n  hidden: [32]\n"
GRID = "base: tiny\ngrid:\n  optimizer.lr: [0.01, 0.05]\nseeds: [0, 1, 2]\n"
BIN = Path(sys.executable).parent


@dataclass
class Server:
    address: str
    password: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }


def as_postgres(*words: str) -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["runuser", "-u", "postgres", "--", *words] if os.getuid() == 0 else list(words)


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A new PostgreSQL with the databases `runs` and `users`; gives the address without a database."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    tools = found[-1] if found else Path(str(shutil.which("initdb"))).parent
    folder, port = Path(f"/tmp/fmnist-postgres-{secrets.token_hex(4)}"), free_port()
    folder.mkdir()
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    where = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(
        as_postgres(
            str(tools / "initdb"),
            "-D",
            str(folder / "data"),
            "-A",
            "trust",
            "-U",
            "fmnist",
            "--no-sync",
        ),
        **where,
    )
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c max_connections=200"
    control = as_postgres(
        str(tools / "pg_ctl"), "-D", str(folder / "data"), "-l", str(folder / "log"), "-w"
    )
    subprocess.run([*control, "-o", options, "start"], **where)
    try:
        for name in ("runs", "users"):
            subprocess.run(
                as_postgres(
                    str(tools / "createdb"),
                    "-h",
                    "127.0.0.1",
                    "-p",
                    str(port),
                    "-U",
                    "fmnist",
                    name,
                ),
                **where,
            )
        yield f"postgresql+psycopg://fmnist@127.0.0.1:{port}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], cwd=folder, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server with the bucket `runs`."""
    port = free_port()
    server = subprocess.Popen(
        [BIN / "moto_server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(address))
        import boto3

        keys = {
            "aws_access_key_id": "key",
            "aws_secret_access_key": "secret",
            "region_name": "us-east-1",
        }
        boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="runs")
        yield address
    finally:
        server.terminate()
        server.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server(databases: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    password, port, log = (
        secrets.token_hex(8),
        free_port(),
        tmp_path_factory.mktemp("server") / "log",
    )
    settings = {
        "DATABASE": f"{databases}/runs", "AUTH_DATABASE": f"{databases}/users", "BUCKET": "s3://runs", "ADMIN_PASSWORD": password,
        "SECRET_KEY": "x" * 32, "PORT": str(port), "MLFLOW_S3_ENDPOINT_URL": s3, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }  # fmt: skip
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [REPOSITORY / "deploy" / "server.sh"],
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(
            lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/health"), 120
        )
        assert process.poll() is None, log.read_text()[-3000:]
        yield Server(f"http://127.0.0.1:{port}", password)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    home = make_home(tmp_path)
    lay_out(home)
    monkeypatch.setenv("FMNIST_HOME", str(home))
    yield home
    stop_sidecar(home)


def lay_out(home: Path, epochs: int = 1, batch: int = 500, every: int = 20) -> None:
    (home / "experiments" / "tiny.yaml").write_text(
        TINY.format(epochs=epochs, batch=batch, every=every)
    )
    (home / "experiments" / "sweeps" / "it.yaml").write_text(GRID)


@pytest.fixture
def there(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    return server


def of_sweep(store: tracking.Store, home: Path) -> pd.DataFrame:
    """The runs of the sweep's trials."""
    runs = store.runs(status=None)
    if "t/fingerprint" not in runs:  # an empty store has no columns of tags
        return runs
    return runs[
        runs["t/fingerprint"].isin([trial.fingerprint for trial in sweeps.load("it", home).grid()])
    ]


def test_two_workers_against_a_server_store_every_point_and_are_compared(
    place: Path, there: Server
) -> None:
    result = command(place, "sweep", "it", "--jobs", "2", "--json")
    assert result.returncode == 0, result.stderr
    store = tracking.connect(place)
    runs = of_sweep(store, place)
    assert (len(runs), set(runs["status"])) == (6, {"FINISHED"})
    for run_id in runs["run_id"]:
        history = [point.step for point in store.client.get_metric_history(run_id, "train/loss")]
        assert history == list(range(10, 101, 10))
        assert len(store.curves(run_id)) == 101
    again = command(place, "sweep", "it", "--json")
    assert (again.returncode, len(of_sweep(store, place))) == (0, 6)

    compared = command(place, "compare", "tiny lr=0.01", "tiny lr=0.05")
    assert compared.returncode == 0, compared.stderr
    assert "tiny lr=0.05 is better" in compared.stdout
    reported = command(place, "report", "tiny lr=0.01", "tiny lr=0.05")
    assert reported.returncode == 0, reported.stderr
    assert (place / "reports" / "report.html").stat().st_size > 100_000
    wait_for(
        lambda: not state.state_folders(place)
    )  # each goes at the carrier's next look after its run was closed


def test_a_wrong_password_is_told(
    place: Path, there: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    result = command(place, "runs")
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert "authenticated" in result.stderr
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert command(place, "run", "tiny").returncode == 0
    result = command(place, "sync", "--to", there.address)
    assert result.returncode == 2
    assert "no MLflow server can be used at" in result.stderr


def test_a_local_store_moves_to_a_server(
    place: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lr in ("0.02", "0.03"):
        result = command(place, "run", "tiny", "-s", f"optimizer.lr={lr}", "--seeds", "2")
        assert result.returncode == 0, result.stderr
    assert (
        command(place, "promote", tracking.connect(place).runs()["run_id"].iloc[0]).returncode == 0
    )
    login = {
        key: value for key, value in server.environment.items() if key != "MLFLOW_TRACKING_URI"
    }
    result = command(place, "sync", "--to", server.address, "--json", **login)
    assert result.returncode == 0, result.stderr
    moved = json.loads(result.stdout)["moved"]
    assert len(moved) == 4
    assert all(
        run["problem"] is None and run["points"] > 200 and run["files"] >= 7 for run in moved
    )
    here = tracking.connect(place)
    for key, value in login.items():
        monkeypatch.setenv(key, value)
    far = tracking.server(place, server.address)
    new = {run["run_id"]: run["there"] for run in moved}
    for run_id, its in new.items():
        before, after = here.client.get_run(run_id), far.client.get_run(its)
        assert after.data.params == before.data.params
        assert after.data.metrics == before.data.metrics
        assert (after.info.start_time, after.info.end_time, after.info.status) == (
            before.info.start_time,
            before.info.end_time,
            "FINISHED",
        )
        assert [i.dataset.digest for i in after.inputs.dataset_inputs] == [
            i.dataset.digest for i in before.inputs.dataset_inputs
        ]
        for key in ("train/loss", "val/accuracy"):
            points = [
                [(p.step, p.value, p.timestamp) for p in store.client.get_metric_history(i, key)]
                for store, i in ((here, run_id), (far, its))
            ]
            assert points[0] == points[1]
        pd.testing.assert_frame_equal(here.curves(run_id), far.curves(its))
        pd.testing.assert_frame_equal(here.predictions(run_id), far.predictions(its))
    champion = far.champion()
    assert champion is not None
    assert champion.run_id == new[here.champion().run_id]  # type: ignore[union-attr]
    groups = far.client.search_runs(
        [e.experiment_id for e in far.client.search_experiments()], "tags.kind = 'group'"
    )
    parents = {far.client.get_run(its).data.tags["mlflow.parentRunId"] for its in new.values()}
    assert parents <= {run.info.run_id for run in groups}

    again = json.loads(command(place, "sync", "--to", server.address, "--json", **login).stdout)[
        "moved"
    ]
    assert {run["there"] for run in again} == set(new.values())
    far.client.delete_tag(new[moved[0]["run_id"]], moving.WHOLE)  # as if it had broken off
    again = json.loads(command(place, "sync", "--to", server.address, "--json", **login).stdout)[
        "moved"
    ]
    assert len({run["there"] for run in again} - set(new.values())) == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    picture = place / "picture.png"
    from PIL import Image

    from fmnist import data

    Image.fromarray(data.raw_images(place, 2)[1]).save(picture)
    predicted = command(place, "predict", "champion", str(picture))
    assert predicted.returncode == 0, predicted.stderr
    assert str(picture) in predicted.stdout


# ---- Ray


@dataclass
class Node:
    process: "subprocess.Popen[bytes]"


def ray_node(*arguments: str, home: Path) -> Node:
    """A node of its own, as on another machine."""
    words = [BIN / "ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats", *arguments]
    environment = {**os.environ, "FMNIST_HOME": str(home)}
    return Node(
        subprocess.Popen(
            words,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def end(node: Node) -> None:
    """As if the machine was cut off: every process of the node at once."""
    if node.process.poll() is None:
        os.killpg(node.process.pid, signal.SIGKILL)
    node.process.wait()


@pytest.mark.parametrize("shared", [True, False], ids=["shared-home", "homes-of-their-own"])
def test_a_ray_cluster_that_loses_a_node_gives_what_this_machine_gives(
    shared: bool, place: Path, server: Server, tmp_path: Path
) -> None:
    lay_out(place, epochs=4, batch=100, every=250)
    (tmp_path / "other").mkdir()
    other = place if shared else make_home(tmp_path / "other")
    lay_out(other, epochs=4, batch=100, every=250)
    seeds = "[10, 11, 12, 13]" if shared else "[20, 21, 22, 23]"  # the server has each case's runs
    grid = GRID.replace("[0.01, 0.05]", "[0.005, 0.01, 0.05]").replace("[0, 1, 2]", seeds)
    (place / "experiments" / "sweeps" / "it.yaml").write_text(grid)
    port = free_port()
    temporary = f"/tmp/fmnist-ray-{secrets.token_hex(3)}"  # sockets there must have short names
    nodes = [
        ray_node(
            "--head",
            f"--port={port}",
            "--include-dashboard=false",
            f"--temp-dir={temporary}",
            home=place,
        )
    ]
    try:
        wait_for(lambda: listens(port))
        time.sleep(3)
        nodes.append(ray_node(f"--address=127.0.0.1:{port}", home=other))
        for key, value in server.environment.items():
            os.environ[key] = value
        try:
            process = start(
                "sweep",
                "it",
                "--on",
                "ray",
                "--address",
                f"127.0.0.1:{port}",
                "--jobs",
                "2",
                "--json",
            )
            store = tracking.connect(place)
            while len(of_sweep(store, place)) < 6 and process.poll() is None:
                time.sleep(1)
            end(nodes[1])
            if not shared:
                stop_sidecar(other)  # it would outlive its node, since it has a session of its own
            out, error = process.communicate(timeout=400)
            assert process.returncode == 0, error[-3000:]
            assert [trial["outcome"] for trial in json.loads(out)["trials"]] == ["finished"] * 12
            runs = of_sweep(store, place)
            finished = runs[runs["t/outcome"] == "finished"]
            assert (len(finished), finished["t/fingerprint"].is_unique) == (12, True)
            if shared:
                assert len(runs) == 12  # the run that was lost was gone on with
            frames = {
                run["t/fingerprint"]: store.curves(run["run_id"]) for _, run in finished.iterrows()
            }
        finally:
            for key in server.environment:
                os.environ.pop(key, None)
    finally:
        for node in nodes:
            end(node)
        shutil.rmtree(temporary, ignore_errors=True)
    alone = tmp_path / "alone"
    alone.mkdir()
    home = make_home(alone)
    lay_out(home, epochs=4, batch=100, every=250)
    (home / "experiments" / "sweeps" / "it.yaml").write_text(grid)
    assert command(home, "sweep", "it", "--jobs", "2", "--no-sync").returncode == 0
    folders = state.state_folders(home)
    assert len(folders) == 12
    for folder in folders:
        curves = journal.curves(folder.spec, journal.read(folder.path / "journal")[0])
        there = frames[folder.run["fingerprint"]]
        pd.testing.assert_frame_equal(
            curves.drop(columns="elapsed_s"), there.drop(columns="elapsed_s"), check_exact=True
        )


def test_a_cluster_that_is_not_there_is_told(place: Path, server: Server) -> None:
    (place / "experiments" / "sweeps" / "it.yaml").write_text(
        GRID.replace("[0, 1, 2]", "[30]")
    )  # which the server has no run of
    result = command(place, "sweep", "it", "--on", "ray")
    assert (result.returncode, "set MLFLOW_TRACKING_URI" in result.stderr) == (2, True)
    tiny = place / "experiments" / "tiny.yaml"
    plain = tiny.read_text()
    tiny.write_text(f"{plain}compute:\n  device: cuda:1\n")
    result = command(place, "sweep", "it", "--on", "ray", **server.environment)
    assert (result.returncode, "given cuda:1; Ray says which" in result.stderr) == (2, True)
    tiny.write_text(plain)
    result = command(
        place,
        "sweep",
        "it",
        "--on",
        "ray",
        "--address",
        f"127.0.0.1:{free_port()}",
        **server.environment,
    )
    assert result.returncode == 2
    assert "no cluster answers (" in result.stderr
    assert "Connection refused" in result.stderr
    assert "Traceback" not in result.stderr
