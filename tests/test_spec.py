"""What an experiment file means: its layers and origins, its fingerprint, its plan, and how each mistake is told."""

import json
import re
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import schema as editors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from fmnist import experiments
from fmnist import spec as specs
from fmnist.errors import SpecError, StoreError

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SHIPPED = experiments.names(EXPERIMENTS.parent)
BASELINE = (EXPERIMENTS / "baseline.yaml").read_text(encoding="utf-8")

FINGERPRINTS = {
    "best": "4cd601744d492f724e2e4542fa41865dded27531fad757ee12cf2ef1d968bc00",
    "baseline": "6231b3820edbb6683211480dacc825feebb57f26c500fbadda01410eb340a51f",
    "epochs-40": "78a52ba3053098f667db884b1e6669bc3e3b0f804df4ad7656985e5730b77a17",
    "holdout": "cf555c54f52290c536cd1ccff05a433d338fd59025b295f9df542de8a32451cb",
    "holdout-epochs-40": "ec112fd1210e5ab0045ff37bd4b72e3734d62fa707e667d83390188791f33018",
    "holdout-lr-0.0003": "01ebe67a4b0241df9f95e89b04408ff8f0b737dc0be0ddc795e4909701489548",
    "holdout-lr-0.003": "d5258c68053e96e5ec7ecad1d05b271650e8629e1ac4323069d9aaac80fde4f2",
    "holdout-lr-0.01": "538786d3a4a94b95b7c43a82ba64ebab5c763356dca8ac62c9a88a508f7bd89a",
    "holdout-lr-0.03": "2a4bd271cf48a0596660b3549df580367f2e39f317073f0889327ab357acb37b",
    "lr-0.0003": "28bc68b5058eba5d90e9b9117591296fc867521019db50a430841296f035581b",
    "lr-0.003": "4344c8bc4904102b7b002f42cc1f6029eb9108b8cb5422a2c6bd1078cea9df80",
    "lr-0.01": "92d0fe58fcb74bb92ebfb7c5e1f2458f6332707db4ef2e76947462d2c3502ca6",
    "lr-0.03": "e459a60174c4d49312c18bcbfa706050e193c4adc290f7e6f3fce9fa39a1c218",
    "lr-0.1": "c21d464f0c719a77c8c889b0b21d36ff982a38efaf679a522c2877887fe80244",
}
ADAPTIVE = {"lr": 0.001, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
DEFAULTS = {
    specs.Data: {"holdout": None, "split_seed": 0, "normalization": "unit"},
    specs.MLP: {"type": "mlp", "hidden": (300, 100), "activation": "relu"},
    specs.SGD: {
        "type": "sgd",
        "lr": 0.001,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "nesterov": False,
    },
    specs.Adam: {"type": "adam", **ADAPTIVE},
    specs.AdamW: {"type": "adamw", **ADAPTIVE, "weight_decay": 0.01},
    specs.Constant: {"type": "constant", "warmup_steps": 0},
    specs.Step: {"type": "step", "warmup_steps": 0, "every_epochs": 10, "factor": 0.1},
    specs.Cosine: {"type": "cosine", "warmup_steps": 0, "final_fraction": 0.0},
    specs.Linear: {"type": "linear", "warmup_steps": 0, "final_fraction": 0.0},
    specs.OneCycle: {
        "type": "one_cycle",
        "warmup_steps": 0,
        "rise": 0.3,
        "initial_divisor": 25.0,
        "final_divisor": 10_000.0,
    },
    specs.EarlyStopping: {"metric": "loss", "patience": 5, "min_delta": 0.0},
    specs.Train: {
        "epochs": 20,
        "batch_size": 32,
        "eval_every": 1000,
        "seed": 0,
        "loss": "cross_entropy",
        "precision": "float32",
        "early_stopping": None,
    },
}
NEVER_CHANGE = (
    "a default changed, or a field that has an effect was added. Runs recorded under the old fingerprint would pass for the new one's,"
    " or would no longer be found. Put the default back; give a new field a default that keeps the old behaviour, and add it here"
)
IGNORED = [
    "name=other",
    "question=why",
    "tracking.experiment=other",
    "tracking.log_every=7",
    "compute.device=cpu",
    "compute.threads=2",
    "compute.stack=3",
    "compute.stack=off",
]
EFFECTIVE = [
    "data.holdout=100",
    "data.split_seed=1",
    "data.normalization=standard",
    "model.hidden=[100, 300]",
    "model.activation=tanh",
]
EFFECTIVE += [
    "optimizer.lr=0.002",
    "optimizer.weight_decay=0.1",
    "optimizer.nesterov=true",
    "optimizer.type=adam",
    "schedule.type=cosine",
]
EFFECTIVE += [
    "schedule.warmup_steps=1",
    "train.epochs=21",
    "train.batch_size=33",
    "train.eval_every=999",
]
EFFECTIVE += [
    "train.precision=tf32",
    "train.precision=bf16",
    "train.early_stopping={}",
    "train.early_stopping.patience=6",
    "train.early_stopping.metric=accuracy",
]


def put(home: Path, **files: str) -> None:
    for name, text in files.items():
        (home / "experiments" / f"{name}.yaml").write_text(text, encoding="utf-8")


def load(home: Path, text: str, *overrides: str) -> experiments.Resolved:
    put(home, mine=text)
    return experiments.load("mine", overrides, home)


def refusal(home: Path, text: str, *overrides: str, name: str = "mine") -> list[str]:
    """The lines of the message with which this input is refused."""
    put(home, mine=text)
    with pytest.raises(SpecError) as caught:
        experiments.load(name, overrides, home)
    return told(caught.value)


def told(error: SpecError) -> list[str]:
    lines = str(error).split("\n")
    leaks = re.compile(
        r"pydantic|Traceback|File \"|Commented|instance of|should (String|Input)|extract fields|Error:",
        re.IGNORECASE,
    )
    assert all(line.strip() for line in lines)
    assert not [line for line in lines if leaks.search(line)]
    return lines


# ---- what is shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiment_loads_fits_the_schema_and_asks_a_question(name: str) -> None:
    spec = experiments.load(name, root=EXPERIMENTS.parent).spec
    assert (spec.name, bool(spec.question)) == (name, True)
    schema = json.loads((EXPERIMENTS / "schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(
        YAML(typ="safe").load((EXPERIMENTS / f"{name}.yaml").read_text(encoding="utf-8"))
    )


def test_committed_schema_is_the_current_one() -> None:
    assert (
        json.loads((EXPERIMENTS / "schema.json").read_text(encoding="utf-8"))
        == editors.file_schema()
    ), "run tools/schema.py"


@pytest.mark.parametrize(
    "text",
    [
        "trian: {}",
        "train: {epoch: 3}",
        "train: {epochs: true}",
        "optimizer: {type: adma}",
        "train: {early_stopping: {patienc: 3}}",
    ],
)
def test_schema_refuses_what_loading_refuses(home: Path, text: str) -> None:
    assert list(
        jsonschema.Draft202012Validator(editors.file_schema()).iter_errors(
            YAML(typ="safe").load(text)
        )
    )
    refusal(home, text)


def test_fingerprints_of_shipped_experiments_never_change() -> None:
    assert {
        name: experiments.load(name, root=EXPERIMENTS.parent).spec.fingerprint for name in SHIPPED
    } == FINGERPRINTS, NEVER_CHANGE


@pytest.mark.parametrize("section", DEFAULTS, ids=lambda section: section.__name__)
def test_defaults_never_change(section: type[specs.Section]) -> None:
    assert section().model_dump() == DEFAULTS[section], NEVER_CHANGE


# ---- fingerprint and group


@pytest.mark.parametrize("change", [*IGNORED, *EFFECTIVE, "train.seed=1"])
def test_fingerprint_is_of_what_defines_the_run_and_group_ignores_the_seed(change: str) -> None:
    before, after = (
        experiments.load("baseline", overrides, EXPERIMENTS.parent).spec
        for overrides in ([], [change])
    )
    assert before != after
    assert (before.fingerprint == after.fingerprint) == (change in IGNORED)
    assert (before.group == after.group) == (change not in EFFECTIVE)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_default_written_out_leaves_the_fingerprint(home: Path, name: str) -> None:
    spec = experiments.load(name, root=home).spec
    assert (
        load(
            home, experiments.dump(spec).replace("weight_decay: 0.0", "weight_decay: 0")
        ).spec.fingerprint
        == spec.fingerprint
    )


def test_a_variants_own_default_is_the_one_that_is_left_out(home: Path) -> None:
    texts = [
        "optimizer: {type: adamw}",
        "optimizer: {type: adamw, weight_decay: 0.01}",
        "optimizer: {type: adamw, weight_decay: 0}",
    ]
    plain, same, other = (load(home, text).spec for text in texts)
    assert plain.fingerprint == same.fingerprint != other.fingerprint


# ---- layers and origins


def test_override_beats_file_beats_parent_beats_default_and_each_origin_is_told(home: Path) -> None:
    put(home, old="train:\n  epochs: 5\n  batch_size: 64\n  seed: 7\n  eval_every: 10\n")
    put(home, parent="extends: old\ntrain:\n  eval_every: 20\n  epochs: 6\n  batch_size: 128\n")
    resolved = load(
        home, "extends: parent\ntrain:\n\n  epochs: 8\n  eval_every: 30\n", "train.eval_every=40"
    )
    assert resolved.spec.train == specs.Train(seed=7, batch_size=128, epochs=8, eval_every=40)
    origins = {
        key: resolved.origins.get(f"train.{key}")
        for key in ("loss", "seed", "batch_size", "epochs", "eval_every")
    }
    places = [
        None,
        "experiments/old.yaml:4",
        "experiments/parent.yaml:5",
        "experiments/mine.yaml:4",
        "--set train.eval_every=40",
    ]
    assert list(origins.values()) == places


def test_mappings_merge_lists_and_null_replace(home: Path) -> None:
    put(home, parent="model:\n  hidden: [300, 100]\ntrain:\n  early_stopping:\n    patience: 3\n")
    merged = load(
        home, "extends: parent\nmodel: {hidden: [10]}\ntrain: {early_stopping: {metric: accuracy}}"
    ).spec
    assert merged.model.hidden == (10,)
    assert merged.train.early_stopping == specs.EarlyStopping(patience=3, metric="accuracy")
    assert (
        load(home, "extends: parent\ntrain: {early_stopping: null}").spec.train.early_stopping
        is None
    )


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("optimizer: {type: adam}", [], specs.Adam()),
        ("", ["optimizer.type=adam"], specs.Adam()),
        ("", ["optimizer={type: adam}"], specs.Adam()),
        ("", ["optimizer.type=adam", "optimizer.lr=0.1"], specs.Adam(lr=0.1)),
        ("", ["optimizer.lr=0.1", "optimizer.type=adam"], specs.Adam(lr=0.1)),
        ("optimizer: {type: adam, lr: 0.2}", ["optimizer.eps=0.5"], specs.Adam(lr=0.2, eps=0.5)),
        ("optimizer: {type: sgd, lr: 0.1}", [], specs.SGD(lr=0.1, momentum=0.9)),
        ("optimizer: {lr: 0.1}", ["optimizer.type=sgd"], specs.SGD(lr=0.1, momentum=0.9)),
    ],
)
def test_another_type_starts_from_its_own_defaults_the_same_keeps_what_it_had(
    home: Path, text: str, overrides: list[str], expected: specs.Section
) -> None:
    assert load(home, f"extends: baseline\n{text}", *overrides).spec.optimizer == expected


