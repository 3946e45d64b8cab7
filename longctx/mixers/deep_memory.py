"""A memory that is a network, and learns by one step of gradient descent a token.

Per head the memory answers `M(x) = x + silu(x A) B` with weights W = (A `[K, F]`, B `[F, K]`). A
token's loss is `|M(k) - v|^2 / 2`; its gradient is taken at the anchor, the weights at the start of
its batch of `size` tokens, counted from the document's start: with `z = k A`, `h = silu(z)` and
`e = M(k) - v` it is `h^T e` for B, and `k^T dz` with `dz = (e B^T) silu'(z)` for A. Then

    P_t = eta_t P_{t-1} - theta_t grad_t,   W_t = (1 - alpha_t) W_{t-1} + P_t,   read M_{W_t}(q_t).

Within a batch W and P are linear in gradients that are known beforehand, so weights of single
tokens are never formed: with the coefficients of a run, `q_t A_t` is what the weights and momenta
that enter it give, minus a sum of `(q_t.k_j) dz_j`; the second layer likewise with activations. A
run is what a segment holds of one batch. Rows advance together, run after run, and the backward
pass keeps the state of every run.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.sequence.plan import Plan

Spans = Sequence[Sequence[tuple[int, int]]]
"""For every row (position in its document, tokens) of the parts of documents that it holds."""


class Runs(NamedTuple):
    """The runs N of rows B of tokens, a slot C for each place in a batch; fewer runs are padded.

    Slots before the first token of a segment hold tokens left of it, if any are known.
    """

    source_BNC: Tensor
    """Index in the row, with what is known left of it, or 0."""
    is_seen_BNC: Tensor
    """Whether a slot has a token, on whichever side of the segment's start."""
    is_token_BNC: Tensor
    """Whether its token lies in the segment."""
    place_BT: Tensor
    """Run and slot of each token, as one number."""
    starts_BN: Tensor
    """Whether a document starts here."""
    anchors_BN: Tensor
    """Whether a batch starts here."""
    left: int
    """Tokens left of the segment that the row begins with."""

    def seen(self, x_BT: Tensor) -> Tensor:
        """Tokens of rows that begin `left` before the segment, in slots `[B, N, C, ..]`."""
        return self._slots(x_BT, self.source_BNC, self.is_seen_BNC)

    def own(self, x_BT: Tensor) -> Tensor:
        """The segment's tokens in slots, zeros elsewhere."""
        return self._slots(x_BT, (self.source_BNC - self.left).clamp(min=0), self.is_token_BNC)

    def tokens(self, x_BNC: Tensor) -> Tensor:
        """Slots back to tokens `[B, T, ..]`."""
        return _taken(x_BNC.flatten(1, 2), self.place_BT)

    def _slots(self, x_BT: Tensor, index_BNC: Tensor, is_here_BNC: Tensor) -> Tensor:
        is_here_BNC = is_here_BNC.view(*index_BNC.shape, *(1,) * (x_BT.dim() - 2))
        return _taken(x_BT, index_BNC).where(is_here_BNC.to(x_BT.device), 0)


def _taken(x_BT: Tensor, index_BN: Tensor) -> Tensor:
    """What lies at these places of each row."""
    rows = torch.arange(len(index_BN)).view(-1, *(1,) * (index_BN.dim() - 1))
    return x_BT[rows.to(x_BT.device), index_BN.to(x_BT.device)]


def runs_of(spans: Spans, size: int, left: int = 0) -> Runs:
    """Cuts rows at the starts of documents and batches."""
    cut: list[list[tuple[int, int, int, bool]]] = []
    for row in spans:
        cut.append([])
        token = 0
        for position, length in row:
            stop = token + length
            while token < stop:
                slot = position % size
                count = min(size - slot, stop - token)
                cut[-1].append((token, slot, count, position == 0))
                token, position = token + count, position + count
    B, N = len(cut), max(map(len, cut))
    source = torch.zeros(B, N, size, dtype=torch.int64)
    is_seen, is_token = (torch.zeros(B, N, size, dtype=torch.bool) for _ in range(2))
    starts, anchors = (torch.zeros(B, N, dtype=torch.bool) for _ in range(2))
    for b, runs in enumerate(cut):
        for n, (token, slot, count, is_start) in enumerate(runs):
            starts[b, n], anchors[b, n] = is_start, slot == 0
            first = max(0, slot - left) if slot else 0
            stop, here = slot + count, left + token - slot
            source[b, n, first:stop] = torch.arange(here + first, here + stop)
            is_seen[b, n, first:stop] = is_token[b, n, slot:stop] = True
    place = torch.stack([row.flatten().nonzero()[:, 0] for row in is_token])
    return Runs(source, is_seen, is_token, place, starts, anchors, left)


def runs_of_segment(plan: Plan, segment: int, size: int, left: int = 0) -> Runs:
    """Those of one segment of a plan; use with `plan.once`."""
    spans: list[list[tuple[int, int]]] = [[] for _ in range(plan.rows)]
    for p in plan.pieces:
        if p.segment == segment:
            spans[p.row].append((p.position - p.document, p.stop - p.start))
    return runs_of(spans, size, left)


