"""Causal attention in which every query uses some of its heads, and the others cost nothing.

Each row and head is a lane: its keys have coordinates of their own, the queries that chose the
head stand among them, and those that did not after all of them, where everything has expired.
Where a query stands in its lane depends on earlier queries only. Lanes lie end to end, and one
call of lifetime attention with a single head goes over all of them.
"""

import torch
from torch import Tensor

from longctx_kernels.lifetime_attention import flash_lifetime
from longctx_kernels.sight import NEVER


def routed_attention(
    operands: tuple[Tensor, Tensor, Tensor],
    chosen_BTH: Tensor,
    positions_BT: Tensor,
    ends_BG: Tensor,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Output `[B, T, H, V]`, zero where a query did not choose the head.

    Queries `[B, T, H, K]` stand at rising positions among keys and values `[B, G, J, K or V]`. A
    query sees what is not after it, from before `ends_BG`, and of that the last `window` unless it
    is 0. Keys and values are repeated for each query head of their group.
    """
    q_BTHK, k_BGJK, v_BGJV = operands
    _check(operands, chosen_BTH, positions_BT, ends_BG)
    (B, T, H, _), G = q_BTHK.shape, k_BGJK.shape[1]
    whole, device = torch.int32, q_BTHK.device
    lanes_BH1 = torch.arange(B * H, dtype=whole, device=device).view(B, H, 1) * (G + 1)
    keys_G = torch.arange(G, dtype=whole, device=device)
    places_BTH = torch.where(chosen_BTH, positions_BT[..., None].to(whole), G)
    places_BHT, order_BHT = places_BTH.transpose(1, 2).sort(dim=-1, stable=True)
    rows_BHT = torch.arange(B, device=device)[:, None, None] * T + order_BHT
    index_N = (rows_BHT * H + torch.arange(H, device=device)[:, None]).flatten()
    ends_BG = ends_BG.to(whole).clamp(max=G)
    ends_BG = torch.minimum(ends_BG, keys_G + window) if window else ends_BG
    out_1N1V, _ = flash_lifetime(
        q_BTHK.flatten(0, 2).index_select(0, index_N)[None, :, None],
        *(_lanes(x, H) for x in (k_BGJK, v_BGJV)),
        expiry=_row(lanes_BH1 + ends_BG[:, None]),
        query_positions=_row(lanes_BH1 + places_BHT),
        key_positions=_row(lanes_BH1 + keys_G),
        backend=backend,
    )
    out_NV = out_1N1V[0, :, 0]
    return torch.zeros_like(out_NV).index_copy(0, index_N, out_NV).view(B, T, H, -1)


def routed_reference(
    operands: tuple[Tensor, Tensor, Tensor],
    chosen_BTH: Tensor,
    positions_BT: Tensor,
    ends_BG: Tensor,
    window: int = 0,
) -> Tensor:
    """The definition, query by query; differentiable by autograd."""
    q_BTHK, *keys = operands
    group = q_BTHK.shape[2] // keys[0].shape[2]
    k_BGHK, v_BGHV = (x.repeat_interleave(group, 2) for x in keys)
    out_BTHV = q_BTHK.new_zeros(*q_BTHK.shape[:3], v_BGHV.shape[-1])
    for b, t, h in chosen_BTH.nonzero().tolist():
        at = int(positions_BT[b, t])
        seen = [j for j in range(at + 1) if ends_BG[b, j] > at and (not window or j > at - window)]
        if seen:
            scores = k_BGHK[b, seen, h] @ q_BTHK[b, t, h] * q_BTHK.shape[-1] ** -0.5
            out = scores.softmax(0) @ v_BGHV[b, seen, h]
            index = tuple(torch.tensor(i) for i in (b, t, h))
            out_BTHV = out_BTHV.index_put(index, out)
    return out_BTHV


def _lanes(x_BGJD: Tensor, heads: int) -> Tensor:
    """`[1, B * H * G, 1, D]`."""
    x_BGHD = x_BGJD.repeat_interleave(heads // x_BGJD.shape[2], 2)
    return x_BGHD.transpose(1, 2).flatten(0, 2)[None, :, None]


def _row(coordinates_BHN: Tensor) -> Tensor:
    return coordinates_BHN.flatten()[None]


def _check(operands, chosen_BTH: Tensor, positions_BT: Tensor, ends_BG: Tensor) -> None:
    q_BTHK, k_BGJK, _ = operands
    (B, T, H, _), G = q_BTHK.shape, k_BGJK.shape[1]
    if chosen_BTH.shape != (B, T, H) or chosen_BTH.dtype != torch.bool:
        raise ValueError(
            f"chosen must be bool {(B, T, H)}, got {chosen_BTH.dtype} {tuple(chosen_BTH.shape)}"
        )
    if positions_BT.shape != (B, T) or ends_BG.shape != (B, G):
        raise ValueError(
            f"positions must be {(B, T)} and ends {(B, G)}, got {tuple(positions_BT.shape)} and "
            f"{tuple(ends_BG.shape)}"
        )
    if H % k_BGJK.shape[2]:
        raise ValueError(f"q has {H} heads, which k's {k_BGJK.shape[2]} must divide")
    if B * H * (G + 1) >= NEVER:
        raise ValueError(
            f"{B} rows of {H} heads and {G} keys are more coordinates than int32 holds: "
            "use fewer rows"
        )
