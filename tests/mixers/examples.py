"""Small configurations of every registered mixer; a new kind is tested as soon as it exists.

A kind without an entry here is tested with its defaults, at width 16.
"""

from longctx.mixers import MixerConfig, Place
from longctx.mixers.aaren import AarenConfig
from longctx.mixers.agent import AgentConfig
from longctx.mixers.bilevel import BilevelConfig
from longctx.mixers.combiner import CombinerConfig
from longctx.mixers.deep_titans import DeepTitansConfig
from longctx.mixers.delta import DeltaNetConfig, GDNConfig, KDAConfig
from longctx.mixers.dma import DMAConfig
from longctx.mixers.efficient import EfficientConfig
from longctx.mixers.favor import FavorConfig
from longctx.mixers.flowformer import FlowformerConfig
from longctx.mixers.gla import GLAConfig
from longctx.mixers.hgrn2 import HGRN2Config
from longctx.mixers.landmark import LandmarkConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.lla import LLAConfig
from longctx.mixers.lte import LTEConfig
from longctx.mixers.mamba2 import Mamba2Config
from longctx.mixers.moba import MoBAConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.mosa import MosaConfig
from longctx.mixers.mta import MTAConfig
from longctx.mixers.nats import NATSConfig
from longctx.mixers.neighbourhood import NeighbourhoodConfig
from longctx.mixers.nsa import NSAConfig
from longctx.mixers.power import PowerConfig
from longctx.mixers.rala import RalaConfig
from longctx.mixers.routing import RoutingConfig
from longctx.mixers.s2 import S2Config
from longctx.mixers.scatterbrain import ScatterbrainConfig
from longctx.mixers.scored import ScoredConfig
from longctx.mixers.sla import SLAConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.mixers.sparse_transformer import FixedConfig, StridedConfig
from longctx.mixers.sum import SumConfig
from longctx.mixers.titans import TitansConfig

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
        "minimax": LinearConfig(
            num_heads=2, decay="minimax", value_map="silu", norm="all", gate="sigmoid"
        ),
        "unit-map": LinearConfig(num_heads=2, feature_map="unit", head_dim=5),
        "hedgehog": LinearConfig(num_heads=2, feature_map="hedgehog", denominator=True),
        "t2r": LinearConfig(num_heads=2, feature_map="t2r", value_dim=3, denominator=True),
        "based": LinearConfig(
            num_heads=2, feature_map="based", feature_dim=3, decay="none", denominator=True
        ),
        "rebased": LinearConfig(num_heads=2, feature_map="rebased", feature_dim=3),
        "dpfp": LinearConfig(
            num_heads=4, head_dim=8, value_dim=2, feature_map="dpfp", nu=2, denominator=True
        ),
        "cosformer": LinearConfig(
            num_heads=2, feature_map="cosformer", longest=1024, denominator=True
        ),
        "fast": LinearConfig(num_heads=2, feature_map="fast", feature_dim=3, denominator=True),
        "inline": LinearConfig(num_heads=2, feature_map="silu", decay="none", inline=True),
        "transnormer": LinearConfig(num_heads=2, head_dim=5, lrpe="all", norm="simple"),
    },
    "softmax": {
        "full": SoftmaxConfig(num_heads=2),
        "grouped": SoftmaxConfig(num_heads=4, num_kv_heads=2, rope_fraction=0.5, gate="sigmoid"),
        "shared-key": SoftmaxConfig(num_heads=4, num_kv_heads=1, rope_fraction=0.0),
        "window": SoftmaxConfig(num_heads=2, window=9, qk_norm=False),
        "window-1": SoftmaxConfig(num_heads=2, window=1),
    },
    "deltanet": {
        "default": DeltaNetConfig(num_heads=2),
        "no-convolution": DeltaNetConfig(
            num_heads=4, convolution=0, negative_eigenvalues=True, head_dim=3, value_dim=5
        ),
    },
    "gdn": {
        "default": GDNConfig(num_heads=2, head_dim=4, value_dim=6),
        "grouped": GDNConfig(num_heads=4, num_key_heads=2, head_dim=3, convolution=2),
    },
    "kda": {
        "default": KDAConfig(num_heads=2, head_dim=4),
        "safe": KDAConfig(num_heads=2, head_dim=3, value_dim=5, lowest_log_decay=-0.5),
    },
    "aaren": {"default": AarenConfig(num_heads=4, head_dim=3, value_dim=4)},
    "agent": {
        "default": AgentConfig(num_heads=2, head_dim=3, num_agents=4),
        "one-agent": AgentConfig(num_heads=4, head_dim=3, num_agents=1, value_dim=5),
    },
    "efficient": {"default": EfficientConfig(num_heads=4, head_dim=3, value_dim=4)},
    "favor": {
        "default": FavorConfig(num_heads=2, head_dim=4),
        "more-features": FavorConfig(num_heads=4, head_dim=3, num_features=7, value_dim=2),
    },
    "rala": {"default": RalaConfig(num_heads=4, head_dim=5, value_dim=3)},
    "flowformer": {
        "default": FlowformerConfig(num_heads=2, head_dim=3),
        "wide-clamp": FlowformerConfig(num_heads=4, head_dim=3, value_dim=5, clamp=5.0),
    },
    "gla": {
        "default": GLAConfig(num_heads=2, head_dim=3, value_dim=5, decay_rank=4),
        "token-shift": GLAConfig(num_heads=4, temperature=2.0, token_shift=True),
    },
    "hgrn2": {
        "rising": HGRN2Config(num_heads=2, head_dim=6, value_dim=3),
        "constant": HGRN2Config(num_heads=4, bounds="constant", lower_bound=0.0),
    },
    "mamba2": {
        "one-group": Mamba2Config(num_heads=2, head_dim=5, state_size=3, convolution=3),
        "two-groups": Mamba2Config(num_heads=4, head_dim=3, state_size=4, num_groups=2),
    },
    "titans": {
        "memory": TitansConfig(num_heads=2, head_dim=4),
        "gated": TitansConfig(num_heads=2, head_dim=3, window=9, persistent=3, convolution=0),
    },
    "deep_titans": {
        "memory": DeepTitansConfig(num_heads=2, head_dim=3, hidden=3, batch=16),
        "before-window": DeepTitansConfig(
            composition="mal", num_heads=2, head_dim=3, hidden=4, batch=8, window=9, persistent=2
        ),
        "as-context": DeepTitansConfig(
            composition="mac",
            num_heads=2,
            head_dim=5,
            hidden=3,
            segment=6,
            persistent=2,
        ),
        "bare": DeepTitansConfig(num_heads=1, head_dim=2, hidden=3, batch=4, convolution=0),
    },
    "lla": {
        "default": LLAConfig(num_heads=2, head_dim=3),
        "sharp": LLAConfig(num_heads=1, head_dim=2, ridge=0.5, rope_fraction=0.0, qk_norm=False),
    },
    "s2": {
        "grouped": S2Config(num_heads=4, num_kv_heads=2, block=4, local_blocks=2, stride=2),
        "dense-head": S2Config(
            num_heads=3, head_dim=4, block=3, local_blocks=1, stride=4, dense_heads=1
        ),
    },
    "fixed": {
        "same": FixedConfig(num_heads=2, block=8, columns=2, gate="sigmoid"),
        "verticals": FixedConfig(num_heads=2, block=8, columns=2, verticals=2),
    },
    "neighbourhood": {"default": NeighbourhoodConfig(num_heads=2, window=11, stride=4)},
    "dma": {
        "default": DMAConfig(num_heads=4, num_kv_heads=2, capacity=7, window=3),
        "no-window": DMAConfig(num_heads=2, head_dim=3, capacity=12, window=1),
    },
    "lte": {
        "default": LTEConfig(num_heads=4, num_kv_heads=2, head_dim=8, capacity=6, window=9, sinks=2)
    },
    "nats": {"default": NATSConfig(num_heads=4, num_kv_heads=2, window=8)},
    "power": {"default": PowerConfig(num_heads=4, num_kv_heads=1, block=16, window_blocks=1)},
    "strided": {"default": StridedConfig(num_heads=2, block=16, local_blocks=1, stride=2)},
    "mta": {
        "default": MTAConfig(num_heads=2, window=11),
        "mixed-heads": MTAConfig(
            num_heads=4, num_kv_heads=2, window=20, past_queries=3, near_keys=5, mixed_heads=2
        ),
    },
    "scored": {
        "sigmoid": ScoredConfig(num_heads=2, normaliser="sigmoid", window=11, sinks=2),
        "sigmoid-slopes": ScoredConfig(
            num_heads=4,
            num_kv_heads=2,
            normaliser="sigmoid",
            sigmoid_length=32,
            bias="alibi",
            rope_fraction=0.0,
        ),
        # So many heads that some have a weight for every token.
        "relu": ScoredConfig(num_heads=8, head_dim=2, normaliser="relu", gate="sigmoid"),
        "softplus": ScoredConfig(num_heads=2, normaliser="softplus", qk_norm=False),
        "reweighted": ScoredConfig(
            num_heads=2, normaliser="reweighted", qk_norm=False, window=20, sinks=1
        ),
        # Its weights jump where a score changes its sign: large scores are rarely close to that.
        "signed": ScoredConfig(num_heads=1, normaliser="signed", qk_norm=False, window=20),
        "forget": ScoredConfig(num_heads=4, num_kv_heads=2, bias="forget", rope_fraction=0.0),
        "ssa": ScoredConfig(num_heads=2, temperature="ssa", sink=True, window=9),
        "shared-heads": ScoredConfig(num_heads=4, num_kv_heads=2, heads="shared", bias="alibi"),
    },
    "moba": {
        "grouped": MoBAConfig(num_heads=4, num_kv_heads=2, block=4, num_blocks=3),
        "two-blocks": MoBAConfig(num_heads=2, head_dim=3, block=8, num_blocks=2, qk_norm=False),
    },
    "mosa": {
        "threshold": MosaConfig(
            num_heads=4, head_dim=4, sparsity=2, group=16, capacity=1.25, include_first=True
        ),
        "token-choice": MosaConfig(
            num_heads=6, head_dim=3, sparsity=2, group=9, capacity=1.2, selection="token_choice"
        ),
        "expert-choice": MosaConfig(
            num_heads=4, head_dim=4, sparsity=2, selection="expert_choice", allow_leak=True
        ),
    },
    "routing": {
        "default": RoutingConfig(num_heads=2, head_dim=4, clusters=3, group=12, commitment=0.1)
    },
    "sum": {
        "hybrid": SumConfig(
            parts={
                "dense": SoftmaxConfig(num_heads=2, head_dim=3),
                "routed": MosaConfig(num_heads=3, head_dim=4, sparsity=2, group=16, capacity=1.25),
            }
        ),
        "gated": SumConfig(
            parts={
                "memory": GLAConfig(num_heads=4, head_dim=3, token_shift=True),
                "near": SoftmaxConfig(num_heads=4, window=9),
            },
            gated=True,
        ),
    },
    "nsa": {
        "own-keys": NSAConfig(
            num_heads=4,
            num_kv_heads=2,
            block=4,
            num_blocks=4,
            compress_block=4,
            compress_stride=2,
            window=9,
        ),
        "shared-keys": NSAConfig(
            num_heads=3,
            head_dim=4,
            block=8,
            num_blocks=4,
            compress_block=4,
            compress_stride=4,
            compression="mean",
            window=5,
            branch_keys="shared",
            gate="sigmoid",
        ),
    },
    "sla": {"default": SLAConfig(num_heads=4, num_kv_heads=2, block=4, num_blocks=3)},
    "scatterbrain": {
        "default": ScatterbrainConfig(num_heads=4, num_kv_heads=2, window=9),
        "few-features": ScatterbrainConfig(num_heads=2, head_dim=3, window=1, num_features=4),
    },
    "combiner": {"default": CombinerConfig(num_heads=4, num_kv_heads=2, block=5)},
    "landmark": {"default": LandmarkConfig(num_heads=4, num_kv_heads=2, block=5)},
    "bilevel": {"default": BilevelConfig(num_heads=4, num_kv_heads=2, block=5, num_blocks=2)},
    "moh": {
        "softmax": MoHConfig(
            inner=SoftmaxConfig(num_heads=4, num_kv_heads=2), shared_heads=1, active_heads=2
        ),
        "two-shared": MoHConfig(inner=SoftmaxConfig(num_heads=4), shared_heads=2, active_heads=1),
        "linear": MoHConfig(inner=LinearConfig(num_heads=4), shared_heads=0, active_heads=3),
        "routed": MoHConfig(
            inner=SoftmaxConfig(num_heads=4, num_kv_heads=2, qk_norm=False),
            router="query-norm",
            compute="routed",
        ),
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
