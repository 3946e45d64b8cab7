"""Muon (Jordan et al. 2024), as Moonlight scales it (arXiv 2502.16982): momentum whose matrices are
made orthogonal, each by one of the processes that hold it together."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longctx.parallel.matrices import Matrix, Round, Seat, deal
from longctx.parallel.mesh import Mesh
from longctx.sequence.communicator import Pending
from longctx.sequence.ledger import OUTSIDE_LAYERS, Label

MUON = Label(OUTSIDE_LAYERS, "muon")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7
SIZE_OF_ADAMW = 0.2
"""Root mean square of AdamW's changes at learning rate 1, which Muon's are scaled to."""


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """Each matrix of the last two dimensions with its singular values near 1, by Newton-Schulz
    iterations in the dtype of the operand."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if is_tall else matrices
    x = wide.reshape(-1, *wide.shape[-2:])
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    x = x.view_as(wide)
    return x.mT if is_tall else x


def direction(whole: Tensor, sizes: tuple[int, ...], steps: int) -> Tensor:
    """Minus the change at learning rate 1 of a weight with this momentum, which is one matrix or
    several of these sizes side by side."""
    found = []
    for matrices in whole.split(sizes):
        scale = SIZE_OF_ADAMW * math.sqrt(max(matrices.shape[-2:]))
        found.append(scale * orthogonalised(matrices, steps))
    return torch.cat(found)


class Wholes:
    """Has each of the matrices that processes hold together computed by one of them.

    They travel, and are computed, in `dtype` on the device of the mesh.
    """

    def __init__(self, mesh: Mesh, matrices: Sequence[Matrix], dtype: torch.dtype):
        self.matrices = matrices
        self._communicator = mesh.holders()
        tp, index = mesh.split.tp, self._communicator.rank
        self.seat = Seat(self._communicator.size // tp, tp, index)
        self._rounds = deal(matrices, self.seat.size)
        self._seats = [self.seat.at(i) for i in range(self.seat.size)]
        self._like = torch.empty(0, dtype=dtype, device=mesh.device)

    def map(
        self, held: Callable[[int], Tensor], compute: Callable[[Tensor, Matrix], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Numbers of the matrices, in an order of its own, and what is held here of
        `compute(whole, matrix)`, given what is `held` of each, which is asked for once."""
        coming, leaving = self._bring(self._rounds[0], held), None
        for owners, following in pairwise([*self._rounds, None]):
            arrived = coming.wait()
            if following is not None:
                coming = self._bring(following, held)
            sent = self._send_back(owners, self._computed(owners, arrived, compute))
            if leaving is not None:
                yield from self._received(*leaving)
            leaving = owners, sent
        yield from self._received(*leaving)

    def _bring(self, owners: Round, held: Callable[[int], Tensor]) -> Pending:
        """Starts to send what is held here to the owners."""
        own = {i: self._packed(held(i)) for numbers in owners for i in numbers}
        parts = []
        for numbers, owner in zip(owners, self._seats):
            mine = [own[i] for i in numbers if self.matrices[i].sends(self.seat, owner)]
            parts.append(torch.cat([self._like, *mine]))
        taken = [self.matrices[i] for i in owners[self.seat.index]]
        sizes = [
            sum(math.prod(m.held(seat)) for m in taken if m.sends(seat, self.seat))
            for seat in self._seats
        ]
        return self._communicator.all_to_all(parts, [(size,) for size in sizes], MUON)

    def _computed(
        self,
        owners: Round,
        arrived: list[Tensor],
        compute: Callable[[Tensor, Matrix], Tensor],
    ) -> list[Tensor]:
        """Of the matrices of this process."""
        results, read = [], [0] * len(arrived)
        for matrix in (self.matrices[i] for i in owners[self.seat.index]):
            whole = self._like.new_empty(matrix.shape)
            for seat, flat in zip(self._seats, arrived):
                if not matrix.sends(seat, self.seat):
                    continue
                start, numel = read[seat.index], math.prod(matrix.held(seat))
                for there, here in matrix.pieces(whole, seat, flat[start : start + numel]):
                    there.copy_(here)
                read[seat.index] += numel
            results.append(compute(whole, matrix))
        return results

    def _send_back(self, owners: Round, results: list[Tensor]) -> Pending:
        """Starts to send everybody what it holds of this process's results."""
        own, parts = [self.matrices[i] for i in owners[self.seat.index]], []
        for seat in self._seats:
            pieces = [self._taken(m, whole, seat) for m, whole in zip(own, results)]
            parts.append(torch.cat([self._like, *pieces]))
        sizes = [sum(math.prod(self.matrices[i].held(self.seat)) for i in n) for n in owners]
        return self._communicator.all_to_all(parts, [(size,) for size in sizes], MUON)

    def _taken(self, matrix: Matrix, whole: Tensor, seat: Seat) -> Tensor:
        held = self._like.new_empty(math.prod(matrix.held(seat)))
        for there, here in matrix.pieces(whole, seat, held):
            here.copy_(there)
        return held

    def _received(self, owners: Round, sent: Pending) -> Iterator[tuple[int, Tensor]]:
        for numbers, flat in zip(owners, sent.wait()):
            shapes = [self.matrices[i].held(self.seat) for i in numbers]
            parts = flat.split([math.prod(shape) for shape in shapes])
            yield from ((i, x.view(shape)) for i, x, shape in zip(numbers, parts, shapes))

    def _packed(self, held: Tensor) -> Tensor:
        return held.flatten().to(self._like)


class Muon(torch.optim.Optimizer):
    """Muon for groups of one weight each, in the order of `wholes`, and AdamW for what it has."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        wholes: Wholes,
        adamw: torch.optim.AdamW,
        momentum: float,
        steps: int,
    ):
        super().__init__(groups, {})
        self._own, self._adamw, self._wholes = list(self.param_groups), adamw, wholes
        self._momentum, self._steps = momentum, steps
        # one list and one dict, so that whoever has this has both
        self.param_groups.extend(adamw.param_groups)
        adamw.state = self.state

    @torch.no_grad()
    def step(self, _closure: None = None) -> None:
        """One update of everything that has a gradient."""
        self._adamw.step()
        changes = self._wholes.map(
            lambda number: self._ahead(self._own[number]["params"][0]),
            lambda whole, matrix: direction(whole, matrix.sizes, self._steps),
        )
        for number, change in changes:
            group = self._own[number]
            (weight,), lr = group["params"], group["lr"]
            if weight.grad is not None:
                held = _local(weight)
                held.mul_(1 - lr * group["weight_decay"])
                held.add_(change.to(held.device), alpha=-lr)

    def _ahead(self, weight: nn.Parameter) -> Tensor:
        """What is here of Nesterov's momentum, after this step's gradient."""
        if weight.grad is None:
            return torch.zeros_like(_local(weight))
        state, gradient = self.state[weight], _local(weight.grad)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.detach())
        average = _local(state["momentum_buffer"]).lerp_(gradient, 1 - self._momentum)
        return gradient.lerp(average, self._momentum)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
