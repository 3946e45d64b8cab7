import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from longctx.config import (
    Registered,
    apply_overrides,
    decode,
    find_config,
    first_difference,
    flatten,
    load_table,
    merge,
    to_dict,
    to_toml,
)
from longctx.errors import InputError

PROG = "longctx train"


class ToyMixer(Registered):
    """A toy family."""


class ToySource(Registered):
    """Another family: its kinds are its own."""


@dataclass(frozen=True)
class ToyLinear(ToyMixer, kind="linear"):
    """Linear attention."""

    num_heads: int
    """Number of heads."""
    decay: Literal["none", "retention"] = "none"
    """How the state fades."""


@dataclass(frozen=True)
class ToySoftmax(ToyMixer, kind="softmax"):
    """Softmax attention."""


@dataclass(frozen=True)
class ToyMoh(ToyMixer, kind="moh"):
    """Routed heads around another mixer."""

    inner: ToyMixer
    """The mixer that is routed."""
    temperature: float = 1.0
    """Temperature of the router."""


@dataclass(frozen=True)
class ToyRandomSource(ToySource, kind="linear"):
    """Random tokens."""


@dataclass(frozen=True)
class ToyStage:
    """A stage of the context ladder."""

    length: int
    """Tokens in a sequence."""


@dataclass(frozen=True)
class ToyModel:
    """The decoder."""

    width: int
    """Model width."""
    pattern: str
    """A letter a layer."""
    mixers: dict[str, ToyMixer]
    """Mixers by letter."""

    def __post_init__(self) -> None:
        for letter in self.pattern:
            if letter not in self.mixers:
                raise InputError(f"model.pattern = {self.pattern!r}: no mixer {letter!r}")


@dataclass(frozen=True)
class ToyTrain:
    """Training."""

    steps: int = 10
    """Optimizer steps in the whole run."""
    rate: float = 0.1
    """Learning rate."""
    compiled: bool = False
    """Whether the model is compiled."""
    betas: tuple[float, ...] = (0.9, 0.99)
    """Momentum coefficients."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source."""
    stages: tuple[ToyStage, ...] = ()
    """Stages of the context ladder."""


@dataclass(frozen=True)
class ToyRoot:
    """A toy run."""

    model: ToyModel
    """The decoder."""
    name: str = "toy"
    """Name of the run."""
    train: ToyTrain = field(default_factory=ToyTrain)
    """Training."""


@pytest.fixture
def table() -> dict[str, Any]:
    inner = {"kind": "linear", "num_heads": 2}
    mixers = {
        "L": {"kind": "linear", "num_heads": 4},
        "M": {"kind": "moh", "inner": inner},
        "S": {"kind": "softmax"},
    }
    return {"model": {"width": 64, "pattern": "LLMS", "mixers": mixers}}


@pytest.fixture
def config(table: dict[str, Any]) -> ToyRoot:
    return decode(ToyRoot, table)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(table: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        decode(ToyRoot, table, file="a.toml")
    return str(caught.value)


def refused_option(config: ToyRoot, *argv: str) -> str:
    with pytest.raises(InputError) as caught:
        apply_overrides(config, argv, PROG)
    return str(caught.value)


def test_decode_builds_nested_dataclasses_and_registered_members(config: ToyRoot) -> None:
    assert config.model.mixers == {
        "L": ToyLinear(num_heads=4),
        "M": ToyMoh(inner=ToyLinear(num_heads=2)),
        "S": ToySoftmax(),
    }
    assert config.model.mixers["M"].kind == "moh"


def test_decode_leaves_its_table_unchanged(table: dict[str, Any]) -> None:
    assert decode(ToyRoot, table) == decode(ToyRoot, table)


def test_integer_is_accepted_for_a_number(table: dict[str, Any]) -> None:
    rate = decode(ToyRoot, table | {"train": {"rate": 1}}).train.rate
    assert (rate, type(rate)) == (1.0, float)


def test_unknown_field_names_the_nearest_and_the_known(table: dict[str, Any]) -> None:
    table["model"]["widht"] = 3
    assert refusal(table) == (
        "a.toml: model.widht is not a known field; nearest: model.width "
        "(known: width, pattern, mixers)"
    )


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"steps": "ten"}, "train.steps = 'ten': expected an integer"),
        ({"steps": True}, "train.steps = True: expected an integer"),
        ({"steps": 1.0}, "train.steps = 1.0: expected an integer"),
        ({"rate": True}, "train.rate = True: expected a number"),
        ({"rate": "1"}, "train.rate = '1': expected a number"),
        ({"rate": float("nan")}, "train.rate = nan: expected a number"),
        ({"compiled": 1}, "train.compiled = 1: expected true or false"),
        ({"betas": 0.9}, "train.betas = 0.9: expected a list, each item a number"),
        ({"betas": [0.9, "x"]}, "train.betas.1 = 'x': expected a number"),
        ({"weights": {"a": "x"}}, "train.weights.a = 'x': expected a number"),
        ({"weights": 3}, "train.weights = 3: expected a table"),
        ({"stages": [{"length": "x"}]}, "train.stages.0.length = 'x': expected an integer"),
        ({"stages": [{}]}, "train.stages.0.length is missing: expected an integer"),
        (3, "train = 3: expected a table"),
    ],
)
def test_wrong_type_is_refused(table: dict[str, Any], train: object, message: str) -> None:
    assert refusal(table | {"train": train}) == f"a.toml: {message}"


