"""Datasets that are read as they come: sequences cut from rows that nobody can jump to.

Shards are shuffled each epoch by (seed, epoch), and rows keep the order of their shard. A shuffle
buffer of the datasets library is refused: what is in it is lost when a run stops.

Every process reads and tokenizes every row, and keeps whole sequences for a while, so this is for
data that fit no disk: `longctx data tokenize` makes a folder of which each process reads its part.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from longctx.data.config import SourceConfig
from longctx.data.stores import Ids, check_ids, id_type
from longctx.data.streams import IGNORE, PackedSequence, Stream, check_slice, shuffled
from longctx.data.tokenizer import Tokenizer
from longctx.errors import InputError, OutsideError

KEPT_BORDERS = 4096
"""Sequences whose document starts, and whose places in the rows, are remembered."""


@dataclass(frozen=True)
class Place:
    """A token of a dataset; JSON holds it."""

    epoch: int = 0
    shard: int = 0
    """Shards of the epoch that are done."""
    row: int = 0
    """Rows of the shard before it."""
    inside: dict[str, Any] | None = None
    """What the datasets library needs to find the row."""
    token: int = 0
    """Tokens of the row before it."""


class Rows:
    """The documents of one split of a dataset, epoch after epoch."""

    def __init__(
        self,
        dataset: Any,
        encode: Callable[[Any, str], Ids | None],
        takes: Callable[[str], bool],
        seed: int | None,
    ) -> None:
        """`takes` says of the name of a row whether it belongs to the split; without a `seed`
        shards keep their order."""
        refuse_shuffled(dataset)
        self._dataset, self._encode, self._takes, self._seed = dataset, encode, takes, seed
        self.num_shards: int = dataset.num_shards

    def read(self, place: Place) -> Iterator[tuple[Place, Ids]]:
        """Documents from the row of a place on, each with where it starts."""
        while True:
            is_whole, found = place.shard == place.row == 0, False
            order = self._order(place.epoch)
            while place.shard < self.num_shards:
                for start, ids in self._shard(order[place.shard], place):
                    found = True
                    yield start, ids
                place = Place(place.epoch, place.shard + 1)
            if is_whole and not found:
                raise InputError(
                    "data: no row of the dataset is left for training, or none for validation: "
                    "set data.validation_path, change data.validation_percent, or lower "
                    "data.shortest"
                )
            place = Place(place.epoch + 1)

    def _shard(self, number: int, place: Place) -> Iterator[tuple[Place, Ids]]:
        rows = self._dataset.shard(self.num_shards, number)
        if place.inside is not None:
            rows.load_state_dict(place.inside)
        row, before = place.row, place.inside
        for record in _readable(rows, number):
            name = f"shard {number}, row {row}"
            if self._takes(name):
                ids = self._encode(record, name)
                if ids is not None:
                    yield Place(place.epoch, place.shard, row, before), ids
            row, before = row + 1, rows.state_dict()

    def _order(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(self.num_shards))
        return shuffled(self._seed, epoch, self.num_shards).tolist()


class _Cut(NamedTuple):
    """A sequence, and the token that follows."""

    tokens: Ids
    starts: tuple[int, ...]


class StreamedStream(Stream):
    """The rows of a dataset concatenated and cut every `seq_len` tokens.

    Sequences are cut in order; `kept` of the last ones are remembered. An earlier one, or one after
    a resume, is reached by reading from the nearest known place at or before it: exact, and slow
    only if there is none near. `state` gives such a place to a checkpoint.
    """

    def __init__(self, rows: Rows, seq_len: int, kept: int) -> None:
        self.seq_len = seq_len
        self._rows, self._kept = rows, kept
        self._cuts: dict[int, _Cut] = {}
        self._starts: dict[int, tuple[int, ...]] = {}
        self._places: dict[int, Place] = {}
        self._loaded = {0: Place()}
        self._next: int | None = None
        self._documents: deque[tuple[Place, Ids]] = deque()
        self._used = 0
        """Tokens of the first of these documents that are in earlier sequences."""
        self._left = 0
        """Tokens of all of them that are not."""
        self._source: Iterator[tuple[Place, Ids]] = iter(())
        # A thread that reads ahead and the one that trains share the place in the rows.
        self._lock = threading.RLock()

    def slice(self, index: int, start: int, stop: int) -> PackedSequence:
        """A part of a sequence that is held whole."""
        check_slice(self, index, start, stop)
        with self._lock:
            if index not in self._cuts:
                self._go_to(index)
            tokens, starts = self._cuts[index]
        part = tokens[start : stop + 1].astype(np.int64)
        labels = part[1:].copy()
        labels[[place - start - 1 for place in starts if start < place <= stop]] = IGNORE
        return PackedSequence(part[:-1], labels, int(part[-1]))

    def document_starts(self, index: int) -> tuple[int, ...]:
        """Remembered, or found by reading on."""
        with self._lock:
            if index not in self._starts:
                self._go_to(index)
            return self._starts[index]

    def num_labels(self, index: int) -> int:
        """All but the last token of each document."""
        return self.seq_len - len(self.document_starts(index)) + 1

    def state(self, index: int) -> dict[str, Any]:
        """The nearest known place at or before a sequence."""
        with self._lock:
            number = self._nearest(index)
            return {"sequence": number} | asdict(self._place(number))

    def load_state(self, state: dict[str, Any]) -> None:
        """A place to read from; nothing is read yet. An empty one stands for the start."""
        if not state:
            return
        names = {field.name for field in fields(Place)}
        if set(state) != names | {"sequence"}:
            raise InputError(
                "the checkpoint's place in a streaming dataset is not of this version of longctx: "
                "start the run anew, or use the version that saved it"
            )
        with self._lock:
            place = Place(**{name: state[name] for name in names})
            self._loaded[state["sequence"]] = place

    def _place(self, number: int) -> Place:
        return self._places.get(number) or self._loaded[number]

    def _nearest(self, index: int) -> int:
        return max(n for known in (self._places, self._loaded) for n in known if n <= index)

    def _go_to(self, index: int) -> None:
        """Cuts sequences up to `index`, from where the last one ended or from a place nearer."""
        nearest = self._nearest(index)
        if self._next is None or not nearest <= self._next <= index:
            start = self._place(nearest)
            self._source, self._documents = self._rows.read(start), deque()
            self._next, self._used, self._left = nearest, start.token, -start.token
        place, self._next = self._next, None  # an error on the way leaves no place to go on from
        while place <= index:
            self._cut(place)
            place += 1
        self._next = place

    def _cut(self, index: int) -> None:
        while self._left <= self.seq_len:
            place, ids = next(self._source)
            self._documents.append((place, ids))
            self._left += len(ids)
        parts, starts, have, low = [], [0], 0, self._used
        for _, ids in self._documents:
            parts.append(ids[low : low + self.seq_len + 1 - have])
            have += len(parts[-1])
            low = 0
            if have > self.seq_len:
                break
            starts.append(have)
        self._cuts[index] = _Cut(np.concatenate(parts), tuple(starts))
        self._starts[index] = self._cuts[index].starts
        self._left -= self.seq_len
        self._used += self.seq_len
        while self._used >= len(self._documents[0][1]):
            self._used -= len(self._documents.popleft()[1])
        self._places[index + 1] = replace(self._documents[0][0], token=self._used)
        _forget(self._cuts, self._kept)
        _forget(self._starts, max(self._kept, KEPT_BORDERS))
        _forget(self._places, KEPT_BORDERS)


def _forget(entries: dict[int, Any], most: int) -> None:
    """Drops the entries that were made first."""
    while len(entries) > most:
        del entries[next(iter(entries))]


class RowEncoder:
    """Token ids of a row: of its text, or those that are in its column."""

    def __init__(self, source: SourceConfig, tokenizer: Tokenizer, shortest: int = 0) -> None:
        """Documents of fewer than `shortest` tokens are left out."""
        self._source, self._tokenizer, self._shortest = source, tokenizer, shortest

    def __call__(self, row: Any, name: str) -> Ids | None:
        """None for a row that is left out; InputError for a bad one that is refused."""
        source = self._source
        value = row.get(source.column)
        if value is None or len(value) == 0:
            if source.bad_rows == "skip":
                return None
            raise InputError(
                f"data.path = {source.path!r}: {name}: nothing in {source.column!r} (columns: "
                f'{", ".join(row)}); name the column in data.column, or set data.bad_rows = "skip"'
            )
        ids = self._ids(value, name)
        return ids if len(ids) >= max(1, self._shortest) else None

    def _ids(self, value: Any, name: str) -> Ids:
        tokenizer = self._tokenizer
        if isinstance(value, str | bytes):
            return tokenizer.encode(
                value.encode(errors="replace") if isinstance(value, str) else value
            )
        ids = np.asarray(value)
        where = f"data.path = {self._source.path!r}: {name}"
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(
                f"{where}: {self._source.column!r} holds neither text nor a list of token ids; "
                "name the column in data.column"
            )
        return check_ids(ids, tokenizer.vocab_size, where, 0).astype(id_type(tokenizer.vocab_size))


def refuse_shuffled(dataset: Any) -> None:
    """InputError for a dataset with a shuffle buffer."""
    from datasets.iterable_dataset import BufferShuffledExamplesIterable

    waiting = [dataset._ex_iterable]
    while waiting:
        part = waiting.pop()
        if isinstance(part, BufferShuffledExamplesIterable):
            raise InputError(
                "data: the streaming dataset was shuffled with a buffer, whose rows are lost when "
                "a run stops, so no resume could be exact: leave out .shuffle(); shards are "
                "shuffled here, and `longctx data tokenize` allows a full shuffle"
            )
        inner = getattr(part, "ex_iterable", None)
        waiting += [inner] if inner is not None else getattr(part, "ex_iterables", [])


def _readable(rows: Any, number: int) -> Iterator[Any]:
    """The rows of a shard; what the datasets library says of them in one line."""
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    try:
        yield from rows
    except (pyarrow.ArrowException, DatasetGenerationError, ValueError) as error:
        raise InputError(
            f"data: shard {number} of the dataset is broken: {_reason(error)}"
        ) from error
    except Exception as error:  # of the network there are many kinds
        raise OutsideError(
            f"data: shard {number} of the dataset cannot be read ({_reason(error)}); check the "
            "network and start the run again, it resumes"
        ) from error


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
