"""What a model keeps between its passes changes nothing it computes."""

import itertools

import pytest
import torch
from longctx_kernels import softmax_attention
from torch import Tensor

from longctx.config import decode
from longctx.errors import InputError
from longctx.model import memory as memory_module
from longctx.model import tiles
from longctx.model.allocations import Allocations
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.model.memory import (
    MemoryConfig,
    check_host,
    host_bytes_needed,
)
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from tests.tolerances import assert_close

SOFTMAX = {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2}
MIXERS = {
    "A": SOFTMAX,
    "B": SOFTMAX | {"reuses": "keys and values"},
    "C": SOFTMAX | {"reuses": "values", "window": 5},
    "L": {"kind": "linear", "num_heads": 2},
    "R": {
        "kind": "moh",
        "inner": SOFTMAX,
        "shared_heads": 1,
        "active_heads": 2,
        "router_noise": 0.5,
    },
}
LENGTH, VOCABULARY = 37, 11


def model(pattern: str = "LRA", memory: dict | None = None, **table) -> Decoder:
    table = {"width": 16, "depth": len(pattern), "pattern": pattern, "mixers": MIXERS} | table
    config = decode(ModelConfig, table, path="model")
    built = Decoder(config, VOCABULARY, decode(MemoryConfig, memory or {}, path="memory"))
    initialise(built, 0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return built.double()


def found(model: Decoder) -> dict[str, Tensor]:
    """Losses, statistics and gradients."""
    tokens_BT = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    view = LocalView(((0,), (0, 5, 20)), LENGTH).keyed(1, 2, (4, 5))
    losses = model(tokens_BT, tokens_BT.roll(-1, 1), view)
    (losses.cross_entropy / LENGTH + sum(losses.mixers.values())).backward()
    named = {"loss": losses.cross_entropy.detach(), **losses.mixers, **losses.statistics}
    return named | {name: p.grad for name, p in model.named_parameters()}


def unequal(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name, x in left.items() if not torch.equal(x, right[name])]


@pytest.mark.parametrize("pattern", ["ABAB", "ACBLACB"])
@pytest.mark.parametrize("policy", ["full", "keep"])
def test_layers_that_reuse_keys_get_those_of_the_layer_before_them(pattern, policy):
    """When they are computed again the last keys are those of a later layer."""
    plain = found(model(pattern))
    assert unequal(found(model(pattern, {"checkpointing": policy})), plain) == []


@pytest.mark.parametrize("policy", ["full", "keep"])
def test_policies_of_single_layers_and_layers_without_parts(policy):
    memory = {"checkpointing": "none", "layers": {"A": policy, "-": "full"}}
    table = {"without_mlp": "AR", "dropout": 0.2, "tied_head": False}
    plain = found(model("LAR-", **table))
    assert unequal(found(model("LAR-", memory, **table)), plain) == []


@pytest.mark.parametrize("policy", ["full", "keep"])
def test_what_is_computed_again_is_rounded_alike(policy):
    with torch.autocast("cpu", torch.bfloat16):
        plain = found(model("LRA", dropout=0.1).float())
        again = found(model("LRA", {"checkpointing": policy}, dropout=0.1).float())
    assert unequal(again, plain) == []
    assert plain["blocks.0.mlp.up.weight"].dtype == torch.float32


@pytest.mark.parametrize(("policy", "runs"), [("none", 1), ("full", 2), ("keep", 1)])
def test_a_softmax_core_that_is_kept_runs_once(policy, runs, monkeypatch):
    calls = []
    attend = softmax_attention.attend
    monkeypatch.setattr(
        softmax_attention, "attend", lambda *args: (calls.append(1), attend(*args))[1]
    )
    found(model("AR", {"checkpointing": policy}))
    assert len(calls) == 2 * runs


def test_a_graph_that_is_retained_can_be_walked_twice():
    x_BTD = torch.randn(2, LENGTH, 16, dtype=torch.float64, requires_grad=True)
    out, view = x_BTD, LocalView.whole(2, LENGTH).keyed(0, 0, (0, 1))
    for block in model("LRA", {"checkpointing": "keep", "mlp_tokens": 10}).blocks:
        out = block(out, view).out
    first = torch.autograd.grad(out.sum(), x_BTD, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(out.sum(), x_BTD))


@pytest.mark.parametrize("policy", ["none", "full", "keep"])
@pytest.mark.parametrize("mlp_tokens", [1, 10, 1000])
@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_tiles_of_feed_forward_layers_leave_the_gradients(policy, mlp_tokens, mlp):
    memory = {"checkpointing": policy, "mlp_tokens": mlp_tokens}
    plain, tiled = found(model("L-", mlp=mlp)), found(model("L-", memory, mlp=mlp))
    for name, wanted in plain.items():
        assert_close(tiled[name], wanted, "fp64", name)


@pytest.mark.parametrize(("policy", "runs"), [("none", 2), ("full", 2), ("keep", 2)])
def test_a_tile_is_computed_twice_and_its_weights_get_one_gradient(policy, runs, monkeypatch):
    """Once forward and once backward; not again when the block is."""
    built = model("-L", {"checkpointing": policy, "mlp_tokens": 20})
    calls, gradients = [], []
    through = tiles._through
    monkeypatch.setattr(tiles, "_through", lambda *args: (calls.append(1), through(*args))[1])
    weight = built.blocks[0].mlp.up.weight
    weight.register_post_accumulate_grad_hook(lambda _: gradients.append(1))
    found(built)
    assert len(calls) == 2 * runs * 4
    assert len(gradients) == 1


def test_gradients_of_narrow_weights_are_summed_in_fp32():
    x_BTD = torch.randn(1, 512, 8, generator=torch.Generator().manual_seed(1))
    layer = torch.nn.Linear(8, 8, bias=False)
    narrow = layer.to(torch.bfloat16)
    x_BTD, exact = x_BTD.to(torch.bfloat16), x_BTD.to(torch.bfloat16).float().sum((0, 1))
    tiles.by_tiles(x_BTD, (narrow,), 512).sum().backward()
    assert_close(narrow.weight.grad[0].float(), exact, "bf16")


def test_every_rank_has_as_many_tiles_as_the_one_with_most_tokens():
    for ranks, length, most in itertools.product((1, 3, 4), (5, 64, 97), (1, 16, 100)):
        plans = [Plan(place("contiguous", ranks, length), r, ((0,), (0,))) for r in range(ranks)]
        counts = {tiles.tile_count(plan, most) for plan in plans}
        longest = max(plan.rows * plan.length for plan in plans)
        assert counts == {-(-longest // most)}


def test_a_tile_may_be_empty():
    x_BTD = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Linear(4, 4, dtype=torch.float64)
    tiles.by_tiles(x_BTD, (layer,), 5).sum().backward()
    assert_close(x_BTD.grad, layer.weight.sum(0).expand(1, 3, 4), "fp64")


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_chunks_of_the_loss_leave_the_gradients(rows):
    plain, chunked = found(model("L")), found(model("L", {"loss_tokens": rows}))
    for name, wanted in plain.items():
        assert_close(chunked[name], wanted, "fp64", name)


class Desk:
    """Copies at once, and remembers what was asked for."""

    def __init__(self) -> None:
        self.log: list[tuple[str, tuple[int, ...]]] = []
        self.waits = 0

    def to_host(self, x: Tensor):
        self.log.append(("host", tuple(x.shape)))
        return x.clone(), self._wait

    def to_device(self, x: Tensor, like: Tensor):
        self.log.append(("device", tuple(x.shape)))
        return x.to(like.dtype).clone(), self._wait

    def _wait(self) -> None:
        self.waits += 1


@pytest.mark.parametrize("policy", ["full", "keep"])
def test_inputs_of_layers_wait_on_the_host(policy):
    memory = {"checkpointing": policy, "layers": {"R": "none"}, "activations": "cpu"}
    plain, built = found(model("ABLRA")), model("ABLRA", memory)
    built.copier = Desk()
    assert unequal(found(built), plain) == []
    checkpointed, each = 4, (2, LENGTH, 16)
    assert built.copier.log == [("host", each)] * checkpointed + [("device", each)] * checkpointed
    assert built.copier.waits == 2 * checkpointed


def test_the_input_of_the_layer_before_is_on_its_way_when_one_is_used():
    built = model("LL", {"checkpointing": "full", "activations": "cpu"})
    built.copier, seen = Desk(), []
    for block in built.blocks:
        block.mixer.register_forward_hook(lambda *_: seen.append(len(built.copier.log)))
    found(built)
    # Two on their way out; then both on their way back before the later layer is computed again.
    assert seen == [1, 2, 4, 4]


def test_where_the_host_is_the_device_nothing_moves():
    plain = found(model("LA"))
    memory = {"checkpointing": "keep", "activations": "cpu"}
    assert unequal(found(model("LA", memory)), plain) == []


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"activations": "cpu"}, "memory.activations = 'cpu': only inputs of checkpointed"),
        ({"layers": {"Q": "full"}}, "memory.layers.Q: no layer of model.pattern has this letter"),
        ({"mlp_tokens": -1}, "memory.mlp_tokens = -1: must be 0 or positive"),
        ({"loss_tokens": -1}, "memory.loss_tokens = -1: must be 0 or positive"),
        ({"checkpointing": "some"}, "memory.checkpointing"),
    ],
)
def test_mistakes_are_named(memory, message):
    with pytest.raises(InputError, match=message):
        model("LA", memory)


