"""The conformance matrix: which mixers, splits, lengths and documents are held to one process."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from longctx.mixers import Mixer, MixerConfig
from longctx.mixers.attention import SparseConfig
from longctx.mixers.evicting import EvictingConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.sequence.expected import WIDTHS, Share, expected_exchange
from longctx.sequence.ledger import Label, Traffic
from longctx.sequence.placement import PLACEMENTS, Placement, place
from longctx.sequence.plan import Documents
from longctx.sequence.refusal import refuse
from longctx.sequence.sharded import Transports
from tests.mixers.examples import all_variants
from tests.mixers.test_every_mixer import build

RANKS = (1, 2, 3, 4)
HEADS = (1, 2, 3, 4)
PREFIXES = ("allgather", "scan", "serial", "ulysses")
STREAMS = (("allgather", 0), ("allgather", 1), ("ring", 0))
LENGTHS = (96, 63, 1001)
LAYOUTS = ("one document", "packed", "length 1", "unreached ranks")
STATED_LENGTH = 96
WORDS = ("gather", "handoff", "fetch", "survivors", "means", "select")
"""Verbs that have one transport."""
DECODER = "whole model"

_WINDOWED = SoftmaxConfig(num_heads=4, num_kv_heads=2, window=20)
_GROUPED = SoftmaxConfig(num_heads=4, num_kv_heads=2)
MORE = {
    "softmax-window-grouped": _WINDOWED,
    "softmax-six": SoftmaxConfig(num_heads=6, num_kv_heads=3, head_dim=4),
    "linear-six": LinearConfig(num_heads=6, head_dim=3, value_dim=2),
}
LAYERS = (
    LinearConfig(num_heads=4),
    _WINDOWED,
    MoHConfig(inner=replace(_GROUPED, reuses="values"), active_heads=2, router_noise=0.5),
)


def subjects() -> dict[str, tuple[MixerConfig, ...]]:
    """Layers under test by name: every variant of every kind, and a hybrid model."""
    variants = dict(all_variants()) | MORE
    return {name: (config,) for name, config in variants.items()} | {DECODER: LAYERS}


def family(subject: str) -> str:
    """The row of the tables that a subject belongs to."""

    def describe(config: MixerConfig) -> str:
        kind = f"{config.kind}, window" if getattr(config, "window", 0) else config.kind
        return f"{kind} of {describe(config.inner)}" if hasattr(config, "inner") else kind

    return subject if subject == DECODER else describe(subjects()[subject][0])


class Setting(NamedTuple):
    """A way to split a sequence."""

    ranks: int
    placement: str
    transports: Transports

    def place(self, length: int) -> Placement:
        """Where the parts of a sequence lie."""
        return place(self.placement, self.ranks, length, self.transports.heads)

    def refusal(self, layers: tuple[MixerConfig, ...]) -> str:
        """Why these layers cannot be split like this; empty if they can."""
        reasons = (refuse(c, self.placement, self.transports, self.ranks) for c in layers)
        return next(filter(None, reasons), "")


class Case(NamedTuple):
    """One cell of the matrix."""

    subject: str
    setting: Setting
    length: int
    layout: str

    @property
    def documents(self) -> Documents:
        """Where documents start."""
        return documents_of(self.layout, self.setting.place(self.length))


def all_settings() -> Iterator[Setting]:
    """Every way to split, supported or not."""
    ways = itertools.product(PLACEMENTS, RANKS, HEADS, PREFIXES, STREAMS)
    for placement, ranks, heads, prefix, (stream, gather_heads) in ways:
        if (prefix, heads) != ("ulysses", 1):
            yield Setting(ranks, placement, Transports(prefix, stream, heads, gather_heads))


def transport_of(subject: str, setting: Setting) -> str:
    """The transports that a subject uses, in words; the halo of a convolution has only one."""
    layers = subjects()[subject]
    verbs: set[str] = set().union(*(c.verbs() for c in layers))
    transports, words = setting.transports, []
    if "prefix" in verbs:
        words.append(f"prefix {transports.prefix}")
    if "stream" in verbs:
        words.append(f"stream {transports.stream}")
    words += [verb for verb in WORDS if verb in verbs]
    if "halo" in verbs and not verbs & {"prefix", "handoff"}:
        words.append("halo")
    by_heads = "stream" in verbs or any(map(_has_window, layers))
    takes_part = any(not isinstance(c, SparseConfig) for c in layers)
    if transports.heads > 1 and by_heads and takes_part:
        words.append("heads")
    return " + ".join(words)


def _has_window(config: MixerConfig) -> bool:
    return bool(getattr(config, "window", 0))


@functools.cache
def _layers(subject: str, length: int) -> tuple[Mixer, ...]:
    return tuple(build(scaled(config, length)) for config in subjects()[subject])


def expected(
    subject: str, setting: Setting, length: int, documents: Documents
) -> tuple[dict[Label, Traffic], ...]:
    """The ledger of every rank, by formula."""
    shares = (
        Share(
            rank,
            setting.place(length),
            len(documents),
            setting.transports,
            WIDTHS["fp64"],
            documents,
        )
        for rank in range(setting.ranks)
    )
    return tuple(expected_exchange(_layers(subject, length), share) for share in shares)


@functools.cache
def stand_ins(subject: str) -> dict[Setting, Setting]:
    """For every supported setting the first that places and sends just the same."""
    first: dict[object, Setting] = {}
    found: dict[Setting, Setting] = {}
    for setting in all_settings():
        if not setting.refusal(subjects()[subject]):
            traffic = expected(subject, setting, STATED_LENGTH, ((0,),))
            sent = tuple(tuple(ledger.items()) for ledger in traffic)
            same = setting.place(STATED_LENGTH), sent
            found[setting] = first.setdefault(same, setting)
    return found


def all_cases() -> list[Case]:
    """The matrix; cases that share a reference follow one another."""
    return [
        Case(subject, setting, length, layout)
        for subject, length, layout in itertools.product(subjects(), LENGTHS, LAYOUTS)
        for setting in dict.fromkeys(stand_ins(subject).values())
    ]


def scaled(config: MixerConfig, length: int) -> MixerConfig:
    """The config with a window and survivors that hide the same share of any sequence."""
    if hasattr(config, "inner"):
        return replace(config, inner=scaled(config.inner, length))
    names = ("window", "capacity") if isinstance(config, EvictingConfig) else ("window",)
    sizes = {name: getattr(config, name, 0) for name in names}
    grown = {name: round(n * length / STATED_LENGTH) for name, n in sizes.items() if n > 1}
    return replace(config, **grown)


def shown(config: MixerConfig) -> int:
    """Keys that a query sees at most; 0 if that is not limited."""
    survivors = config.capacity if isinstance(config, EvictingConfig) else 0
    return getattr(config, "window", 0) + survivors


def documents_of(layout: str, placement: Placement) -> Documents:
    """Documents in rows of tokens, laid in a certain way to the cuts of a placement."""
    length = placement.length
    cuts = sorted(s.start for own in placement.segments for s in own)[1:] or [length // 2]
    first, last = cuts[0], cuts[-1]
    near_cuts = {first - 1, first, first + 1, last - 1, last, last + 1}
    rows: dict[str, list[set[int]]] = {
        "one document": [{0}],
        "packed": [{0, *cuts[::2]}, {0, first // 2, (last + length) // 2}, {0, first + 1}],
        "length 1": [{0, 1, length - 1} | near_cuts, {0, first - 1, first}],
        "unreached ranks": [{0, first // 2}, {0, last}],
    }
    return tuple(tuple(sorted(row)) for row in rows[layout])
