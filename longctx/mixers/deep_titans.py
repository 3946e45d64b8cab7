"""Titans (arXiv 2501.00663) with a memory of two layers, exact and serial from rank to rank.

The memory learns as equations 8 to 14 say, gradients taken at the weights that a batch of `batch`
tokens starts with (section 3.2; 1 is every token), see `deep_memory`. Batches and segments count
from a document's start, so that no split changes them; a document starts with learned weights. The
update is not linear in the state, so that nothing associative stands for a part of the sequence:
weights, momenta and anchors are handed from rank to rank, and ranks wait for each other. alpha and
eta are sigmoids per head and token. theta is `largest_step / batch (1 - eta) sigmoid`, which is
ours as unit values are: neither a larger batch nor a longer momentum makes memories move faster.

`lmm` is the memory alone, normalised and gated. `mal` (equations 29 to 31) is attention to a window
over the memory's normalised answers. `mac` (equations 21 to 25) works on segments, which are its
batches as well: h_j = M(q(x_j)) with the weights at the segment's start (21); token t of it attends
to persistent keys, h_j and x_j (22, 23) and the memory takes a step on k(y_t), v(y_t) (24); its
output is y_t gated by M_t(q(y_t)) (25). In the paper all of a segment's tokens see each other and
read a memory that has taken all of its steps. Here token t sees j <= t and reads the memory after
its own step, else outputs would depend on later tokens. Also ours: persistent keys and values in
place of tokens, which attention alone sees, and keys and values of h by maps of their own.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from longctx_kernels.softmax_attention import softmax_attention_after, softmax_attention_reference
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Backend, HeadsConfig, Mixer, Place, split_heads
from longctx.mixers.deep_context import Attention, Context, Look
from longctx.mixers.deep_memory import (
    DeepMemory,
    Gates,
    OneDocument,
    Runs,
    State,
    StepGates,
    memorise,
    runs_of,
    runs_of_segment,
)
from longctx.mixers.parts import GatedNorm, ShortConvolution, unit
from longctx.sequence.expected import (
    Expected,
    Share,
    Sizes,
    combined,
    halo_traffic,
    handoff_traffic,
    softmax_traffic,
)
from longctx.sequence.local import LocalView
from longctx.sequence.sharded import Transports
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class DeepTitansConfig(HeadsConfig, kind="deep_titans"):
    """A memory of two layers: alone, before attention to a window, or as context of attention."""

    composition: Literal["lmm", "mal", "mac"] = "lmm"
    """The memory alone, attention to a window of what it answers, or memory as context."""
    hidden: int = 0
    """Hidden size of the memory; 0 means twice the size of a head."""
    batch: int = 16
    """Tokens whose gradients are taken at the same weights; with mac those of a segment."""
    largest_step: float = 0.5
    """Largest sum of the steps of a batch; from about 1 on, less with batch 1, memories diverge."""
    segment: int = 0
    """With mac, tokens that attend to each other."""
    window: int = 0
    """With mal, keys that attention sees, its own included."""
    persistent: int = 0
    """Learned keys and values that every query of attention sees."""
    convolution: int = 4
    """Taps of the short convolution of what the memory is asked and told; 0 has none."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies of attention."""

    def build(self, place: Place) -> "DeepTitans":
        return DeepTitans(self, place)

    def on(self, backend: Backend) -> "DeepTitansConfig":
        # The memory is in PyTorch alone; a model may want other kernels elsewhere.
        return super().on("auto" if backend in ("triton", "fla") else backend)

    def verbs(self) -> frozenset[str]:
        has_neighbours = self.convolution or self.composition != "lmm"
        return frozenset({"handoff", "halo"} if has_neighbours else {"handoff"})

    @property
    def batch_size(self) -> int:
        """Tokens whose gradients are taken at the same weights."""
        return self.segment if self.composition == "mac" else self.batch

    def check_length(self, seq_len: int, where: str) -> None:
        for name in ("window", "segment"):
            if getattr(self, name) > seq_len:
                raise InputError(
                    f"{where}.{name} = {getattr(self, name)} is longer than "
                    f"train.seq_len = {seq_len}: shorten it"
                )

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.backend in ("triton", "fla"):
            raise InputError(
                f"{where}.backend = {self.backend!r}: a deep memory has no such kernels; "
                "choose auto or torch"
            )
        if self.batch < 1:
            raise InputError(f"{where}.batch = {self.batch}: must be at least 1")
        for name in ("hidden", "segment", "window", "persistent"):
            if getattr(self, name) < 0:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must not be negative")
        for name, composition in (("window", "mal"), ("segment", "mac")):
            value, is_used = getattr(self, name), self.composition == composition
            if is_used != bool(value):
                raise InputError(
                    f"{where}.{name} = {value}: composition {self.composition!r} "
                    + ("needs at least 1" if is_used else f"has none; choose {composition!r}")
                )
        if self.persistent and self.composition == "lmm":
            raise InputError(
                f"{where}.persistent = {self.persistent}: needs attention to see them; "
                "choose composition 'mal' or 'mac'"
            )
        for name in ("largest_step", "rope_base"):
            if getattr(self, name) <= 0:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must be positive")
        if self.convolution not in (0, *range(2, 9)):
            raise InputError(f"{where}.convolution = {self.convolution}: must be 0 or 2..8 taps")

    def tp_refusal(self, tp: int) -> str:
        if self.composition != "lmm" and tp > 1:
            return f"composition = {self.composition!r} maps all heads together: choose 'lmm'"
        return super().tp_refusal(tp)

    def refusal(self, transports: Transports) -> str:
        """States are handed over whatever the transport; attention to a window trades heads."""
        return super().refusal(transports) if self.composition == "mal" else ""


