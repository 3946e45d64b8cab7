"""Loss and accuracy on held-out sequences: of all labels, and by their position in documents."""

from collections.abc import Sequence
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longctx.data import IGNORE
from longctx.model.decoder import LabelScores

if TYPE_CHECKING:
    from longctx.train.trainer import Trainer

FIRST_BIN = 16
"""Positions of the first bin; the second has as many, and each later one twice those before it."""


def bin_start(number: int) -> int:
    """First position of a bin: 0, 16, 32, 64 and so on."""
    return FIRST_BIN << number - 1 if number else 0


def bin_starts(seq_len: int) -> list[int]:
    """First positions of the bins of a sequence of this length."""
    return [0, *takewhile(lambda start: start < seq_len, map(bin_start, count(1)))]


@torch.no_grad()
def evaluate(trainer: "Trainer") -> dict[str, Any]:
    """Over the labels of the held-out sequences: the mean loss in nats, and the share that is the
    most likely token; of each bin of `bin_starts` the mean loss, None without labels, and the
    number of labels.

    A label belongs to the bin of the position in its document of the token before it.
    """
    trainer.model.eval()
    mesh, config, loader = trainer.mesh, trainer.settings.train, trainer.loaders.validation
    ids, dp = range(trainer.settings.eval.sequences), mesh.split.dp
    rows, starts = config.micro_batch or config.batch_size // dp, bin_starts(config.seq_len)
    total_3N = torch.zeros(3, len(starts), dtype=torch.float64, device=mesh.device)
    for start in range(0, len(ids), dp * rows):
        mine = ids[start + mesh.dp_rank : start + dp * rows : dp]
        # Without a sequence of its own, a process still takes part in exchanges of weights.
        batch = loader.read(mine or ids[:1], trainer.segments)
        scores = trainer.forward(batch)[0].scores
        if mine:
            total_3N += _sums(scores, batch.labels_BT.flatten().to(mesh.device), starts)
    return _means(mesh.sum(total_3N, "evaluation").cpu())


def _sums(scores: LabelScores, labels_M: Tensor, starts: Sequence[int]) -> Tensor:
    """`[3, N]`: of labels in each bin the loss, the right answers and the number."""
    last = torch.tensor(starts[1:], device=labels_M.device)
    bin_M = torch.bucketize(scores.position_M, last, right=True)
    of_label_3M = torch.stack(
        [x.double() for x in (scores.loss_M, scores.correct_M, labels_M != IGNORE)]
    )
    sums_3N = of_label_3M.new_zeros(3, len(starts))
    return sums_3N.index_add_(1, bin_M, of_label_3M)


def _means(total_3N: Tensor) -> dict[str, Any]:
    loss, correct, labels = total_3N.sum(1).tolist()
    by_position = [
        (total / number if number else None, int(number))
        for total, _, number in total_3N.T.tolist()
    ]
    return {
        "val_loss": loss / max(1, labels),
        "val_accuracy": correct / max(1, labels),
        "val_loss_by_position": [mean for mean, _ in by_position],
        "val_labels_by_position": [number for _, number in by_position],
    }
