"""Neural attention search (arXiv 2502.13251): every token chooses how long its key is seen.

By three logits a key head gives a token a role. A global token stays; a local one is seen until the
next global one; a window token for `window` tokens. In training Gumbel noise makes the choice
random. The forward pass is the hard choice; the probability of the chosen role learns by the
gradient that the value gets, and a penalty favours windows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from longctx_kernels.lifetime_attention import flash_lifetime
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.attention import Attention, SparseConfig, masked_attention
from longctx.mixers.base import Place
from longctx.sequence.expected import (
    Expected,
    Share,
    combined,
    gathered_rows_traffic,
    reduce_traffic,
)
from longctx.sequence.local import LocalView
from longctx.sequence.patterned import document_bounds
from longctx.sequence.view import SequenceView

GLOBAL, LOCAL, WINDOW = range(3)
ROLE_BYTES = 8


@dataclass(frozen=True)
class NATSConfig(SparseConfig, kind="nats"):
    """Attention in which tokens choose the lifetimes of their keys."""

    window: int = 64
    """Tokens for which a window token is seen, its own included."""
    penalty: float = 1e-3
    """Weight of the mean share of tokens that are not window tokens."""
    noise: float = 1.0
    """Scale of the Gumbel noise on logits of roles in training."""

    def build(self, place: Place) -> "NATS":
        return NATS(self, place)

    one_key_head_is_shared = False

    def verbs(self) -> frozenset[str]:
        return frozenset({"gather", "reduce", "select"})

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        self.check_positive(where, "window")
        for name in ("penalty", "noise"):
            if getattr(self, name) < 0:
                raise InputError(f"{where}.{name} = {getattr(self, name)}: must not be negative")


class NATSParts(NamedTuple):
    """What attention sees, the role of each key, and the probabilities of roles."""

    q_BTHK: Tensor
    k_BTJK: Tensor
    v_BTJV: Tensor
    gate_BTHV: Tensor | None
    role_BTJ: Tensor
    probability_BTJ3: Tensor


class NATS(Attention):
    """See the module's docstring."""

    config: NATSConfig

    def __init__(self, config: NATSConfig, place: Place):
        super().__init__(config, place)
        self.part, self.parts = place.part, place.parts
        self.role = nn.Linear(place.width, 3 * self.num_kv_heads, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> NATSParts:
        parts = self.attention_parts(x_BTD, view)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        logits = self.role(x_BTD).to(wide).unflatten(-1, (self.num_kv_heads, 3))
        if self.config.noise and self.training and view.keys_BT is not None:
            of_all = view.uniform("router", 3 * self.num_kv_heads * self.parts)
            chance = of_all.chunk(self.parts, -1)[self.part].view(logits.shape)
            gumbel = -(-chance.clamp(min=1e-7).log()).log()
            logits = logits + self.config.noise * gumbel
        probability = logits.softmax(-1)
        role_BTJ = probability.argmax(-1)
        chosen = probability.gather(-1, role_BTJ[..., None])
        taught = (chosen - chosen.detach()).to(parts.v_BTJV.dtype)
        parts = parts._replace(v_BTJV=parts.v_BTJV * (1 + taught))
        return NATSParts(*parts, role_BTJ, probability)

    def losses(self, projected: NATSParts, view: SequenceView) -> dict[str, Tensor]:
        lasting_J = view.reduce_mean(1 - projected.probability_BTJ3[..., WINDOW])
        return {"roles": self.config.penalty * lasting_J.mean()}

    def statistics(self, projected: NATSParts, view: SequenceView) -> dict[str, Tensor]:
        roles = torch.arange(3, device=projected.role_BTJ.device)
        return {"roles": (projected.role_BTJ[..., None] == roles).sum((0, 1))}

    def adapt(self, sums: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        share_J3 = sums["roles"] / tokens
        names = ("share_global", "share_local", "share_window")
        return {name: share_J3[:, role] for role, name in enumerate(names)}

    @torch.compiler.disable
    def core(self, projected: NATSParts, view: SequenceView) -> Tensor:
        pairs = view.gather(torch.cat((projected.k_BTJK, projected.v_BTJV), -1))
        role_BGJ = view.gather(projected.role_BTJ)
        k_BGJK, v_BGJV = pairs.split((self.size, pairs.shape[-1] - self.size), -1)
        B, G = role_BGJ.shape[:2]
        device = role_BGJ.device
        place_BG = torch.arange(B * G, device=device).view(B, G)
        row = torch.arange(B)[:, None].expand(B, G)
        _, stop = document_bounds(view.plan, row, torch.arange(G).expand(B, G))
        stop_BG1 = (stop + row * G).to(device)[..., None]
        expiry = self._expiry(role_BGJ, place_BG[..., None], stop_BG1)
        queries = place_BG.gather(1, view.token_ids_BT)
        out, _ = flash_lifetime(
            projected.q_BTHK.flatten(0, 1)[None],
            k_BGJK.flatten(0, 1)[None],
            v_BGJV.flatten(0, 1)[None],
            expiry=expiry.flatten(0, 1)[None].int(),
            query_positions=queries.flatten()[None].int(),
            key_positions=place_BG.flatten()[None].int(),
            backend=self.config.computes_with,
        )
        return out[0].view(*projected.q_BTHK.shape[:3], -1)

    def _expiry(self, role_BGJ: Tensor, place_BG1: Tensor, stop_BG1: Tensor) -> Tensor:
        """Place from which each key is not seen, at most where its document stops."""
        far = role_BGJ.shape[:2].numel() + self.config.window
        is_global = role_BGJ == GLOBAL
        at = torch.where(is_global, place_BG1, far).flip(1).cummin(1).values.flip(1)
        following = torch.cat((at[:, 1:], torch.full_like(at[:, :1], far)), 1)
        expiry = torch.where(role_BGJ == LOCAL, following, far)
        expiry = torch.where(role_BGJ == WINDOW, place_BG1 + self.config.window, expiry)
        return torch.minimum(expiry, stop_BG1)

    def core_reference(self, projected: NATSParts, view: LocalView) -> Tensor:
        q, k, v, role = (x.flatten(0, 1) for x in (*projected[:3], projected.role_BTJ))
        cuts, rows = view.cu_seqlens.tolist(), []
        for start, stop in zip(cuts, cuts[1:]):
            for query in range(start, stop):
                part = slice(start, query + 1)
                seen_JU = torch.stack([self._seen(role[part, j]) for j in range(role.shape[1])])
                row = masked_attention(
                    q[None, query : query + 1], k[None, part], v[None, part], seen_JU[:, None]
                )
                rows.append(row[0, 0])
        return torch.stack(rows).view(projected.q_BTHK.shape[:3] + v.shape[-1:])

    def _seen(self, role_U: Tensor) -> Tensor:
        """Which of these keys the query of the last one sees."""
        last = len(role_U) - 1
        seen = []
        for key, role in enumerate(role_U.tolist()):
            is_near = last - key < self.config.window
            has_global = bool((role_U[key + 1 :] == GLOBAL).any())
            seen.append(role == GLOBAL or (is_near if role == WINDOW else not has_global))
        return torch.tensor(seen)

    def advance(
        self, projected: NATSParts, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q_BTHK, tokens = projected.q_BTHK, projected.q_BTHK.shape[1]
        new = (projected.k_BTJK, projected.v_BTJV, projected.role_BTJ)
        keys = new if memory is None else tuple(torch.cat(x, 1) for x in zip(memory, new))
        k_BUJK, v_BUJV, role_BUJ = keys
        place_U = torch.arange(k_BUJK.shape[1], device=q_BTHK.device)
        last = torch.full_like(place_U, len(place_U))
        expiry_BUJ = self._expiry(role_BUJ, place_U[None, :, None], last[None, :, None])
        queries_T1 = place_U[-tokens:, None]
        seen = (place_U <= queries_T1) & (queries_T1 < expiry_BUJ.transpose(1, 2)[:, :, None])
        return masked_attention(q_BTHK, k_BUJK, v_BUJV, seen), keys

    def core_flops(self, contexts_M: Tensor) -> int:
        return 4 * self.num_heads * self.size * int(contexts_M.sum())

    def expected_traffic(self, share: Share) -> Expected:
        J = self.num_kv_heads
        pairs = gathered_rows_traffic(share, 2 * J * self.size)
        roles = gathered_rows_traffic(share, J)
        forward = roles["gather", False]
        width = share.widths.activation
        sent = forward._replace(received=forward.received // width * ROLE_BYTES)
        penalty = reduce_traffic(share, J, (1, 1))
        return combined([pairs, {("gather", False): sent}, penalty])
