"""A plan as text for a terminal."""

from collections.abc import Callable, Iterable, Sequence
from textwrap import wrap
from typing import Any

from longctx.plan.prediction import Prediction
from longctx.plan.reasons import choice_of
from longctx.plan.search import Candidate, room_of
from longctx.plan.units import duration, gib, short, told
from longctx.plan.what_if import WhatIf
from longctx.sequence.ledger import Traffic

WIDTH = 100
LABEL, CELL, NARROW = 40, 26, 12
LEAST_SHARE = 1e-4
"""Of a step below which exchanges are told together."""
Row = tuple[str, list[str]]


def as_text(plan: Prediction) -> str:
    """The whole plan, lines of at most 100 columns."""
    shown = _shown(plan)
    parts = [
        _head(plan),
        _model(plan),
        _columns(plan, shown) if shown else "",
        _policies(plan),
        _longest(plan),
        _runners(plan),
        _what_if(plan),
        _left_out(plan),
        _paragraph("Predicted from", plan.cluster.source),
    ]
    return "\n\n".join(part for part in parts if part)


def _shown(plan: Prediction) -> dict[str, Candidate]:
    """The candidates that have a column, by its title."""
    asked, best = plan.asked, plan.best
    if asked and best and choice_of(asked.work) == choice_of(best.work):
        return {"as it is, and best": asked}
    columns = {"as it is": asked, "best": best}
    return {title: each for title, each in columns.items() if each}


def _head(plan: Prediction) -> str:
    train = plan.settings.train
    line = (
        f"{plan.settings.run.name} on {plan.processes} processes of {plan.cluster.name}: "
        f"{train.batch_size} sequences of {train.seq_len:,} tokens a step, {plan.precision}, "
        f"vocabulary {plan.vocab_size:,}"
    )
    lines = wrap(line, WIDTH)
    if plan.refusal:
        lines += wrap(f"As it is, it cannot run: {plan.refusal}", WIDTH)
    return "\n".join(lines)


def _model(plan: Prediction) -> str:
    sizes, letters = plan.parameters, plan.settings.model.letters
    mixers = plan.settings.model.mixers
    named = {
        f"{letters.count(a)} x {a} {mixers[a].kind if a in mixers else 'mlp'}": size
        for a, size in sizes.layers.items()
    }
    outside = {"embedding": sizes.embedding, "head": sizes.head, "norm": sizes.norm}
    parts = ", ".join(f"{name} {short(size)}" for name, size in (named | outside).items() if size)
    kinds = ", ".join(f"{kind} {short(flops)}" for kind, flops in plan.flops.items())
    forward = sum(plan.flops.values())
    return "\n".join(
        [
            _paragraph("Parameters", f"{short(sizes.total)}: {parts}"),
            _paragraph("FLOPs a token", f"{short(forward)} forward, 3 x trained: {kinds}"),
        ]
    )


def _columns(plan: Prediction, shown: dict[str, Candidate]) -> str:
    """What the candidates are and take, a column each."""
    candidates, room = list(shown.values()), room_of(plan.cluster)
    sections: list[tuple[str, Iterable[Row]]] = [
        ("", _rows(candidates, _choice)),
        (f"Memory of a process, of {gib(room.device)}", _rows(candidates, _memory)),
        ("Received by a process in a step", _rows(candidates, _traffic)),
        ("Time of a step, of the slowest process", _rows(candidates, _time)),
        (f"To {short(plan.tokens)} tokens", _rows(candidates, lambda c: _cost(c, plan.tokens))),
    ]
    lines = [_line("", list(shown))]
    for title, rows in sections:
        lines += [title] if title else []
        lines += [_line(f"  {label}" if title else label, cells) for label, cells in rows]
    return "\n".join(lines)


