"""NSA, native sparse attention (arXiv 2502.11089): three branches, each with a gate by head.

The compressed branch sees blocks of `compress_block` tokens, each as one key, from their last token
on. What their weights come to in a block of the document, summed over the heads of a key group, is
its importance: the selected branch sees the query's own block, the one before it, the first and the
most important of the others. The third branch is a window. A compressed block counts once for every
stretch of `compress_stride` tokens that it shares with a block. Nothing is differentiated through
the selection, and no loss is added: the compressed branch learns the ranking.

Compressed keys are made of rotated ones, as in the released code of FLA, which has means of one
size of block; heads may share keys in groups of any size.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.attention import Attention, SparseConfig, masked_attention
from longctx.mixers.base import Place, RMSNorm, split_heads
from longctx.mixers.compression import Compression
from longctx.sequence.block_sums import Blocks, block_sums_traffic
from longctx.sequence.expected import Expected, Share, combined
from longctx.sequence.local import LocalView
from longctx.sequence.past_blocks import past_blocks_after, past_blocks_attention
from longctx.sequence.patterned import patterned_attention, patterned_traffic
from longctx.sequence.policy import Window
from longctx.sequence.selected import (
    Choice,
    Tile,
    best,
    best_blocks,
    selected_after,
    selected_blocks_attention,
    selected_blocks_traffic,
)
from longctx.sequence.view import SequenceView

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


@dataclass(frozen=True)
class NSAConfig(SparseConfig, kind="nsa"):
    """Attention to compressed blocks, to selected ones and to a window."""

    block: int = 64
    """Tokens of a block that is selected."""
    num_blocks: int = 16
    """Selected blocks, with the query's own, the one before it and the first."""
    compress_block: int = 32
    """Tokens of a compressed block."""
    compress_stride: int = 16
    """Tokens from the start of a compressed block to that of the next."""
    compression: Literal["mean", "mlp"] = "mlp"
    """How a block becomes one key and value."""
    window: int = 512
    """Keys that the third branch sees, the query's own included."""
    branch_keys: Literal["shared", "own"] = "own"
    """Whether branches project keys and values of their own."""

    def build(self, place: Place) -> "NSA":
        return NSA(self, place)

    one_key_head_is_shared = False

    def verbs(self) -> frozenset[str]:
        return frozenset({"fetch", "means"})

    def check_length(self, seq_len: int, where: str) -> None:
        self.check_window(self.window, seq_len, where)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "block", "compress_block", "compress_stride", "window")
        if self.num_blocks < 3:
            raise InputError(
                f"{where}.num_blocks = {self.num_blocks}: must be at least 3, for a query's own "
                "block, the one before it and the first"
            )
        for name in ("block", "compress_block"):
            if getattr(self, name) % self.compress_stride:
                raise InputError(
                    f"{where}.compress_stride = {self.compress_stride} does not divide "
                    f"{name} = {getattr(self, name)}: change one of them"
                )
        if self.compress_block > self.block:
            raise InputError(
                f"{where}.compress_block = {self.compress_block} is longer than "
                f"block = {self.block}: shorten it"
            )


class NSAParts(NamedTuple):
    """Queries, keys and values of the compressed, selected and window branch, raw gates of the
    branches, and the raw output gate."""

    q_BTHK: Tensor
    compressed: Pair
    selected: Pair
    near: Pair
    mix_BTHN: Tensor
    gate_BTHV: Tensor | None


class Remembered(NamedTuple):
    """What tokens to come may see: compressed blocks, tokens of those to come, all tokens, the
    last of them."""

    compressed: Pair
    rest: Pair
    selected: Pair
    near: Pair


