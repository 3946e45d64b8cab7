"""What processes that share the heads of a mixer make of it, beside what one process makes."""

import random
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.mixers import Mixer, MixerConfig
from longctx.mixers.dma import DMAConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.nats import NATSConfig
from longctx.mixers.s2 import S2Config
from longctx.mixers.scored import ScoredConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.mixers.sparse_transformer import FixedConfig
from longctx.mixers.sum import SumConfig
from longctx.parallel.megatron import TensorGroup, make_tensor_group
from longctx.parallel.shares import Cut, cut_to, refuse_tp
from longctx.parallel.tensor_parallel import TensorSplit, share_mixer
from longctx.sequence.ledger import Label, Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.placement import place
from longctx.sequence.plan import Plan
from longctx.sequence.refusal import refuse
from longctx.sequence.sharded import ShardedView, Transports
from longctx.sequence.view import SequenceView
from tests.mixers.examples import PLACE, WIDTH, all_variants
from tests.mixers.test_every_mixer import build
from tests.sequence.cases import DOCUMENTS, LAYER, LENGTH
from tests.sequence.links import gloo_links
from tests.tolerances import LARGEST_ERROR, error_of

MORE: dict[str, MixerConfig] = {
    "dma-one-key-head": DMAConfig(num_heads=4, num_kv_heads=1, capacity=7, window=3),
    "scored-signed-heads": ScoredConfig(num_heads=2, normaliser="signed", qk_norm=False, window=20),
    "scored-sink": ScoredConfig(num_heads=2, sink=True, window=9),
    "nats-noise": NATSConfig(num_heads=4, num_kv_heads=2, window=8, noise=2.0, penalty=0.3),
    "fixed-one-key-head": FixedConfig(num_heads=4, num_kv_heads=1, block=8, columns=2),
    "fixed-four-verticals": FixedConfig(num_heads=4, block=8, columns=2, verticals=4),
    "s2-dense-heads": S2Config(
        num_heads=4, head_dim=4, block=3, local_blocks=1, stride=4, dense_heads=1
    ),
    "moh-noise": MoHConfig(inner=SoftmaxConfig(num_heads=4), active_heads=2, router_noise=0.5),
    "moh-computes-routed": MoHConfig(
        inner=SoftmaxConfig(num_heads=4, num_kv_heads=2), active_heads=2, compute="routed"
    ),
    "sum-of-losses": SumConfig(
        parts={
            "routed": MoHConfig(inner=LinearConfig(num_heads=4), active_heads=2),
            "searched": NATSConfig(num_heads=2, window=8, penalty=0.5),
        },
        gated=True,
    ),
}
LABEL = Label(LAYER, "comparison")
SPLITS = (
    ("contiguous", Transports()),
    ("zigzag", Transports("scan", "ring")),
    ("contiguous", Transports("serial", "ring")),
    ("mirror", Transports("ulysses", "allgather", 2)),
)


def all_cases() -> dict[str, MixerConfig]:
    """Every variant of every mixer, and more that share heads where those cannot."""
    return dict(all_variants()) | MORE


class Seat(NamedTuple):
    """This rank's group, which of the ranks of a sequence it is, and how these are split."""

    group: TensorGroup
    sp_rank: int
    sp: int
    split: tuple[str, Transports]

    @property
    def sequences(self) -> list[list[int]]:
        """The ranks of each sequence: tp is innermost."""
        tp = self.group.size
        return [list(range(t, self.sp * tp, tp)) for t in range(tp)]

    def view(self) -> SequenceView:
        """Of the rank's own tokens."""
        placement, transports = self.split
        if self.sp == 1:
            return LocalView(DOCUMENTS, LENGTH)
        plan = Plan(place(placement, self.sp, LENGTH, transports.heads), self.sp_rank, DOCUMENTS)
        links = gloo_links(transports.heads, Ledger(), self.sequences)
        return ShardedView(plan, links, transports, LAYER)

    def over_sequence(self, x: Tensor) -> Tensor:
        """Sum over the ranks of the sequence."""
        if self.sp == 1:
            return x
        links = gloo_links(1, Ledger(), self.sequences)
        return links.sequence.all_reduce(x, LABEL)


def group_of(rank: int, tp: int, sp: int = 1) -> TensorGroup:
    """This rank's group; every rank calls it once."""
    group = make_tensor_group(tp, sp, timedelta(seconds=60), Ledger())
    assert (group.rank, group.size) == (rank % tp, tp)
    return group


