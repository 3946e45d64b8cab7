"""Landmark attention (arXiv 2305.16300): a softmax over tokens in two levels.

The last token of a block is its landmark. A softmax goes over the tokens of the query's own block
and the landmarks of all blocks before it; what a landmark gets is given to the other tokens of its
block, by a softmax among them. So every block is weighed as a whole first. A landmark's own value
is not read, and that of the query's own block is not seen. In the paper landmarks are tokens of
their own that are added to the text; here tokens of the text take their place.

Everything that is seen is laid out, for some queries at a time: there is no kernel for it.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longctx.errors import InputError
from longctx.mixers.attention import Attention, AttentionParts, SparseConfig
from longctx.mixers.base import Backend, Place
from longctx.sequence.expected import Expected, Share
from longctx.sequence.local import LocalView
from longctx.sequence.plan import Plan
from longctx.sequence.running import wide
from longctx.sequence.selected import (
    TILE_ELEMENTS,
    key_blocks,
    keys_in_blocks,
    selected_blocks_traffic,
)
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class LandmarkConfig(SparseConfig, kind="landmark"):
    """Attention to blocks by their landmarks, and to the tokens in them."""

    block: int = 64
    """Tokens of a block, the last of which is its landmark."""

    def build(self, place: Place) -> "Landmark":
        return Landmark(self, place)

    def verbs(self) -> frozenset[str]:
        return frozenset({"fetch"})

    def on(self, backend: Backend) -> Self:
        # There are no kernels but PyTorch's.
        return super().on("auto" if backend == "triton" else backend)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.block < 2:
            raise InputError(
                f"{where}.block = {self.block}: must be at least 2, a landmark and a token"
            )
        if self.backend == "triton":
            raise InputError(
                f"{where}.backend = 'triton': there are no such kernels; choose auto or torch"
            )


class Tile(NamedTuple):
    """Own queries of a document, their positions in it, and keys of its blocks up to theirs."""

    tokens: slice
    position_t: Tensor
    keys: slice


class Landmark(Attention):
    """See the module's docstring."""

    config: LandmarkConfig

    @torch.compiler.disable
    def core(self, projected: AttentionParts, view: SequenceView) -> Tensor:
        q_BTHK, k_BTJK, v_BTJV = projected[:3]
        q_MHK, device, block = q_BTHK.flatten(0, 1), q_BTHK.device, self.config.block
        layout = view.plan.once(key_blocks, block, device)
        k_UJK, v_UJV = keys_in_blocks(view, (q_BTHK, k_BTJK, v_BTJV), layout)
        outs = []
        for tokens, position_t, keys in view.plan.once(_tiles, block, self.num_heads, device):
            operands = q_MHK[tokens], k_UJK[keys], v_UJV[keys]
            outs.append(checkpoint(self._attend, *operands, position_t, use_reentrant=False))
        return torch.cat(outs).view(q_BTHK.shape)

    def _attend(self, q_tHK: Tensor, k_uJK: Tensor, v_uJV: Tensor, position_t: Tensor) -> Tensor:
        """Of queries at these positions to blocks of a document from its start on."""
        block, tokens, J = self.config.block, len(q_tHK), self.num_kv_heads
        with torch.autocast(q_tHK.device.type, enabled=False):
            q_JmK = wide(q_tHK).unflatten(1, (J, -1)).movedim(0, 2).flatten(1, 2)
            score_Jmu = q_JmK @ wide(k_uJK).permute(1, 2, 0) * self.size**-0.5
            score_JGtnl = score_Jmu.unflatten(1, (-1, tokens)).unflatten(-1, (-1, block))
            inside, landmark = score_JGtnl[..., :-1], score_JGtnl[..., -1:]
            by_block = inside - inside.logsumexp(-1, keepdim=True) + landmark
            place_u = torch.arange(len(k_uJK), device=position_t.device).view(-1, block)
            number_n1, place_nl = place_u[:, :1] // block, place_u[:, :-1]
            own_t11 = position_t[:, None, None] // block
            is_seen_tnl = (number_n1 == own_t11) & (place_nl <= position_t[:, None, None])
            inside = inside.masked_fill(~is_seen_tnl, -torch.inf)
            logit_JGtnl = torch.where(number_n1 < own_t11, by_block, inside)
            weight_Jmu = logit_JGtnl.flatten(-2).softmax(-1).flatten(1, 2)
            v_JuV = wide(v_uJV).unflatten(0, (-1, block))[:, :-1].flatten(0, 1).transpose(0, 1)
            out_JmV = weight_Jmu @ v_JuV
        out_tHV = out_JmV.unflatten(1, (-1, tokens)).flatten(0, 1).transpose(0, 1)
        return out_tHV.type_as(v_uJV)

    def core_reference(self, projected: AttentionParts, view: LocalView) -> Tensor:
        q_MHK, k_MJK, v_MJV = (x.flatten(0, 1) for x in projected[:3])
        rows = []
        for t, position in enumerate(view.positions_BT.flatten().tolist()):
            seen = slice(t - position, t + 1)
            heads = zip(
                q_MHK[t].chunk(self.num_kv_heads),
                k_MJK[seen].unbind(1),
                v_MJV[seen].unbind(1),
            )
            rows.append(torch.cat([self._row(*head) for head in heads]))
        return torch.stack(rows).view(projected.q_BTHK.shape)

    def _row(self, q_gK: Tensor, k_UK: Tensor, v_UV: Tensor) -> Tensor:
        """Output of the last of U tokens for the queries of one key head."""
        block = self.config.block
        whole = (len(k_UK) - 1) // block * block
        own = slice(whole, min(len(k_UK), whole + block - 1))
        keys = torch.cat((k_UK[:whole], k_UK[own]))
        score_gU = q_gK @ keys.T * self.size**-0.5
        past, near = score_gU.split((whole, len(keys) - whole), 1)
        landmarks_gn = past[:, block - 1 :: block]
        share_gU = torch.cat((landmarks_gn, near), 1).softmax(-1)
        weights, values = [], []
        for n in range(whole // block):
            inner = slice(n * block, (n + 1) * block - 1)
            weights.append(share_gU[:, n : n + 1] * past[:, inner].softmax(-1))
            values.append(v_UV[inner])
        weights.append(share_gU[:, whole // block :])
        return torch.cat(weights, 1) @ torch.cat([*values, v_UV[own]])

    def advance(
        self, projected: AttentionParts, memory: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q_BTHK, k_BUJK, v_BUJV = projected[:3]
        if memory is None:
            view = LocalView.whole(q_BTHK.shape[0], q_BTHK.shape[1], q_BTHK.device)
            return self.core(projected, view), (k_BUJK, v_BUJV)
        k_BUJK, v_BUJV = torch.cat((memory[0], k_BUJK), 1), torch.cat((memory[1], v_BUJV), 1)
        tokens, missing = k_BUJK.shape[1], -k_BUJK.shape[1] % self.config.block
        position_t = torch.arange(tokens - q_BTHK.shape[1], tokens, device=q_BTHK.device)
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k_BUJK, v_BUJV))
        rows = [self._attend(*row, position_t) for row in zip(q_BTHK, keys, values)]
        return torch.stack(rows), (k_BUJK, v_BUJV)

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of all keys but the own landmark, and of all values but landmarks'."""
        block = self.config.block
        blocks = int(((contexts_M - 1) // block).sum())
        own = int(((contexts_M - 1) % block + 1).clamp(max=block - 1).sum())
        pairs = blocks * block + own + blocks * (block - 1) + own
        return 2 * self.num_heads * self.size * pairs

    def expected_traffic(self, share: Share) -> Expected:
        return selected_blocks_traffic(share, self.sizes)


def _tiles(plan: Plan, block: int, num_heads: int, device: torch.device) -> tuple[Tile, ...]:
    """All own queries, so many at a time that scores stay few."""
    layout, tiles = plan.once(key_blocks, block, torch.device("cpu")), []
    for piece in plan.pieces:
        begin, end = piece.position - piece.document, piece.stop - piece.start
        first = int(layout.blocks_N[layout.first_M11[piece.start]]) * block
        step = max(1, TILE_ELEMENTS // (num_heads * (begin + end + block)))
        for start in range(0, end, step):
            stop = min(start + step, end)
            position_t = torch.arange(begin + start, begin + stop)
            keys = slice(first, first + (int(position_t[-1]) // block + 1) * block)
            tokens = slice(piece.start + start, piece.start + stop)
            tiles.append(Tile(tokens, position_t.to(device), keys))
    return tuple(tiles)
