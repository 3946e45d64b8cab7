"""Recorded facts that only change on purpose: `make golden` rewrites them for review.

Losses of 10 steps in fp64 on generated integers, resolved presets, every config field with its
type and default, and the public names.
"""

import dataclasses
import importlib
import json
from pathlib import Path

import torch

from longctx.config import to_toml
from longctx.mixers import MixerConfig
from longctx.model.decoder import Decoder, initialise
from longctx.parallel import Mesh, ParallelConfig, resolve
from longctx.parallel.engine import Replicated
from longctx.sequence.local import LocalView
from longctx.train.optim import build_optimizer, learning_rate
from longctx.train.settings import Settings, load_settings

FOLDER = Path(__file__).parent / "golden"
PRESETS = sorted(path.stem for path in Path("configs").glob("*.toml"))
PUBLIC = ("longctx.mixers", "longctx.config", "longctx.data", "longctx_kernels.decay_attention")
STEPS = 10
VOCABULARY = 97


def ten_losses() -> list[float]:
    """Training losses of the tiny preset on tokens of a linear congruential sequence."""
    settings = load_settings("tiny")
    model = Decoder(settings.model, VOCABULARY)
    initialise(model, seed=0)
    model.double()
    mesh = Mesh(resolve(ParallelConfig(), settings.model.layers, 1, 64), torch.device("cpu"), 60)
    optimizer = build_optimizer(model, settings.optim)
    engine = Replicated(model, optimizer, settings.optim.clip_norm, mesh)
    stream = [7]
    while len(stream) < STEPS * 2 * 65:
        stream.append((stream[-1] * 31 + len(stream) // 13) % VOCABULARY)
    batches = torch.tensor(stream).view(STEPS, 2, 65)
    documents_BT = (torch.arange(64) >= 41).int().expand(2, -1)
    losses = []
    for step, batch in enumerate(batches, start=1):
        result = model(batch[:, :-1], batch[:, 1:], LocalView.of_ids(documents_BT))
        loss = result.cross_entropy / 128 + sum(result.mixers.values())
        engine.backward(loss)
        engine.gradient_norm()
        engine.update(learning_rate(settings.optim, step, STEPS))
        losses.append(loss.item())
    return losses


def config_surface() -> str:
    """One line a field: dotted name, type and default."""
    lines: list[str] = []
    _list_fields(Settings, "", lines)
    for kind, config_class in sorted(MixerConfig.kinds().items()):
        _list_fields(config_class, f"mixer {kind}: ", lines)
    return "\n".join(lines) + "\n"


def _list_fields(config_class: type, prefix: str, lines: list[str]) -> None:
    for field in dataclasses.fields(config_class):
        is_table = isinstance(field.type, type) and dataclasses.is_dataclass(field.type)
        if is_table and not issubclass(field.type, MixerConfig):
            _list_fields(field.type, f"{prefix}{field.name}.", lines)
            continue
        default = "required" if field.default is dataclasses.MISSING else repr(field.default)
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        lines.append(f"{prefix}{field.name}: {kind} = {default}")


def public_names() -> str:
    """Names that other programs may import."""
    lines = []
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        own = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module_name
        ]
        lines += [f"{module_name}.{name}" for name in sorted(getattr(module, "__all__", own))]
    return "\n".join(lines) + "\n"


def write() -> None:
    """Rewrites every golden file."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "losses.json").write_text(json.dumps(ten_losses(), indent=1) + "\n")
    (FOLDER / "config_surface.txt").write_text(config_surface())
    (FOLDER / "public_names.txt").write_text(public_names())
    for name in PRESETS:
        (FOLDER / f"{name}.toml").write_text(to_toml(load_settings(name)))


if __name__ == "__main__":
    write()
