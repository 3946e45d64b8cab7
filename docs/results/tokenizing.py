"""Our tokenizing beside `tokenizers` alone: python docs/results/tokenizing.py [ROUNDS].

Both tokenize the standard library's sources with the same tokenizer on all cores, in turn, each
time in a new process, whose start is not counted. The peer has the texts in memory and encodes them
by `encode_batch_fast`, all at once, on its own threads; what it makes is thrown away. Ours is what
`longctx data tokenize` does: it reads the files, encodes, frames documents by marks, writes ids and
indexes, joins and hashes them, and waits for the disk. CPU seconds are those of all its processes,
which other work on the machine disturbs less.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

import numpy as np
from tokenizers import Tokenizer

from longctx.data.config import SourceConfig
from longctx.data.folder import TokenFolder
from longctx.data.texts import open_texts
from longctx.data.tokenize import TokenizeConfig, tokenize
from longctx.data.tokenizer import open_tokenizer
from longctx.data.vocabulary import TrainTokenizerConfig, train_tokenizer
from longctx.data.workers import cores

VOCABULARY = 8192


def peer(file: str) -> int:
    """Tokens that the library alone makes."""
    source = open_texts(SourceConfig())
    texts = [t.content.decode(errors="replace") for part in source.parts for t in source.read(part)]
    tokenizer = Tokenizer.from_file(file)
    with timed():
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(map(len, encoded))


def ours(file: str, folder: str) -> int:
    """Tokens, marks left out, that the command makes."""
    with timed():
        totals = tokenize("", TokenizeConfig(output=folder, tokenizer=file)).totals
    return totals.tokens - 2 * totals.documents


@contextmanager
def timed() -> Iterator[None]:
    """Prints wall and CPU seconds of what it surrounds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    yield
    print(time.perf_counter() - wall, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    usages = (getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def check(file: Path, folder: Path) -> None:
    """The folder holds what the tokenizer makes of each text."""
    source, tokenizer = open_texts(SourceConfig()), open_tokenizer(str(file))
    store = TokenFolder(folder)
    texts = (text for part in source.parts for text in source.read(part))
    for document, text in enumerate(texts):
        ids = store.read(document, 0, int(store.lengths[document]))
        assert np.array_equal(ids, tokenizer.encode(text.content)), text.name


def compare(rounds: int) -> None:
    """Prints times in turn, and the ratios of speeds."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokenizer.json"
        train_tokenizer("", TrainTokenizerConfig(output=str(file), vocab_size=VOCABULARY))
        times: dict[str, list[list[float]]] = {"peer": [], "ours": []}
        for number in range(rounds):
            folder = Path(scratch) / f"tokens-{number}"
            for name in ("peer", "ours") if number % 2 else ("ours", "peer"):
                command = [sys.executable, __file__, name, str(file), str(folder)]
                words = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                wall, cpu, tokens = map(float, words.split())
                times[name].append([wall, cpu])
                print(f"{name}: {wall:.2f} s, CPU {cpu:.2f} s, {tokens:,.0f} tokens", flush=True)
        check(file, folder)
    print(f"{cores()} cores, {rounds} rounds")
    for kind, column in (("seconds", 0), ("CPU seconds", 1)):
        peers, own = ([pair[column] for pair in times[name]] for name in ("peer", "ours"))
        medians = statistics.median(peers), statistics.median(own)
        pairs = ", ".join(f"{a / b:.2f}" for a, b in zip(peers, own))
        print(f"{kind}: medians {medians[0]:.2f} (peer), {medians[1]:.2f} (ours)", end="; ")
        print(f"speed, ours over the peer's: {medians[0] / medians[1]:.2f} (pairs: {pairs})")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["peer", file, _]:
            print(peer(file))
        case ["ours", file, folder]:
            print(ours(file, folder))
        case [*rounds]:
            compare(int(rounds[0]) if rounds else 5)
