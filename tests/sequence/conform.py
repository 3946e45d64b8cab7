"""Runs a case of the conformance matrix on simulated ranks and on one process, and compares."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longctx.mixers import Mixer
from longctx.model.decoder import Decoder, ModelConfig
from longctx.model.loss import IGNORE
from longctx.sequence.ledger import Ledger
from longctx.sequence.local import LocalView
from longctx.sequence.plan import Documents, Plan
from longctx.sequence.sharded import ShardedView
from longctx.sequence.simulator import Hub, run_ranks
from longctx.sequence.view import SequenceView
from tests.mixers.examples import WIDTH
from tests.mixers.test_every_mixer import build
from tests.sequence.links import simulated_links
from tests.sequence.matrix import DECODER, Case, expected, scaled, subjects
from tests.tolerances import error_of

VOCABULARY = 29


class Outcome(NamedTuple):
    """What a rank computes: tokens of its own, parts of sums, and what all ranks agree on."""

    tokens: dict[str, Tensor]
    summed: dict[str, Tensor]
    agreed: dict[str, Tensor]


class Problem(Protocol):
    """A module and a batch of whole sequences."""

    def evaluate(self, view: SequenceView, ids_T: Tensor, ranks: int) -> Outcome:
        """Forward and backward over the tokens `ids_T` of each sequence."""
        ...


def noise(seed: int, *shape: int) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _gradients(total: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(total, list(named.values()))
    return {f"gradient of {name}": g for name, g in zip(named, gradients)}


@dataclass(frozen=True)
class MixerProblem:
    """Output of a mixer, and gradients of a random sum of it."""

    mixer: Mixer
    x_BGD: Tensor
    weight_BGD: Tensor

    def evaluate(self, view: SequenceView, ids_T: Tensor, ranks: int) -> Outcome:
        x_BTD = self.x_BGD[:, ids_T].requires_grad_()
        mixed = self.mixer(x_BTD, view)
        total = (mixed.out * self.weight_BGD[:, ids_T]).sum() + sum(mixed.losses.values()) / ranks
        gradients = _gradients(total, {"input": x_BTD} | dict(self.mixer.named_parameters()))
        tokens = {"output": mixed.out, "input": gradients.pop("gradient of input")}
        return Outcome(tokens, gradients, mixed.losses)


@dataclass(frozen=True)
class DecoderProblem:
    """Loss of a model over all valid labels, and gradients of its parameters."""

    model: Decoder
    tokens_BG: Tensor
    labels_BG: Tensor

    def evaluate(self, view: SequenceView, ids_T: Tensor, ranks: int) -> Outcome:
        labels_BT = self.labels_BG[:, ids_T]
        losses = self.model(self.tokens_BG[:, ids_T], labels_BT, view)
        valid = (self.labels_BG != IGNORE).sum()
        total = losses.cross_entropy / valid + sum(losses.mixers.values()) / ranks
        gradients = _gradients(total, dict(self.model.named_parameters()))
        return Outcome({}, {"loss": total} | gradients, losses.mixers)


@functools.lru_cache(maxsize=32)
def problem_of(subject: str, length: int, documents: Documents) -> Problem:
    """Weights and inputs, which depend on nothing else."""
    configs = [scaled(config, length) for config in subjects()[subject]]
    rows = len(documents)
    if subject != DECODER:
        return MixerProblem(
            build(configs[0]), noise(11, rows, length, WIDTH), noise(3, rows, length, WIDTH)
        )
    letters = dict(zip("ABCDEFG", configs))
    config = ModelConfig(
        width=WIDTH, depth=len(configs), pattern="".join(letters), mixers=letters, dropout=0.2
    )
    model = Decoder(config, VOCABULARY).double()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = (parameter.dim() == 1) + 0.3 * noise(seed, *parameter.shape)
    generator = torch.Generator().manual_seed(5)
    tokens_BG = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels_BG = tokens_BG.roll(-1, 1)
    for labels, starts in zip(labels_BG, documents):
        labels[[s - 1 for s in starts]] = IGNORE
    return DecoderProblem(model, tokens_BG, labels_BG)


def keyed(view: Any, rows: int) -> Any:
    """The view with random numbers for the router and for dropout."""
    return view.keyed(1, 2, tuple(range(5, 5 + rows)))


@functools.lru_cache(maxsize=32)
def reference_of(subject: str, length: int, documents: Documents) -> Outcome:
    """The answer of one process."""
    view = keyed(LocalView(documents, length), len(documents))
    return problem_of(subject, length, documents).evaluate(view, torch.arange(length), 1)


class Result(NamedTuple):
    """Largest error as the table of tolerances measures it, where, and a wrong ledger if any."""

    error: float
    worst: str
    mismatch: str


def run(case: Case) -> Result:
    """Forward and backward on every rank."""
    setting, documents = case.setting, case.documents
    problem = problem_of(case.subject, case.length, documents)
    reference = reference_of(case.subject, case.length, documents)

    def work(rank: int, hub: Hub) -> tuple[Tensor, Outcome, Ledger]:
        ledger = Ledger()
        plan = Plan(setting.place(case.length), rank, documents)
        links = simulated_links(hub, rank, setting.ranks, setting.transports.heads, ledger)
        view = keyed(ShardedView(plan, links, setting.transports), len(documents))
        ids_T = plan.token_ids_BT[0]
        return ids_T, problem.evaluate(view, ids_T, setting.ranks), ledger

    ranks = run_ranks(setting.ranks, work)
    errors = {
        f"sum of {name}": error_of(sum(o.summed[name] for _, o, _ in ranks), wanted, "fp64")
        for name, wanted in reference.summed.items()
    }
    for rank, (ids_T, outcome, _) in enumerate(ranks):
        for name, wanted in reference.tokens.items():
            error = error_of(outcome.tokens[name], wanted[:, ids_T], "fp64")
            errors[f"{name} of rank {rank}"] = error
        for name, wanted in reference.agreed.items():
            errors[f"{name} of rank {rank}"] = error_of(outcome.agreed[name], wanted, "fp64")
    worst = max(errors, key=errors.__getitem__)
    return Result(errors[worst], worst, _mismatch(case, [ledger for *_, ledger in ranks]))


def _mismatch(case: Case, ledgers: list[Ledger]) -> str:
    """Where a ledger differs from its formula."""
    predicted = expected(case.subject, case.setting, case.length, case.documents)
    for rank, (ledger, wanted) in enumerate(zip(ledgers, predicted)):
        if ledger.traffic() != wanted:
            return f"rank {rank} recorded {ledger.traffic()}, the formula says {wanted}"
    return ""
