"""`longctx plan`: what it prints, its exit codes, and what bad input gets."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from longctx.cli import main
from longctx.config import apply_overrides
from longctx.plan.clusters import load_cluster
from longctx.plan.picture import draw
from longctx.plan.prediction import predict
from longctx.plan.record import as_record
from longctx.plan.show import as_text
from longctx.train.settings import load_settings

CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
SMALL = ["340m", "--cluster", "8xh100", "--processes", "4", "--vocab_size", "512"]
BAD = {
    "unknown cluster": (["tiny", "--cluster", "8xh10"], "8xh100"),
    "cluster without links": (["tiny", "--cluster", "BROKEN"], "links.node is missing"),
    "too many": (["tiny", "--cluster", "8xh100", "--processes", "8192"], "has 4096"),
    "part of a node": (["tiny", "--cluster", "8xh100", "--processes", "12"], "with 8 or 16"),
    "no such split": ([*SMALL, "--parallel.sp", "3"], "parallel.sp = 3"),
    "split without search": (
        [*SMALL, "--search", "false", "--train.batch_size", "2"],
        "batch_size = 2",
    ),
    "negative": (["tiny", "--tokens", "-1"], "must not be negative"),
    "unknown kind of picture": (["tiny", "--picture", "plan.xyz"], "must end in .png"),
    "vocabulary of one": (
        [*SMALL, "--train.batch_size", "4", "--vocab_size", "1", "--parallel.tp", "2"],
        "vocab_size = 1",
    ),
    "no config": (["--cluster", "8xh100"], "needs a config file or preset"),
    "no tokenizer": (["tiny", "--data.tokenizer", "/nowhere.json"], "or give --vocab_size"),
    "unknown option": (["tiny", "--clutser", "8xh100"], "nearest: --cluster"),
    "unknown field": (["tiny", "--train.stepz", "1"], "nearest: --train.steps"),
}


def plan(capsys, *argv):
    code = main(["plan", *argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def prediction():
    options = ["--train.batch_size", "4", "--train.seq_len", "65536", "--parallel.sp", "8"]
    settings = apply_overrides(load_settings("340m"), options, "test")
    return predict(settings, load_cluster("8xh100"), 8, 512, 1_000_000, True)


def test_a_plan_fits_a_terminal_and_says_where_its_numbers_come_from(prediction):
    text = as_text(prediction)
    assert max(map(len, text.splitlines())) <= 100
    for part in ("Parameters", "FLOPs a token", "Memory of a process", "Received by a process",
                 "Time of a step", "MFU", "To 1 M tokens", "Longest sequence", "Best", "Others",
                 "dp of 8 left out", "Predicted from"):  # fmt: skip
        assert part in text, part
    assert "Nothing was measured with longctx" in " ".join(text.split())


def test_a_record_adds_up(prediction):
    record = json.loads(json.dumps(as_record(prediction)))
    for way in (record["asked"], record["best"]):
        time, memory = way["time"], way["memory"]
        parts = sum(time["compute"].values()) + sum(time["exposed"].values())
        rest = time["optimizer"] + time["fixed"] + time["calling"]
        assert time["total"] == pytest.approx(parts + rest)
        assert memory["device"] == sum(memory["parts"].values())
        assert way["fits"]
    assert record["asked"]["choice"]["sp"] == 8
    assert record["best"]["time"]["total"] <= record["asked"]["time"]["total"] * 1.003
    lengths = [found["tokens"] for found in record["longest"]]
    assert lengths == sorted(lengths)
    assert record["parameters"]["total"] > 0


def test_every_key_of_a_record_is_documented(prediction):
    page = (CLUSTERS.parents[1] / "docs" / "planning.md").read_text()
    record = as_record(prediction)
    for name in {*record, *record["best"], *record["best"]["time"], *record["best"]["choice"]}:
        assert f"`{name}`" in page, name


def test_what_does_not_fit_is_told_by_how_much_and_what_helps(capsys):
    code, out, err = plan(
        capsys, *SMALL, "--search", "false", "--parallel.sp", "4",
        "--train.seq_len", "1048576", "--train.batch_size", "1",
    )  # fmt: skip
    assert code == 1
    assert "DOES NOT FIT" in out
    (line,) = err.splitlines()
    assert line.startswith("longctx: 340m does not fit: needs ")
    assert "train.seq_len at most " in line
    assert "--memory.checkpointing" in line


def test_a_config_of_which_no_way_fits_fails(capsys):
    code, out, err = plan(capsys, "7b", "--cluster", "8xh100", "--processes", "1",
                          "--vocab_size", "512", "--train.seq_len", "8388608")  # fmt: skip
    assert code == 1
    assert "Nothing fits." in out
    assert max(map(len, out.splitlines())) <= 100
    assert "7b does not fit: needs " in err
    assert len(err.splitlines()) == 1


def test_a_config_that_leaves_the_split_open_gets_one(capsys):
    code, out, _ = plan(capsys, *SMALL, "--train.batch_size", "2", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["asked"] is None
    assert "replicas" in record["refusal"]
    assert record["best"]["choice"]["sp"] * record["best"]["choice"]["tp"] > 1


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, capsys):
    argv, part = BAD[name]
    broken, whole = tmp_path / "broken.toml", (CLUSTERS / "localhost.toml").read_text()
    broken.write_text(re.sub(r"\[links\.node\]\n(.+\n)+", "", whole))
    argv = [str(broken) if word == "BROKEN" else word for word in argv]
    code, out, err = plan(capsys, *argv)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert part in line, line


def test_a_picture_is_written(prediction, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "plan.png"
    draw(replace(prediction, longest=()), str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
