"""Samples from a checkpoint, token after token, with constant state in linear layers."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from longctx import checkpoint
from longctx.config import decode
from longctx.data import Tokenizer, find_tokenizer, open_tokenizer, source_tokenizer
from longctx.errors import InputError
from longctx.model.decoder import Decoder
from longctx.train.settings import Settings


@dataclass(frozen=True)
class GenerateConfig:
    """Options of `longctx generate`."""

    prompt: str = "def "
    """Text to go on from."""
    tokens: int = 200
    """Tokens to sample at most."""
    temperature: float = 0.8
    """Randomness; 0 takes the most likely token."""
    seed: int = 0
    """Decides the sample."""
    output: str = ""
    """File that gets the text as well."""
    tokenizer: str = ""
    """Tokenizer of the run, as in [data]; empty takes the one in the run directory, or the one that
    the run was given."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"--tokens = {self.tokens}: must be at least 1")
        if self.temperature < 0:
            raise InputError(f"--temperature = {self.temperature}: must not be negative")


def load_model(path: str) -> Decoder:
    """The model of a run or checkpoint, ready for evaluation."""
    with contextlib.closing(checkpoint.open_checkpoint(checkpoint.resolve(path))) as opened:
        settings = decode(Settings, opened.state["config"], file=str(opened.path))
        model = Decoder(settings.model, opened.state["vocab_size"])
        checkpoint.load_model(opened, model)
    return model.eval()


def load_tokenizer(path: str, spec: str = "") -> Tokenizer:
    """The tokenizer of a run or checkpoint: the one that `spec` names, the one that lies in the run
    directory, or what the run was given."""
    start = checkpoint.resolve(path)
    state = checkpoint.read_state(start)
    data = decode(Settings, state["config"], file=str(start)).data
    if data.task:
        raise InputError(f"{path}: was trained on a data.task, whose tokens stand for no text")
    if not spec and isinstance(start, Path):
        spec = find_tokenizer(start.parents[1])
    source = next(iter(data.sources().values()))
    tokenizer = open_tokenizer(spec) if spec else source_tokenizer(source, data)
    learnt = state.get("tokenizer", tokenizer.fingerprint)
    if learnt != tokenizer.fingerprint or state["vocab_size"] != tokenizer.vocab_size:
        raise InputError(
            f"{path}: was trained with another tokenizer than {tokenizer.name}; "
            "name the one of that run with --tokenizer"
        )
    return tokenizer


def generate(path: str, config: GenerateConfig) -> str:
    """Prompt and continuation, up to the end of the document."""
    tokenizer, model = load_tokenizer(path, config.tokenizer), load_model(path)
    generator = torch.Generator().manual_seed(config.seed)
    ids = tokenizer.encode_prompt(config.prompt).tolist()
    if not ids:
        raise InputError(f"--prompt {config.prompt!r}: {tokenizer.name} makes no token of it")
    logits_1V, memory = model.step(torch.tensor([ids]), 0, [])
    for _ in range(config.tokens):
        if config.temperature == 0:
            token = int(logits_1V.argmax())
        else:
            chances = (logits_1V[0] / config.temperature).softmax(-1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        if token == tokenizer.end:
            break
        ids.append(token)
        logits_1V, memory = model.step(torch.tensor([[token]]), len(ids) - 1, memory)
    return tokenizer.decode(ids)
