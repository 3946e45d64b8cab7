"""Layers that are computed again on real ranks, and under PyTorch's fully sharded parallelism."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from longctx.config import decode
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.model.memory import MemoryConfig
from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from tests.dist import run_gloo
from tests.sequence.links import gloo_links

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.alone
RANKS, LENGTH, VOCABULARY = 2, 40, 11
SOFTMAX = {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2}
MIXERS = {
    "S": SOFTMAX,
    "V": SOFTMAX | {"reuses": "values"},
    "L": {"kind": "linear", "num_heads": 4},
    "G": {"kind": "gdn", "num_heads": 2},
    "H": {"kind": "moh", "inner": SOFTMAX, "shared_heads": 1, "active_heads": 2},
    "N": {"kind": "nsa", "num_heads": 4, "num_kv_heads": 2, "block": 4, "compress_block": 4}
    | {"compress_stride": 2, "window": 9, "num_blocks": 4},
    "T": {"kind": "deep_titans", "num_heads": 2},
}
MEMORY = (
    {},
    {"checkpointing": "full", "mlp_tokens": 16},
    {"checkpointing": "keep", "mlp_tokens": 16, "loss_tokens": 8},
)
SPLITS = (
    ("SLVSV", "zigzag", Transports(stream="ring")),
    ("GHN", "contiguous", Transports(prefix="scan")),
    ("HL", "contiguous", Transports(heads=2)),
    ("TS", "contiguous", Transports(prefix="serial")),
)


def model(pattern: str, memory: dict) -> Decoder:
    table = {"width": 16, "depth": len(pattern), "pattern": pattern, "dropout": 0.1}
    config = decode(ModelConfig, table | {"mixers": MIXERS, "without_mlp": "V"}, path="model")
    built = Decoder(config, VOCABULARY, decode(MemoryConfig, memory, path="memory"))
    initialise(built, 0)
    return built.double()


def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def gradients(built: Decoder, tokens_BT: torch.Tensor, labels_BT: torch.Tensor, view) -> dict:
    losses = built(tokens_BT, labels_BT, view.keyed(1, 2, (4, 5)))
    (losses.cross_entropy / LENGTH + sum(losses.mixers.values()) / RANKS).backward()
    return {name: p.grad for name, p in built.named_parameters()}


def largest_difference(found: dict, wanted: dict) -> float:
    return max(
        float((found[name] - x).abs().max() / x.abs().max().clamp(min=1e-300))
        for name, x in wanted.items()
    )


def split_sequences(rank: int) -> list[float]:
    """For each split and policy the difference from none."""
    found = []
    for pattern, placement, transports in SPLITS:
        plan = Plan(place(placement, RANKS, LENGTH, transports.heads), rank, ((0,), (0, 5, 33)))
        ids_T, results = plan.token_ids_BT[0], []
        for memory in MEMORY:
            ledger = Ledger()
            view = ShardedView(plan, gloo_links(transports.heads, ledger), transports)
            batch = tokens()[:, ids_T], tokens().roll(-1, 1)[:, ids_T]
            results.append(gradients(model(pattern, memory), *batch, view))
        found += [largest_difference(other, results[0]) for other in results[1:]]
    return found


def sharded_weights(rank: int) -> list[float]:
    """For each policy the difference of summed gradients from those of whole weights."""
    mesh, found = init_device_mesh("cpu", (RANKS,)), []
    view, batch = LocalView.whole(2, LENGTH), (tokens() + rank) % VOCABULARY
    plain = gradients(model("SLHV", {}), batch, batch.roll(-1, 1), view)
    for x in plain.values():
        dist.all_reduce(x)
    for memory in MEMORY:
        built = model("SLHV", memory)
        for module in (*built.blocks, built):
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        sharded = gradients(built, batch, batch.roll(-1, 1), view)
        assert all(isinstance(x, DTensor) for x in sharded.values())
        found.append(
            largest_difference({name: x.full_tensor() for name, x in sharded.items()}, plain)
        )
    return found


def test_split_sequences_have_the_same_gradients_on_real_ranks():
    for found in run_gloo(RANKS, split_sequences):
        assert max(found) < 1e-12, found


def test_sharded_weights_get_the_same_gradients():
    for found in run_gloo(RANKS, sharded_weights):
        assert max(found) < 1e-12, found


@pytest.mark.cluster
def test_the_ladder_runs_on_a_cpu(tmp_path):
    script = ROOT / "kernels" / "bench" / "ladder.py"
    call = [sys.executable, str(script), "--tiny", "--first", "64", "--most", "128"]
    call += ["--rungs", "none,offload", "--out", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rungs = json.loads((tmp_path / "ladder-the-CPU-tiny.json").read_text())
    assert [rung["longest"]["tokens"] for rung in rungs] == [128, 128]
    assert rungs[0]["longest"]["kept_bytes"] > rungs[1]["longest"]["kept_bytes"] > 0
    assert "| offload | 128 |" in done.stdout