def test_dotted_key_is_refused(table: dict[str, Any]) -> None:
    assert "train.weights: key 'a.b'" in refusal(table | {"train": {"weights": {"a.b": 1.0}}})


def test_missing_field_is_named(table: dict[str, Any]) -> None:
    del table["model"]["width"]
    assert refusal(table) == "a.toml: model.width is missing: expected an integer"


def test_missing_table_is_named() -> None:
    assert refusal({}) == "a.toml: model is missing: expected a table"


def test_choice_lists_choices_and_the_nearest(table: dict[str, Any]) -> None:
    table["model"]["mixers"]["L"]["decay"] = "retentoin"
    assert refusal(table) == (
        "a.toml: model.mixers.L.decay = 'retentoin': expected one of 'none', 'retention'; "
        "nearest: retention"
    )


def test_unknown_kind_lists_registered_kinds_and_the_nearest(table: dict[str, Any]) -> None:
    table["model"]["mixers"]["M"]["inner"]["kind"] = "linaer"
    assert refusal(table) == (
        "a.toml: model.mixers.M.inner.kind = 'linaer': not a known kind; nearest: linear "
        "(registered: linear, moh, softmax)"
    )


def test_missing_kind_lists_registered_kinds(table: dict[str, Any]) -> None:
    del table["model"]["mixers"]["L"]["kind"]
    assert refusal(table) == (
        "a.toml: model.mixers.L.kind is missing (registered: linear, moh, softmax)"
    )


def test_refusal_by_the_dataclass_carries_the_file(table: dict[str, Any]) -> None:
    table["model"]["pattern"] = "X"
    assert refusal(table) == "a.toml: model.pattern = 'X': no mixer 'X'"


def test_unsupported_type_is_a_programming_error() -> None:
    @dataclass(frozen=True)
    class Broken:
        value: int | None

    with pytest.raises(TypeError, match="value: a config field cannot have type"):
        decode(Broken, {"value": 3})


def test_each_family_is_a_registry_of_its_own() -> None:
    assert ToyMixer.kinds() == {"linear": ToyLinear, "softmax": ToySoftmax, "moh": ToyMoh}
    assert ToySource.kinds() == {"linear": ToyRandomSource}


def test_kind_cannot_be_registered_twice() -> None:
    with pytest.raises(TypeError, match="kind 'linear' is taken by ToyLinear"):

        class Duplicate(ToyMixer, kind="linear"):
            pass


def test_slots_are_refused_since_they_register_another_class() -> None:
    class Family(Registered):
        pass

    with pytest.raises(TypeError, match="slots"):

        @dataclass(frozen=True, slots=True)
        class Member(Family, kind="member"):
            pass


def test_extends_takes_the_name_of_a_file_that_comes_with_longctx(tmp_path: Path) -> None:
    child = write(tmp_path / "tiny.toml", 'extends = "tiny"\n[train]\nsteps = 3\n')
    tiny = load_table(find_config("tiny", "preset"))
    assert load_table(child) == merge(tiny, {"train": {"steps": 3}})
    cluster = write(tmp_path / "mine.toml", 'extends = "8xh100"\nmost_nodes = 3\n')
    assert load_table(cluster)["links"] == load_table(find_config("8xh100", "cluster"))["links"]
    write(tmp_path / "8xh100", "most_nodes = 1\n")
    assert load_table(cluster) == {"most_nodes": 3}


