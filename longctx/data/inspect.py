"""`longctx data inspect`: what is at a path, checked as a run would check it."""

from collections.abc import Iterator
from dataclasses import dataclass

from longctx.data.arrow import holds_ids
from longctx.data.config import DataConfig, SourceConfig
from longctx.data.files import settled
from longctx.data.folder import TokenFolder
from longctx.data.options import PathOptions
from longctx.data.sources import open_store, source_tokenizer
from longctx.data.stores import TokenStore
from longctx.data.texts import open_texts
from longctx.errors import InputError

SHOWN_TOKENS = 64
SHOWN_CHARACTERS = 100
KINDS = {
    "text": "text files",
    "jsonl": "JSON lines",
    "parquet": "parquet files",
    "datasets": "a dataset of the datasets library",
    "tokens": "a folder of tokens",
    "megatron": "Megatron's .bin and .idx",
}


@dataclass(frozen=True)
class InspectConfig(PathOptions):
    """Options of `longctx data inspect`."""

    tokenizer: str = ""
    """As data.tokenizer: a file, bytes or ids:N; empty means, for tokens, the one that made
    them."""
    documents: int = 3
    """How many of the first documents are shown."""

    def __post_init__(self) -> None:
        if self.documents < 0:
            raise InputError(f"--documents = {self.documents}: must be at least 0")


def inspect(path: str, config: InspectConfig) -> Iterator[tuple[str, str]]:
    """What is at a path, as labels and values; reads all of it and refuses what a run would."""
    source = settled(config.source(path))
    kind = source.format
    yield "what it is", KINDS[kind] if path else "text files of the standard library"
    if kind not in ("tokens", "megatron") and not holds_ids(source):
        yield from _describe_texts(source, config.documents)
        return
    data = DataConfig(tokenizer=config.tokenizer)
    store = open_store(source, data, verify=True)
    yield "documents", f"{len(store.lengths):,}"
    yield "tokens", f"{int(store.lengths.sum()):,}"
    yield "vocabulary", f"{store.vocab_size:,}"
    if isinstance(store, TokenFolder):
        yield from _describe_folder(store)
    else:
        yield "tokenizer", store.tokenizer or "unknown"
        yield "verified", "every id is in the vocabulary"
    yield "fingerprint", store.fingerprint()
    yield from _first_documents(store, source, data, config.documents)


def _describe_folder(folder: TokenFolder) -> Iterator[tuple[str, str]]:
    plan, shards = folder.manifest.plan, folder.manifest.shards
    size = sum(shard.ids.size for shard in shards)
    yield "files", f"{len(shards):,} of {plan['dtype']}, {size:,} bytes"
    yield "tokenizer", f"{plan['tokenizer_name']} ({folder.tokenizer[:16]})"
    yield "made of", plan["path"] or "the standard library's sources"
    yield "text", f"{folder.text_bytes:,} bytes; {folder.skipped:,} rows or files were left out"
    files = 2 * len(shards) + len(folder.manifest.extras) + 1
    yield "verified", f"sha256 of {files:,} files"


def _describe_texts(source: SourceConfig, shown: int) -> Iterator[tuple[str, str]]:
    texts = open_texts(source)
    documents = size = 0
    first: list[tuple[str, str]] = []
    for part in texts.parts:
        for text in texts.read(part):
            if documents < shown:
                begin = text.content[:SHOWN_CHARACTERS].decode(errors="replace")
                first.append((text.name, f"{len(text.content):,} bytes: {begin!r}"))
            documents += 1
            size += len(text.content)
    yield "documents", f"{documents:,}"
    yield "text", f"{size:,} bytes; {texts.skipped:,} rows or files were left out"
    yield from first


def _first_documents(
    store: TokenStore, source: SourceConfig, data: DataConfig, shown: int
) -> Iterator[tuple[str, str]]:
    tokenizer = source_tokenizer(source, data)
    for document, length in enumerate(store.lengths[:shown].tolist()):
        text = tokenizer.decode(store.read(document, 0, min(length, SHOWN_TOKENS)))
        yield f"document {document}", f"{length:,} tokens: {text[:SHOWN_CHARACTERS]!r}"