@pytest.mark.parametrize("override", ["optimizer.type=adam", "optimizer={type: adam}"])
def test_values_dropped_with_a_type_leave_no_origin(home: Path, override: str) -> None:
    origins = load(home, "extends: baseline", override).origins
    assert origins.get("optimizer.type") == f"--set {override}"
    assert {"optimizer.lr", "optimizer.momentum"} & origins.keys() == set()


def test_name_and_question_are_not_inherited(home: Path) -> None:
    put(home, parent="name: fancy\nquestion: Why?\n")
    resolved = load(home, "extends: parent")
    assert (resolved.spec.name, resolved.spec.question) == ("mine", "")
    assert {"name", "question"} & resolved.origins.keys() == set()


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        ([], "baseline"),
        (["optimizer.lr=0.01", "train.seed=3"], "baseline lr=0.01 s3"),
        (["train.seed=3", "optimizer.lr=1e-2", "question=why"], "baseline lr=0.01 s3"),
        (["name=other", "model.hidden=[10, 20]"], "other hidden=[10, 20]"),
        (["optimizer.lr=1", "optimizer.lr=2"], "baseline lr=2.0"),
        (["train.early_stopping=null"], "baseline early_stopping=None"),
    ],
)
def test_display_name_tells_what_was_overridden(overrides: list[str], shown: str) -> None:
    assert experiments.load("baseline", overrides, EXPERIMENTS.parent).display_name == shown