class State(NamedTuple):
    """Weights above momenta of both layers, and the anchor."""

    inner: Tensor
    """`[B, H, 2 K, F]`."""
    outer: Tensor
    """`[B, H, 2 F, K]`."""
    anchor_inner: Tensor
    anchor_outer: Tensor

    def flat(self) -> Tensor:
        """All of it, `[B, 6 H K F]`."""
        return torch.cat([x.flatten(1) for x in self], 1)

    def of(self, flat: Tensor) -> "State":
        """The state that `flat` came from, of the shape of this one."""
        parts = flat.split([x[0].numel() for x in self], 1)
        return State(*(part.view(x.shape) for part, x in zip(parts, self)))

    def entering(self, runs: Runs, n: int, first: "State") -> "State":
        """What run n of each row starts with."""
        state = self
        if runs.starts_BN[:, n].any():
            starts = runs.starts_BN[:, n, None, None, None].to(self.inner.device)
            inner, outer, *_ = (torch.where(starts, a, b) for a, b in zip(first, state))
            state = state._replace(inner=inner, outer=outer)
        anchors = runs.anchors_BN[:, n]
        if not anchors.any():
            return state
        now = [x.narrow(2, 0, x.shape[2] // 2) for x in state[:2]]
        if not anchors.all():
            anchors = anchors[:, None, None, None].to(self.inner.device)
            now = [torch.where(anchors, a, b) for a, b in zip(now, state[2:])]
        return state._replace(anchor_inner=now[0], anchor_outer=now[1])

    def before(self, x: Tensor) -> Tensor:
        """What the weights answer for `[B, H, C, K]` that the batch began with."""
        return answer(x, self.anchor_inner, self.anchor_outer)


def answer(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """`M(x)` with these weights."""
    return x + F.silu(x @ inner) @ outer


class DeepMemory(nn.Module):
    """The weights that documents start with.

    They make activations of length near 1 for unit keys, and answers near the question.
    """

    def __init__(self, num_heads: int, size: int, hidden: int):
        super().__init__()
        self.first_inner = nn.Parameter(torch.empty(num_heads, size, hidden))
        self.first_outer = nn.Parameter(torch.empty(num_heads, hidden, size))
        self._std = {"first_inner": 2 * hidden**-0.5, "first_outer": 0.5 * size**-0.5}
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=self._std[name])

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        """First values of either layer."""
        return self._std[name] * torch.randn(getattr(self, name).shape, generator=generator)

    def start(self, rows: int, dtype: torch.dtype) -> State:
        """The state that a document starts with: no momentum."""
        inner, outer = (
            x.to(dtype).expand(rows, *x.shape) for x in (self.first_inner, self.first_outer)
        )
        both = [torch.cat((x, torch.zeros_like(x)), 2) for x in (inner, outer)]
        return State(both[0], both[1], inner, outer)


class Gates(NamedTuple):
    """Of each token: theta, the logs of 1 - alpha and of eta, `[B, T, H]`."""

    step_BTH: Tensor
    log_keep_BTH: Tensor
    log_momentum_BTH: Tensor


class StepGates(nn.Module):
    """Sigmoids for each head: theta is one times `largest (1 - eta)`."""

    def __init__(self, width: int, num_heads: int, largest: float):
        super().__init__()
        self.largest = largest
        self.raw = nn.Linear(width, 3 * num_heads, bias=False)
        # Forgets 0.1 % a token at first: weights that forget faster than they learn end at zero,
        # where neither layer has a gradient.
        self.keep_bias = nn.Parameter(torch.full((num_heads,), 7.0))

    def stretches(self) -> dict[str, tuple[int, ...]]:
        """As a mixer has them."""
        return {"raw.weight": 3 * (len(self.keep_bias),)}

    def forward(self, x_BTD: Tensor) -> Gates:
        """In at least fp32."""
        raw = self.raw(x_BTD)
        step, keep, momentum = raw.to(torch.promote_types(raw.dtype, torch.float32)).chunk(3, -1)
        step = self.largest * step.sigmoid() * (-momentum).sigmoid()
        return Gates(step, F.logsigmoid(keep + self.keep_bias), F.logsigmoid(momentum))


class Course(NamedTuple):
    """How a run changes memory and momentum, `[B, N, H, ..]`."""

    keep: Tensor
    """Of the entering memory what is left in it after each token, `[C, 1]`."""
    momentum: Tensor
    """Of the entering momentum what is by then in the memory."""
    written: Tensor
    """Of each gradient what is by then taken from the memory, `[C, C]`."""
    memory_end: Tensor
    """The same at the end, `[C, 1]`."""
    momentum_end: Tensor
    """Of each gradient what is in the end taken from the momentum."""
    carry: Tensor
    """Of memory and momentum what is in the end in each, `[2, 2]`."""


def course_of(runs: Runs, gates: Gates) -> Course:
    """As `delta_rules.Momentum` has it: products and sums of numbers in 0..1."""
    step, log_keep, log_momentum = (runs.own(x).transpose(2, 3) for x in gates)
    is_token = runs.is_token_BNC[:, :, None, :, None].to(step)
    kept, passed = _left(log_keep), _left(log_momentum)
    memory = kept[..., 1:] @ (passed[..., 1:, :] * is_token)
    ends = torch.stack((kept[..., -1, 0], memory[..., -1, 0], passed[..., -1, 0]), -1)
    carry = F.pad(ends, (0, 1))[..., [0, 1, 3, 2]].unflatten(-1, (2, 2))
    return Course(
        kept[..., 1:, :1],
        memory[..., 1:, :1],
        memory[..., 1:, 1:] * step[..., None, :],
        (memory[..., -1, 1:] * step)[..., None],
        (passed[..., -1, 1:] * step)[..., None],
        carry,
    )


def _left(log_C: Tensor) -> Tensor:
    """What is left after each token of what was there before, `[1 + C, 1 + C]`, the start first."""
    later = torch.ones(log_C.shape[-1] + 1, log_C.shape[-1] + 1, device=log_C.device).tril() > 0
    # Sums that begin at each column: differences of running sums would round what is far smaller.
    between = log_C[..., None].where(later[:-1], 0).cumsum(-2)
    return F.pad(between, (0, 0, 1, 0)).masked_fill(~later, -torch.inf).exp()


Ask = Callable[[State, int], tuple[Tensor, ...]]
"""q, k, v `[B, H, C, K]` of a run, given the state it starts with; what more there is, is kept."""


def memorise(
    runs: Runs, state: State, first: State, gates: Gates, ask: Ask
) -> tuple[Tensor, State]:
    """Answers of a segment `[B, T, H, ..]`, after anything more that was asked, and the state."""
    outputs = []
    for n, course in enumerate(zip(*(x.unbind(1) for x in course_of(runs, gates)))):
        state = state.entering(runs, n, first)
        q, k, v, *more = ask(state, n)
        out, state = _learn(state, Course(*course), q, k, v)
        outputs.append(torch.cat((*more, out), -1))
    return runs.tokens(torch.stack(outputs, 1).transpose(2, 3)), state


def _learn(state: State, course: Course, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
    """Answers after each token of a run, and the state after it."""
    z = k @ state.anchor_inner
    gate = z.sigmoid()
    h = z * gate
    e = k - v + h @ state.anchor_outer
    dz = (e @ state.anchor_outer.mT) * (gate + h * (1 - gate))
    keep, momentum = course.keep, course.momentum
    zq = torch.cat((q * keep, q * momentum), -1) @ state.inner
    hq = F.silu(zq - (course.written * (q @ k.mT)) @ dz)
    out = q + torch.cat((hq * keep, hq * momentum), -1) @ state.outer
    out = out - (course.written * (hq @ h.mT)) @ e
    inner = _carried(course, state.inner) - _spread(course, k).mT @ dz
    outer = _carried(course, state.outer) - _spread(course, h).mT @ e
    return out, State(inner, outer, *state[2:])


def _carried(course: Course, x: Tensor) -> Tensor:
    return (course.carry @ x.reshape(*x.shape[:2], 2, -1)).view(x.shape)


def _spread(course: Course, x: Tensor) -> Tensor:
    """Shares of each token's write in memory and momentum."""
    return torch.cat((x * course.memory_end, x * course.momentum_end), -1)


class OneDocument:
    """The definition: weights `[H, ..]` of one document, formed after every token."""

    def __init__(self, memory: DeepMemory, dtype: torch.dtype):
        self.dtype = dtype
        self.weights = tuple(x.to(dtype) for x in (memory.first_inner, memory.first_outer))
        self.momenta = tuple(torch.zeros_like(x) for x in self.weights)
        self.anchor = self.weights

    def begin_batch(self) -> None:
        """Takes gradients at the weights of now."""
        self.anchor = self.weights

    def learn(
        self, k: Tensor, v: Tensor, step: Tensor, log_keep: Tensor, log_momentum: Tensor
    ) -> None:
        """One token's step; k and v are `[1, H, 1, K]`, its gates `[H, 1, 1]`."""
        inner, outer = self.anchor
        z = k @ inner
        gate = z.sigmoid()
        error = k + (z * gate) @ outer - v
        dz = (error @ outer.mT) * gate * (1 + z * (1 - gate))
        gradients = (k.mT * dz, (z * gate).mT * error)
        moved = zip(self.momenta, gradients)
        self.momenta = tuple(log_momentum.exp() * p - step * gradient for p, gradient in moved)
        self.weights = tuple(log_keep.exp() * w + p for w, p in zip(self.weights, self.momenta))

    def before(self, q: Tensor) -> Tensor:
        """What the weights answer that the batch began with."""
        return answer(q, *self.anchor)

    def now(self, q: Tensor) -> Tensor:
        """What the weights answer."""
        return answer(q, *self.weights)
