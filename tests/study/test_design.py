from dataclasses import fields
from pathlib import Path

import pytest

from longctx.cli import main
from longctx.config import load_table
from longctx.study.design import Options, StudyConfig, load_study
from longctx.train.settings import load_settings
from tests.study.conftest import BASE
from tests.test_repository import attributes_read, field_docstrings, without_layout

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.toml"))
AXES = """
[study.variants.task]
short = { train = { seq_len = 12 } }
copying = { data = { task = "selective_copying" }, train = { seq_len = 16 } }
[study.variants.mixer.full]
[study.variants.mixer.linear.model.mixers.M]
kind = "linear"
num_heads = 2
[study.grid]
run.seed = [0, 1]
"optim.lr" = [0.001, 0.01]
"""


def test_cells_are_all_combinations_of_all_axes_in_the_order_of_the_file(write):
    study = load_study(write(AXES))
    assert study.axes == ("task", "mixer", "run.seed", "optim.lr")
    names = [cell.name for cell in study.cells]
    assert len(set(names)) == 2 * 2 * 2 * 2
    assert names[:2] == ["short-full-seed0-lr0.001", "short-full-seed0-lr0.01"]
    assert names[-1] == "copying-linear-seed1-lr0.01"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_of_the_repository_says_what_it_is_and_can_be_read(path):
    assert path.read_text().startswith("# ")
    if "study" in load_table(path):
        study = load_study(path)
        assert study.config.name == path.stem
        assert study.cells
    else:
        assert load_settings(str(path)).run.name == path.stem


def test_a_cell_is_the_config_with_its_values_over_it(write, tmp_path):
    study = load_study(write(AXES))
    cells = {cell.name: cell for cell in study.cells}
    cell = cells["copying-linear-seed1-lr0.01"]
    settings = cell.settings
    assert (settings.data.task, settings.data.answers) == ("selective_copying", 2)
    assert settings.model.mixers["M"].kind == "linear"
    assert (settings.run.seed, settings.optim.lr, settings.train.steps) == (1, 0.01, 4)
    assert settings.run.name == cell.name
    assert settings.run.path == tmp_path / "out" / cell.name
    assert cell.values == {
        "task": "copying",
        "mixer": "linear",
        "run.seed": 1,
        "optim.lr": 0.01,
    }
    assert cells["short-full-seed0-lr0.001"].settings.model.mixers["M"].kind == "softmax"


LISTS = """
[[study.cells]]
model.width = 16
optim.lr = 0.01
[[study.cells]]
name = "large"
model.width = 32
model.mixers.M = { kind = "linear", num_heads = 4 }
[study.grid]
optim.betas = [[0.9, 0.95], [0.9, 0.99]]
run.init_from = ["a/b", "a_b"]
train.deterministic = [true]
"""


def test_a_list_of_cells_is_one_axis_beside_those_of_the_grid(write):
    study = load_study(write(LISTS))
    assert study.axes == ("cells", "optim.betas", "run.init_from", "train.deterministic")
    names = [cell.name for cell in study.cells]
    assert len(names) == 2 * 2 * 2
    assert names[0].startswith("width16-lr0.01-betas0.9_0.95-init_from")
    assert names[0].endswith("-deterministictrue")
    assert names[-1].startswith("large-betas0.9_0.99-init_froma_b-")
    first, last = study.cells[0], study.cells[-1]
    assert (first.settings.model.width, first.settings.optim.lr) == (16, 0.01)
    assert (last.settings.model.width, last.settings.model.mixers["M"].num_heads) == (32, 4)
    assert first.settings.run.init_from == "a/b"
    assert first.settings.optim.betas == (0.9, 0.95)
    assert first.values["optim.betas"] == [0.9, 0.95]
    assert (first.values["cells"], last.values["cells"]) == ("width16-lr0.01", "large")
    assert last.config["model.mixers.M.kind"] == "linear"
    assert last.config["train.seq_len"] == 12


