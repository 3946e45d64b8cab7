"""Small configurations of every registered mixer; a new kind is tested as soon as it exists.

A kind without an entry here is tested with its defaults, at width 16.
"""

from longctx.mixers import MixerConfig, Place
from longctx.mixers.linear import LinearConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.softmax import SoftmaxConfig

WIDTH = 16
PLACE = Place(width=WIDTH, layer=1, depth=3)

VARIANTS: dict[str, dict[str, MixerConfig]] = {
    "linear": {
        "lightning": LinearConfig(num_heads=2),
        "paper": LinearConfig(num_heads=2, decay="paper", value_dim=6, gate="sigmoid"),
        "retention": LinearConfig(num_heads=4, decay="retention", gate="none"),
        "basic": LinearConfig(
            num_heads=2, feature_map="elu1", decay="none", denominator=True, output_norm=False
        ),
        "softmax-map": LinearConfig(num_heads=2, feature_map="softmax", denominator=True),
        "unit-map": LinearConfig(num_heads=2, feature_map="unit", head_dim=5),
    },
    "softmax": {
        "full": SoftmaxConfig(num_heads=2),
        "grouped": SoftmaxConfig(num_heads=4, num_kv_heads=2, rope_fraction=0.5),
        "shared-key": SoftmaxConfig(num_heads=4, num_kv_heads=1, rope_fraction=0.0),
        "window": SoftmaxConfig(num_heads=2, window=9, qk_norm=False),
        "window-1": SoftmaxConfig(num_heads=2, window=1),
    },
    "moh": {
        "softmax": MoHConfig(
            inner=SoftmaxConfig(num_heads=4, num_kv_heads=2), shared_heads=1, active_heads=2
        ),
        "two-shared": MoHConfig(inner=SoftmaxConfig(num_heads=4), shared_heads=2, active_heads=1),
        "linear": MoHConfig(inner=LinearConfig(num_heads=4), shared_heads=0, active_heads=3),
    },
}


def all_variants() -> list[tuple[str, MixerConfig]]:
    """(name, config) of every variant of every registered kind."""
    found = []
    for kind, config_class in MixerConfig.kinds().items():
        variants = VARIANTS.get(kind)
        if variants is None:
            variants = {"default": config_class()}
        found += [(f"{kind}-{name}", config) for name, config in variants.items()]
    return found
