"""No secret leaves in what a run tells."""

import json
import sys
import time

import pytest

from longctx.train.environment import describe
from longctx.train.metrics import LogConfig, MetricsLog
from longctx.train.redaction import HIDDEN, redact

SECRETS = {
    "store s3://me:hunter2@bucket/x is away": f"store s3://{HIDDEN}@bucket/x is away",
    "https://hunter2@example.org/a@b": f"https://{HIDDEN}@example.org/a@b",
    "simplecache::ftp://me:hun/ter2@host/x": f"simplecache::ftp://{HIDDEN}@host/x",
    "WANDB_API_KEY=hunter2, and more": f"WANDB_API_KEY={HIDDEN}, and more",
    "run with --store.hf-token hunter2 --a b": f"run with --store.hf-token {HIDDEN} --a b",
    '{"client_secret": "hunter2 hunter2", "a": 1}': f'{{"client_secret": {HIDDEN}, "a": 1}}',
    "https://x/y?sig=hunter2&sv=1": f"https://x/y?sig={HIDDEN}&sv=1",
    "https://x/y?v=1&X-Amz-Signature=hunter2": f"https://x/y?v=1&X-Amz-Signature={HIDDEN}",
    "Authorization: Bearer hunter2hunter2": f"Authorization: Bearer {HIDDEN}",
    "Authorization: Basic hunter2hunter2": f"Authorization: Basic {HIDDEN}",
    "Password : hunter2": f"Password : {HIDDEN}",
    "refused hf_hunter2hunter2hunter2 today": f"refused {HIDDEN} today",
}
PLAIN = (
    "step 3: loss 2.5, 1,234 tok/s",
    "model.mixers.S.near_keys = 11: must be odd",
    "runs/mine/checkpoints/step-12: 3 tokens, key = 4",
    "a basic retention of task-5-is-not-a-token and AKIAB",
    "wandb-run@2: see https://host/a?b=c and a@b.org",
    "memory.mlp_tokens = 0 token_shift=false --model.mixers.S.num_key_heads 4",
)


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_in_a_text_is_hidden(text):
    assert redact(text) == SECRETS[text]
    assert "hunter2" not in redact([{"a": (text,)}])[0]["a"][0]


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_tables_hide_values_of_secret_names():
    table = {"store": {"api_key": "x", "Password": 7, "my_token": ["a"], "secrets": {"a": "b"}}}
    assert set(redact(table)["store"].values()) == {HIDDEN}
    plain = {
        "api_key": "",
        "first_token": 3,
        "bytes_per_token": 0.5,
        "has_secret": False,
        "a": None,
    }
    assert redact(plain) == plain


def test_words_after_a_secret_option_are_hidden():
    argv = [
        "longctx",
        "train",
        "--a.api_key",
        "hunter2",
        "hunter3",
        "--b",
        "c",
        "--x-token=hunter2",
    ]
    expected = [
        "longctx",
        "train",
        "--a.api_key",
        HIDDEN,
        HIDDEN,
        "--b",
        "c",
        f"--x-token={HIDDEN}",
    ]
    assert redact(argv) == expected
    assert redact(tuple(argv)) == tuple(expected)


def test_environment_console_and_log_hold_no_secret(tmp_path, monkeypatch, capsys):
    url = "s3://me:hunter2@bucket"
    monkeypatch.setattr(sys, "argv", ["longctx", "train", "--checkpoint.dir", url])
    assert "hunter2" not in json.dumps(describe())
    log = MetricsLog(tmp_path, LogConfig(), "tiny", {}, 0)
    log.info(url)
    log.warn(url)
    log.close()
    told = capsys.readouterr().out + (tmp_path / "log.txt").read_text()
    assert told.count(f"s3://{HIDDEN}@bucket") == 4
    assert "hunter2" not in told


@pytest.mark.parametrize(
    "part", ["a-", "a.", "-", "secret-", "x_token", "://a:", "?key", "bearer "]
)
def test_a_long_text_takes_no_long_time(part):
    started = time.thread_time()
    redact(part * 20_000)
    assert time.thread_time() - started < 2
