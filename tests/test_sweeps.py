"""Sweep files: what they stand for, and what is said of mistakes in them."""

import json
from pathlib import Path

import jsonschema
import optuna
import pytest
from conftest import REPOSITORY, Fmnist
from ruamel.yaml import YAML

from fmnist import experiments, search, sweeps
from fmnist.errors import SpecError
from fmnist.journal import Result

GRID = """
base: holdout
grid:
  optimizer.lr: [0.003, 0.01]
  model.hidden: [[32], [64, 32]]
seeds: [0, 5]
"""
SEARCH = """
base: holdout
search:
  sampler: {sampler}
  trials: {trials}
  space:
    optimizer.lr: {{low: 1.0e-3, high: 0.3, log: true}}
    train.epochs: {{low: 2, high: 9}}
    model.hidden: {{choices: [[32], [64, 32]]}}
"""


def load(home: Path, text: str) -> sweeps.Sweep:
    (home / "experiments" / "sweeps" / "it.yaml").write_text(text)
    return sweeps.load("it", home)


@pytest.mark.parametrize("name", sweeps.names(REPOSITORY))
def test_shipped_sweeps_are_sound(name: str) -> None:
    sweep = sweeps.load(name, REPOSITORY)
    assert sweep.spec.question
    assert f"EXP={name}" in (REPOSITORY / sweeps.place(name)).read_text()
    assert sweep.spec.search or sweep.grid()


@pytest.mark.parametrize("name", sweeps.names(REPOSITORY))
def test_editors_know_sweeps(name: str) -> None:
    import schema as editors  # of tools/

    folder = REPOSITORY / "experiments" / "sweeps"
    assert json.loads((folder / "schema.json").read_text()) == editors.sweep_schema()
    text = (folder / f"{name}.yaml").read_text()
    validator = jsonschema.Draft202012Validator(editors.sweep_schema())
    assert not list(validator.iter_errors(YAML(typ="safe").load(text)))
    assert list(validator.iter_errors(YAML(typ="safe").load(text.replace("base:", "bass:"))))


def test_a_grid_is_every_combination_with_every_seed(home: Path) -> None:
    trials = load(home, GRID).grid()
    found = [
        (t.resolved.spec.train.seed, t.resolved.spec.optimizer.lr, t.resolved.spec.model.hidden)
        for t in trials
    ]
    assert found == [
        (seed, lr, hidden)
        for seed in (0, 5)
        for lr in (0.003, 0.01)
        for hidden in ((32,), (64, 32))
    ]
    assert [trial.number for trial in trials] == list(range(8))
    assert trials[3].name == "holdout lr=0.01 hidden=[64, 32] s0"


def test_a_trial_is_the_run_that_the_same_overrides_give(home: Path) -> None:
    trial = load(home, GRID).grid()[-1]
    alone = experiments.load(
        "holdout", ["optimizer.lr=0.01", "model.hidden=[64, 32]", "train.seed=5"], home
    )
    assert trial.fingerprint == alone.spec.fingerprint
    assert trial.resolved.spec.tracking.log_every == 10
    settings = "--set optimizer.lr=0.01 --set 'model.hidden=[64, 32]' --set train.seed=5 --set tracking.log_every=10"
    assert trial.resolved.command == f"fmnist run holdout {settings}"


def test_points_that_are_the_same_run_are_one_trial(home: Path) -> None:
    trials = load(home, "base: holdout\ngrid:\n  optimizer.lr: [0.01, 1.0e-2, 0.02]\n").grid()
    assert [trial.resolved.spec.optimizer.lr for trial in trials] == [0.01, 0.02]
    assert [trial.number for trial in trials] == [0, 1]


def test_log_every_is_the_bases_where_that_says_it(home: Path) -> None:
    (home / "experiments" / "dense.yaml").write_text(
        "extends: holdout\ntracking:\n  log_every: 2\n"
    )
    [trial] = load(home, "base: dense\ngrid:\n  optimizer.lr: [0.01]\n").grid()
    assert trial.resolved.spec.tracking.log_every == 2


