"""What engines exchange to spread weights and add up gradients."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from longctx.parallel.matrices import Matrix, matrices_traffic
from longctx.parallel.matrices import Seat as MatrixSeat
from longctx.parallel.muon import MUON
from longctx.parallel.shares import share
from longctx.parallel.tensor_parallel import PARTIAL
from longctx.parallel.zero import BUCKET
from longctx.plan.traffic_layers import Layer, Seat, Shapes, layers_of
from longctx.plan.workload import Workload
from longctx.sequence.expected import WIDTHS, all_reduce, combined
from longctx.sequence.ledger import OUTSIDE_LAYERS, Label, Traffic

Sent = dict[Label, Traffic]
WEIGHTS, GRADIENTS = "weights", "gradients"
ESTIMATED = " (estimate)"
"""Ends the names of what DeepSpeed exchanges beside our ledger."""


class Shards(NamedTuple):
    """Over how many processes FSDP2 spreads weights, which this is of them, and how many copies."""

    over: int
    number: int
    copies: int

    def padded(self, shape: tuple[int, ...]) -> int:
        """Elements of each shard of a parameter, along its first dimension."""
        return -(-shape[0] // self.over) * math.prod(shape[1:])

    def own(self, shape: tuple[int, ...]) -> int:
        """Elements of this process's shard, without padding."""
        if not shape:
            return 1
        size, step = shape[0], -(-shape[0] // self.over)
        rows = min(size, (self.number + 1) * step) - min(size, self.number * step)
        return rows * math.prod(shape[1:])


def engine_traffic(work: Workload, rank: int) -> Sent:
    """Of one step of one process."""
    split = work.split
    seat, holders = Seat(rank % split.tp, split.tp), split.dp * split.sp
    layers, letters = layers_of(work.settings.model, seat), work.settings.model.letters
    outside = outside_shapes(work, seat)
    groups = [(number, layers[letter].shapes) for number, letter in enumerate(letters)]
    groups.append((OUTSIDE_LAYERS, outside))
    shards = Shards(1, 0, 1)
    if split.engine == "fsdp2":
        count = holders // split.replicas
        shards = Shards(count, rank // split.tp % count, split.replicas)
        sent = _fsdp2(work, groups, shards)
    else:
        elements = sum(math.prod(shape) for _, shapes in groups for shape in shapes)
        sent = (_zero if split.engine == "deepspeed" else _summed)(work, elements)
    all_layers = [layers[letter] for letter in letters]
    return combined([sent, _partial(work, all_layers, shards), _muon(work, all_layers, rank)])


def outside_shapes(work: Workload, seat: Seat) -> Shapes:
    """Of the embedding, the last norm and the head."""
    model = work.settings.model
    rows = share(work.vocab_size, *seat)[1]
    matrices = 1 if model.tied_head else 2
    return ((rows, model.width),) * matrices + ((model.width,),)


def _fsdp2(work: Workload, groups: Iterable[tuple[int, Shapes]], shards: Shards) -> Sent:
    """Weights of layers are gathered for either pass and padded to equal shards, those outside of
    them once; gradients are added up after every pass, in the width of states."""
    passes, wide = len(work.micro_rows), WIDTHS[work.precision].state
    rounded = work.settings.parallel.weights == "bf16"
    others = shards.over - 1
    sent: Sent = {}
    padded: dict[Shapes, int] = {}
    for layer, shapes in groups:
        is_layer = layer != OUTSIDE_LAYERS
        width = WIDTHS["bf16"].activation if rounded and is_layer else wide
        if shapes not in padded:
            padded[shapes] = sum(map(shards.padded, shapes))
        elements = padded[shapes]
        calls = passes * (2 if is_layer else 1)
        if others:
            label = Label(layer, WEIGHTS)
            sent[label] = Traffic(calls, calls * others * elements * width)
        scattered = Traffic(passes * bool(others), passes * others * elements * wide)
        copied = all_reduce(elements, shards.copies, wide, passes * (shards.copies > 1))
        summed = scattered.calls + copied.calls, scattered.received + copied.received
        sent[Label(layer, GRADIENTS)] = Traffic(*summed)
    return sent


def _summed(work: Workload, elements: int) -> Sent:
    """Everybody has everything: one sum of all gradients."""
    holders = work.split.dp * work.split.sp
    calls = int(holders > 1)
    total = all_reduce(elements, holders, WIDTHS[work.precision].state, calls)
    return {Label(OUTSIDE_LAYERS, GRADIENTS): total}


def _zero(work: Workload, elements: int) -> Sent:
    """What must travel, in calls of whole buckets; counted on two processes, stages 1 and 2 send
    32 bytes more.

    Stage 1 sums gradients once a step, 2 after every pass, both with all-reduces, and gather what
    the update changed. 3 gathers weights for either pass and scatters sums; it keeps small weights
    whole, which is left out, as are its calls for each layer.
    """
    holders, stage = work.split.dp * work.split.sp, work.settings.parallel.zero_stage
    if holders == 1:
        return {}
    passes, buckets = len(work.micro_rows), -(-elements // BUCKET)
    width = WIDTHS["fp32"].state
    half = (holders - 1) * -(-elements // holders) * width
    gathers, sums = (2 * passes if stage == 3 else 1), (1 if stage == 1 else passes)
    each = half if stage == 3 else all_reduce(elements, holders, width).received
    return {
        Label(OUTSIDE_LAYERS, WEIGHTS + ESTIMATED): Traffic(gathers * buckets, gathers * half),
        Label(OUTSIDE_LAYERS, GRADIENTS + ESTIMATED): Traffic(sums * buckets, sums * each),
    }


def _partial(work: Workload, layers: Iterable[Layer], shards: Shards) -> Sent:
    """One sum over the processes that share heads, of the gradients that each has a part of."""
    shapes = [shape for layer in layers for shape in layer.partial]
    if not shapes:
        return {}
    elements, width = sum(map(shards.own, shapes)), WIDTHS[work.precision].state
    return {PARTIAL: all_reduce(elements, work.split.tp, width)}


def _muon(work: Workload, layers: Iterable[Layer], rank: int) -> Sent:
    """Matrices on their way to who makes them orthogonal, and back."""
    if work.settings.optim.kind != "muon":
        return {}
    split = work.split
    together = work.processes // split.replicas
    seat = MatrixSeat(together // split.tp, split.tp, rank % together)
    matrices = [
        Matrix(matrix.shape, matrix.sizes, cut, split.engine == "fsdp2")
        for layer in layers
        for matrix, cut in layer.matrices
    ]
    wide = torch.float64 if work.precision == "fp64" else torch.float32
    dtype = torch.bfloat16 if work.precision == "bf16" else wide
    return {MUON: matrices_traffic(matrices, seat, dtype)}
