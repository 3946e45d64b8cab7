"""What layers keep between their passes equals the formulas, byte for byte."""

import itertools
from contextlib import nullcontext

import pytest
import torch

from longctx.config import decode
from longctx.mixers import Place
from longctx.model import saved_runs
from longctx.model.allocations import Allocations
from longctx.model.decoder import Decoder, ModelConfig, build_block, initialise
from longctx.model.memory import MemoryConfig
from longctx.model.saved_bytes import DTYPES, Batch, counted, of_block, of_ends, of_model
from longctx.model.saved_runs import Layer, saved_by_running
from longctx.sequence.expected import WIDTHS, Share
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.sharded import Transports

WIDTH, VOCABULARY = 32, 50
GROUPED = {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2}
BLOCKS = {"kind": "nsa", "num_heads": 4, "num_kv_heads": 2}
MIXERS = {
    "linear": {"kind": "linear", "num_heads": 4},
    "linear, sigmoid gate": {"kind": "linear", "num_heads": 2, "gate": "sigmoid"},
    "linear, no decay": {"kind": "linear", "num_heads": 2, "decay": "none"},
    "linear, bare": {"kind": "linear", "num_heads": 2, "gate": "none", "output_norm": False},
    "linear, norm over heads": {"kind": "linear", "num_heads": 2, "gate": "sigmoid"}
    | {"value_map": "silu", "norm": "all"},
    "linear, norm over heads, swish": {"kind": "linear", "num_heads": 2, "norm": "all"},
    "gla": {"kind": "gla", "num_heads": 2},
    "mamba2": {"kind": "mamba2", "num_heads": 2, "state_size": 16},
    "mamba2, groups": {"kind": "mamba2", "num_heads": 4, "num_groups": 2, "state_size": 8},
    "deltanet": {"kind": "deltanet", "num_heads": 2},
    "gdn": {"kind": "gdn", "num_heads": 2},
    "gdn, grouped": {"kind": "gdn", "num_heads": 4, "num_key_heads": 2, "value_dim": 12},
    "kda": {"kind": "kda", "num_heads": 2},
    "titans": {"kind": "titans", "num_heads": 4},
    "titans, window": {"kind": "titans", "num_heads": 4, "window": 9, "persistent": 2},
    "softmax": GROUPED,
    "softmax, window": GROUPED | {"window": 9, "qk_norm": False, "rope_fraction": 0.5},
    "softmax, gate": {"kind": "softmax", "num_heads": 4, "gate": "sigmoid", "rope_fraction": 0.0},
    "softmax, long window": GROUPED | {"window": 33},
    "softmax, one head": {"kind": "softmax", "num_heads": 1},
    "moh": {"kind": "moh", "inner": GROUPED, "shared_heads": 1, "active_heads": 2},
    "moh, shared": {"kind": "moh", "inner": GROUPED | {"window": 9, "gate": "sigmoid"}}
    | {"shared_heads": 2, "router_noise": 0.5},
    "moh, all routed": {"kind": "moh", "inner": GROUPED, "shared_heads": 0},
    "moh, all routed, noise": {"kind": "moh", "inner": GROUPED, "shared_heads": 0}
    | {"active_heads": 4, "router_noise": 1.0},
    "lte": {"kind": "lte", "num_heads": 4, "num_kv_heads": 2, "capacity": 8, "window": 9},
    "lte, one key": {"kind": "lte", "num_heads": 4, "num_kv_heads": 1, "capacity": 60}
    | {"window": 30, "gate": "sigmoid", "qk_norm": False, "rope_fraction": 0.5},
    "nsa": BLOCKS | {"block": 16, "compress_block": 16, "compress_stride": 8, "window": 32},
    "nsa, means": BLOCKS
    | {"block": 16, "compress_block": 16, "compress_stride": 16, "window": 9}
    | {"compression": "mean", "branch_keys": "shared", "gate": "sigmoid", "num_blocks": 3},
    "nsa, no block": BLOCKS | {"compress_block": 64, "window": 9, "qk_norm": False},
}
NEARLY_THE_SAME = {"linear", "linear, bare", "mamba2", "deltanet", "gdn", "softmax", "moh"}
"""As others, as far as several ranks are concerned."""
OTHERS = {
    "moh, by lengths": {"kind": "moh", "inner": GROUPED | {"qk_norm": False}}
    | {"router": "query-norm"},
    "moba": {"kind": "moba", "num_heads": 4, "num_kv_heads": 2, "block": 16, "num_blocks": 3},
    "mosa": {"kind": "mosa", "num_heads": 4, "sparsity": 4, "group": 64},
    "aaren": {"kind": "aaren", "num_heads": 4},
    "s2": {"kind": "s2", "num_heads": 4, "block": 16},
    "linear, inline": {"kind": "linear", "num_heads": 4, "inline": True, "decay": "none"},
    "scored": {"kind": "scored", "num_heads": 4},
}
PADDED = {"mosa": 0.06}
"""Share by which a prediction may be wrong where slots fill up tiles."""
FETCHED = {"nsa": 0.1}
"""The same where blocks are fetched as data choose."""
SHAPES = ((1, 64), (2, 40), (1, 200))
PRECISIONS = ("fp64", "fp32", "bf16")
POLICIES = ("none", "full", "keep")
RUNS = [
    (shape, precision, policy)
    for shape, precision, policy in itertools.product(SHAPES, PRECISIONS, POLICIES)
    if precision != "fp64" or shape[0] > 1
]


