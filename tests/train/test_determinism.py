"""Two runs are equal bit for bit, or refused."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longctx.errors import InputError
from longctx.mixers import MixerConfig
from longctx.mixers.delta import GDNConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.mixers.sum import SumConfig
from longctx.train import determinism
from longctx.train.determinism import check_deterministic, make_deterministic
from tests.train.repeated import every_kind, hybrid, trained

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
TWO_THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def _deterministic(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


@pytest.mark.usefixtures("_deterministic")
def test_torch_refuses_no_kind_of_layer():
    assert torch.are_deterministic_algorithms_enabled()
    config = every_kind()
    first = trained(config, length=40, steps=2)
    assert trained(config, length=40, steps=2) == first
    assert len(set(first)) > len(first) // 2


def test_two_processes_of_two_threads_are_equal_bit_for_bit():
    command = [sys.executable, "-m", "tests.train.repeated"]
    environment = os.environ | TWO_THREADS
    outputs = [
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True).stdout
        for _ in range(2)
    ]
    assert outputs[0].startswith(b"2 [")
    assert outputs[0] == outputs[1]


FLA = LinearConfig(num_heads=4, backend="fla")


@pytest.mark.parametrize(
    ("mixer", "path"),
    [
        (FLA, "model.mixers.L"),
        (MoHConfig(inner=FLA), "model.mixers.L.inner"),
        (SumConfig(parts={"a": SoftmaxConfig(num_heads=4), "b": FLA}), "model.mixers.L.parts.b"),
    ],
    ids=["itself", "inside routed heads", "inside a sum"],
)
def test_kernels_that_are_tuned_at_each_start_are_refused(mixer: MixerConfig, path: str):
    with pytest.raises(InputError, match=rf"train\.deterministic: {path} computes with fla"):
        check_deterministic({"L": mixer}, "auto")


def test_a_backend_for_the_whole_model_is_refused_where_it_is_used():
    with pytest.raises(InputError, match=r"model\.mixers\.D computes with fla"):
        check_deterministic({"S": SoftmaxConfig(num_heads=4), "D": GDNConfig(num_heads=4)}, "fla")
    check_deterministic({"S": SoftmaxConfig(num_heads=4)}, "fla")
    check_deterministic(hybrid().mixers, "triton")


def test_an_operation_that_torch_refuses_is_named_in_one_line():
    refusal = "cumsum_cuda_kernel does not have a deterministic implementation, but you set ..."
    with (
        pytest.raises(InputError, match="cumsum_cuda_kernel gives other bits each time"),
        determinism.naming_nondeterminism(),
    ):
        raise RuntimeError(refusal)
    with pytest.raises(RuntimeError, match="other"), determinism.naming_nondeterminism():
        raise RuntimeError("other")
