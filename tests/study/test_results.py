import csv
import json
import sys
from dataclasses import replace

import pytest

from longctx.errors import InputError, OutsideError
from longctx.study import results as study_results
from longctx.study.results import Results, Row, read_results, write_results

AXES = ("kind", "optim.lr", "optim.betas", "train.seq_len")


def row(folder, name, values, **changes) -> Row:
    figures = {
        "status": "done",
        "attempts": 1,
        "error": "",
        "is_best": False,
        "processes": 2,
        "config": {"optim.lr": values[1], "model.width": 16, "model.mixers.M.window": None},
        "summary": {"val_loss": 1.5, "tokens": 96, "seconds": 2.5, "flops": 1e9, "parameters": 7},
    }
    own = dict(zip(AXES, values))
    return Row(name=name, values=own, run_dir=folder / name, **(figures | changes))


@pytest.fixture
def results(tmp_path):
    return Results(
        name="sizes",
        command="longctx study 'my study.toml'",
        axes=AXES,
        rows=(
            row(tmp_path, "a", ("gdn", 0.001, [0.9, 0.95], 12), is_best=True),
            row(tmp_path, "b", ("kda", 2**60 + 1, [0.9, 0.99], 24), status="failed", summary={}),
        ),
        over=("optim.lr",),
        group="kind",
    )


def test_results_are_read_as_they_were_written(results, tmp_path):
    write_results(results, tmp_path)
    assert read_results(tmp_path) == results
    first = read_results(tmp_path).rows[0]
    assert (first.seconds, first.parameters, first.tokens, first.flops) == (2.5, 7, 96, 1e9)
    assert not list(tmp_path.glob(".partial*"))


def test_a_study_that_is_moved_finds_its_runs(results, tmp_path):
    write_results(results, tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_results(tmp_path / "new").rows[0].run_dir == tmp_path / "new" / "a"


def test_parquet_keeps_types_and_csv_is_the_same_table(results, tmp_path):
    from pyarrow import parquet

    write_results(results, tmp_path)
    table = parquet.read_table(tmp_path / "study.parquet")
    columns = table.to_pydict()
    assert columns["cell"] == ["a", "b"]
    assert columns["kind"] == ["gdn", "kda"]
    assert (columns["optim.lr"], str(table.schema.field("optim.lr").type)) == (
        [0.001, 2**60],
        "double",
    )
    assert str(table.schema.field("train.seq_len").type) == "int64"
    assert [json.loads(item) for item in columns["optim.betas"]] == [[0.9, 0.95], [0.9, 0.99]]
    assert columns["is_best"] == [True, False]
    assert columns["val_loss"] == [1.5, None]
    with (tmp_path / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(columns)
    assert rows[0]["train.seq_len"] == "12"
    assert rows[1]["val_loss"] == ""
    assert rows[0]["is_best"] == "true"
    assert rows[1]["optim.betas"] == "[0.9, 0.99]"


def test_numbers_and_texts_that_parquet_does_not_hold_do_not_stop_a_study(results, tmp_path):
    from pyarrow import parquet

    rows = (results.rows[0], row(tmp_path, "b", ("kda", 2**64, [1], 24), error="\udcff is a name"))
    write_results(replace(results, rows=rows), tmp_path)
    columns = parquet.read_table(tmp_path / "study.parquet").to_pydict()
    assert columns["optim.lr"] == [0.001, 2.0**64]
    assert columns["error"] == ["", "? is a name"]
    assert [type(n) for n in study_results._of_one_type([2**64, None])] == [float, type(None)]
    assert read_results(tmp_path).rows[1].error == "\udcff is a name"


def test_without_pyarrow_there_is_a_warning_and_a_csv(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    study_results._warn_of_no_parquet.cache_clear()
    for _ in range(2):
        write_results(results, tmp_path)
    assert (
        capsys.readouterr().err == "warning: no study.parquet, because pyarrow is not installed\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.csv", "study.json"]


@pytest.mark.parametrize("text", ["", "{}", '{"rows": [{}]}', '{"rows": 3}', "[]"])
def test_a_damaged_record_is_one_line(text, tmp_path):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(InputError, match=r"is damaged .*--collect makes it anew"):
        read_results(tmp_path)


def test_a_folder_without_a_study_and_one_that_cannot_be_written_are_told(results, tmp_path):
    with pytest.raises(InputError, match=r"holds no study\.json"):
        read_results(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutsideError, match="cannot write the results"):
        write_results(results, tmp_path / "file")