def test_display_name_tells_a_section_turned_on_from_one_turned_off() -> None:
    on, off = (
        experiments.load(
            "baseline", [f"train.early_stopping={value}"], EXPERIMENTS.parent
        ).display_name
        for value in ("{}", "null")
    )
    assert on != off


def test_1e_3_is_a_number(home: Path) -> None:
    assert load(
        home, "optimizer: {lr: 1e-3}", "optimizer.momentum=1e-1"
    ).spec.optimizer == specs.SGD(lr=0.001, momentum=0.1)


# ---- mistakes

AT = "experiments/mine.yaml"
MISTAKES: list[tuple[str, str | None, list[str]]] = [
    # misspelt keys
    ("\ntrian: {}", None, [f"{AT}:2: trian: unknown key", "'train'", "extends, name"]),
    ("train:\n  epoch: 3", None, [f"{AT}:2: train.epoch: unknown key", "'epochs'", "batch_size"]),
    (
        "optimizer:\n  type: adam\n  beta: 3",
        None,
        [f"{AT}:3: optimizer.beta: unknown key", "'betas'", "eps"],
    ),
    (
        "train:\n  early_stopping:\n    patienc: 3",
        None,
        [f"{AT}:3: train.early_stopping.patienc: unknown key", "'patience'", "min_delta"],
    ),
    ("model: {mlp: 1}", None, [f"{AT}:1: model.mlp: unknown key", "hidden, activation"]),
    (
        "",
        "optimizer.momentun=0.5",
        ["--set optimizer.momentun=0.5: optimizer.momentun: unknown key", "'momentum'"],
    ),
    ("", "no.such=1", ["--set no.such=1: no: unknown key", "optimizer"]),
    ("", "optimizer.lr.x=1", ["--set optimizer.lr.x=1: optimizer.lr", "{'x': 1}", "number"]),
    # wrong types
    ("train:\n  epochs: true", None, [f"{AT}:2: train.epochs: given True", "integer"]),
    ("optimizer: {lr: '0.1'}", None, [f"{AT}:1: optimizer.lr: given '0.1'", "number"]),
    ("optimizer: {nesterov: 1}", None, [f"{AT}:1: optimizer.nesterov: given 1", "bool"]),
    ("model: {hidden: [300, true]}", None, [f"{AT}:1: model.hidden", "given True", "integer"]),
    ("model: {hidden: 300}", None, [f"{AT}:1: model.hidden: given 300", "list"]),
    ("train: [1]", None, [f"{AT}:1: train: given [1]", "mapping"]),
    ("optimizer: null", None, [f"{AT}:1: optimizer: given None", "mapping"]),
    ("", "train.epochs=", ["--set train.epochs=: train.epochs: given None", "integer"]),
    # out of range
    ("optimizer: {lr: .nan}", None, [f"{AT}:1: optimizer.lr: given nan", "finite"]),
    ("data: {holdout: 59991}", None, [f"{AT}:1: data.holdout: given 59991", "59990"]),
    ("", "optimizer.lr=-1", ["--set optimizer.lr=-1: optimizer.lr: given -1", "greater than 0"]),
    # unknown choices
    (
        "optimizer:\n  type: adm",
        None,
        [f"{AT}:2: optimizer.type: given 'adm'", "'adam'", "sgd, adam, adamw"],
    ),
    (
        "schedule: {type: cosin}",
        None,
        [f"{AT}:1: schedule.type: given 'cosin'", "'cosine'", "one_cycle"],
    ),
    (
        "compute: {device: cud}",
        None,
        [f"{AT}:1: compute.device: given 'cud'", "did you mean 'cuda'", "'auto'"],
    ),
    ("tracking: {experiment: a/b}", None, [f"{AT}:1: tracking.experiment: given 'a/b'"]),
    # what does not fit together
    ("\ntrain: {batch_size: 60001}", None, [f"{AT}:2: train.batch_size: 60001", "60000 images"]),
    (
        "train: {batch_size: 50001}",
        "data.holdout=10000",
        [f"{AT}:1: train.batch_size: 50001", "50000 images"],
    ),
    (
        "schedule:\n  warmup_steps: 37500",
        None,
        [f"{AT}:2: schedule.warmup_steps: 37500", "37500 steps", "fewer"],
    ),
    (
        "optimizer: {nesterov: true}",
        None,
        [f"{AT}:1: optimizer", "nesterov needs a momentum above 0"],
    ),
    (
        "",
        "optimizer.nesterov=true",
        ["--set optimizer.nesterov=true: optimizer", "nesterov needs a momentum above 0"],
    ),
    # parents
    ("train: {}\nextends: mine", None, [f"{AT}:2: extends: mine -> mine", "cycle"]),
    (
        "extends: baselin",
        None,
        [f"{AT}:1: extends: unknown experiment 'baselin', did you mean 'baseline'?", "epochs-40"],
    ),
    ("extends: [baseline]", None, [f"{AT}:1: extends: given ['baseline']", "name of one"]),
    # overrides and files that can't be read
    ("", "optimizer.lr", ["--set optimizer.lr: write key.path=value"]),
    ("", "train.epochs=[1", ["--set train.epochs=[1", "not readable as YAML"]),
    ("train:\n  epochs: [1\nseed: 2", None, [f"{AT}:3: not readable as YAML"]),
    ("train:\n  epochs: 1\n  epochs: 2", None, [f"{AT}:3: train.epochs: duplicate key"]),
    ("", "train.seed=1\nname: x", ["--set train.seed=1", "write key.path=value"]),
    ("", "extends=epochs-40", ["--set extends=epochs-40", "only a file"]),
    ('question: "a\\x85b"', None, [f"{AT}:1: question: given", "printed"]),
    ("train: &a {epochs: 1}", None, [f"{AT}:1: train: only plain"]),
    ("train: !!python/object:os.system {}", None, [f"{AT}:1: train: only plain"]),
    ("train:\n  epochs: 0x10", None, [f"{AT}:2: train.epochs: given '0x10'", "decimal"]),
    (
        "train: {epochs: 100000, batch_size: 1}",
        None,
        [f"{AT}:1: train.epochs: 100000", "at most 100,000,000 steps"],
    ),
    (
        "train:\n  eval_every: 1\n  epochs: 100",
        None,
        [f"{AT}:2: train.eval_every: 1", "at most 100,000 evaluations"],
    ),
    ("- train", None, [f"{AT}: given", "mapping of sections"]),
    ('"a\\nb": 1', None, [f"{AT}:1: ", "unknown key"]),
    ("#" * 100_001, None, [f"{AT}: 100001 bytes", "at most 100000"]),
]