def test_no_two_files_that_come_with_longctx_have_the_same_name() -> None:
    names = [path.stem for path in Path(find_config("tiny", "preset")).parent.rglob("*.toml")]
    assert len(names) == len(set(names)) > 20


def test_extends_merges_tables_and_the_child_wins(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared" / "root.toml", "[train]\nsteps = 1\nrate = 0.5\n[model]\nwidth = 8\n")
    write(tmp_path / "shared" / "base.toml", 'extends = "root.toml"\n[train]\nsteps = 2\n')
    child = write(tmp_path / "a.toml", 'extends = "shared/base.toml"\n[train]\nrate = 0.25\n')
    assert load_table(child) == {"train": {"steps": 2, "rate": 0.25}, "model": {"width": 8}}


def test_another_kind_replaces_the_table(tmp_path: Path) -> None:
    base = '[m.L]\nkind = "linear"\nnum_heads = 4\n[m.S]\nkind = "linear"\nnum_heads = 4\n'
    write(tmp_path / "base.toml", base)
    text = 'extends = "base.toml"\n[m.L]\nkind = "softmax"\n[m.S]\nkind = "linear"\nx = 1\n'
    assert load_table(write(tmp_path / "a.toml", text))["m"] == {
        "L": {"kind": "softmax"},
        "S": {"kind": "linear", "num_heads": 4, "x": 1},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "a.toml"', r"a\.toml: extends forms a cycle: .*a\.toml -> .*a\.toml$"),
        ('extends = "none.toml"', r"none\.toml: No such file .*named by extends in .*a\.toml\)$"),
        ("extends = 3", r"a\.toml: extends = 3: expected a file name$"),
        ("a = 1\nb = =\n", r"a\.toml: not valid TOML: .*\(at line 2, column 5\)$"),
    ],
)
def test_unreadable_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.toml", text)
    with pytest.raises(InputError) as caught:
        load_table(path)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: No such file"):
        load_table(tmp_path / "none.toml")


def test_toml_round_trip_is_equal(tmp_path: Path, config: ToyRoot) -> None:
    train = ToyTrain(
        rate=1e-5,
        betas=(1e16, float("inf")),
        weights={"web": 0.5},
        stages=(ToyStage(8), ToyStage(16)),
    )
    for variant in (config, replace(config, name='q"\\\n\x7fü😀', train=train)):
        path = tmp_path / "config.toml"
        path.write_text(to_toml(variant), encoding="utf-8")
        assert decode(ToyRoot, load_table(path)) == variant


def test_toml_has_every_field_in_order_with_kind_first(config: ToyRoot) -> None:
    assert to_toml(config) == (
        'name = "toy"\n\n'
        '[model]\nwidth = 64\npattern = "LLMS"\n\n'
        '[model.mixers.L]\nkind = "linear"\nnum_heads = 4\ndecay = "none"\n\n'
        '[model.mixers.M]\nkind = "moh"\ntemperature = 1.0\n\n'
        '[model.mixers.M.inner]\nkind = "linear"\nnum_heads = 2\ndecay = "none"\n\n'
        '[model.mixers.S]\nkind = "softmax"\n\n'
        "[train]\nsteps = 10\nrate = 0.1\ncompiled = false\nbetas = [0.9, 0.99]\nstages = []\n\n"
        "[train.weights]\n"
    )


def test_dict_round_trip_is_equal(config: ToyRoot) -> None:
    assert decode(ToyRoot, to_dict(config)) == config


def test_overrides_reach_every_type(config: ToyRoot) -> None:
    config = replace(config, train=ToyTrain(weights={"web": 0.5}, stages=(ToyStage(8),)))
    words = (
        "--name=a=b --model.mixers.L.num_heads 8 --model.mixers.L.decay retention "
        "--model.mixers.M.inner.num_heads 6 --model.mixers.M.temperature 2 "
        "--train.rate -1e-3 --train.compiled true --train.betas 0.5 0.6 0.7 "
        "--train.weights.web 0.25 --train.stages.0.length 16"
    )
    changed = apply_overrides(config, words.split(), PROG)
    assert changed.name == "a=b"
    assert changed.model.mixers["L"] == ToyLinear(num_heads=8, decay="retention")
    assert changed.model.mixers["M"] == ToyMoh(inner=ToyLinear(num_heads=6), temperature=2.0)
    assert changed.train == ToyTrain(
        rate=-1e-3,
        compiled=True,
        betas=(0.5, 0.6, 0.7),
        weights={"web": 0.25},
        stages=(ToyStage(16),),
    )