def _line(label: str, cells: Sequence[str], width: int = CELL) -> str:
    return (f"{label:{LABEL}}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip()


def _rows(candidates: Sequence[Candidate], of: Callable[[Candidate], dict[str, str]]) -> list[Row]:
    """The same table of each candidate, side by side; what one of them lacks stays empty."""
    tables = [of(candidate) for candidate in candidates]
    order: list[str] = []
    for table in tables:
        place = 0
        for label in table:
            if label not in order:
                order.insert(place, label)
            place = order.index(label) + 1
    return [(label, [table.get(label, "") for table in tables]) for label in order]


def _choice(candidate: Candidate) -> dict[str, str]:
    own = choice_of(candidate.work)
    rows = {
        "dp x sp x tp": "{dp} x {sp} x {tp}".format_map(own),
        "heads, placement": "{heads}, {placement}".format_map(own),
        "prefix": own["prefix"],
        "stream": own["stream"] + f", {own['gather_heads']} heads" * bool(own["gather_heads"]),
        "engine": own["engine"] + f", {own['replicas']} replicas" * (own["replicas"] > 1),
        "weights sent as": own["weights"],
        "checkpointing": own["checkpointing"],
        "micro_batch": str(own["micro_batch"]),
    }
    waiting = [
        name
        for name, where in (
            ("activations", own["activations"]),
            ("weights", own["weights_on"]),
            ("optimizer", own["optimizer_on"]),
        )
        if where != "device"
    ]
    if own["mlp_tokens"]:
        rows["mlp_tokens"] = str(own["mlp_tokens"])
    return rows | ({"not on the device": ", ".join(waiting)} if waiting else {})


def _memory(candidate: Candidate) -> dict[str, str]:
    memory = candidate.memory
    rows = {name: gib(size) for name, size in memory.parts.items() if size}
    rows["all, at the peak"] = gib(memory.device) + ("" if candidate.fits else " DOES NOT FIT")
    rows["which is in"] = memory.moment
    return rows | ({"on the host": gib(memory.host)} if memory.host else {})


def _traffic(candidate: Candidate) -> dict[str, str]:
    sent = candidate.traffic
    least = LEAST_SHARE * sum(traffic.received for traffic in sent.values())
    large = {verb: traffic for verb, traffic in sent.items() if traffic.received > least}
    small = [traffic for traffic in sent.values() if traffic.received <= least]
    if small:
        large["all else"] = Traffic(sum(t.calls for t in small), sum(t.received for t in small))
    return {
        verb: f"{gib(traffic.received)}, {traffic.calls} calls" for verb, traffic in large.items()
    }


def _time(candidate: Candidate) -> dict[str, str]:
    time = candidate.time
    least = LEAST_SHARE * time.total
    rows = {f"computing {kind}": duration(s) for kind, s in time.compute.items()}
    rows |= {f"waiting for {verb}": duration(s) for verb, s in time.exposed.items() if s > least}
    small = sum(seconds for seconds in time.exposed.values() if seconds <= least)
    rows |= {"waiting for all else": duration(small)} if small else {}
    rows |= {"making exchanges": duration(time.calling)} if time.calling else {}
    rows |= {"update": duration(time.optimizer), "fixed": duration(time.fixed)}
    rows["all"] = duration(time.total)
    rows["exchanged meanwhile, not waited for"] = duration(sum(time.hidden.values()))
    return rows | {
        "MFU": f"{time.mfu:.1%}",
        "tokens a second": short(time.tokens_per_second),
    }


def _cost(candidate: Candidate, tokens: int) -> dict[str, str]:
    cost = candidate.time.cost(tokens)
    rows = {"time": duration(cost.seconds), "device hours": short(cost.device_hours)}
    return rows | ({"price": short(cost.price)} if cost.price else {})


def _policies(plan: Prediction) -> str:
    """What is kept between the passes under each policy, a column each."""
    which = "best" if plan.best else "as it is"
    kinds = dict.fromkeys(kind for memory in plan.policies.values() for kind in memory.activations)
    columns = list(plan.policies.values())
    rows = {f"  {kind}": [gib(m.activations.get(kind, 0)) for m in columns] for kind in kinds}
    rows["  on the host"] = [gib(m.on_host.get("activations", 0)) for m in columns]
    rows["  all memory of the device"] = [gib(memory.device) for memory in columns]
    lines = [_line(f"Kept by policy, {which}", list(plan.policies), NARROW)]
    return "\n".join([*lines, *(_line(label, cells, NARROW) for label, cells in rows.items())])


def _longest(plan: Prediction) -> str:
    lines = ["Longest sequence that fits, with all else as it is"]
    for found in plan.longest:
        text = f"{found.tokens:,} tokens" if found.tokens else "none"
        lines.append(f"  {found.where:{LABEL}}{text}")
        if found.work and found.where != "as it is":
            way = _way(choice_of(found.work))
            lines += wrap(way, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return "\n".join(lines) if plan.longest else ""


def _way(choice: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in choice.items())


def _runners(plan: Prediction) -> str:
    """The best way as options, and what would be otherwise in others."""
    best = plan.best
    if not plan.candidates:
        return ""
    if not best:
        nearest = plan.candidates[0]
        lacking = f"{gib(nearest.lacks)} a process"
        return _paragraph(
            "Nothing fits.", f"The nearest lacks {lacking}: {told(nearest.overrides)}"
        )
    lines = [_paragraph("Best", told(best.overrides) or "as it is"), "Others, by what differs"]
    for runner in plan.runners:
        time = duration(runner.candidate.time.total) if runner.candidate.fits else "-"
        differs = _way(runner.differs)
        line = f"  {time:>9}  {differs:38}  {runner.why}"
        if len(differs) > 38 or len(line) > WIDTH:
            whole = wrap(f"  {time:>9}  {differs}", WIDTH, subsequent_indent=" " * 13)
            lines += [*whole, *wrap(runner.why, WIDTH, initial_indent=" " * 15)]
        else:
            lines.append(line)
    return "\n".join(lines)


def _what_if(plan: Prediction) -> str:
    """Simulated steps, a row for each choice of transports."""
    if not plan.what_if:
        return ""
    rows = [(_transports(each), _delays(each)) for each in plan.what_if]
    which, verbs = "best" if plan.best else "as it is", ", ".join(rows[0][0])
    lines = [_line(f"What if, {which}" + f": {verbs}" * bool(verbs), list(rows[0][1]), NARROW)]
    lines += [
        _line(f"  {', '.join(own.values()) or 'simulated'}", [*cells.values()], NARROW)
        for own, cells in rows
    ]
    scopes = dict.fromkeys((each.ranks, each.layers) for each in plan.what_if)
    few = [
        f"{ranks[0]} of {ranks[1]} processes and {layers[0]} of {layers[1]} layers"
        for ranks, layers in scopes
        if ranks[0] < ranks[1] or layers[0] < layers[1]
    ]
    return "\n".join([*lines, *([_paragraph("Simulated", "; ".join(few))] if few else [])])


def _transports(way: WhatIf) -> dict[str, str]:
    stream = way.stream + f", {way.gather_heads} heads" * bool(way.gather_heads)
    return {verb: own for verb, own in (("prefix", way.prefix), ("stream", stream)) if own}


def _delays(way: WhatIf) -> dict[str, str]:
    def more(seconds: float) -> str:
        return f"+{max(0.0, seconds / way.steady - 1):.1%}"

    return {
        "predicted": duration(way.predicted),
        "steady": duration(way.steady),
        "5% jitter": more(way.usual),
        "its worst": more(way.worst),
        "one slow": more(way.one_slow),
    }


def _left_out(plan: Prediction) -> str:
    if not plan.candidates:
        return ""
    text = f"{len(plan.candidates)} ways in {duration(plan.seconds)}"
    if plan.left_out:
        numbers = ", ".join(map(str, plan.left_out))
        text += (
            f"; dp of {numbers} left out, because train.batch_size = "
            f"{plan.settings.train.batch_size} is no multiple of it"
        )
    return _paragraph("Tried", text)


def _paragraph(title: str, text: str) -> str:
    return "\n".join(wrap(f"{title:15}{text}", WIDTH, subsequent_indent=" " * 15))
