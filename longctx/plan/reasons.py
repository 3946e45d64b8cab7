"""Why a way to run is not the best, and what to change where a run does not fit."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from longctx.errors import InputError
from longctx.plan.choices import changed, differences
from longctx.plan.longest import longest
from longctx.plan.search import SAME, Candidate, choose_memory, room_of
from longctx.plan.units import duration, gib, told
from longctx.plan.workload import Workload, workload

MESHES = 3
"""Other meshes that are told beside the best."""
ALIKE = "as fast"
MOST = 2, 1
"""Of those that differ in one choice, so many that fit and so many that do not."""
CHOICES = {
    "mesh": ("dp", "sp", "tp"),
    "heads": ("heads",),
    "placement": ("placement",),
    "prefix": ("prefix",),
    "stream": ("stream", "gather_heads"),
    "engine": ("engine", "replicas"),
    "weights": ("weights",),
    "memory": ("checkpointing", "mlp_tokens", "activations", "weights_on", "optimizer_on"),
    "micro_batch": ("micro_batch",),
}
"""What makes up a way to run, by what is chosen together."""


class Runner(NamedTuple):
    """A way that is not the best, and why."""

    candidate: Candidate
    differs: dict[str, Any]
    """What it chooses otherwise."""
    why: str


def choice_of(work: Workload) -> dict[str, Any]:
    """A way to run, with what `auto` stood for."""
    split, memory, way = work.split, work.settings.memory, work.split.transports
    return {
        "dp": split.dp,
        "sp": split.sp,
        "tp": split.tp,
        "heads": way.heads,
        "placement": split.placement,
        "prefix": way.prefix,
        "stream": way.stream,
        "gather_heads": way.gather_heads,
        "engine": split.engine,
        "replicas": split.replicas,
        "weights": work.settings.parallel.weights,
        "checkpointing": memory.checkpointing,
        "mlp_tokens": memory.mlp_tokens,
        "activations": memory.activations,
        "weights_on": memory.weights,
        "optimizer_on": memory.optimizer,
        "micro_batch": max(work.micro_rows),
    }


def runners_up(candidates: Sequence[Candidate]) -> list[Runner]:
    """Of the ways behind the first the most telling: other meshes, and those that differ in one
    choice."""
    best, found = candidates[0], list[Runner]()
    own, meshes, told_of = choice_of(best.work), set[Any](), Counter[Any]()
    for other in candidates[1:]:
        choice = choice_of(other.work)
        differs = {name: value for name, value in choice.items() if value != own[name]}
        kinds = {kind for kind, names in CHOICES.items() if differs.keys() & {*names}}
        mesh = tuple(choice[name] for name in CHOICES["mesh"])
        is_new_mesh = "mesh" in kinds and mesh not in meshes and len(meshes) < MESHES
        kind = next(iter(kinds), "")
        is_near = len(kinds) == 1 and kind != "mesh"
        if is_new_mesh or (is_near and told_of[kind, other.fits] < MOST[not other.fits]):
            meshes |= {mesh} if is_new_mesh else set()
            told_of[kind, other.fits] += 1
            found.append(Runner(other, differs, why_not(other, best)))
    return found


def why_not(other: Candidate, best: Candidate) -> str:
    """Why a way is not the best."""
    if not other.fits:
        return what_lacks(other)
    slower = other.time.total - best.time.total
    if slower <= SAME * best.time.total:
        return ALIKE
    own, parts = time_parts(best), time_parts(other)
    more = {name: seconds - own.get(name, 0.0) for name, seconds in parts.items()}
    name = max(more, key=lambda each: more[each])
    unequal = ", in unequal parts" if _is_unequal(other, best, name) else ""
    return f"{name} {duration(more[name])} more{unequal}"


def what_lacks(candidate: Candidate) -> str:
    """How much memory a way takes that a process has not."""
    room, memory = room_of(candidate.cluster), candidate.memory
    is_host = room.is_apart and memory.host - room.host > memory.device - room.device
    limit, where = (room.host, " on the host") if is_host else (room.device, "")
    return f"needs {gib(limit + candidate.lacks)} of {gib(limit)}{where}"


def time_parts(candidate: Candidate) -> dict[str, float]:
    """Seconds of a step by the name of what takes them."""
    time = candidate.time
    parts = {f"computing {kind}:": seconds for kind, seconds in time.compute.items()}
    parts |= {f"waiting for {verb}:": seconds for verb, seconds in time.exposed.items()}
    return parts | {"making exchanges:": time.calling, "the update:": time.optimizer}


def _is_unequal(other: Candidate, best: Candidate, part: str) -> bool:
    """Whether the slowest process computes more for nothing but what it holds."""
    placements = {other.work.split.placement, best.work.split.placement}
    same = other.work.settings.memory == best.work.settings.memory
    return part.startswith("computing") and same and len(placements) > 1


def advice(asked: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """What to change, and by how much, where a run does not fit as it is."""
    work, room = asked.work, room_of(asked.cluster)
    tokens, _ = longest([work], room)
    ways = f" with {told(asked.overrides)}" if asked.overrides else ""
    said = [
        what_lacks(asked) + ways,
        f"train.seq_len at most {tokens:,}" if tokens else "no shorter sequence fits either",
    ]
    others = {"or ": _saved(asked), "or, ": _wider(asked)}
    others |= {"or, the fastest, ": candidates[0]} if candidates else {}
    for title, other in others.items():
        if other and other.fits and (option := told(other.overrides)) not in " ".join(said):
            twice = other.work.processes
            more = f"on {twice} processes " if twice > work.processes else ""
            said.append(f"{title}{more}{option} ({gib(other.memory.device)})")
    return said


def _saved(asked: Candidate) -> Candidate:
    """The same, with what layers keep chosen to fit."""
    work = asked.work
    sizes = work.processes, work.vocab_size, work.precision
    memory = choose_memory(work.settings, *sizes, room_of(asked.cluster))
    settings = replace(work.settings, memory=memory)
    names = ("checkpointing", "mlp_tokens", "activations")
    changes = {f"memory.{name}": getattr(memory, name) for name in names}
    overrides = differences(work.settings, changes)
    return Candidate(workload(settings, *sizes), asked.cluster, overrides)


def _wider(asked: Candidate) -> Candidate | None:
    """The same, with each sequence on twice as many processes."""
    work, processes = asked.work, 2 * asked.work.processes
    changes = {"parallel.dp": 0, "parallel.sp": 2 * work.split.sp}
    if processes > asked.cluster.most_processes:
        return None
    try:
        wider = changed(work.settings, changes)
        work = workload(wider, processes, work.vocab_size, work.precision)
    except InputError:
        return None
    return Candidate(work, asked.cluster, differences(asked.work.settings, changes))
