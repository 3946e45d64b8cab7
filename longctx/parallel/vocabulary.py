"""A vocabulary whose rows are shared: embedding, cross-entropy and scores of labels.

Megatron's functions of the same purpose need a vocabulary padded to equal shares, sum three times
where one exchange does, and compute in fp32 whatever the precision (megatron-core 0.16.1); these
give what one process does.
"""

from typing import Any

import torch
from torch import Tensor, nn

from longctx.parallel.megatron import TensorGroup
from longctx.sequence.ledger import OUTSIDE_LAYERS, Label

IGNORE = -100
CHUNK_ELEMENTS = 1 << 24
EMBEDDING = Label(OUTSIDE_LAYERS, "shared embedding")
HEAD = Label(OUTSIDE_LAYERS, "shared head")
LOSS = Label(OUTSIDE_LAYERS, "shared loss")


class SharedEmbedding(nn.Embedding):
    """Rows `first`, `first + 1`, ... of an embedding; others are looked up by other processes."""

    def __init__(self, weight_VD: nn.Parameter, first: int, group: TensorGroup):
        super().__init__(*weight_VD.shape, _weight=weight_VD, device=weight_VD.device)
        self.weight = weight_VD
        self.first, self.group = first, group

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Rows of all tokens."""
        rows_BT = tokens_BT - self.first
        is_here_BT = (rows_BT >= 0) & (rows_BT < self.num_embeddings)
        x_BTD = super().forward(rows_BT.where(is_here_BT, 0))
        return self.group.leave(x_BTD * is_here_BT[..., None], EMBEDDING)


class SharedHead:
    """Cross-entropy of a linear head of which each process has the rows from `first` on.

    Logits are held of `rows` tokens at a time, which all processes have to agree on.
    """

    def __init__(self, group: TensorGroup, vocab_size: int, first: int, rows: int):
        self.group, self.first = group, first
        self.rows = rows or max(1, CHUNK_ELEMENTS * group.size // vocab_size)

    def cross_entropy(self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Tensor:
        """Sum over labels other than -100 of the negative log probability, in at least fp32."""
        hidden_MD = self.group.enter(hidden_MD, HEAD)
        return _SharedCrossEntropy.apply(hidden_MD, weight_VD, labels_M, self)

    @torch.no_grad()
    def score_labels(
        self, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of each label its negative log probability, in at least fp32, and whether its logit is
        the largest, the earlier class winning ties; 0 and False for -100; equal everywhere."""
        wide = torch.promote_types(hidden_MD.dtype, torch.float32)
        loss_M = torch.zeros(labels_M.shape, dtype=wide, device=labels_M.device)
        correct_M = torch.zeros_like(labels_M, dtype=torch.bool)
        asked = (labels_M != IGNORE).nonzero()[:, 0]
        for index in asked.split(self.rows):
            logits_RV, labels = (hidden_MD[index] @ weight_VD.mT).to(wide), labels_M[index]
            own = _own_labels(labels, self.first, len(weight_VD))
            best = logits_RV.max(-1)
            candidate_2R = torch.stack((best.values.double(), (best.indices + self.first).double()))
            found_4R = torch.cat((candidate_2R, _normaliser_here(logits_RV, own).double()))
            value_PR, class_PR, lse_PR, chosen_PR = self.group.gather(found_4R, LOSS).unbind(1)
            winner_R = value_PR.max(0).indices
            correct_M[index] = class_PR.gather(0, winner_R[None])[0].long() == labels
            loss_M[index] = (lse_PR.logsumexp(0) - chosen_PR.sum(0)).to(wide)
        return loss_M, correct_M


class _SharedCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, one chunk of tokens after another."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, head: SharedHead
    ) -> Tensor:
        wide = torch.promote_types(hidden_MD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_MD.device)
        has_gradients = any(ctx.needs_input_grad)
        if has_gradients:
            dhidden_MD = torch.empty_like(hidden_MD)
            dweight_VD = torch.zeros_like(weight_VD, dtype=wide)
        chunks = (x.split(head.rows) for x in (hidden_MD, labels_M))
        for number, (hidden, labels) in enumerate(zip(*chunks)):
            logits_RV = (hidden @ weight_VD.mT).to(wide)
            own = _own_labels(labels, head.first, len(weight_VD))
            total_R, chosen_R = _normaliser(logits_RV, own, head)
            valid = labels != IGNORE
            total += ((total_R - chosen_R) * valid).sum()
            if not has_gradients:
                continue
            dlogits_RV = (logits_RV - total_R[:, None]).exp_()
            dlogits_RV[own] -= 1
            dlogits_RV = (dlogits_RV * valid[:, None]).to(hidden.dtype)
            start = number * head.rows
            dhidden_MD[start : start + len(hidden)] = dlogits_RV @ weight_VD
            dweight_VD += dlogits_RV.mT @ hidden
        if has_gradients:
            ctx.save_for_backward(dhidden_MD, dweight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> Any:
        dhidden_MD, dweight_VD = ctx.saved_tensors
        scale = dtotal.to(dhidden_MD.dtype)
        return dhidden_MD * scale, dweight_VD * scale, None, None


def _own_labels(labels_R: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Where labels are among the rows from `first` on: tokens and own rows."""
    here = ((labels_R >= first) & (labels_R < first + rows)).nonzero()[:, 0]
    return here, labels_R[here] - first


def _normaliser(
    logits_RV: Tensor, own: tuple[Tensor, Tensor], head: SharedHead
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp over the whole vocabulary, and the logit of the label, 0 without one."""
    gathered = head.group.gather(_normaliser_here(logits_RV, own), LOSS)
    lse_PR, chosen_PR = gathered.unbind(1)
    return lse_PR.logsumexp(0), chosen_PR.sum(0)


def _normaliser_here(logits_RV: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
    """`[2, R]`: the same two over this process's share of the vocabulary."""
    chosen_R = torch.zeros_like(logits_RV[:, 0])
    chosen_R[own[0]] = logits_RV[own]
    return torch.stack((logits_RV.logsumexp(-1), chosen_R))
