"""A plan as a table of plain values, for `longctx plan --json`."""

from typing import Any

from longctx.plan.memory import Memory
from longctx.plan.prediction import Longest, Prediction
from longctx.plan.reasons import choice_of
from longctx.plan.search import Candidate, room_of


def as_record(plan: Prediction) -> dict[str, Any]:
    """Bytes, seconds, FLOPs and tokens; docs/planning.md explains each."""
    train, sizes, room = plan.settings.train, plan.parameters, room_of(plan.cluster)
    return {
        "name": plan.settings.run.name,
        "cluster": plan.cluster.name,
        "source": plan.cluster.source,
        "processes": plan.processes,
        "precision": plan.precision,
        "vocab_size": plan.vocab_size,
        "seq_len": train.seq_len,
        "batch_size": train.batch_size,
        "tokens": plan.tokens,
        "room": {"device": room.device, "host": room.host},
        "parameters": {
            "layers": sizes.layers,
            "embedding": sizes.embedding,
            "head": sizes.head,
            "norm": sizes.norm,
            "total": sizes.total,
        },
        "flops_per_token": plan.flops,
        "refusal": plan.refusal,
        "asked": _candidate(plan.asked, plan.tokens),
        "best": _candidate(plan.best, plan.tokens),
        "runners_up": [
            {
                "differs": runner.differs,
                "why": runner.why,
                "fits": runner.candidate.fits,
                "device_bytes": runner.candidate.memory.device,
                "seconds": runner.candidate.time.total if runner.candidate.fits else None,
            }
            for runner in plan.runners
        ],
        "policies": {name: _memory(memory) for name, memory in plan.policies.items()},
        "longest": [_longest(found) for found in plan.longest],
        "what_if": [each._asdict() for each in plan.what_if],
        "advice": list(plan.advice),
        "tried": len(plan.candidates),
        "left_out": list(plan.left_out),
        "refused": dict(plan.refused),
        "seconds": plan.seconds,
    }


def _candidate(candidate: Candidate | None, tokens: int) -> dict[str, Any] | None:
    if candidate is None:
        return None
    memory, time, cost = candidate.memory, candidate.time, candidate.time.cost(tokens)
    return {
        "choice": choice_of(candidate.work),
        "overrides": candidate.overrides,
        "fits": candidate.fits,
        "lacks": candidate.lacks,
        "memory": _memory(memory),
        "traffic": {verb: sent._asdict() for verb, sent in candidate.traffic.items()},
        "time": {
            "compute": time.compute,
            "exposed": time.exposed,
            "hidden": time.hidden,
            "optimizer": time.optimizer,
            "fixed": time.fixed,
            "calling": time.calling,
            "total": time.total,
        },
        "mfu": time.mfu,
        "tokens_per_second": time.tokens_per_second,
        "cost": cost._asdict(),
    }


def _memory(memory: Memory) -> dict[str, Any]:
    return {
        "parts": memory.parts,
        "moment": memory.moment,
        "activations": memory.activations,
        "device": memory.device,
        "host": memory.host,
    }


def _longest(found: Longest) -> dict[str, Any]:
    choice = choice_of(found.work) if found.work else None
    return {"where": found.where, "tokens": found.tokens, "choice": choice}
