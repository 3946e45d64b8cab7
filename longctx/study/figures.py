"""Figures of what a study learnt: loss over compute, curves, the best size, the learning rate."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from longctx.report.charts import Band, Chart, Curve
from longctx.report.curves import Series
from longctx.report.scales import written
from longctx.study.cards import Plot, Table, by_reason, span
from longctx.study.laws import Law, Refusal, fit_compute, fit_size_and_tokens
from longctx.study.minima import Minima, fit_minima
from longctx.study.points import Point, Points, known

ALONG = 60
"""Places that a fitted line is drawn through."""
LEAST_R2 = 0.5
"""Of laws that say something."""
NO_FLOPS = "the runs do not tell their FLOPs: they were trained before summaries had them"


def compute_plot(points: Points) -> Plot:
    """Held-out loss at the end over FLOPs of training, with a law and its band for each group."""
    curves, bands, rows, fits, notes = [], [], [], [], []
    groups = points.groups(points.best)
    for number, (name, own) in enumerate(groups.items()):
        found = known(own, lambda p: p.row.flops, lambda p: p.loss)
        if not found:
            notes.append((name, "no loss" if any(p.row.flops for p in own) else NO_FLOPS))
            continue
        flops, losses = (np.array([each[k] for each in found]) for k in range(2))
        labels = [p.row.name for *_, p in found]
        curves.append(Curve(number, name, Series(flops, losses), "dots", labels))
        rows += [[name, p.row.name, p.row.parameters, p.row.tokens, x, y] for x, y, p in found]
        law = _apart(own) or fit_compute(flops, losses)
        if isinstance(law, Refusal):
            notes.append((name, f"no fit: {law.reason}"))
            continue
        along = np.geomspace(flops[0], flops[-1], ALONG)
        curves.append(Curve(number, f"{name}, law", Series(along, law.at(along))))
        if law.has_band:
            bands.append(Band(number, along, *law.band(along)))
        fits.append(_law_row(name, law))
        notes += [(name, law.note)] if law.note else []
        if law.r2 < LEAST_R2:
            notes.append((name, "the law says little: R2 is below a half"))
    chart = Chart(
        "Loss over compute", curves, x_title="FLOPs of training", log_x=True, wide=True, bands=bands
    )
    note = "held-out data, nats a label; dots: runs, line: L = E + A C^-a, band: 90 %"
    numbers = Table(["group", "cell", "parameters", "tokens", "flops", "val_loss"], rows)
    heading = ["group", "E", "E, 90 %", "A", "a", "a, 90 %", "runs", "R2", "largest residual"]
    table = Table([*heading, "resamples that failed"], fits)
    drawn = chart if curves else None
    return Plot(chart.title, note, drawn, list(groups), numbers, table, by_reason(notes))


def _apart(points: Sequence[Point]) -> Refusal | None:
    """Why these points share no law of loss, if so."""
    if len({point.length for point in points}) > 1:
        return Refusal("the runs differ in train.seq_len, and with it in what they are asked for")
    return None


def _law_row(name: str, law: Law) -> list[object]:
    failed = f"{law.draws.failed} of {law.draws.made}" if law.draws.made else ""
    floor = span(law.ranges.get("floor"))
    own = [law.floor or None, floor, law.factors[0], law.exponents[0]]
    own += [span(law.ranges.get("exponent")), law.points, law.r2]
    return [name, *own, f"{100 * law.largest:.2g} %", failed]


def size_and_tokens_plot(points: Points) -> Plot:
    """The law of loss over weights and tokens for each group; a table."""
    rows, fits, notes = [], [], []
    for name, own in points.groups(points.best).items():
        kept = [p for p in own if p.row.parameters and p.row.tokens and p.loss]
        size, tokens, loss = (
            [float(get(p)) for p in kept]
            for get in (lambda p: p.row.parameters, lambda p: p.row.tokens, lambda p: p.loss)
        )
        rows += [[name, p.row.name, *each] for p, *each in zip(kept, size, tokens, loss)]
        law = _apart(own) or fit_size_and_tokens(size, tokens, loss)
        if isinstance(law, Refusal):
            notes.append((name, f"no fit: {law.reason}"))
            continue
        parts = [law.floor, span(law.ranges.get("floor"))]
        for k in range(2):
            ends = span(law.ranges.get(f"exponent {k + 1}"))
            parts += [law.factors[k], law.exponents[k], ends]
        failed = f"{law.draws.failed} of {law.draws.made}"
        fits.append([name, *parts, law.points, law.r2, f"{100 * law.largest:.2g} %", failed])
        notes += [(name, law.note)] if law.note else []
    heading = ["group", "E", "E, 90 %", "A", "a", "a, 90 %", "B", "b", "b, 90 %", "runs", "R2"]
    table = Table([*heading, "largest residual", "resamples that failed"], fits)
    numbers = Table(["group", "cell", "parameters", "tokens", "val_loss"], rows)
    note = "L = E + A N^-a + B D^-b"
    return Plot("Loss over weights and tokens", note, None, [], numbers, table, by_reason(notes))


def curves_plot(points: Points) -> Plot:
    """Held-out losses along training; of a sweep, those that are not the best are faint."""
    over = "flops" if any("flops" in p.run.series for p in points.all) else "tokens"
    curves, rows, groups = [], [], points.groups(points.all)
    best = {p.row.name for p in points.best}
    for number, (name, own) in enumerate(groups.items()):
        for point in own:
            series = point.losses_over(over)
            if series is None:
                continue
            style = "line" if point.row.name in best else "faint"
            curves.append(Curve(number, point.row.name, series, style))
            rows += [[name, point.row.name, float(x), float(y)] for x, y in zip(series.x, series.y)]
    title = "FLOPs of training" if over == "flops" else "tokens"
    chart = Chart("All loss curves", curves, x_title=title, log_x=True, wide=True)
    notes = [] if over == "flops" else [NO_FLOPS]
    note = "held-out data, nats a label" + ("; faint: not the best" if points.results.over else "")
    numbers = Table(["group", "cell", over, "val_loss"], rows)
    drawn = chart if curves else None
    if not curves:
        notes.append("no run was evaluated")
    return Plot(chart.title, note, drawn, list(groups), numbers, None, notes)


def equal_compute_plots(points: Points) -> list[Plot]:
    """For each group, losses over size at equal FLOPs and the minimum of each."""
    plots, refused = [], []
    for name, own in points.groups(points.best).items():
        curves = [
            (float(p.row.parameters), series)
            for p in own
            if p.row.parameters and (series := p.losses_over("flops"))
        ]
        found = _apart(own) or (fit_minima(curves) if curves else Refusal(NO_FLOPS))
        if isinstance(found, Refusal):
            refused.append((name, f"no fit: {found.reason}"))
        else:
            plots.append(_minima_plot(name, found))
    if refused:
        empty = Table(["group"], [])
        plots.append(Plot("Loss at equal compute", "", None, [], empty, None, by_reason(refused)))
    return plots


def _minima_plot(name: str, found: Minima) -> Plot:
    curves, rows, fits, reasons, names = [], [], [], [], []
    for number, minimum in enumerate(found.minima):
        label = f"{minimum.budget:.2g} FLOPs"
        names.append(label)
        curves.append(Curve(number, label, Series(minimum.sizes, minimum.losses), "dots"))
        along = np.geomspace(minimum.sizes[0], minimum.sizes[-1], ALONG)
        curves.append(Curve(number, f"{label}, parabola", Series(along, minimum.at(along))))
        rows += [[minimum.budget, *each] for each in zip(minimum.sizes, minimum.losses)]
        fits.append([minimum.budget, minimum.best, span(minimum.range), len(minimum.sizes)])
        reasons += [(label, minimum.note)] if minimum.note else []
    notes = by_reason(reasons)
    if found.exponent is not None:
        ends = (
            f"{span(found.range)} in 90 % of resamples" if found.range else "its range is not known"
        )
        notes.append(f"the best size grows as compute to the power {found.exponent:.3f} ({ends})")
    notes += [found.note] if found.note else []
    notes.append("losses along training: the learning rate had not come down yet")
    title = f"Loss at equal compute, {name}"
    chart = Chart(title, curves, x_title="parameters", log_x=True)
    note = "held-out data; dots: sizes, line: parabola over log size"
    fitted = Table(["FLOPs", "best size", "best size, 90 %", "sizes"], fits)
    return Plot(
        title, note, chart, names, Table(["flops", "size", "val_loss"], rows), fitted, notes
    )


def rate_plots(points: Points) -> list[Plot]:
    """For each group, the loss at the end over the learning rate, with a line for each size."""
    plots = []
    for name, own in points.groups(points.all).items():
        lines = points.lines(own, "rate", "seed")
        if any(len({p.rate for p in line}) > 1 for line in lines.values()):
            plots.append(_rate_plot(name, lines))
    return plots


def _rate_plot(group: str, lines: dict[str, list[Point]]) -> Plot:
    curves, rows, notes, names = [], [], [], []
    for name, line in lines.items():
        found = known(line, lambda p: p.rate, lambda p: p.loss)
        if not found:
            notes.append(f"{name}: no loss that is a number")
            continue
        number = len(names)
        names.append(name)
        means = _means(found)
        curves.append(Curve(number, name, means, "points"))
        rows += [[name, p.row.name, x, y, p.row.is_best] for x, y, p in found]
        if len(means.x) > 1 and int(means.y.argmin()) in (0, len(means.y) - 1):
            at = written(float(means.x[means.y.argmin()]))
            notes.append(f"{name}: the best rate, {at}, is at the end of those that were tried")
    title = f"Learning rate, {group}"
    chart = Chart(title, curves, x_title="peak learning rate", log_x=True, whole_x=False)
    numbers = Table(["line", "cell", "lr", "val_loss", "is_best"], rows)
    drawn = chart if curves else None
    return Plot(title, "held-out loss at the end", drawn, names, numbers, None, notes)


def _means(found: Sequence[tuple[float, float, Point]]) -> Series:
    """Means of those at the same x."""
    parts = [(x, [y for _, y, _ in own]) for x, own in groupby(found, key=lambda each: each[0])]
    return Series(np.array([x for x, _ in parts]), np.array([np.mean(y) for _, y in parts]))