def test_a_field_beside_a_kind_is_kept_in_whatever_order_they_stand(write):
    for order in (("num_heads", "kind"), ("kind", "num_heads")):
        values = {"num_heads": "[2, 4]", "kind": '["linear", "gdn"]'}
        lines = "".join(f"model.mixers.M.{name} = {values[name]}\n" for name in order)
        cells = load_study(write(f"[study.grid]\n{lines}")).cells
        found = {
            (c.settings.model.mixers["M"].kind, c.settings.model.mixers["M"].num_heads)
            for c in cells
        }
        assert found == {("linear", 2), ("linear", 4), ("gdn", 2), ("gdn", 4)}


def test_names_too_long_for_a_file_system_are_shortened_and_stay_apart(write):
    pieces = "".join(f"{'x' * 150}{n} = {{ run = {{ seed = {n} }} }}\n" for n in range(3))
    names = [cell.name for cell in load_study(write(f"[study.variants.a]\n{pieces}")).cells]
    assert len(set(names)) == 3
    assert max(map(len, names)) < 255
    cells = load_study(write(f'[study.variants.a]\n"{"日" * 110}" = {{}}\n')).cells
    assert len(cells[0].name.encode()) < 255
    assert cells[0].name.startswith("日" * 40)


def test_a_cell_has_the_processes_of_its_parallel_table(write):
    study = load_study(write("[study.grid]\nparallel.sp = [1, 2, 4]\nparallel.dp = [0, 2]\n"))
    assert [cell.processes for cell in study.cells] == [1, 2, 2, 4, 4, 8]


def test_a_study_of_the_repository_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_study("mqar") == load_study(STUDIES[0].parent / "mqar.toml")


def test_options_change_how_a_study_is_run(write, tmp_path):
    options = ["--study.workers", "3", "--study.dir", str(tmp_path / "else")]
    study = load_study(write(AXES), options)
    assert study.config.workers == 3
    assert study.cells[0].settings.run.path.parent == tmp_path / "else"


