"""Attention around a deep memory: over what it answers, and with its answers as context.

Operands of attention within a segment are `[B, H, C, K]`, one slot a place in the segment.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.mixers.base import RMSNorm, split_heads
from longctx.mixers.deep_memory import Ask, Runs, State
from longctx.mixers.parts import rotate, unit
from longctx.sequence.view import Persistent


class Look(NamedTuple):
    """Heads of attention and their size, persistent keys, and the base of rotary frequencies."""

    num_heads: int
    size: int
    persistent: int
    rope_base: float


class Attention(nn.Module):
    """Queries, keys and values with QK-norm and rotary positions; persistent keys."""

    def __init__(self, look: Look, width: int):
        super().__init__()
        self.look, (H, size, count, _) = look, look
        self.query = nn.Linear(width, H * size, bias=False)
        self.key = nn.Linear(width, H * size, bias=False)
        self.value = nn.Linear(width, H * size, bias=False)
        self.query_norm, self.key_norm = RMSNorm(size), RMSNorm(size)
        if count:
            self.persistent_key = nn.Parameter(torch.zeros(count, H, size))
            self.persistent_value = nn.Parameter(torch.zeros(count, H, size))

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of tokens."""
        H, base = self.look.num_heads, self.look.rope_base
        q, k, v = (split_heads(f(x_BTD), H) for f in (self.query, self.key, self.value))
        q = rotate(self.query_norm(q), positions_BT, base)
        return q.type_as(v), self.rotated(k, positions_BT).type_as(v), v

    def rotated(self, k_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        """Normalised keys with positions."""
        return rotate(self.key_norm(k_BTHK), positions_BT, self.look.rope_base)

    @property
    def persistent(self) -> Persistent | None:
        """Keys and values that every query sees."""
        if not self.look.persistent:
            return None
        return Persistent(self.persistent_key, self.persistent_value)


class Context(nn.Module):
    """Memory as context: attention within segments to tokens and to what the memory answers them.

    It makes what the memory is then told and asked.
    """

    def __init__(self, look: Look, width: int, segment: int):
        super().__init__()
        self.look, self.segment = look, segment
        self.attention, wide = Attention(look, width), look.num_heads * look.size
        self.memory_key = nn.Linear(wide, wide, bias=False)
        self.memory_value = nn.Linear(wide, wide, bias=False)
        self.key = nn.Linear(wide, wide, bias=False)
        self.value = nn.Linear(wide, wide, bias=False)
        self.question = nn.Linear(wide, wide, bias=False)

    def asking(
        self, runs: Runs, queries: Sequence[Tensor], seen: Sequence[Sequence[Tensor]]
    ) -> Ask:
        """Attention of each run: `seen` has questions to the memory, keys and values of slots."""
        size, device = self.segment, queries[0].device
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        # Slots without a token see themselves, so that nothing is divided by zero.
        shown = (runs.is_seen_BNC[:, :, None] & causal) | torch.eye(size, dtype=torch.bool)
        shown = F.pad(torch.cat((shown, shown), -1), (self.look.persistent, 0), value=True)
        hidden = ~shown.to(device)[:, :, None]
        places_1C = torch.arange(size, device=device)[None]

        def ask(state: State, n: int) -> tuple[Tensor, ...]:
            questions, k, v = (x[n] for x in seen)
            answers = self._as_seen(state.before(questions), places_1C)
            keys, values = (torch.cat(x, 2) for x in zip(self._persistent(k), answers, (k, v)))
            scores = queries[n] @ keys.mT * self.look.size**-0.5
            y = scores.masked_fill(hidden[:, n], -torch.inf).softmax(-1) @ values
            return *self.told(y), y

        return ask

    def _as_seen(self, h: Tensor, places_1C: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of answers."""
        k, v = self._mapped(h, self.memory_key, self.memory_value)
        return self.attention.rotated(k.transpose(1, 2), places_1C).transpose(1, 2), v

    def told(self, y: Tensor) -> list[Tensor]:
        """Question, key and value for the memory, made of what attention gave."""
        return [unit(F.silu(x)) for x in self._mapped(y, self.question, self.key, self.value)]

    def _mapped(self, x: Tensor, *maps: nn.Linear) -> list[Tensor]:
        """Maps of all heads together, in the dtype of `x`."""
        flat, H = x.transpose(1, 2).flatten(2), self.look.num_heads
        mapped = (F.linear(flat, f.weight.to(x.dtype)) for f in maps)
        return [split_heads(y, H).transpose(1, 2) for y in mapped]

    def _persistent(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Persistent keys and values for each row, none if there are none."""
        persistent = self.attention.persistent
        if persistent is None:
            return like[:, :, :0], like[:, :, :0]
        k, v = (x.to(like.dtype).transpose(0, 1).expand(len(like), -1, -1, -1) for x in persistent)
        return k, v

    def shown(self, h: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The definition's key and value of one answer `[1, H, 1, K]`, by its place."""
        return self._as_seen(h, torch.full((1, 1), place, device=h.device))

    def attend(self, query: Tensor, shown: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The definition for one query `[1, H, 1, K]`, which sees all that was shown."""
        keys, values = (torch.cat(x, 2) for x in zip(self._persistent(query), *shown))
        return (query @ keys.mT * self.look.size**-0.5).softmax(-1) @ values
