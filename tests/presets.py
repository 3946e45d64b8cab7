"""Every preset at a tiny size."""

from dataclasses import fields, replace
from pathlib import Path

from longctx.mixers import MixerConfig
from longctx.model.decoder import ModelConfig

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.toml"))
TINY = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_key_heads": 2,
    "head_dim": 8,
    "value_dim": 12,
    "state_size": 8,
    "num_groups": 2,
    "window": 16,
    "persistent": 2,
    "block": 8,
    "num_blocks": 3,
    "compress_block": 8,
    "compress_stride": 8,
    "capacity": 8,
}
"""Values for fields that are not 0, at width 32."""


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same pattern and kinds at width 32."""

    def tiny(mixer: MixerConfig) -> MixerConfig:
        present = {f.name: getattr(mixer, f.name) for f in fields(mixer)}
        return replace(mixer, **{n: size for n, size in TINY.items() if present.get(n)})

    mixers = {letter: tiny(mixer) for letter, mixer in config.mixers.items()}
    depth = min(config.depth, len(config.pattern) + 1)
    return replace(config, width=32, depth=depth, mlp_hidden=64, mixers=mixers)