PLACE = "experiments/sweeps/it.yaml"
MISTAKES = {
    "base: holdout\n": f"{PLACE}: grid: give either a grid or a search",
    "base: baseline\ngrid:\n  optimizer.lr: [0.1]\n": f"{PLACE}:1: base: baseline is validated on the test images, by which nothing may be chosen",
    "base: nowhere\ngrid:\n  optimizer.lr: [0.1]\n": "unknown experiment 'nowhere'",
    "base: holdout\ngrdi:\n  optimizer.lr: [0.1]\n": f"{PLACE}:2: grdi: unknown key, did you mean 'grid'?",
    "base: holdout\ngrid:\n  optimizer.lr: 0.1\n": f"{PLACE}:3: grid.optimizer.lr: given 0.1; it should be a list",
    "base: holdout\ngrid:\n  optimizer.lr: []\n": "given an empty list; give at least one value",
    "base: holdout\ngrid:\n  optimizer.rl: [0.1]\n": f"{PLACE}: optimizer.rl=0.1: optimizer.rl: unknown key; allowed here: lr",
    "base: holdout\ngrid:\n  optimizer.lr: [0.1, -1]\n": f"{PLACE}: optimizer.lr=-1: optimizer.lr: given -1; it should be greater than 0",
    "base: holdout\ngrid:\n  tracking.log_every: [1, 2]\n": "tracking.log_every: only fields that define a run can be swept",
    "base: holdout\ngrid:\n  data.holdout: [5000, 10000]\n": "data.holdout: trials that are validated on other images can't be compared",
    "base: holdout\ngrid:\n  train.seed: [1]\nseeds: [2]\n": "grid.train.seed: is what `seeds` is for",
    "base: holdout\nseeds: [1, 2]\nsearch:\n  space:\n    optimizer.lr: {low: 0.1, high: 0.2}\n": "a search trains each trial once, give one seed",
    "base: holdout\nsearch:\n  space:\n    optimizer.lr: {low: 0.2, high: 0.1}\n": "low 0.2, high 0.1: give both, low below high",
    "base: holdout\nsearch:\n  space:\n    optimizer.lr: {}\n": "give low and high, or choices",
    "base: holdout\nsearch:\n  space:\n    optimizer.lr: {low: 0, high: 1, log: true}\n": "log: only a range with low above 0",
    "base: holdout\nsearch:\n  space:\n    optimizer.lr: {lo: 0, high: 1}\n": "optimizer.lr.lo: unknown key, did you mean 'low' or 'log'?",
    "base: holdout\nsearch:\n  space:\n    optimizer.lr: {low: 0.1, high: 2000.0}\n": "it should be less than or equal to 1000",
    "base: holdout\nsearch:\n  sampler: bayes\n  space:\n    optimizer.lr: {low: 0.1, high: 0.2}\n": "search.sampler: given 'bayes'",
    "base: holdout\ngrid:\n  train.seed: ["
    + ", ".join(map(str, range(101)))
    + "]\n  train.epochs: ["
    + ", ".join(map(str, range(1, 101)))
    + "]\n": "makes 10,100 trials; a sweep has at most 10,000",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_told(home: Path, text: str) -> None:
    with pytest.raises(SpecError) as error:
        load(home, text).grid()
    assert MISTAKES[text] in str(error.value)


def test_an_unknown_sweep_is_told_in_a_line(fmnist: Fmnist) -> None:
    result = fmnist("sweep", "sweep-rl")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("fmnist: unknown sweep 'sweep-rl', did you mean 'sweep-lr'")
    result = fmnist("show", "sweep-lr", "--set", "optimizer.lr=1")
    assert (result.returncode, "--set is for experiments" in result.stderr) == (2, True)
    result = fmnist("sweep", "sweep-lr", "--on", "slurm")
    assert (result.returncode, "give local, or ray" in result.stderr) == (2, True)


# ---- searches


def ask_all(sweep: sweeps.Sweep) -> list[sweeps.Trial]:
    assert sweep.spec.search
    study = search.Study(sweep, sweep.spec.search)
    found = []
    while trial := study.ask():
        found.append(trial)
    return found


def test_a_random_search_is_the_same_trials_wherever_and_whenever_it_is_asked(home: Path) -> None:
    sweep = load(home, SEARCH.format(sampler="random", trials=6))
    assert sweep.spec.search
    first = ask_all(sweep)
    (home / "mlruns" / "searches.db").unlink()
    again: list[sweeps.Trial] = []
    while len(again) < 6:  # two that take turns, and stop in between
        for study in [search.Study(sweep, sweep.spec.search) for _ in range(2)]:
            if trial := study.ask():
                again.append(trial)
                study.tell(trial.number, Result("finished", "", 0.5 + 0.01 * len(again)))
    assert [trial.settings for trial in again] == [trial.settings for trial in first]
    assert len({trial.fingerprint for trial in first}) == 6
    assert {type(trial.settings["train.epochs"]) for trial in first} == {int}


def test_more_trials_go_on_with_a_search_and_another_space_is_another(home: Path) -> None:
    first = ask_all(load(home, SEARCH.format(sampler="tpe", trials=3)))
    more = ask_all(load(home, SEARCH.format(sampler="tpe", trials=5)))
    assert [trial.number for trial in first + more] == [0, 1, 2, 3, 4]
    other = ask_all(load(home, SEARCH.format(sampler="tpe", trials=2).replace("0.3", "0.4")))
    assert [trial.number for trial in other] == [0, 1]


def test_a_search_knows_what_was_asked_and_what_came_out(home: Path) -> None:
    sweep = load(home, SEARCH.format(sampler="tpe", trials=4))
    assert sweep.spec.search
    asked = ask_all(sweep)
    study = search.Study(sweep, sweep.spec.search)
    assert [trial.settings for trial in study.open()] == [trial.settings for trial in asked]
    study.tell(0, Result("finished", "", 0.8))
    study.tell(0, Result("finished", "", 0.1))  # the first word counts
    study.tell(1, Result("diverged", ""))
    study.prune(2, 1000, 0.5)
    study.tell(2, Result("pruned", ""))
    assert [trial.number for trial in study.open()] == [3]
    assert {trial.number: (result.outcome, result.accuracy) for trial, result in study.settled()} == {
        0: ("finished", 0.8), 1: ("finished", search.GUESSING), 2: ("pruned", 0.5),
    }  # fmt: skip


def test_showing_a_search_writes_nothing(fmnist: Fmnist, home: Path) -> None:
    sweep = load(home, SEARCH.format(sampler="random", trials=3))
    assert sweep.spec.search
    shown = json.loads(fmnist("show", "it", "--json").stdout)
    assert (shown["total"], shown["missing"], shown["trials"]) == (3, 3, [])
    assert not (home / "mlruns").exists()
    study = search.Study(sweep, sweep.spec.search)
    first = study.ask()
    assert first
    before = (home / "mlruns" / "searches.db").read_bytes()
    copy = search.Study(sweep, sweep.spec.search, copy=True)
    assert [trial.settings for trial in copy.open()] == [first.settings]
    copy.tell(first.number, Result("finished", "", 0.5))
    assert [trial.name for trial, _ in copy.settled()] == [first.name]
    assert [row["name"] for row in json.loads(fmnist("show", "it", "--json").stdout)["trials"]] == [
        first.name
    ]
    assert (home / "mlruns" / "searches.db").read_bytes() == before
    assert study.settled() == []


def test_a_file_of_searches_of_no_use_is_told_in_one_line(fmnist: Fmnist, home: Path) -> None:
    assert fmnist("show", "search-recipe").returncode == 0
    path = home / "mlruns" / "searches.db"
    path.parent.mkdir(exist_ok=True)
    optuna.storages.RDBStorage(f"sqlite:///{path}")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for page in range(2, len(whole) // 4096):
        damaged[page * 4096 : page * 4096 + 200] = bytes(200)
    for content in (b"hello\n" * 1000, b"nonsense", whole[: len(whole) // 2], bytes(damaged)):
        path.write_bytes(content)
        for arguments in (("show", "search-recipe"), ("sweep", "search-recipe")):
            result = fmnist(*arguments)
            assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
            assert f"{path} can't be used" in result.stderr
        assert path.read_bytes() == content


def test_a_trial_that_is_far_below_the_others_is_pruned(home: Path) -> None:
    sweep = load(home, SEARCH.format(sampler="random", trials=8))
    assert sweep.spec.search
    study = search.Study(sweep, sweep.spec.search)
    for accuracy in (0.80, 0.81, 0.82, 0.83, 0.84):
        trial = study.ask()
        assert trial
        assert not any(study.prune(trial.number, 1000 * step, accuracy) for step in range(32))
        study.tell(trial.number, Result("finished", "", accuracy))
    poor, good = study.ask(), study.ask()
    assert poor
    assert good
    assert [study.prune(poor.number, 1000 * step, 0.3) for step in (10, 20)] == [False, True]
    assert not study.prune(good.number, 20_000, 0.9)


def test_importances_find_the_field_that_matters(home: Path) -> None:
    sweep = load(home, SEARCH.format(sampler="random", trials=30))
    results = [
        (trial.settings, 0.5 + float(trial.settings["optimizer.lr"])) for trial in ask_all(sweep)
    ]
    found = search.importances(sweep, results)
    assert max(found, key=lambda path: found[path]) == "optimizer.lr"
    assert sum(found.values()) == pytest.approx(1)
    assert search.importances(sweep, results[:1]) == {}
