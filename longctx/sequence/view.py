"""SequenceView: all that a mixer may know about where its tokens come from.

A mixer is written once against this interface. On one process the view holds whole documents;
other implementations spread a sequence over ranks and answer the same calls with the same values.
"""

import copy
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Self

import torch
from longctx_kernels.decay_attention import decay_attention
from longctx_kernels.softmax_attention import softmax_attention
from torch import Tensor

from longctx.sequence.plan import Documents
from longctx.sequence.randomness import token_keys, uniform


def one_row(x_BTHD: Tensor) -> Tensor:
    """Rows laid end to end, as operators with `cu_seqlens` want them."""
    return x_BTHD.flatten(0, 1)[None]


PURPOSES = ("mixer dropout", "mlp dropout", "router")


class SequenceView(ABC):
    """Tokens `[B, T]` of this process."""

    positions_BT: Tensor
    """Position of each token within its document."""
    token_ids_BT: Tensor
    """Position of each token within its whole sequence."""
    keys_BT: Tensor | None = None
    """What random numbers of each token depend on."""
    layer: int = 0

    def at(self, layer: int) -> Self:
        """The same view, named for what a layer exchanges and draws."""
        view = copy.copy(self)
        view.layer = layer
        return view

    def keyed(self, seed: int, step: int, sequence_ids: tuple[int, ...]) -> Self:
        """The same view with random numbers of its own for this step."""
        view = copy.copy(self)
        view.keys_BT = token_keys(seed, step, sequence_ids, self.token_ids_BT)
        return view

    def uniform(self, purpose: str, width: int) -> Tensor:
        """Random numbers in [0, 1) `[B, T, width]` that do not depend on how tokens are split."""
        if self.keys_BT is None:
            raise ValueError("this view has no random numbers; make one with keyed()")
        return uniform(self.keys_BT, self.layer, PURPOSES.index(purpose), width)

    @abstractmethod
    def decay_attention(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_H: Tensor | None
    ) -> Tensor:
        """Linear attention over each document, state decayed by a constant per head."""

    @abstractmethod
    def softmax_attention(
        self, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJV: Tensor, window: int
    ) -> Tensor:
        """Causal softmax attention over each document; `window` keys are seen, 0 sees all."""

    @abstractmethod
    def reduce_mean(self, x_BTE: Tensor) -> Tensor:
        """Mean over all tokens of all sequences, on whichever rank they lie, in at least fp32."""


class LocalView(SequenceView):
    """Whole sequences on one process."""

    def __init__(self, documents_BT: Tensor):
        """`documents_BT`: an id per token; a token whose id differs from the last starts anew."""
        self.batch, self.length = documents_BT.shape
        self._device = documents_BT.device
        starts_BT = torch.ones(self.batch, self.length, dtype=torch.bool, device=self._device)
        starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        index_T = torch.arange(self.length, device=self._device).expand(self.batch, -1)
        self.positions_BT = index_T - (index_T * starts_BT).cummax(1).values
        self.token_ids_BT = index_T
        cuts = starts_BT.flatten().nonzero()[:, 0].tolist()
        self.cuts = (*cuts, self.batch * self.length)

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device | str = "cpu") -> "LocalView":
        """Every row is one document."""
        return cls(torch.zeros(batch, length, dtype=torch.int32, device=device))

    @classmethod
    def of_documents(
        cls, documents: Documents, length: int, device: torch.device | str = "cpu"
    ) -> "LocalView":
        """Rows of `length` tokens in which documents start at these positions."""
        documents_BT = torch.zeros(len(documents), length, dtype=torch.int32, device=device)
        for row, starts in zip(documents_BT, documents):
            row[list(starts)] = 1
        return cls(documents_BT.cumsum(1))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Cuts between documents in the rows laid end to end."""
        return torch.tensor(self.cuts, dtype=torch.int32)

    def decay_attention(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_H: Tensor | None
    ) -> Tensor:
        q, k, v = one_row(q_BTHK), one_row(k_BTHK), one_row(v_BTHV)
        out, _ = decay_attention(q, k, v, log_decay_H, scale=1.0, cu_seqlens=self.cu_seqlens)
        return out.view_as(v_BTHV)

    def softmax_attention(
        self, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJV: Tensor, window: int
    ) -> Tensor:
        q, k, v = one_row(q_BTHK), one_row(k_BTJK), one_row(v_BTJV)
        out = softmax_attention(q, k, v, window, cu_seqlens=self.cu_seqlens)
        return out.view(*q_BTHK.shape[:3], -1)

    def reduce_mean(self, x_BTE: Tensor) -> Tensor:
        wide = torch.promote_types(x_BTE.dtype, torch.float32)
        return x_BTE.flatten(0, 1).mean(0, dtype=wide)
