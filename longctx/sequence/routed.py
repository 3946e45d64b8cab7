"""Softmax attention whose heads each serve the tokens that chose them; exact, by gathering keys."""

import torch
from longctx_kernels.routed_attention import routed_attention
from torch import Tensor

from longctx.sequence.local import LocalView
from longctx.sequence.plan import Plan
from longctx.sequence.view import SequenceView

Operands = tuple[Tensor, Tensor, Tensor]


def attend_routed(
    view: SequenceView, operands: Operands, chosen_BTH: Tensor, window: int, backend: str
) -> Tensor:
    """Causal attention over each document of own q `[B, T, H, K]`, k and v `[B, T, J, K or V]`.

    Zero where a token did not choose a head: such queries cost nothing. `window` keys are seen, 0
    sees all.
    """
    if not isinstance(view, LocalView):
        return _attend_gathered(view, operands, chosen_BTH, window, backend)
    rows, length = view.token_ids_BT.shape
    first_B1 = torch.arange(0, rows * length, length, device=view.ends_M.device)[:, None]
    ends_BT = view.ends_M.view(rows, length) - first_B1
    return routed_attention(operands, chosen_BTH, view.token_ids_BT, ends_BT, window, backend)


@torch.compiler.disable
def _attend_gathered(
    view: SequenceView, operands: Operands, chosen_BTH: Tensor, window: int, backend: str
) -> Tensor:
    """With everyone's keys and values up to the last own token."""
    q_BTHK, k_BTJK, v_BTJV = operands
    together = view.gather(torch.cat((k_BTJK, v_BTJV), -1))
    last = view.plan.segments[-1].stop
    k_BGJK, v_BGJV = together[:, :last].split((k_BTJK.shape[-1], v_BTJV.shape[-1]), -1)
    ends_BG = view.plan.once(document_ends, q_BTHK.device)[:, :last]
    operands = q_BTHK, k_BGJK, v_BGJV
    return routed_attention(operands, chosen_BTH, view.token_ids_BT, ends_BG, window, backend)


def document_ends(plan: Plan, device: torch.device) -> Tensor:
    """For each token of the whole rows, `[B, G]`, the position at which its document ends."""
    ends_BG = []
    for starts in plan.documents:
        bounds = torch.tensor((*starts, plan.placement.length))
        ends_BG.append(bounds[1:].repeat_interleave(bounds.diff()))
    return torch.stack(ends_BG).to(device)