class NSA(Attention):
    """See the module's docstring."""

    config: NSAConfig

    def __init__(self, config: NSAConfig, place: Place):
        super().__init__(config, place)
        block, stride = config.compress_block, config.compress_stride
        self.choice = Choice(config.block, config.num_blocks, keeps_edges=True)
        self.compress = Compression(self.size, block, stride, config.compression)
        self.mix = nn.Linear(place.width, self.num_heads * 3, bias=False)
        if config.branch_keys == "own":
            both = 2 * self.num_kv_heads * self.size
            self.more_keys = nn.Linear(place.width, both, bias=False)
            self.more_values = nn.Linear(place.width, both, bias=False)
            self.more_norm = RMSNorm(self.size) if config.qk_norm else nn.Identity()

    def stretches(self) -> dict[str, tuple[int, ...]]:
        branches = 2 * (self.num_kv_heads * self.size,)
        return {"more_keys.weight": branches, "more_values.weight": branches}

    def project(self, x_BTD: Tensor, view: SequenceView) -> NSAParts:
        q_BTHK, k_BTJK, v_BTJV, gate_BTHV = self.attention_parts(x_BTD, view)
        pairs: list[Pair] = [(k_BTJK, v_BTJV)] * 3
        if self.config.branch_keys == "own":
            heads = 2 * self.num_kv_heads
            keys = self.more_norm(split_heads(self.more_keys(x_BTD), heads))
            keys = self._rotate(keys, view)
            values = split_heads(self.more_values(x_BTD), heads)
            pairs[1:] = zip(keys.type_as(values).chunk(2, 2), values.chunk(2, 2))
        mix_BTHN = split_heads(self.mix(x_BTD), self.num_heads)
        return NSAParts(q_BTHK, pairs[0], pairs[1], pairs[2], mix_BTHN, gate_BTHV)

    def core(self, projected: NSAParts, view: SequenceView) -> Tensor:
        return self._mixed(self._branches(projected, view), projected.mix_BTHN)

    @torch.compiler.disable
    def _branches(self, projected: NSAParts, view: SequenceView) -> tuple[Tensor, ...]:
        q_BTHK, backend, config = projected.q_BTHK, self.config.computes_with, self.config
        k_UJK, v_UJV = self.compress(view, *projected.compressed)
        layout = self.compress.block, self.compress.stride
        far, lse = past_blocks_attention(view, (q_BTHK, k_UJK, v_UJV), *layout, backend=backend)
        blocks = self._selection(q_BTHK, k_UJK, lse, view)
        operands = q_BTHK, *projected.selected
        chosen, _ = selected_blocks_attention(view, operands, blocks, config.block, backend)
        operands = q_BTHK, *projected.near
        near, _ = patterned_attention(view, operands, Window(config.window), backend=backend)
        return far, chosen, near

    def _mixed(self, branches: tuple[Tensor, ...], mix_BTHN: Tensor) -> Tensor:
        return (mix_BTHN.sigmoid()[..., None] * torch.stack(branches, -2)).sum(-2)

    def _selection(
        self, q_BTHK: Tensor, k_UJK: Tensor, lse_BTH: Tensor, view: SequenceView
    ) -> Tensor:
        """The blocks that each query sees in the selected branch."""
        q_MHK, lse_MH = q_BTHK.flatten(0, 1), lse_BTH.flatten(0, 1)
        blocks = view.plan.once(Blocks, self.compress.block, self.compress.stride)
        each = self.config.block // self.compress.stride

        def score(tile: Tile) -> Tensor:
            first, count = blocks.documents[tile.document]
            keys = k_UJK[first : first + min(count, tile.blocks * each)]
            where = tile.positions, self.config.block, tile.blocks
            return self.compress.importance(q_MHK[tile.tokens], keys, lse_MH[tile.tokens], where)

        return best_blocks(view, score, self.choice, self.num_kv_heads, self.num_heads * each)

    def core_reference(self, projected: NSAParts, view: LocalView) -> Tensor:
        q_MHK = projected.q_BTHK.flatten(0, 1)
        pairs = [[x.flatten(0, 1) for x in pair] for pair in projected[1:4]]
        cuts, branches = view.cu_seqlens.tolist(), []
        size, stride = self.compress.block, self.compress.stride
        for start, stop in zip(cuts, cuts[1:]):
            compressed = [
                [
                    pool.reference(x[first : first + size])
                    for first in range(start, stop - size + 1, stride)
                ]
                for pool, x in zip((self.compress.key, self.compress.value), pairs[0])
            ]
            for query in range(start, stop):
                own = [[x[start : query + 1] for x in pair] for pair in pairs[1:]]
                branches.append(self._row(q_MHK[query], compressed, own))
        stacked = (torch.stack(y).view(projected.q_BTHK.shape) for y in zip(*branches))
        return self._mixed(tuple(stacked), projected.mix_BTHN)

    def _row(
        self, q_HK: Tensor, compressed: list[list[Tensor]], own: list[list[Tensor]]
    ) -> tuple[Tensor, ...]:
        """Each branch's output of the last of U tokens."""
        config, tokens, outs = self.config, len(own[0][0]), []
        past = max(0, (tokens - self.compress.block) // self.compress.stride + 1)
        for j, q_gK in enumerate(q_HK.chunk(self.num_kv_heads)):
            far, weights = torch.zeros_like(q_gK), []
            if past:
                keys, values = (torch.stack(x[:past])[:, j] for x in compressed)
                weight_gn = (q_gK @ keys.T * self.size**-0.5).softmax(-1)
                far, weights = weight_gn @ values, weight_gn.sum(0).tolist()
            blocks = self._chosen(weights, (tokens - 1) // config.block)
            seen = [u for u in range(tokens) if u // config.block in blocks]
            last = list(range(max(0, tokens - config.window), tokens))
            near = [
                (q_gK @ k[u, j].T * self.size**-0.5).softmax(-1) @ v[u, j]
                for (k, v), u in zip(own, (seen, last))
            ]
            outs.append((far, *near))
        return tuple(torch.cat(parts) for parts in zip(*outs))

    def _chosen(self, weights: list[float], own: int) -> set[int]:
        """Blocks of a query, given the weights of compressed blocks and its own block."""
        size, stride = self.compress.block, self.compress.stride
        importance = [0.0] * (own + 2)
        for n, weight in enumerate(weights):
            for token in range(n * stride, n * stride + size, stride):
                importance[token // self.config.block] += weight
        forced = {0, own, max(0, own - 1)}
        ranked = sorted(set(range(own)) - forced, key=lambda n: (-importance[n], n))
        return forced | set(ranked[: self.config.num_blocks - len(forced)])

    def advance(self, projected: NSAParts, memory: Remembered | None) -> tuple[Tensor, Remembered]:
        q_BTHK, config = projected.q_BTHK, self.config
        after = self._after(projected, memory)
        if memory is None:
            view = LocalView.whole(q_BTHK.shape[0], q_BTHK.shape[1], q_BTHK.device)
            return self.core(projected, view), self._kept(after)
        total, device = after.selected[0].shape[1], q_BTHK.device
        position_T = torch.arange(total - q_BTHK.shape[1], total, device=device)
        k_BmJK, v_BmJV = after.compressed
        stride, own_T = self.compress.stride, position_T // config.block
        last_m = torch.arange(k_BmJK.shape[1], device=device) * stride + self.compress.block - 1
        far, lse = past_blocks_after((q_BTHK, k_BmJK, v_BmJV), last_m, total, config.computes_with)
        earlier = (total - 1) // config.block
        keys = k_BmJK[:, : earlier * config.block // stride]
        where = position_T, config.block, earlier
        blocks = best(self.compress.importance(q_BTHK, keys, lse, where), own_T, self.choice)
        operands = q_BTHK, *after.selected
        chosen = selected_after(operands, blocks, config.block, config.computes_with)
        key_U = torch.arange(total - after.near[0].shape[1], total, device=device)
        seen_TU = (key_U <= position_T[:, None]) & (key_U > position_T[:, None] - config.window)
        near = masked_attention(q_BTHK, *after.near, seen_TU[None])
        return self._mixed((far, chosen, near), projected.mix_BTHN), self._kept(after)

    def _after(self, projected: NSAParts, memory: Remembered | None) -> Remembered:
        """All that these tokens may see."""
        nothing = [_from(pair, pair[0].shape[1]) for pair in projected[1:4]]
        before = memory or (nothing[0], *nothing)
        rest, selected, near = map(_joined, before[1:], projected[1:4])
        new = self.compress.of_rows(*rest)
        rest = _from(rest, new[0].shape[1] * self.compress.stride)
        return Remembered(_joined(before[0], new), rest, selected, near)

    def _kept(self, after: Remembered) -> Remembered:
        """What is left of it for tokens to come."""
        dropped = max(0, after.near[0].shape[1] - self.config.window + 1)
        return after._replace(near=_from(after.near, dropped))

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of seen keys and values in all branches, and of compressing."""
        config, size, stride = self.config, self.compress.block, self.compress.stride
        own_M = (contexts_M - 1) // config.block
        whole = int(own_M.clamp(max=config.num_blocks - 1).sum()) * config.block
        seen = whole + int(((contexts_M - 1) % config.block + 1).sum())
        seen += int(contexts_M.clamp(max=config.window).sum())
        seen += int(((contexts_M - size) // stride + 1).clamp(min=0).sum())
        ends = int(((contexts_M >= size) & ((contexts_M - size) % stride == 0)).sum())
        pools = self.compress.key, self.compress.value
        layers = sum(pool.flops(self.num_kv_heads, ends) for pool in pools)
        return 4 * self.num_heads * self.size * seen + layers

    def expected_traffic(self, share: Share) -> Expected:
        block, stride = self.compress.block, self.compress.stride
        means = block_sums_traffic(share, block, 2 * self.num_kv_heads * self.size, stride)
        near = patterned_traffic(share, self.sizes, Window(self.config.window))
        return combined((means, selected_blocks_traffic(share, self.sizes), near))


def _from(pair: Pair, first: int) -> Pair:
    """Of tokens from the `first` on."""
    return pair[0][:, first:], pair[1][:, first:]


def _joined(left: Pair, right: Pair) -> Pair:
    """Of tokens and those after them."""
    return torch.cat((left[0], right[0]), 1), torch.cat((left[1], right[1]), 1)
