"""`prefix` over two monoids: weighted means of the past, and its best tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from longctx.sequence.plan import Piece
from longctx.sequence.verbs import LOG_SUM_EXP, Monoid, prefix, top_monoid
from tests.sequence.cases import Case, Setting, Shard, Values

COUNT = 3
WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

Elements = tuple[Tensor, ...]


def visible(setting: Setting, row: int, t: int, rightwards: bool) -> slice:
    """Tokens of t's document up to t, or from t on."""
    edges = (*setting.documents[row], setting.length)
    start = max(s for s in edges if s <= t)
    stop = min(s for s in edges if s > t)
    return slice(start, t + 1) if rightwards else slice(t, stop)


def outer_pieces(shard: Shard, segment: int, at_exit: bool, rightwards: bool) -> list[Piece]:
    """Of every row the piece of a segment that states leave from, or enter by."""
    takes_last = at_exit == rightwards
    by_row: dict[int, Piece] = {}
    for piece in shard.plan.pieces:
        if piece.segment == segment and (takes_last or piece.row not in by_row):
            by_row[piece.row] = piece
    return [by_row[row] for row in sorted(by_row)]


def folded(
    shard: Shard, elements: Callable[[slice], Elements], monoid: Monoid, rightwards: bool
) -> list[Elements]:
    """What each local token has behind it and with itself, from summaries of ranges of tokens."""
    segments = range(len(shard.plan.segments))
    summaries = []
    for segment in segments:
        leaving = outer_pieces(shard, segment, True, rightwards)
        parts = [elements(slice(p.start, p.stop)) for p in leaving]
        summaries.append([torch.stack(x) for x in zip(*parts)])
    joined = tuple(torch.stack(x) for x in zip(*summaries))
    entering = prefix(joined, monoid, shard.wire("prefix"), rightwards)
    states: list[Elements] = []
    for piece in shard.plan.pieces:
        is_entry = piece in outer_pieces(shard, piece.segment, False, rightwards)
        state = tuple(x[piece.segment, piece.row][None] for x in entering)
        for t in range(piece.start, piece.stop):
            seen = slice(piece.start, t + 1) if rightwards else slice(t, piece.stop)
            own = tuple(x[None] for x in elements(seen))
            pair = (state, own) if rightwards else (own, state)
            states.append(tuple(x[0] for x in (monoid.join(*pair) if is_entry else own)))
    return states


def mean_of_past(rightwards: bool) -> Case:
    """Values weighted by exp(score), over the visible tokens."""

    def run(shard: Shard, inputs: Values) -> Tensor:
        score, value = inputs["score"].flatten(0, 1), inputs["value"].flatten(0, 1)

        def elements(seen: slice) -> Elements:
            m = score[seen].max()
            weight = (score[seen] - m).exp()
            return m[None], weight.sum()[None], weight @ value[seen]

        states = folded(shard, elements, LOG_SUM_EXP, rightwards)
        return torch.stack([w / u for _, u, w in states]).view_as(inputs["value"])

    def whole(setting: Setting, inputs: Values) -> Tensor:
        rows = []
        for row, (score, value) in enumerate(zip(inputs["score"], inputs["value"])):
            for t in range(setting.length):
                seen = visible(setting, row, t, rightwards)
                rows.append(score[seen].softmax(0) @ value[seen])
        return torch.stack(rows).view_as(inputs["value"])

    direction = "rightwards" if rightwards else "leftwards"
    return Case(f"log-sum-exp-{direction}", {"score": (), "value": (3,)}, run, whole)


def rounded(score: Tensor) -> Tensor:
    """Scores with ties, and the gradient of the scores they come from."""
    return score + (score.round() - score).detach()


def best_of_past(rightwards: bool) -> Case:
    """The best tokens among the visible ones, each read with a weight of its place."""

    def read(score: Tensor, payload: Tensor) -> Tensor:
        return torch.cat((WEIGHTS[: len(score)] @ payload, (score.exp() * WEIGHTS).sum()[None]))

    def run(shard: Shard, inputs: Values) -> Tensor:
        score, payload = rounded(inputs["score"]).flatten(), inputs["payload"].flatten(0, 1)

        def elements(seen: slice) -> Elements:
            order = score[seen].sort(descending=True, stable=True).indices[:COUNT]
            missing = COUNT - len(order)
            best = torch.nn.functional.pad(score[seen][order], (0, missing), value=-torch.inf)
            return best, torch.nn.functional.pad(payload[seen][order], (0, 0, 0, missing))

        states = folded(shard, elements, top_monoid(COUNT), rightwards)
        return torch.stack([read(*state) for state in states]).unflatten(0, inputs["score"].shape)

    def whole(setting: Setting, inputs: Values) -> Tensor:
        outputs = []
        for row, (score, payload) in enumerate(zip(rounded(inputs["score"]), inputs["payload"])):
            for t in range(setting.length):
                seen = visible(setting, row, t, rightwards)
                tokens = range(seen.start, seen.stop)
                best = sorted(tokens, key=lambda j: (-score[j].item(), j))[:COUNT]
                weights = WEIGHTS[: len(best)]
                scores = (score[best].exp() * weights).sum()[None]
                outputs.append(torch.cat((weights @ payload[best], scores)))
        return torch.stack(outputs).unflatten(0, inputs["score"].shape)

    direction = "rightwards" if rightwards else "leftwards"
    return Case(f"top-{direction}", {"score": (), "payload": (2,)}, run, whole)


MONOID_CASES = [case(way) for case in (mean_of_past, best_of_past) for way in (True, False)]