@pytest.mark.parametrize(
    ("text", "override", "fragments"),
    MISTAKES,
    ids=[f"{text[:30]!r} {override}" for text, override, _ in MISTAKES],
)
def test_a_mistake_is_told_in_one_line_with_place_path_and_remedy(
    home: Path, text: str, override: str | None, fragments: list[str]
) -> None:
    (line,) = refusal(home, text, *([override] if override else []))
    assert line.startswith(fragments[0])
    assert [fragment for fragment in fragments if fragment not in line] == []


def test_several_mistakes_are_told_at_once_a_line_each(home: Path) -> None:
    lines = refusal(
        home,
        "data: {holdout: 1}\noptimizer:\n  lr: fast\n  moment: 1\ntrain: {epochs: 0}",
        "train.sead=1",
    )
    places = [
        ":1: data.holdout",
        ":3: optimizer.lr",
        ":4: optimizer.moment",
        ":5: train.epochs",
        "--set train.sead=1: train.sead",
    ]
    assert [
        line.removeprefix(AT).startswith(place) for line, place in zip(lines, places, strict=True)
    ] == [True] * 5


def test_a_longer_cycle_is_told_as_its_chain(home: Path) -> None:
    put(home, one="extends: two", two="extends: mine")
    (line,) = refusal(home, "extends: one")
    assert "mine -> one -> two -> mine" in line


