"""Shared layers beside megatron-core's, bad inputs, and what processes exchange."""

import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.parallel.megatron import check_installed, make_tensor_group
from longctx.parallel.shares import Cut, cut_to, refuse_tp, share
from longctx.parallel.tensor_parallel import split_decoder
from longctx.sequence.communicator import all_reduce_bytes
from longctx.sequence.ledger import Ledger, Traffic
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from tests.dist import run_gloo
from tests.parallel.megatron_on_cpu import on_cpu
from tests.tolerances import assert_close

pytestmark = pytest.mark.cluster

WIDTH, VOCAB, TOKENS = 16, 38, 21


def small_decoder(tied: bool = True, dtype: torch.dtype = torch.float32) -> Decoder:
    mixers = {"S": SoftmaxConfig(num_heads=4, num_kv_heads=2)}
    config = ModelConfig(
        width=WIDTH, depth=2, pattern="S", mixers=mixers, tied_head=tied, mlp_hidden=24
    )
    model = Decoder(config, VOCAB)
    initialise(model, seed=3)
    return model.to(dtype)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def megatron_layers(mlp: nn.Module, embedding: Tensor) -> tuple[nn.Module, ...]:
    """megatron-core's gate, up, project_out and embedding with the weights of this rank."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )

    options = {
        "config": ModelParallelConfig(
            tensor_model_parallel_size=2, use_cpu_initialization=True, perform_initialization=False
        ),
        "init_method": nn.init.zeros_,
    }
    hidden = 2 * mlp.up.weight.shape[0]
    columns = {"bias": False, "gather_output": False} | options
    rows = {"bias": False, "input_is_parallel": True, "skip_bias_add": False} | options
    layers = (
        ColumnParallelLinear(WIDTH, hidden, **columns),
        ColumnParallelLinear(WIDTH, hidden, **columns),
        RowParallelLinear(hidden, WIDTH, **rows),
        VocabParallelEmbedding(VOCAB, WIDTH, **options),
    )
    weights = mlp.gate.weight, mlp.up.weight, mlp.project_out.weight, embedding
    for layer, weight in zip(layers, weights):
        layer.weight = nn.Parameter(weight.detach().clone())
    return layers


def beside_megatron(rank: int) -> None:
    """Feed-forward layer, embedding and loss of this repository and of megatron-core."""
    assert rank < 2
    group = make_tensor_group(2, 1, timedelta(seconds=60), Ledger())
    model = small_decoder()
    split_decoder(model, group, torch.device("cpu"))
    mlp, embedding = model.blocks[0].mlp, model.embedding
    with on_cpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

        gate, up, project_out, lookup = megatron_layers(mlp, embedding.weight)
        x, theirs = (random(1, 3, WIDTH).requires_grad_() for _ in range(2))
        y = mlp(x)
        expected = project_out(F.silu(gate(theirs)[0]) * up(theirs)[0])[0]
        assert_close(y, expected, "fp32", "feed-forward layer")
        (y * random(1, 3, WIDTH)).sum().backward()
        (expected * random(1, 3, WIDTH)).sum().backward()
        assert_close(x.grad, theirs.grad, "fp32", "gradient of its input")
        assert_close(mlp.up.weight.grad, up.weight.grad, "fp32", "gradient of columns")
        assert_close(mlp.project_out.weight.grad, project_out.weight.grad, "fp32", "of rows")

        tokens = torch.arange(VOCAB)[None]
        assert_close(embedding(tokens), lookup(tokens), "fp32", "embedding")
        hidden, their_hidden = (random(TOKENS, WIDTH).requires_grad_() for _ in range(2))
        labels = torch.arange(TOKENS) * 7 % VOCAB
        loss = model.cross_entropy(hidden, model.head.weight, labels)
        parallel = copy_to_tensor_model_parallel_region(their_hidden)
        their_loss = vocab_parallel_cross_entropy(parallel @ lookup.weight.T, labels).sum()
        assert_close(loss, their_loss, "fp32", "loss")
        embedding.weight.grad = lookup.weight.grad = None
        loss.backward()
        their_loss.backward()
        assert_close(hidden.grad, their_hidden.grad, "fp32", "gradient of hidden")
        assert_close(embedding.weight.grad, lookup.weight.grad, "fp32", "gradient of the head")


def test_shared_layers_give_what_those_of_megatron_give():
    check_installed()  # once, before processes fork
    run_gloo(2, beside_megatron, timeout=120)


def one_pass(rank: int) -> tuple[Traffic, Traffic]:
    """What this rank counts in a training step and what it should, and ties and bf16."""
    group = make_tensor_group(2, 1, timedelta(seconds=60), ledger := Ledger())
    model, whole = small_decoder(), small_decoder()
    split_decoder(model, group, torch.device("cpu"))
    labels = torch.full((2, TOKENS), 5)
    labels[0, :4] = -100
    view = LocalView.whole(2, TOKENS)
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS) % VOCAB
    model(tokens, labels, view).cross_entropy.backward()
    counted = ledger.total()

    with torch.no_grad():
        # Rows 7 and 30 are equal, on different ranks: the first of them wins.
        for weight, first in ((whole.embedding.weight, 0), (model.embedding.weight, 19 * rank)):
            weight.fill_(-1.0)
            for row in (7, 30):
                if 0 <= row - first < len(weight):
                    weight[row - first] = 1.0
        hidden = torch.ones(3, WIDTH)
        for labels, right in (([7, 7, -100], 2), ([30, 30, 30], 0)):
            _, correct = model.score_labels(hidden, model.head.weight, torch.tensor(labels))
            assert correct.sum() == right
    with torch.autocast("cpu", torch.bfloat16):
        labels = torch.arange(2 * TOKENS).view(2, TOKENS) % VOCAB
        losses = [m(tokens, labels, view).cross_entropy[None] for m in (model, whole)]
        assert losses[0].dtype == torch.float32
        assert_close(*losses, "bf16", "loss in bf16")

    activations = all_reduce_bytes(torch.empty(2 * TOKENS, WIDTH), 2)
    lse_and_label = 2 * 2 * TOKENS * 4
    return counted, Traffic(1 + 2 * 4 + 1 + 1, (1 + 2 * 4 + 1) * activations + lse_and_label)


def test_the_ledger_has_every_exchange_and_ties_go_to_the_first_token():
    check_installed()
    for counted, expected in run_gloo(2, one_pass, timeout=120):
        assert counted == expected


def test_a_shared_decoder_refuses_to_generate():
    check_installed()
    (error,) = set(run_gloo(2, refusing_step, timeout=120))
    assert "does not generate" in error


def refusing_step(rank: int) -> str:
    model = small_decoder()
    group = make_tensor_group(2, 1, timedelta(seconds=60), Ledger())
    split_decoder(model, group, torch.device("cpu"))
    with pytest.raises(TypeError) as error:
        model.step(torch.zeros(1, 3, dtype=torch.int64), rank, [])
    return str(error.value)


def test_without_megatron_the_message_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(InputError, match=r"pip install 'longctx\[megatron\]'"):
        check_installed()


def test_refusals_name_the_field_and_what_would_work():
    def reason(config: SoftmaxConfig, tp: int, heads: int = 1) -> str:
        return refuse_tp(config, 24, tp, Transports(heads=heads))

    assert reason(SoftmaxConfig(num_heads=6), 1) == ""
    assert reason(SoftmaxConfig(num_heads=6), 3) == ""
    assert reason(SoftmaxConfig(num_heads=6, num_kv_heads=1), 6) == ""
    assert reason(SoftmaxConfig(num_heads=6), 4) == (
        "num_heads = 6 is no multiple of parallel.tp = 4: set parallel.tp to 1, 2, 3 or 6"
    )
    assert "num_kv_heads = 2 is no multiple" in reason(SoftmaxConfig(6, num_kv_heads=2), 6)
    # Three heads are left to a process, which two ranks cannot trade.
    found = reason(SoftmaxConfig(num_heads=6), 2, heads=2)
    assert found.startswith("of the heads that parallel.tp = 2 leaves to a process, num_heads = 3")


@pytest.mark.parametrize("size", [1, 2, 7, 256])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_shares_are_the_whole_in_order(size, parts):
    shares = [share(size, part, parts) for part in range(parts)]
    assert [i for start, length in shares for i in range(start, start + length)] == [*range(size)]
    assert max(n for _, n in shares) - min(n for _, n in shares) <= 1


def test_blocks_of_a_part_put_the_whole_together_again():
    whole = torch.arange(12 * 2).view(12, 2)
    found = torch.zeros_like(whole)
    for part in range(2):
        cut = cut_to((12, 2), (6, 2), (part, 2), (4, 2, 6))
        assert cut.stretches == ((2 * part, 2), (4 + part, 1), (6 + 3 * part, 3))
        own = cut.take(whole)
        for first, rows in ((0, 3), (3, 3)):
            for offsets, block in cut.blocks((first, 0), own[first : first + rows]):
                found[offsets[0] : offsets[0] + len(block)] += block
    assert torch.equal(found, whole)
    assert Cut((3, 2)).blocks((1, 0), whole[:1])[0][0] == (1, 0)