SPLITS = (
    (2, 1, "zigzag", Transports()),
    (3, 2, "contiguous", Transports("scan", "ring")),
    (2, 0, "contiguous", Transports("ulysses", heads=2)),
    (4, 1, "mirror", Transports("ulysses", heads=2)),
)
"""Ranks, one of them, placement and transports."""


def config_of(mixer: dict, **table) -> ModelConfig:
    table = {"width": WIDTH, "depth": 1, "pattern": "M", "mixers": {"M": mixer}} | table
    return decode(ModelConfig, table, path="model")


def block_and_view(config: ModelConfig, memory: MemoryConfig, batch: Batch, letter: str = "M"):
    block = build_block(config, config.letters.index(letter), memory)
    view = LocalView.whole(batch.rows, batch.tokens)
    return block.to(DTYPES[batch.precision]), view.keyed(0, 0, tuple(range(batch.rows)))


def ran(config: ModelConfig, memory: MemoryConfig, batch: Batch, letter: str = "M") -> int:
    """Of a second pass: the first leaves tables with the view."""
    block, view = block_and_view(config, memory, batch, letter)
    return [counted(block, view, WIDTH, batch.precision) for _ in range(2)][1]


@pytest.mark.parametrize("name", MIXERS)
def test_a_layer_keeps_what_its_formula_says(name):
    for shape, precision, policy in RUNS:
        memory, batch = MemoryConfig(checkpointing=policy), Batch(*shape, precision)
        config = config_of(MIXERS[name], dropout=0.1 * (shape[0] - 1))
        wanted = ran(config, memory, batch)
        assert of_block(config, "M", memory, batch) == wanted, (shape, precision, policy)


@pytest.mark.cluster
@pytest.mark.parametrize("name", sorted(MIXERS.keys() - NEARLY_THE_SAME))
def test_a_layer_of_several_ranks_keeps_what_its_formula_says(name):
    """tests/plan compares the same with real ranks."""
    config = config_of(MIXERS[name], without_mlp="M")
    mixer = config.mixers["M"]
    for number, (ranks, rank, kind, transports) in enumerate((SPLITS[0], *SPLITS)):
        if mixer.refusal(transports):
            continue
        precision, widths, rows = ("fp32", "bf16")[number == 4], WIDTHS["fp32"], 1 + (number > 0)
        placement = place(kind, ranks, 24 * ranks, transports.heads)
        share = Share(rank, placement, rows, transports, widths)
        batch = Batch(rows, 24, precision, share=share)
        for policy in POLICIES:
            layer = Layer(mixer, Place(WIDTH, 0, 1), policy)
            wanted = saved_by_running(layer, batch)
            found = of_block(config, "M", MemoryConfig(checkpointing=policy), batch)
            assert found == wanted, (share, policy)


