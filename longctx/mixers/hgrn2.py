"""HGRN2: a gated recurrence whose keys are what its forget gates leave.

arXiv 2404.07904: `S_t = Diag(alpha_t) S_{t-1} + (1 - alpha_t) v_t^T` and `o_t = S_t^T q_t`, with
`alpha = bound + (1 - bound) sigmoid(f)`; all heads' outputs are normalised together. Queries (the
paper's output gates) go through swish as in the code of flash-linear-attention, which also divides
by sqrt(K): the norm takes that out. In the paper the bounds are learned, a softmax over layers
summed from the first on; that couples all layers, so here they are fixed: `rising` is where the
learned ones start.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Place, StateConfig, split_heads
from longctx.mixers.parts import DecayMixer, GatedNorm, log_sigmoid
from longctx.sequence.view import SequenceView


@dataclass(frozen=True)
class HGRN2Config(StateConfig, kind="hgrn2"):
    """HGRN2 with fixed lower bounds of its forget gates."""

    value_dim: int = 0
    """Value size of a head; 0 means model.width / num_heads."""
    bounds: Literal["rising", "constant"] = "rising"
    """Layer l of L has l / L of lower_bound as its own, or every layer has all of it."""
    lower_bound: float = 1.0
    """Below this no forget gate can fall; see bounds."""

    def build(self, place: Place) -> "HGRN2":
        return HGRN2(self, place)

    def bound_of(self, place: Place) -> float:
        """The lower bound of one layer, below 1."""
        share = place.layer / place.depth if self.bounds == "rising" else 1.0
        return share * self.lower_bound

    def size_of_value(self, width: int) -> int:
        """Value size of a head."""
        return self.value_dim or width // self.num_heads

    def over_tp(self, width: int, tp: int) -> Self:
        return replace(super().over_tp(width, tp), value_dim=self.size_of_value(width))

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.value_dim < 0:
            raise InputError(f"{where}.value_dim = {self.value_dim}: must be 0 or positive")
        if self.value_dim == 0 and width % self.num_heads:
            raise InputError(
                f"{where}.num_heads = {self.num_heads} does not divide model.width = {width}; "
                "change one of them or set value_dim"
            )
        if not 0 <= self.lower_bound <= 1:
            raise InputError(f"{where}.lower_bound = {self.lower_bound}: must be in 0..1")
        if self.bounds == "constant" and self.lower_bound == 1:
            raise InputError(
                f"{where}.lower_bound = {self.lower_bound}: with bounds = 'constant' nothing would "
                "ever be written; set less, or bounds = 'rising'"
            )
        key_dim, value_dim = self.size_of_head(width), self.size_of_value(width)
        self.check_state(key_dim, value_dim, f"{where}.head_dim")


class HGRN2Parts(NamedTuple):
    """Queries, keys `1 - alpha`, values and log decays `log alpha`."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_decay_BTHK: Tensor


def forget_gate(f: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """`(1 - alpha, log alpha)` of a raw gate, in at least fp32; exact at both ends of alpha."""
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    written = (1 - bound) * torch.sigmoid(-f)
    if bound == 0:
        return written, log_sigmoid(f)
    from_one = torch.log1p(-written.clamp(max=0.5))
    from_bound = (bound + (1 - bound) * torch.sigmoid(f)).log()
    return written, torch.where(written < 0.5, from_one, from_bound)


class HGRN2(DecayMixer):
    """See the module's docstring."""

    def __init__(self, config: HGRN2Config, place: Place):
        H, K = config.num_heads, config.size_of_head(place.width)
        V = config.size_of_value(place.width)
        super().__init__(config, key_dim=K, value_dim=V, gate_size=K)
        self.bound = config.bound_of(place)
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.forget = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * V, bias=False)
        self.norm = GatedNorm(H * V)
        self.project_out = nn.Linear(H * V, place.width, bias=False)

    def project(self, x_BTD: Tensor, view: SequenceView) -> HGRN2Parts:
        H = self.num_heads
        q_BTHK = F.silu(split_heads(self.query(x_BTD), H))
        v_BTHV = split_heads(self.value(x_BTD), H)
        k_BTHK, log_decay_BTHK = forget_gate(split_heads(self.forget(x_BTD), H), self.bound)
        return HGRN2Parts(q_BTHK, k_BTHK.type_as(v_BTHV), v_BTHV, log_decay_BTHK)

    def read(self, y_BTHV: Tensor, projected: HGRN2Parts) -> Tensor:
        return self.norm(y_BTHV.flatten(2), None, self.computes_with).view_as(y_BTHV)

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))