MISTAKES = {
    "no study": ("", "has no table [study]"),
    "no axes": ("[study]\n", "the study is empty"),
    "empty list": ("[study.grid]\nrun.seed = []\n", "axis run.seed has no value"),
    "no list": ("[study.grid]\nrun.seed = 3\n", "study.grid.run.seed = 3: expected a list"),
    "empty axis": ("[study.variants.task]\n", "axis task has no value"),
    "no table": ("[study.variants]\ntask = 3\n", "study.variants.task = 3: expected a table"),
    "a date": ("[study.grid]\nrun.seed = [2024-01-01]\n", "datetime.date(2024, 1, 1): expected an"),
    "a name that is a file": (
        '[study.variants.a."study.html"]\n',
        "'study.html': cannot be the name",
    ),
    "a line break in a name": ('[study.variants.a."b\\nc"]\n', r"'b\nc': cannot be the name"),
    "unknown field": (
        "[study.grid]\ntrain.stepz = [1]\n",
        "cell stepz1: train.stepz is not a known field; nearest: train.steps",
    ),
    "unknown kind": (
        '[study.grid]\nmodel.mixers.M.kind = ["linaer"]\n',
        "cell kindlinaer: model.mixers.M.kind = 'linaer'",
    ),
    "wrong type": ('[study.grid]\nrun.seed = [1, "x"]\n', "run.seed = 'x': expected an integer"),
    "not fitting": ("[study.grid]\ndata.pairs = [2, 6]\n", "cell pairs6: data.vocabulary = 12"),
    "too long": ("[study.grid]\ntrain.seq_len = [2]\n", "train.seq_len = 2 is too short"),
    "three heads": (
        "[study.grid]\ntrain.batch_size = [3]\nparallel.dp = [2]\n",
        "cell batch_size3-dp2, on 2 processes (parallel.dp x sp x tp): train.batch_size = 3",
    ),
    "an engine that cannot": (
        '[study.grid]\noptim.kind = ["muon"]\nparallel.engine = ["deepspeed"]\n',
        "cell kindmuon-enginedeepspeed, on 1 processes (parallel.dp x sp x tp): optim.kind",
    ),
    "no cells": ("[study]\ncells = []\n", "axis cells has no value"),
    "cells that are no tables": ("[study]\ncells = [3]\n", "study.cells = [3]: expected tables"),
    "an empty cell": ("[[study.cells]]\n", "study.cells.0 sets nothing"),
    "cells of a name": (
        '[[study.cells]]\nname = "a"\n[[study.cells]]\nname = "a"\nrun.seed = 1\n',
        "study.cells.1: a is the name of another",
    ),
    "unknown field in a cell": ("[[study.cells]]\ntrain.stepz = 1\n", "nearest: train.steps"),
    "the same run": (
        "[study.variants.a]\nx = {}\ny = { run = { seed = 0 } }\n",
        "cells x and y are the same run",
    ),
    "two axes of a name": (
        '[study.variants."run.seed"]\nx = {}\n[study.grid]\nrun.seed = [1]\n',
        "two axes have the name run.seed",
    ),
    "a column": ("[study.variants.status]\nx = {}\n", "axis status: a column of the results"),
    "sweep": (
        '[study.grid]\noptim.lr = [0.1]\n[study.best]\nover = ["optim.ir"]\n',
        "study.best.over: 'optim.ir' is no axis of the study; nearest: optim.lr",
    ),
    "group": (
        '[study]\ngroup = "x"\n[study.grid]\noptim.lr = [0.1]\n',
        "study.group: 'x' is no axis",
    ),
    "slurm": ("[study.slurm]\nnode = 2\n[study.grid]\nrun.seed = [1]\n", "study.slurm.nodes"),
    "same value": ("[study.grid]\nrun.seed = [1, 1]\n", "run.seed = [1, 1]: holds a value twice"),
    "same name": (
        "[study.variants.a]\nx = {}\nx-y = {}\n[study.variants.b]\nz = {}\ny-z = {}\n",
        "two cells have the name x-y-z",
    ),
    "same field": (
        "[study.variants.a]\nx = { optim = { lr = 1.0 } }\n[study.grid]\noptim.lr = [0.1]\n",
        "optim.lr is set by axis a and by axis optim.lr",
    ),
    "own field": ('[study.grid]\nrun.dir = ["a"]\n', "run.dir is set by the study and by axis"),
    "slash": ('[study.variants.a]\n"x/y" = {}\n', "run.name = 'x/y': must be a plain file name"),
    "study field": ("[study]\nworkerz = 2\n[study.grid]\nrun.seed = [1]\n", "study.workerz"),
    "no text": (
        '[study]\nname = "a\\u0000"\n[study.grid]\nrun.seed = [1]\n',
        r"name = 'a\x00': must be",
    ),
    "workers": ("[study]\nworkers = 0\n[study.grid]\nrun.seed = [1]\n", "study.workers = 0"),
}


@pytest.mark.parametrize(("text", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_line_and_exit_code_2_before_anything_runs(
    text, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(text + BASE)
    assert main(["study", "study.toml"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("longctx: study.toml")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


@pytest.mark.parametrize("argv", [["study"], ["study", "nowhere.toml"], ["study", "a", "--x", "1"]])
def test_a_missing_file_or_option_is_told(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("[study]\n[study.grid]\nrun.seed = [1]\n" + BASE)
    assert main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_field_is_documented_and_read_and_in_the_help(capsys):
    documented = field_docstrings(StudyConfig)
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    shown = without_layout(capsys.readouterr().out)
    for field in fields(StudyConfig):
        assert field.name in attributes_read()
        assert without_layout(f"--study.{field.name}") in shown
        if field.name not in ("best", "slurm"):
            assert without_layout(documented[field.name]) in shown
    assert [field.name for field in fields(Options)] == ["study"]
