"""What runs on gloo ranks: verbs, a pairwise cover of mixers and splits, fp32, odd groups."""

import functools
from typing import NamedTuple

import torch

from longctx.sequence.sharded import Transports
from tests.sequence.cases import DOCUMENTS, Case, Setting
from tests.sequence.delta_cases import DELTA_CASES
from tests.sequence.gate_cases import GATE_CASES
from tests.sequence.mixer_cases import CONFIGS, MIXER_CASES
from tests.sequence.pairwise import pairwise_cover
from tests.sequence.verb_cases import CASES, HEAD_TRADE


class Job(NamedTuple):
    """A case, its split, and the groups of ranks that share a sequence (one: all)."""

    case: Case
    setting: Setting
    sequences: tuple[tuple[int, ...], ...] = ()

    @property
    def reference(self) -> Setting:
        """What one process computes it in; the trade of heads depends on the split itself."""
        setting = self.setting
        if self.case is HEAD_TRADE:
            return setting
        return Setting(1, length=setting.length, documents=setting.documents)

    def __str__(self) -> str:
        dtype = "-fp32" if self.setting.dtype == torch.float32 else ""
        return f"{self.case.name}-{self.setting}{dtype}"


def is_legal(ranks: int, choice: dict) -> bool:
    """What the ranks and the mixer's heads allow."""
    heads = choice["heads"]
    if ranks % heads or (choice["placement"] == "mirror" and heads % 2):
        return False
    if choice["prefix"] == "ulysses" and heads == 1:
        return False
    transports = Transports(choice["prefix"], choice["stream"], heads, choice["gather_heads"])
    return not CONFIGS[choice["mixer"]].refusal(transports)


@functools.cache
def mixer_jobs(ranks: int) -> list[Job]:
    """Every pair of choices that goes together, of mixers and ways to split them."""
    choices = {
        "mixer": list(MIXER_CASES),
        "placement": ["contiguous", "zigzag", "mirror"],
        "prefix": ["allgather", "scan", "serial", "ulysses"],
        "stream": ["allgather", "ring"],
        "heads": [1, 2, 4],
        "gather_heads": [0, 1],
        "documents": [DOCUMENTS, DOCUMENTS[:1]],
    }
    cover = pairwise_cover(choices, lambda choice: is_legal(ranks, choice), seed=ranks)
    return [
        Job(
            MIXER_CASES[c["mixer"]],
            Setting(
                ranks,
                c["placement"],
                Transports(c["prefix"], c["stream"], c["heads"], c["gather_heads"]),
                documents=c["documents"],
            ),
        )
        for c in cover
    ]


def verb_jobs(ranks: int) -> list[Job]:
    """Every verb and transport under one placement, another one for the next."""
    names = ["contiguous", "zigzag", *(["mirror"] if ranks % 2 == 0 else [])]
    jobs = []
    for number, case in enumerate(CASES):
        name = names[number % len(names)]
        heads = 2 if name == "mirror" else 1
        jobs.append(Job(case, Setting(ranks, name, Transports(heads=heads))))
    sizes = [heads for heads in (2, 4) if ranks % heads == 0]
    trades = [Setting(ranks, "zigzag", Transports(heads=heads)) for heads in sizes]
    return jobs + [Job(HEAD_TRADE, setting) for setting in trades] + gate_jobs(ranks)


def gate_jobs(ranks: int) -> list[Job]:
    """Gates per token, and delta rules, by every transport."""
    transports = [Transports(prefix) for prefix in ("allgather", "scan", "serial")]
    if ranks % 2 == 0:
        transports.append(Transports("ulysses", heads=2))
    return [
        Job(case, Setting(ranks, ("contiguous", "zigzag")[(number + shift) % 2], one))
        for shift, case in enumerate((*GATE_CASES.values(), *DELTA_CASES.values()))
        for number, one in enumerate(transports)
    ]


def single_precision_jobs(ranks: int) -> list[Job]:
    """One split of each mixer in fp32."""
    prefixes, streams = ("allgather", "scan", "serial"), ("allgather", "ring")
    return [
        Job(
            case,
            Setting(
                ranks,
                ("contiguous", "zigzag")[number % 2],
                Transports(prefixes[number % 3], streams[number % 2]),
                dtype=torch.float32,
            ),
        )
        for number, case in enumerate(MIXER_CASES.values())
    ]


def scattered_jobs() -> list[Job]:
    """Two sequences on four ranks, of which each has every other rank."""
    transports = [
        Transports("scan", "ring"),
        Transports("allgather", "allgather"),
        Transports("ulysses", "ring", heads=2),
    ]
    chosen = ("linear-lightning", "softmax-grouped", "softmax-window", "moh-softmax")
    return [
        Job(MIXER_CASES[name], Setting(2, "zigzag", t), ((0, 2), (1, 3)))
        for name in chosen
        for t in transports
        if not CONFIGS[name].refusal(t)
    ]


@functools.cache
def jobs_of(world: int) -> list[Job]:
    jobs = verb_jobs(world) + mixer_jobs(world) + single_precision_jobs(world)
    return jobs + (scattered_jobs() if world == 4 else [])
