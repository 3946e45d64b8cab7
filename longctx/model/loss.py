"""Cross-entropy and right answers of a linear head, without all logits of a batch in memory at
once."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_ELEMENTS = 1 << 24


def linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, rows: int = 0
) -> Tensor:
    """Sum over labels other than -100 of the negative log probability, in at least fp32.

    PyTorch's own function serves where it exists and the operands are wide. It rounds the loss of
    bf16 operands to bf16 (1.3 off in a sum of 140), so those take the loop below. Logits are held
    of `rows` tokens at a time, or of as many as make CHUNK_ELEMENTS.
    """
    rows = rows or _rows_per_chunk(weight_VD)
    if hidden_MD.dtype != torch.bfloat16 and hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, acc_policy="accurate")
        return F.linear_cross_entropy(
            hidden_MD, weight_VD, labels_M, reduction="sum", ignore_index=IGNORE, options=options
        )
    return _ChunkedCrossEntropy.apply(hidden_MD, weight_VD, labels_M, rows)


@torch.no_grad()
def score_labels(
    hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, rows: int = 0
) -> tuple[Tensor, Tensor]:
    """Of each label its negative log probability, in at least fp32, and whether its logit is the
    largest, the earlier class winning ties; 0 and False for -100. Logits are held as above."""
    wide = torch.promote_types(hidden_MD.dtype, torch.float32)
    loss_M = torch.zeros(labels_M.shape, dtype=wide, device=labels_M.device)
    correct_M = torch.zeros_like(labels_M, dtype=torch.bool)
    asked = (labels_M != IGNORE).nonzero()[:, 0]
    for index in asked.split(rows or _rows_per_chunk(weight_VD)):
        logits_RV, labels = (hidden_MD[index] @ weight_VD.mT).to(wide), labels_M[index]
        loss_M[index] = F.cross_entropy(logits_RV, labels, reduction="none")
        correct_M[index] = logits_RV.argmax(-1) == labels
    return loss_M, correct_M


def _rows_per_chunk(weight_VD: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight_VD.shape[0])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, one chunk of tokens after another."""

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, labels_M, rows):
        wide = torch.promote_types(hidden_MD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_MD.device)
        dhidden_MD = torch.empty_like(hidden_MD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide)
        for hidden, labels, dhidden in zip(
            hidden_MD.split(rows), labels_M.split(rows), dhidden_MD.split(rows), strict=True
        ):
            logits_RV = (hidden @ weight_VD.mT).to(wide)
            total += F.cross_entropy(logits_RV, labels, reduction="sum", ignore_index=IGNORE)
            valid = labels != IGNORE
            dlogits_RV = logits_RV.softmax(-1)
            dlogits_RV[valid.nonzero()[:, 0], labels[valid]] -= 1
            dlogits_RV = (dlogits_RV * valid[:, None]).to(hidden.dtype)
            dhidden.copy_(dlogits_RV @ weight_VD)
            dweight_VD += dlogits_RV.mT @ hidden
        ctx.save_for_backward(dhidden_MD, dweight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, dtotal):
        dhidden_MD, dweight_VD = ctx.saved_tensors
        scale = dtotal.to(dhidden_MD.dtype)
        return dhidden_MD * scale, dweight_VD * scale, None, None