def test_no_overrides_change_nothing(config: ToyRoot) -> None:
    assert apply_overrides(config, [], PROG) == config


def test_list_can_be_emptied_and_the_last_option_wins(config: ToyRoot) -> None:
    argv = ["--train.betas", "--train.steps", "1", "--train.steps", "2"]
    changed = apply_overrides(config, argv, PROG)
    assert (changed.train.betas, changed.train.steps) == ((), 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--train.stepz 3",
            "--train.stepz is not a known option; nearest: --train.steps "
            "(all: longctx train --help)",
        ),
        ("--train.steps ten", "--train.steps = 'ten': expected an integer"),
        ("--train.steps 1.5", "--train.steps = '1.5': expected an integer"),
        ("--train.steps", "--train.steps takes one value, not 0"),
        ("--train.steps 1 2", "--train.steps takes one value, not 2"),
        ("--train.compiled yes", "--train.compiled = 'yes': expected true or false"),
        ("--train.betas 1 x", "--train.betas.1 = 'x': expected a number"),
        ("--train.stages x", "--train.stages.0 = 'x': expected a table"),
        (
            "--model.mixers.L.decay retain",
            "--model.mixers.L.decay = 'retain': expected one of 'none', 'retention'; "
            "nearest: retention",
        ),
        (
            "--model.mixers.L.kind softmax",
            "--model.mixers.L.kind: a kind is chosen in the config file, not by an option",
        ),
        ("--model.pattern X", "command line: model.pattern = 'X': no mixer 'X'"),
        ("train.steps 3", "'train.steps': expected an option such as --table.key value"),
    ],
)
def test_wrong_option_is_refused_in_one_line(
    config: ToyRoot, capfd: pytest.CaptureFixture[str], argv: str, message: str
) -> None:
    assert refused_option(config, *argv.split()) == message
    assert capfd.readouterr() == ("", "")


def test_a_table_is_not_an_option(config: ToyRoot) -> None:
    assert refused_option(config, "--model.mixers.L", "x").startswith(
        "--model.mixers.L is not a known option; nearest: --model.mixers.L."
    )


def test_help_shows_every_field_with_its_docstring(
    config: ToyRoot, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    config = replace(config, train=ToyTrain(stages=(ToyStage(8),)))
    with pytest.raises(SystemExit) as caught:
        apply_overrides(config, ["--train.steps", "3", "--help"], PROG)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in flatten(config):
        assert f"--{name}" in shown or name.endswith("kind")
    for docstring in ("Number of heads.", "Temperature of the router.", "Optimizer steps in the"):
        assert docstring in shown


def test_flatten_names_every_field_and_kind(config: ToyRoot) -> None:
    assert flatten(config) == {
        "model.width": 64,
        "model.pattern": "LLMS",
        "model.mixers.L.kind": "linear",
        "model.mixers.L.num_heads": 4,
        "model.mixers.L.decay": "none",
        "model.mixers.M.kind": "moh",
        "model.mixers.M.inner.kind": "linear",
        "model.mixers.M.inner.num_heads": 2,
        "model.mixers.M.inner.decay": "none",
        "model.mixers.M.temperature": 1.0,
        "model.mixers.S.kind": "softmax",
        "name": "toy",
        "train.steps": 10,
        "train.rate": 0.1,
        "train.compiled": False,
        "train.betas": (0.9, 0.99),
        "train.stages": (),
    }


def test_first_difference_names_the_field_and_both_values(config: ToyRoot) -> None:
    other = apply_overrides(config, ["--train.steps", "20", "--train.rate", "1"], PROG)
    assert first_difference(config, config, ["model", "train"]) is None
    assert first_difference(config, other, ["model", "train"]) == "train.steps: 10 -> 20"
    assert first_difference(config, other, ["train"], ["train.steps"]) == "train.rate: 0.1 -> 1.0"
    assert first_difference(config, other, ["model", "train.betas", "train.step"]) is None


def test_first_difference_sees_kinds_and_absent_fields(config: ToyRoot) -> None:
    mixers = config.model.mixers | {"L": ToySoftmax()}
    other = replace(config, model=replace(config.model, mixers=mixers))
    assert first_difference(config, other, ["model"]) == (
        "model.mixers.L.kind: 'linear' -> 'softmax'"
    )
    ignored = ["model.mixers.*.kind"]
    assert first_difference(config, other, ["model"], ignored) == (
        "model.mixers.L.num_heads: 4 -> absent"
    )
