import subprocess
import sys

import pytest

from longctx.cli import main

MISTAKES = {
    "unknown command": (["trane", "tiny"], "'trane' is no command"),
    "missing config": (["train", "nowhere.toml"], "nowhere.toml: no such file or preset"),
    "no config": (["train"], "longctx train needs a config file or preset"),
    "unknown key": (["train", "tiny", "--train.stepz", "1"], "nearest: --train.steps"),
    "wrong type": (["train", "tiny", "--train.steps", "ten"], "train.steps"),
    "heads": (["train", "tiny", "--model.mixers.L.num_heads", "5"], "does not divide model.width"),
    "letter": (["train", "tiny", "--model.pattern", "LX"], "[model.mixers.X]"),
    "seq_len": (["train", "tiny", "--train.seq_len", "0"], "train.seq_len = 0"),
    "data": (["train", "tiny", "--data.path", "/no/such/place"], "data.path"),
    "device": (["train", "tiny", "--train.device", "tpu"], "train.device"),
    "feature map": (["train", "tiny", "--model.mixers.L.feature_map", "x"], "feature_map"),
    "denominator": (["train", "tiny", "--model.mixers.L.denominator", "true"], "positive"),
    "routed heads": (["train", "tiny", "--model.mixers.S.active_heads", "7"], "active_heads"),
    "window": (["train", "tiny", "--model.mixers.S.inner.window", "2000"], "longer than train.seq"),
    "checkpoint": (["generate", "/no/such/run"], "no checkpoint here"),
}


@pytest.mark.parametrize(("argv", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_line_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[model]\npattern = "L"\n[model.mixers.L]\nkind = "linaer"', "nearest: linear"),
        ('[model]\npattern = "L"\n[model.mixers.L]\nnum_heads = 2', "kind"),
        ("[model\n", "not valid TOML"),
        ('[model]\npattern = "L"\nwidht = 3\n[model.mixers.L]\nkind = "linear"', "model.width"),
        ('[model]\npattern = "L"', "model.mixers"),
    ],
)
def test_a_bad_file_is_named(text, words, capsys, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    assert main(["train", str(file)]) == 2
    captured = capsys.readouterr()
    assert "bad.toml" in captured.err
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_print_config_prints_the_resolved_file(capsys):
    assert main(["train", "tiny", "--train.steps", "3", "--print-config"]) == 0
    assert "steps = 3" in capsys.readouterr().out


def test_usage_and_version(capsys):
    assert main([]) == 0
    assert main(["--version"]) == 0
    assert "train" in capsys.readouterr().out


def test_module_and_script_are_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "longctx", "train", "nowhere.toml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
