import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from longctx.config import apply_overrides
from longctx.train import hardware, trainer
from longctx.train.environment import describe
from longctx.train.hardware import peak_flops, peak_memory_bytes
from longctx.train.settings import load_settings


def test_the_peak_of_a_cpu_is_measured_without_using_random_numbers():
    before = torch.get_rng_state()
    rate, source = peak_flops(torch.device("cpu"), torch.float32)
    assert rate > 1e8
    assert source == "measured 1024 x 1024 float32 matrix product on cpu"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA GB200", torch.bfloat16, 2500e12),
        ("NVIDIA H200", torch.float32, 67e12),
        ("NVIDIA H200", torch.float64, None),
        ("NVIDIA GeForce RTX 4090", torch.float16, 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.float16, None),
        ("Some Card", torch.bfloat16, None),
    ],
)
def test_a_known_gpu_has_its_data_sheet_peak(name, dtype, peak):
    assert hardware._listed_peak(name, dtype) == peak


def test_tf32_products_are_not_compared_with_the_fp32_peak(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert hardware._listed_peak("NVIDIA H200", torch.float32) is None


def test_peak_memory_is_in_bytes():
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40


def test_the_environment_is_json_without_environment_variables(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "not-to-be-recorded")
    text = json.dumps(describe())
    assert "not-to-be-recorded" not in text
    assert json.loads(text)["torch"] == torch.__version__
    assert json.loads(text)["cores"] <= os.cpu_count()


def test_training_on_a_cpu_keeps_freed_memory(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(trainer, "keep_freed_memory", lambda: asked.append(True))
    options = ["--train.steps", "1", "--train.seq_len", "32", "--train.device", "cpu"]
    options += ["--eval.sequences", "1", "--run.dir", str(tmp_path / "run")]
    trainer.train(apply_overrides(load_settings("tiny"), options, "test"))
    assert asked == [True]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")
def test_most_freed_memory_is_reused_without_new_page_faults():
    script = (
        "import resource, sys, torch\n"
        "from longctx.train.hardware import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': assert keep_freed_memory()\n"
        # Small objects behind a block can keep it from being taken again until a few are joined.
        "for _ in range(10): torch.ones(1 << 24)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(1 << 24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )

    def faults(choice: str) -> int:
        command = [sys.executable, "-c", script, choice]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < faults("plain") / 2