BAD_NAMES = [
    "no",
    "yes",
    "on",
    "null",
    "a/b",
    "../baseline",
    "/etc/passwd",
    "a\\b",
    "a..b",
    "..",
    "",
    "A",
    "a\0b",
    "a\nb",
    "a\n",
    "a" * 65,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_be_a_path_or_a_yaml_word_is_refused_everywhere(
    home: Path, name: str
) -> None:
    (line,) = refusal(home, "", name=name)
    assert repr(name) in line
    assert "allowed are a to z" in line
    for key in ("extends", "name"):
        (line,) = refusal(home, f"\n{key}: {json.dumps(name)}")
        assert line.startswith(f"{AT}:2: "), line
        assert repr(name)[:60] in line
    (line,) = refusal(home, "", f"name={json.dumps(name)}")
    assert line.startswith("--set name="), line


@pytest.mark.parametrize(
    "content", [b"question: \xff", "question: é".encode("latin-1"), "train: {}".encode("utf-16")]
)
def test_a_file_that_is_not_utf_8_is_refused(home: Path, content: bytes) -> None:
    (home / "experiments" / "bytes.yaml").write_bytes(content)
    (line,) = refusal(home, "", name="bytes")
    assert line.startswith("experiments/bytes.yaml")


ODD = [
    "optimizer:\n  <<: {lr: 1}",
    "<<: {train: {}}",
    "optimizer: !!omap [lr: 1]",
    "optimizer: =",
    "train: {epochs: !!bool x}",
]
ODD += [
    "optimizer: {lr: .INF}",
    "optimizer: {lr: !!float x}",
    "optimizer: {nesterov: !!bool maybe}",
]
ODD += [
    "train: {epochs: !!int ''}",
    "train: {epochs: !!float}",
    "model: {hidden: !!set x}",
    "model: {hidden: !!set {1, 2}}",
    "? [a]\n: 1",
]
ODD += [
    "train: {epochs: !!python/object:os.system {}}",
    "train: &x [*x]",
    "train: &x {seed: *x}",
    "a: " + "[" * 500,
    "a: " + "{a: " * 30,
]
ODD += [
    f"train: {{{key}: {value}}}"
    for key in ("epochs", "eval_every")
    for value in ("0x" + "f" * 5000, "9" * 5000)
]
ODD += ["question: !!binary aGk=", 'question: "\\ud800"', 'question: "\\x7f\\u0085\\e[31m"']


def loads_or_is_refused(home: Path, content: bytes) -> None:
    (home / "experiments" / "odd.yaml").write_bytes(content)
    try:
        spec = experiments.load("odd", root=home).spec
    except SpecError:
        return
    assert experiments.parse(experiments.dump(spec).encode().decode(), "spec.yaml") == spec


@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:40]))
def test_odd_yaml_loads_or_is_refused(home: Path, text: str) -> None:
    loads_or_is_refused(home, text.encode())


