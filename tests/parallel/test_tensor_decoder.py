"""A small decoder trained by processes that share its weights, beside one that has all of them."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from longctx.mixers import MixerConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.model.memory import MemoryConfig
from longctx.parallel.megatron import check_installed, make_tensor_group
from longctx.parallel.tensor_parallel import TensorSplit, split_decoder
from longctx.sequence.ledger import Label, Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.view import SequenceView
from longctx.train.optim import OptimConfig, build_optimizer
from tests.dist import run_gloo
from tests.sequence.links import gloo_links
from tests.tolerances import assert_close

pytestmark = pytest.mark.cluster

VOCAB, LENGTH, STEPS, CLIP = 37, 26, 3, 0.05
DOCUMENTS = ((0, 9), (0, 1, 17))
MIXERS: dict[str, MixerConfig] = {
    "L": LinearConfig(num_heads=6, head_dim=3, norm="all"),
    "S": MoHConfig(
        inner=SoftmaxConfig(num_heads=12, head_dim=2, num_kv_heads=6),
        shared_heads=2,
        active_heads=5,
    ),
    "R": SoftmaxConfig(num_heads=12, head_dim=2, num_kv_heads=6, reuses="keys and values"),
}
MEMORY = {
    "plain": MemoryConfig(),
    "saving": MemoryConfig(checkpointing="keep", mlp_tokens=7, loss_tokens=5),
}


def decoder(tied: bool, memory: str) -> Decoder:
    config = ModelConfig(
        width=16,
        depth=3,
        pattern="LSR",
        mixers=MIXERS | {"S": MIXERS["S"].inner if not tied else MIXERS["S"]},
        tied_head=tied,
        dropout=0.1,
        mlp_hidden=22,
        init_std=0.2,
    )
    model = Decoder(config, VOCAB, MEMORY[memory])
    initialise(model, seed=5)
    return model.double()


class Alone:
    """The group of one process, for the decoder that is whole."""

    sp, size = 1, 1
    view = staticmethod(lambda: LocalView(DOCUMENTS, LENGTH))
    over_sequence = over_heads = staticmethod(lambda x: x)


class Together:
    """This rank among tp x sp ranks, tp innermost."""

    def __init__(self, rank: int, tp: int, sp: int):
        self.ledger = Ledger()
        self.group = make_tensor_group(tp, sp, timedelta(seconds=60), self.ledger)
        self.sp, self.size, self._sp_rank = sp, tp, rank // tp
        self._sequences = [list(range(t, sp * tp, tp)) for t in range(tp)]

    def view(self) -> SequenceView:
        if self.sp == 1:
            return LocalView(DOCUMENTS, LENGTH)
        plan = Plan(place("zigzag", self.sp, LENGTH), self._sp_rank, DOCUMENTS)
        return ShardedView(plan, gloo_links(1, Ledger(), self._sequences), Transports(), 0)

    def over_sequence(self, x: Tensor) -> Tensor:
        if self.sp == 1:
            return x
        return gloo_links(1, Ledger(), self._sequences).sequence.all_reduce(x, Label(0, "test"))

    def over_heads(self, x: Tensor) -> Tensor:
        return self.group.sum(x, Label(0, "test"))


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels, of which some are left out."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB, (2, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, ::5] = -100
    return tokens[:, :-1], labels


def train(model: Decoder, split: TensorSplit | None, seat: Alone | Together) -> dict[str, float]:
    """A few steps with clipping; losses and right answers by step."""
    optimizer = build_optimizer(model, OptimConfig(lr=0.02, weight_decay=0.1))
    tokens_BT, labels_BT = batch()
    valid, figures = int((labels_BT != -100).sum()), {}
    for step in range(STEPS):
        view = seat.view().keyed(5, step, (0, 1))
        ids = view.token_ids_BT[0]
        losses = model.train()(tokens_BT[:, ids], labels_BT[:, ids], view)
        balance = sum(losses.mixers.values(), torch.zeros(()))
        (losses.cross_entropy / valid + balance / seat.sp).backward()
        figures[f"loss {step}"] = float(seat.over_sequence(losses.cross_entropy.detach()))
        figures[f"balance {step}"] = float(balance)
        if split is not None:
            split.sum_partial(model.named_parameters())
        squares = torch.zeros((), dtype=torch.float64)
        for name, parameter in model.named_parameters():
            parameter.grad = seat.over_sequence(parameter.grad)
            squares += parameter.grad.square().sum() / (split.copies(name) if split else 1)
        figures[f"norm {step}"] = float(seat.over_heads(squares).sqrt())
        for parameter in model.parameters():
            parameter.grad *= min(1.0, CLIP / figures[f"norm {step}"])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen = model.eval()(tokens_BT[:, ids], labels_BT[:, ids], view)
        figures[f"correct {step}"] = float(seat.over_sequence(seen.scores.correct_M.sum()))
        figures[f"seen {step}"] = float(seat.over_sequence(seen.cross_entropy))
    return figures


def same_weights(model: Decoder, whole: Decoder, split: TensorSplit) -> None:
    """Every part is its cut of the whole, and its blocks lie where they say."""
    expected = whole.state_dict()
    assert model.state_dict().keys() == expected.keys() <= split.cuts.keys()
    for name, value in model.state_dict().items():
        cut = split.cuts[name]
        assert_close(value, cut.take(expected[name]), "fp64", name)
        rows = len(value) // 2
        for first, piece in ((0, value[:rows]), (rows, value[rows:])):
            for offsets, block in cut.blocks((first, *[0] * (value.dim() - 1)), piece):
                where = tuple(slice(o, o + n) for o, n in zip(offsets, block.shape))
                assert_close(block, expected[name][where], "fp64", name)


def compared(rank: int, tp: int, sp: int) -> None:
    """Trains the whole decoder and the shared one on this rank, and compares all there is."""
    seat = Together(rank, tp, sp)
    for tied, memory in ((True, "plain"), (False, "saving")):
        whole, shared = decoder(tied, "plain"), decoder(tied, memory)
        counts = shared.num_parameters(), shared.flops(torch.arange(1, 9))
        split = split_decoder(shared, seat.group, torch.device("cpu"))
        same_weights(shared, whole, split)
        assert (shared.num_parameters(), shared.flops(torch.arange(1, 9))) == counts
        assert split.partial.isdisjoint(n for n in split.cuts if split.is_sharded(n))
        assert (shared.head.weight is shared.embedding.weight) == tied
        expected, actual = train(whole, None, Alone()), train(shared, split, seat)
        assert expected["norm 0"] > CLIP
        assert expected["loss 0"] > expected[f"loss {STEPS - 1}"]
        for name, value in expected.items():
            assert_close(torch.tensor(actual[name]), torch.tensor(value), "fp64", name)
        same_weights(shared, whole, split)
    dist.barrier()


@pytest.mark.parametrize(("tp", "sp"), [(2, 1), (2, 2), (3, 1)])
def test_a_shared_decoder_trains_as_a_whole_one_does(tp, sp):
    check_installed()  # once, before processes fork
    run_gloo(tp * sp, compared, tp, sp, timeout=120)


def sharded_too(rank: int, tp: int, dp: int) -> None:
    """One step of a decoder whose parts are spread by FSDP2 over those with the same part."""
    seat, row = Together(rank, tp, 1), rank // tp
    whole, shared = decoder(False, "plain"), decoder(False, "plain")
    split = split_decoder(shared, seat.group, torch.device("cpu"))
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("data", "tensor"))["data"]
    for module in (*shared.blocks, shared):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    tokens_BT, labels_BT = batch()
    for model, rows in ((whole, range(dp)), (shared, range(row, row + 1))):
        view = LocalView(tuple(DOCUMENTS[r] for r in rows), LENGTH).keyed(5, 0, tuple(rows))
        rows = list(rows)
        model(tokens_BT[rows], labels_BT[rows], view).cross_entropy.backward()
    split.sum_partial(shared.named_parameters())
    expected = dict(whole.named_parameters())
    for name, parameter in shared.named_parameters():
        gradient = split.cuts[name].take(expected[name].grad)
        assert_close(parameter.grad.full_tensor(), gradient, "fp64", name)
    dist.barrier()


def test_parts_can_be_spread_by_fsdp2():
    check_installed()
    run_gloo(4, sharded_too, 2, 2, timeout=120)