def test_a_host_without_room_is_refused(monkeypatch):
    memory = MemoryConfig(checkpointing="full", layers={"A": "none"}, activations="cpu")
    needed = host_bytes_needed(memory, "LLLA", 2048, 3 * 2**19)
    assert needed == 3 * 2**34
    monkeypatch.setattr(memory_module, "free_memory", lambda: needed)
    check_host(needed)
    monkeypatch.setattr(memory_module, "free_memory", lambda: 47 * 2**30)
    with pytest.raises(InputError, match=r"need 48.0 GiB of host memory and 47.0 GiB are free"):
        check_host(needed)
    assert host_bytes_needed(MemoryConfig(checkpointing="full"), "LLLA", 2048, 1) == 0
    monkeypatch.undo()
    check_host(1)


@pytest.mark.parametrize("policy", ["none", "full", "keep"])
def test_no_tensor_has_the_logits_of_all_tokens(policy):
    """And with tiles none the hidden channels of all tokens."""
    tokens, vocabulary, hidden = 1024, 512, 256
    memory = {"checkpointing": policy, "loss_tokens": 64, "mlp_tokens": 64}
    config = decode(
        ModelConfig,
        {"width": 16, "depth": 2, "pattern": "LA", "mixers": MIXERS, "mlp_hidden": hidden},
        path="model",
    )
    built = Decoder(config, vocabulary, decode(MemoryConfig, memory, path="memory"))
    tokens_BT = torch.arange(tokens)[None] % vocabulary
    view = LocalView.whole(1, tokens)
    for precision in (torch.float32, torch.bfloat16):
        with Allocations() as allocations:
            with torch.autocast("cpu", torch.bfloat16, precision == torch.bfloat16):
                loss = built(tokens_BT, tokens_BT.roll(-1, 1), view).cross_entropy
            loss.backward()
        assert 0 < allocations.largest < tokens * min(hidden, vocabulary) * 2