@pytest.mark.parametrize(("name", "policy"), [("nsa", "none"), ("moh", "keep"), ("moh", "none")])
def test_runs_with_few_heads_rows_and_ranks_tell_of_many(name, policy, monkeypatch):
    more = {"moh": {"inner": {"kind": "softmax", "num_heads": 8}}, "nsa": {"num_kv_heads": 8}}
    mixer = MIXERS[name] | ({} if name == "moh" else {"num_heads": 8}) | more.get(name, {})
    layer = Layer(config_of(mixer).mixers["M"], Place(WIDTH, 0, 1), policy)
    share = Share(3, place("contiguous", 8, 384), 3, Transports(), WIDTHS["fp32"])
    batch = Batch(3, 48, share=share)
    monkeypatch.setattr(saved_runs, "FEW", 8)
    wanted = saved_by_running(layer, batch)
    monkeypatch.setattr(saved_runs, "FEW", 4)
    monkeypatch.setattr(saved_runs, "NARROW", 16)
    assert abs(saved_by_running(layer, batch) / wanted - 1) <= FETCHED.get(name, 0.01)


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
@pytest.mark.parametrize("mlp_tokens", [0, 16])
def test_a_feed_forward_layer_keeps_what_its_formula_says(mlp, mlp_tokens):
    config = config_of(GROUPED, pattern="M-", depth=2, mlp=mlp)
    for policy, precision in itertools.product(POLICIES, PRECISIONS):
        memory, batch = MemoryConfig(policy, mlp_tokens=mlp_tokens), Batch(2, 40, precision)
        assert of_block(config, "-", memory, batch) == ran(config, memory, batch, "-")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OTHERS)
def test_layers_without_a_formula_grow_by_the_same_with_every_token(name, policy):
    config, memory = config_of(OTHERS[name], without_mlp="M"), MemoryConfig(checkpointing=policy)
    batch = Batch(1, 2304)
    predicted, found = of_block(config, "M", memory, batch), ran(config, memory, batch)
    assert abs(predicted - found) <= PADDED.get(name, 0) * found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_keeps_the_sum_of_its_parts(policy, precision):
    mixers = {"L": MIXERS["linear"], "S": GROUPED}
    config = config_of(GROUPED, pattern="LS-", depth=3, mixers=mixers)
    memory, batch = MemoryConfig(checkpointing=policy), Batch(2, 48, precision)
    model = Decoder(config, VOCABULARY, memory).to(DTYPES[precision])
    initialise(model, 0)
    tokens_BT = torch.zeros(2, 48, dtype=torch.long)
    view = LocalView.whole(2, 48)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with Allocations() as allocations:
        with autocast:
            losses = model(tokens_BT, tokens_BT, view)
        alive = allocations.alive() - losses.cross_entropy.untyped_storage().nbytes()
    assert of_model(config, VOCABULARY, memory, batch) == alive
    assert of_ends(config, VOCABULARY, batch) > 0


SHARED = {
    "S": GROUPED,
    "V": GROUPED | {"reuses": "values"},
    "K": GROUPED | {"reuses": "keys and values"},
    "L": MIXERS["linear"],
}


@pytest.mark.parametrize("pattern", ["SV", "SVLKS", "SLKV", "SKSVL"])
@pytest.mark.parametrize("policies", ["none", "full", "keep", "full none", "none keep"])
def test_keys_that_layers_share_are_kept_once(pattern, policies):
    maker, reader = (2 * policies.split())[:2]
    config = config_of(GROUPED, pattern=pattern, depth=len(pattern), mixers=SHARED)
    layers = {letter: maker if letter in "SL" else reader for letter in set(pattern)}
    memory, batch = MemoryConfig(layers=layers), Batch(2, 48)
    model = Decoder(config, VOCABULARY, memory)
    tokens_BT, view = torch.zeros(2, 48, dtype=torch.long), LocalView.whole(2, 48)
    with Allocations() as allocations:
        losses = model(tokens_BT, tokens_BT, view)
        alive = allocations.alive() - losses.cross_entropy.untyped_storage().nbytes()
    table = 16  # where documents end, of a view with a shelf
    assert 0 <= alive - of_model(config, VOCABULARY, memory, batch) <= table


def test_hooks_of_saved_tensors_count_the_same():
    """By the other way to see what a graph holds."""
    config, batch = config_of(MIXERS["linear"]), Batch(1, 64)
    block, view = block_and_view(config, MemoryConfig(), batch)
    weights = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *block.buffers())}
    found = {}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = block(torch.randn(1, 64, WIDTH, requires_grad=True), view).out
    tables = view.cu_seqlens.untyped_storage().data_ptr()
    own = [x for pointer, x in found.items() if pointer not in {*weights, tables}]
    assert sum(x.untyped_storage().nbytes() for x in own) == of_block(
        config, "M", MemoryConfig(), batch
    )
    assert out.shape == (1, 64, WIDTH)