def results(mixer: Mixer, view: SequenceView, split: TensorSplit | None) -> dict[str, Tensor]:
    """Output, losses, statistics and gradients; those of parameters by `grad NAME`."""
    ids = view.token_ids_BT[0]
    generator = torch.Generator().manual_seed(11)
    x_BTD, weight_BTD, each_BT = (
        torch.randn(2, LENGTH, size, generator=generator, dtype=torch.float64)[:, ids]
        for size in (WIDTH, WIDTH, 1)
    )
    x_BTD = x_BTD.clone().requires_grad_()
    mixed = mixer(x_BTD, view.at(LAYER).keyed(5, 3, (0, 1)))
    losses = sum((loss * each_BT).sum() for loss in mixed.losses.values())
    ((mixed.out * weight_BTD).sum() + losses).backward()
    if split is not None:
        split.sum_partial(mixer.named_parameters())
    found = {"output": mixed.out.detach(), "input": x_BTD.grad}
    found |= {f"loss {name}": x.detach() for name, x in mixed.losses.items()}
    found |= {f"grad {name}": p.grad for name, p in mixer.named_parameters()}
    return found | {f"sum {name}": x.detach() for name, x in mixed.statistics.items()}


def compare(seat: Seat, config: MixerConfig) -> dict[str, float]:
    """Shares a mixer; the error of every output, gradient and adapted buffer."""
    whole = build(config)
    for name, buffer in whole.named_buffers():
        if name == "penalty_J":
            buffer.copy_(0.3 + torch.arange(buffer.numel()))
    whole.double()
    part, cuts = share_mixer(whole, config, PLACE, seat.group)
    partial = frozenset(n for n, _ in part.named_parameters() if cuts[n].dim is None)
    view = seat.view()
    expected = results(whole, LocalView(DOCUMENTS, LENGTH), None)
    actual = results(part, view, TensorSplit(seat.group, cuts, partial, torch.device("cpu")))
    assert actual.keys() == expected.keys()
    found = {}
    for key, value in actual.items():
        if key in ("output", "input"):
            expected[key] = expected[key][:, view.token_ids_BT[0]]
        elif key.startswith(("grad ", "sum ")):
            value = actual[key] = seat.over_sequence(value)
        cut = cuts.get(key.removeprefix("grad ")) or _like(expected[key], value, seat.group)
        found[key] = _error(value, cut.take(expected[key]))
        if key.startswith("sum ") and found[key] > LARGEST_ERROR["fp64"]:
            # What is summed over heads has the parts of all processes.
            found[key] = _error(seat.group.sum(value, LABEL), expected[key])
    return found | adapted(whole, part, cuts, (expected, actual))


def adapted(
    whole: Mixer, part: Mixer, cuts: dict[str, Cut], found: tuple[dict[str, Any], ...]
) -> dict[str, float]:
    """Errors of buffers after both mixers have been adapted to their statistics."""
    for mixer, values in zip((whole, part), found):
        own = {k.removeprefix("sum "): x for k, x in values.items() if k.startswith("sum ")}
        if own:
            mixer.adapt(own, 2 * LENGTH)
    buffers = dict(whole.named_buffers())
    return {
        f"buffer {name}": _error(x, cuts[name].take(buffers[name]))
        for name, x in part.named_buffers()
    }


def _like(whole: Tensor, part: Tensor, group: TensorGroup) -> Cut:
    """The cut that statistics of heads have."""
    return cut_to(tuple(whole.shape), tuple(part.shape), (group.rank, group.size), ())


def _error(actual: Tensor, expected: Tensor) -> float:
    return error_of(actual.double(), expected.double(), "fp64")


def found_on(rank: int, tp: int, sp: int) -> dict[str, dict[str, float]]:
    """Errors of every case that can be shared on this rank; of split sequences, in one way each."""
    group, found = group_of(rank, tp, sp), {}
    choice = random.Random(7)
    for name, config in all_cases().items():
        ways = [
            way
            for way in (SPLITS if sp > 1 else SPLITS[:1])
            if not refuse_tp(config, WIDTH, tp, way[1])
            and (sp == 1 or not refuse(config, way[0], way[1], sp))
        ]
        if ways:
            found[name] = compare(Seat(group, rank // tp, sp, choice.choice(ways)), config)
    dist.barrier()
    return found