LINES = BASELINE.splitlines()
VALUES = re.split(
    "  +",
    "null  []  {}  {a: 1}  [1, [2]]  -1  1e999  0x  .inf  true  ''  ~  =  <<  *x  &x 1  !!bool  !!int  !t  |  [  }  - 1  %  @",
)
CHANGE = st.tuples(
    st.integers(0, len(LINES) - 1),
    st.sampled_from(["value", "drop", "twice", "indent", "key"]),
    st.sampled_from(VALUES),
)


def mutated(changes: list[tuple[int, str, str]]) -> bytes:
    lines = list(LINES)
    for index, what, value in changes:
        key = lines[index].partition(":")[0]
        made = {
            "drop": "",
            "twice": f"{lines[index]}\n{lines[index]}",
            "indent": f"  {lines[index]}",
            "key": f"{value}: 1",
        }
        lines[index] = made.get(what, f"{key}: {value}")
    return "\n".join(lines).encode()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(str.encode),
        st.lists(CHANGE, min_size=1, max_size=3).map(mutated),
    )
)
def test_any_file_loads_or_is_refused_and_nothing_else(home: Path, content: bytes) -> None:
    loads_or_is_refused(home, content)


# ---- stored and read again


@pytest.mark.parametrize("name", [*SHIPPED, "rich"])
def test_dump_and_parse_give_the_same_spec(home: Path, name: str) -> None:
    put(
        home,
        rich="optimizer: {type: adam, betas: [0.8, 0.99]}\nschedule: {type: one_cycle}\ntrain: {early_stopping: {}}",
    )
    spec = experiments.load(name, root=home).spec
    again = experiments.parse(experiments.dump(spec), "spec.yaml")
    assert again == spec
    assert again.fingerprint == spec.fingerprint


