"""Agent attention (arXiv 2312.08874), causal: few agents gather what tokens have, queries ask them.

The paper's equation is `softmax(Q A^T) softmax(A K^T) V` with A pooled from the queries of all
tokens, and a depthwise convolution of V beside it. The causal form is ours and no reproduction:
agents are learned, since a pool sees the future, the second softmax is over the tokens of the
document up to the query's, and there is no convolution. An agent keeps a softmax mean of values.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from longctx_kernels.running import weighted_means_reference
from torch import Tensor, nn

from longctx.errors import InputError
from longctx.mixers.base import Mixer, Place, ValueConfig, split_heads
from longctx.sequence.expected import Expected, Share, Sizes, means_traffic
from longctx.sequence.local import LocalView
from longctx.sequence.running import Resumed, Runs, running_means, wide
from longctx.sequence.view import SequenceView, one_row


@dataclass(frozen=True)
class AgentConfig(ValueConfig, kind="agent"):
    """Learned agents attend to the tokens so far, and queries to the agents."""

    num_agents: int = 49
    """Agents of a head."""

    def build(self, place: Place) -> "Agent":
        return Agent(self, place)

    def check(self, width: int, where: str) -> None:
        super().check(width, where)
        if self.num_agents < 1:
            raise InputError(f"{where}.num_agents = {self.num_agents}: must be at least 1")


class AgentParts(NamedTuple):
    """Weights of agents for queries, scores of keys for agents, and values."""

    read_BTHA: Tensor
    score_BTHA: Tensor
    v_BTHV: Tensor


class Agent(Mixer):
    """See the module's docstring."""

    def __init__(self, config: AgentConfig, place: Place):
        super().__init__()
        self.config, self.num_heads = config, config.num_heads
        H, K = config.num_heads, config.size_of_head(place.width)
        self.size, self.value_size = K, config.value_dim or K
        self.agents = nn.Parameter(torch.empty(H, config.num_agents, K))
        self.query = nn.Linear(place.width, H * K, bias=False)
        self.key = nn.Linear(place.width, H * K, bias=False)
        self.value = nn.Linear(place.width, H * self.value_size, bias=False)
        self.project_out = nn.Linear(H * self.value_size, place.width, bias=False)
        nn.init.normal_(self.agents)

    def initial(self, name: str, generator: torch.Generator) -> Tensor | None:
        """Agents of unit variance, so that they differ from the start."""
        return torch.randn(self.agents.shape, generator=generator) if name == "agents" else None

    def project(self, x_BTD: Tensor, view: SequenceView) -> AgentParts:
        q_BTHA = self._scores(split_heads(self.query(x_BTD), self.num_heads))
        k_BTHA = self._scores(split_heads(self.key(x_BTD), self.num_heads))
        v_BTHV = split_heads(self.value(x_BTD), self.num_heads)
        return AgentParts(q_BTHA.softmax(-1), k_BTHA, v_BTHV)

    def _scores(self, x_BTHK: Tensor) -> Tensor:
        """Products with the agents; autocast would round what is exponentiated."""
        with torch.autocast(x_BTHK.device.type, enabled=False):
            x_BTHK, agents_HAK = wide(x_BTHK), wide(self.agents) * self.size**-0.5
            return torch.einsum("bthk,hak->btha", x_BTHK, agents_HAK)

    def core(self, projected: AgentParts, view: Runs) -> Tensor:
        read_BTHA, score_BTHA, v_BTHV = projected
        return running_means(view, score_BTHA, read_BTHA, v_BTHV, self.config.computes_with)

    def core_reference(self, projected: AgentParts, view: LocalView) -> Tensor:
        read_MHA, score_MHA, v_MHV = (one_row(x)[0] for x in projected)
        ones = torch.ones_like(score_MHA)
        means_MHAV = weighted_means_reference(score_MHA, ones, v_MHV, view.plan.cuts)
        return (read_MHA[:, :, None] @ means_MHAV).view_as(projected.v_BTHV)

    def advance(
        self, projected: AgentParts, memory: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        resumed = Resumed(memory)
        return self.core(projected, resumed), resumed.kept

    def output(self, y_BTHV: Tensor) -> Tensor:
        return self.project_out(y_BTHV.flatten(2))

    def core_flops(self, contexts_M: Tensor) -> int:
        """Of agents with queries and keys, and with values twice."""
        rows = self.num_heads * self.config.num_agents
        return 4 * rows * (self.size + self.value_size) * contexts_M.numel()

    def expected_traffic(self, share: Share) -> Expected:
        H, A = self.num_heads, self.config.num_agents
        return means_traffic(share, Sizes(H, H, A, self.value_size))
