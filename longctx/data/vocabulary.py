"""`longctx data train-tokenizer`: a byte-level BPE tokenizer, learnt from text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from longctx.data.options import PathOptions
from longctx.data.texts import Part, TextSource, open_texts
from longctx.errors import InputError, OutsideError
from longctx.files import write_whole

MARKS = ("<|begin|>", "<|end|>")
SMALLEST = 256 + len(MARKS)


@dataclass(frozen=True)
class TrainTokenizerConfig(PathOptions):
    """Options of `longctx data train-tokenizer`."""

    output: str = ""
    """File that gets the tokenizer, such as tokenizer.json."""
    vocab_size: int = 32768
    """Tokens, with one for each byte and two marks; fewer if the text has not so many words."""
    most_bytes: int = 2**30
    """Text to learn from; of a longer one, parts at even distances are taken."""

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST:
            raise InputError(f"--vocab_size = {self.vocab_size}: must be at least {SMALLEST}")
        if self.most_bytes < 1:
            raise InputError(f"--most_bytes = {self.most_bytes}: must be at least 1")


@dataclass(frozen=True)
class Trained:
    """What was learnt."""

    vocab_size: int
    text_bytes: int


def train_tokenizer(path: str, config: TrainTokenizerConfig) -> Trained:
    """Learns a tokenizer from the text at a path; the same text gives the same file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not config.output:
        raise InputError("longctx data train-tokenizer needs --output FILE")
    output = Path(config.output).expanduser()
    if output.suffix != ".json" or output.exists():
        reason = "exists" if output.exists() else "does not end in .json"
        raise InputError(f"--output {output}: {reason}; choose another name")
    source = open_texts(config.source(path))
    texts = _Texts(source, sample(source.parts, config.most_bytes), config.most_bytes)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.decoded(), trainer)
    if not texts.bytes:
        raise InputError(f"{path or 'the embedded sources'}: no text in it")
    content = tokenizer.to_str(pretty=True).encode()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, content)
    except OSError as error:
        raise OutsideError(f"--output {output}: cannot be written ({error.strerror})") from error
    return Trained(tokenizer.get_vocab_size(), texts.bytes)


def sample(parts: Sequence[Part], most_bytes: int) -> Sequence[Part]:
    """Parts at even distances that have about as much text."""
    total = sum(part.size for part in parts)
    return parts[:: max(1, -(-total // most_bytes))]


class _Texts:
    """Texts of some parts, up to so many bytes, and how much was read of them."""

    def __init__(self, source: TextSource, parts: Sequence[Part], most_bytes: int) -> None:
        self.bytes = 0
        self._source, self._parts, self._most_bytes = source, parts, most_bytes

    def decoded(self) -> Iterator[str]:
        """Each text, with U+FFFD for what is not UTF-8."""
        for text in chain.from_iterable(map(self._source.read, self._parts)):
            content = text.content[: self._most_bytes - self.bytes]
            self.bytes += len(content)
            yield content.decode(errors="replace")
            if self.bytes == self._most_bytes:
                return