@settings(max_examples=200, deadline=None)
@given(
    question=st.text(st.characters().filter(lambda c: c.isprintable() or c == "\n")),
    lr=st.floats(0, 1_000, exclude_min=True),
)
def test_any_question_and_number_survive_dump_and_parse(question: str, lr: float) -> None:
    spec = specs.ExperimentSpec(name="x", question=question, optimizer=specs.SGD(lr=lr))
    assert experiments.parse(experiments.dump(spec), "spec.yaml") == spec


# ---- the plan


@settings(max_examples=200, deadline=None)
@given(
    epochs=st.integers(1, 12),
    batch_size=st.integers(150, specs.TRAIN_IMAGES),
    eval_every=st.integers(1, 6_000),
)
def test_plan_covers_every_step_once_in_short_segments_and_evaluates_on_time(
    epochs: int, batch_size: int, eval_every: int
) -> None:
    spec = specs.ExperimentSpec(
        name="x", train=specs.Train(epochs=epochs, batch_size=batch_size, eval_every=eval_every)
    )
    assert spec.steps == epochs * -(-60_000 // batch_size)
    first, *rest = specs.plan(spec)
    assert (first, rest[0].start, rest[-1].stop) == (specs.Segment(0, 0, True), 0, spec.steps)
    assert all(before.stop == after.start for before, after in pairwise(rest))
    assert all(0 < segment.stop - segment.start <= specs.SEGMENT_STEPS for segment in rest)
    evaluated = [segment.stop for segment in (first, *rest) if segment.evaluate]
    assert evaluated == sorted({0, *range(eval_every, spec.steps, eval_every), spec.steps})


def test_the_local_stores_own_uri_is_the_local_store(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlruns/mlflow.db")
    assert (specs.tracking_server(), specs.store_name()) == (None, "local")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/other.db")
    with pytest.raises(StoreError, match="http"):
        specs.tracking_server()