class DeepTitansParts(NamedTuple):
    """What a memory and the attention around it need of tokens."""

    seen: list[Tensor]
    """Of each segment `[B, T, H, 3 K]`: questions, keys and values of the memory; of mac its
    questions, keys and values of attention, from `segment - 1` tokens left of it on."""
    gates: Gates
    asked_BTHK: Tensor | None
    """Queries of attention of mac."""
    gate_BTHK: Tensor | None
    """The output gate, but for mac."""
    positions_BT: Tensor


Memory = tuple[Tensor, int, tuple[Tensor, ...]]
"""Of generation: state, position, and keys and values of a window."""


class DeepTitans(Mixer):
    """See the module's docstring."""

    def __init__(self, config: DeepTitansConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        width, H, K = place.width, config.num_heads, config.size_of_head(place.width)
        is_mac, parts = config.composition == "mac", 1 if config.composition == "mac" else 3
        self.key_dim, self.hidden = K, config.hidden or 2 * K
        self.left = config.segment - 1 if is_mac else 0
        self.told = nn.Linear(width, parts * H * K, bias=False)
        self.gates = StepGates(width, H, config.largest_step / config.batch_size)
        taps, channels = config.convolution, parts * H * K
        self.convolve = ShortConvolution(channels, taps) if taps else None
        self.memory = DeepMemory(H, K, self.hidden)
        attends = config.composition == "mal"
        look = Look(H, K, config.persistent, config.rope_base)
        self.attention = Attention(look, H * K) if attends else None
        self.context = Context(look, width, config.segment) if is_mac else None
        self.memory_norm = GatedNorm(K) if attends or is_mac else None
        self.norm = GatedNorm(K, "sigmoid" if is_mac else "silu")
        self.gate = None if is_mac else nn.Linear(width, H * K, bias=False)
        self.project_out = nn.Linear(H * K, width, bias=False)

    def stretches(self) -> dict[str, tuple[int, ...]]:
        told = 3 * (self.num_heads * self.key_dim,)
        return {"told.weight": told, "convolve.weight": told}

    def project(self, x_BTD: Tensor, view: SequenceView) -> DeepTitansParts:
        H, told = self.num_heads, self.told(x_BTD)
        if self.convolve is None:
            told = F.silu(told)
        else:
            told = self.convolve(told, view, self.config.computes_with)
        told = unit(told.unflatten(-1, (-1, self.key_dim)))
        asked, positions = None, view.positions_BT
        if self.context is None:
            lengths = [segment.length for segment in view.plan.segments]
            seen = list(torch.cat(told.chunk(3, 2), -1).split(lengths, 1))
        else:
            asked, k, v = self.context.attention(x_BTD, positions % self.config.segment)
            seen = view.halo(torch.cat((told, k, v), -1).type_as(v), self.left)
        gate = None if self.gate is None else split_heads(self.gate(x_BTD), H)
        return DeepTitansParts(seen, self.gates(x_BTD), asked, gate, positions)

    def core(self, projected: DeepTitansParts, view: SequenceView) -> Tensor:
        size, lengths = self.config.batch_size, [segment.length for segment in view.plan.segments]
        asked = projected.asked_BTHK
        with torch.autocast(projected.positions_BT.device.type, enabled=False):
            first = self._first(projected)
            gates = [Gates(*part) for part in zip(*(x.split(lengths, 1) for x in projected.gates))]
            queries = [None for _ in lengths] if asked is None else asked.split(lengths, 1)

            def work(flat: Tensor, index: int) -> tuple[Tensor, Tensor]:
                runs = view.plan.once(runs_of_segment, index, size, self.left)
                tokens = projected.seen[index], queries[index], gates[index]
                y, state = self._memorised(tokens, runs, first.of(flat), first)
                return y, state.flat()

            y_BTHV = torch.cat(view.handoff(first.flat(), work), 1)
        y_BTHV = y_BTHV.type_as(projected.seen[0])
        if self.attention is None:
            return y_BTHV
        q, k, v = self._looking(y_BTHV, projected.positions_BT)
        options = self.config.window, self.config.computes_with, self.attention.persistent
        return view.softmax_attention(q, k, v, *options)

    def _first(self, projected: DeepTitansParts) -> State:
        """What documents start with."""
        step_BTH = projected.gates.step_BTH
        return self.memory.start(len(step_BTH), step_BTH.dtype)

    def _looking(self, y_BTHK: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of mal, of what the memory answered."""
        assert self.attention is not None
        assert self.memory_norm is not None
        normed = self.memory_norm(y_BTHK, None, self.config.computes_with)
        return self.attention(normed.flatten(2), positions_BT)

    def _memorised(
        self, tokens: tuple[Tensor, Tensor | None, Gates], runs: Runs, state: State, first: State
    ) -> tuple[Tensor, State]:
        """What a segment's tokens make of the memory, and the memory after them."""
        seen, asked, gates = tokens
        slots = runs.seen(seen.to(gates.step_BTH.dtype)).transpose(2, 3)
        q, k, v = (x.unbind(1) for x in slots.chunk(3, -1))
        if asked is None:
            return memorise(runs, state, first, gates, lambda _, n: (q[n], k[n], v[n]))
        assert self.context is not None
        queries = runs.own(asked.to(slots.dtype)).transpose(2, 3).unbind(1)
        ask = self.context.asking(runs, queries, (q, k, v))
        return memorise(runs, state, first, gates, ask)

    def core_reference(self, projected: DeepTitansParts, view: LocalView) -> Tensor:
        outputs = []
        for piece in view.plan.pieces:
            first = piece.start - piece.row * view.plan.length
            outputs += self._token_by_token(
                projected, piece.row, range(first, first + piece.stop - piece.start)
            )
        y_BTHV = torch.stack(outputs).unflatten(0, projected.positions_BT.shape)
        y_BTHV = y_BTHV.type_as(projected.seen[0])
        if self.attention is None:
            return y_BTHV
        q, k, v = (x.flatten(0, 1) for x in self._looking(y_BTHV, projected.positions_BT))
        if self.attention.persistent is not None:
            k, v = self.attention.persistent.before(k, v)
        window, count = self.config.window, self.config.persistent
        row, cuts = (q[None], k[None], v[None]), view.cu_seqlens
        y = softmax_attention_reference(*row, window, cu_seqlens=cuts, persistent=count)
        return y.view_as(y_BTHV)

    def _token_by_token(self, projected: DeepTitansParts, row: int, tokens: range) -> list[Tensor]:
        """The definition for one document: outputs `[H, V]` of its tokens."""
        document, outputs = OneDocument(self.memory, projected.gates.step_BTH.dtype), []
        for t in tokens:
            if (t - tokens.start) % self.config.batch_size == 0:
                document.begin_batch()
                shown: list[tuple[Tensor, Tensor]] = []
            told = projected.seen[0][row, self.left + t].to(document.dtype)[None, :, None]
            q, k, v = told.chunk(3, -1)
            more: tuple[Tensor, ...] = ()
            if self.context is not None:
                assert projected.asked_BTHK is not None
                asked = projected.asked_BTHK[row, t].to(document.dtype)[None, :, None]
                shown += [self.context.shown(document.before(q), len(shown) // 2), (k, v)]
                y = self.context.attend(asked, shown)
                q, k, v = self.context.told(y)
                more = (y,)
            document.learn(k, v, *(x[row, t, :, None, None] for x in projected.gates))
            outputs.append(torch.cat((*more, document.now(q)), -1)[0, :, 0])
        return outputs

    def advance(self, projected: DeepTitansParts, memory: Memory | None) -> tuple[Tensor, Memory]:
        first = self._first(projected)
        flat, position, before = memory or (first.flat(), 0, ())
        B, T = projected.positions_BT.shape
        runs = runs_of([[(position, T)]] * B, self.config.batch_size, self.left)
        tokens = projected.seen[0], projected.asked_BTHK, projected.gates
        y, state = self._memorised(tokens, runs, first.of(flat), first)
        y, flat = y.type_as(projected.seen[0]), state.flat()
        if self.attention is None:
            return y, (flat, position + T, ())
        q, *keys = self._looking(y, projected.positions_BT)
        k, v = (torch.cat((a, b), 1) for a, b in zip(before or [x[:, :0] for x in keys], keys))
        window, persistent = self.config.window, self.attention.persistent
        kept = tuple(x[:, max(0, x.shape[1] - window + 1) :] for x in (k, v))
        if persistent is not None:
            shown = (x.to(k.dtype).expand(len(k), *x.shape) for x in persistent)
            k, v = (torch.cat((a, b), 1) for a, b in zip(shown, (k, v)))
        scale, count = self.key_dim**-0.5, self.config.persistent
        return softmax_attention_after(q, k, v, window, scale, count), (flat, position + T, kept)

    def read(self, y_BTHV: Tensor, projected: DeepTitansParts) -> Tensor:
        backend = self.config.computes_with
        if self.context is None:
            return self.norm(y_BTHV, projected.gate_BTHK, backend)
        assert self.memory_norm is not None
        near, memory = y_BTHV.split(self.key_dim, -1)
        return self.norm(near, self.memory_norm(memory, None, backend), backend)

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of three products forward and one back at a token's key, and two at its question."""
        H, K, config = self.num_heads, self.key_dim, self.config
        flops, shown = 10 * H * K * self.hidden * contexts_M.numel(), 0
        if config.composition == "mal":
            shown = int((contexts_M.clamp(max=config.window) + config.persistent).sum())
        elif config.composition == "mac":
            flops += 4 * H * K * self.hidden * contexts_M.numel()
            places_M = (contexts_M - 1) % config.segment
            shown = int((2 * (places_M + 1) + config.persistent).sum())
        return flops + 4 * H * K * shown

    def expected_traffic(self, share: Share) -> Expected:
        H, K, config = self.num_heads, self.key_dim, self.config
        parts = [handoff_traffic(share, 6 * H * K * self.hidden)]
        if self.convolve is not None:
            parts.append(self.convolve.expected_traffic(share))
        if config.composition == "mal":
            parts.append(softmax_traffic(share, Sizes(H, H, K, K), config.window))
        elif config.composition == "mac":
            parts.append(halo_traffic(share, self.left, 3 * H * K))
        return combined(parts)
