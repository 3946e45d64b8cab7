"""A block of keys or values as one: its mean, or what an MLP makes of it.

The first layer of the MLP has a matrix for each place of a block, and its products are summed. So
a block that lies on several ranks has a sum over each, and these are added before the activation;
the second layer is computed everywhere. A rank's queries send their part of a block's gradient
back to the sums, and where these were made to tokens and matrices: each part is counted once.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.sequence.block_sums import block_pieces, joined_pieces
from longctx.sequence.running import wide
from longctx.sequence.view import SequenceView

Kind = Literal["mean", "mlp"]


class Pooling(nn.Module):
    """Of `[..., block, J, size]` one `[..., J, size]`; an MLP is the same for all heads."""

    def __init__(self, size: int, block: int, kind: Kind):
        super().__init__()
        self.size, self.block, self.has_layers = size, block, kind == "mlp"
        if self.has_layers:
            self.first = nn.Parameter(torch.empty(block * size, size))
            self.bias = nn.Parameter(torch.zeros(size))
            self.second = nn.Parameter(torch.empty(size, size))
            nn.init.normal_(self.first, std=(block * size) ** -0.5)
            nn.init.normal_(self.second, std=size**-0.5)

    def sums(self, x_NLJD: Tensor) -> Tensor:
        """What parts of a block add up from."""
        if self.has_layers:
            return x_NLJD.transpose(-3, -2).flatten(-2) @ self.first
        return wide(x_NLJD).sum(-3) / self.block

    def finish(self, sum_UJD: Tensor) -> Tensor:
        """Whole blocks of whole sums."""
        return F.silu(sum_UJD + self.bias) @ self.second if self.has_layers else sum_UJD

    def reference(self, x_LJD: Tensor) -> Tensor:
        """A whole block, token by token."""
        if not self.has_layers:
            return x_LJD.mean(0)
        layers = self.first.view(self.block, self.size, -1)
        total = sum(x_JD @ layer for x_JD, layer in zip(x_LJD, layers))
        return F.silu(total + self.bias) @ self.second

    def flops(self, heads: int, blocks: int) -> int:
        """Of so many blocks."""
        weights = self.first.numel() + self.second.numel() if self.has_layers else 0
        return 2 * heads * blocks * weights


class Compression(nn.Module):
    """Blocks of keys, and of values, each in its own way; one from every `stride`-th token on."""

    def __init__(self, size: int, block: int, stride: int, kind: Kind):
        super().__init__()
        self.block, self.stride = block, stride
        self.key, self.value = (Pooling(size, block, kind) for _ in range(2))

    def forward(self, view: SequenceView, k_BTJK: Tensor, v_BTJV: Tensor) -> tuple[Tensor, Tensor]:
        """All whole blocks of all documents, `[U, J, ...]`, in the dtype of values."""
        pairs_BTJD = torch.cat((k_BTJK, v_BTJV), -1)
        k_NLJK, v_NLJV = block_pieces(view, pairs_BTJD, self.block, self.stride).chunk(2, -1)
        pieces = torch.cat((self.key.sums(k_NLJK), self.value.sums(v_NLJV)), -1)
        k_UJK, v_UJV = joined_pieces(view, pieces, self.block, self.stride).sum(1).chunk(2, -1)
        return self.key.finish(k_UJK).type_as(v_BTJV), self.value.finish(v_UJV).type_as(v_BTJV)

    def of_rows(self, k_BUJK: Tensor, v_BUJV: Tensor) -> tuple[Tensor, Tensor]:
        """The whole blocks `[B, n, J, ...]` of rows that are one document each."""
        if k_BUJK.shape[1] < self.block:
            return k_BUJK[:, :0], v_BUJV[:, :0]
        parts = (x.unfold(1, self.block, self.stride).movedim(-1, 2) for x in (k_BUJK, v_BUJV))
        ways = zip((self.key, self.value), parts)
        k_BnJK, v_BnJV = (pool.finish(pool.sums(x)).type_as(v_BUJV) for pool, x in ways)
        return k_BnJK, v_BnJV

    def importance(
        self, q_THK: Tensor, k_mJK: Tensor, lse_TH: Tensor, where: tuple[Tensor, int, int]
    ) -> Tensor:
        """`[..., T, J, n]` of the first blocks of a document: the weights of compressed blocks in
        each, once for every stretch of `stride` tokens that they share.

        `where` has the queries' positions, the tokens of a block and the number of blocks.
        """
        position_T, block, blocks = where
        size, J = self.key.size, k_mJK.shape[-2]
        with torch.autocast(q_THK.device.type, enabled=False):
            q_JgK = wide(q_THK).unflatten(-2, (J, -1)).movedim(-4, -2).flatten(-3, -2)
            score_Jgm = (q_JgK @ wide(k_mJK).movedim(-3, -1)).mul_(size**-0.5)
        score_JGTm = score_Jgm.unflatten(-2, (-1, len(position_T)))
        lse_JGT = lse_TH.unflatten(-1, (J, -1)).movedim(-3, -1)
        last_m = torch.arange(k_mJK.shape[-3], device=position_T.device) * self.stride
        is_past_Tm = last_m + self.block - 1 <= position_T[:, None]
        weight_JTm = score_JGTm.sub_(lse_JGT[..., None]).exp_().sum(-3)
        weight_JTm = torch.where(is_past_Tm, weight_JTm, 0.0)
        overlap, each = self.block // self.stride, block // self.stride
        wide_JTm = F.pad(weight_JTm, (overlap - 1, blocks * each - len(last_m)))
        stretch_JTc = wide_JTm.unfold(-1, overlap, 1).sum(-1)
        return stretch_JTc.unflatten(-1, (blocks, each)).sum(-1).transpose(-3, -2)
