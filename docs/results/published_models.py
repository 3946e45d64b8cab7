"""What the event simulator and a memory model say about measurements that others published.

Every function takes the constants that a fit may change, and nothing else that was measured there.
Sizes, FLOPs and bytes are those of the models; links and memory those of the cluster files.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

from longctx.plan.clusters import ClusterConfig, LinkConfig, load_cluster
from longctx.plan.events import Program, simulate
from longctx.plan.programs import (
    Crew,
    Scheme,
    Sharded,
    Work,
    gather,
    local,
    ring,
    scan,
    serial,
    step,
)

GIB, K = 2**30, 1024
cluster = cache(load_cluster)


@dataclass(frozen=True)
class Linear:
    """A stack of linear-attention layers."""

    width: int
    depth: int
    heads: int
    key: int
    value: int
    mlp: int
    vocabulary: int
    gated: bool
    """Whether another matrix makes a gate of the output."""
    tied: bool
    chunk: int

    @property
    def qkv(self) -> int:
        """Weights of what a state is made from."""
        return self.width * self.heads * (2 * self.key + self.value)

    @property
    def rest(self) -> int:
        """Weights of a layer after its state: gate, output, gated MLP."""
        return (1 + self.gated) * self.width * self.heads * self.value + 3 * self.width * self.mlp

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.width * self.vocabulary

    @property
    def weights(self) -> int:
        """Of the whole model."""
        return self.depth * (self.qkv + self.rest) + self.head * (1 if self.tied else 2)

    @property
    def state(self) -> int:
        """Elements of a layer's state."""
        return self.heads * self.key * self.value

    def core(self, tokens: float, rate: float) -> tuple[Work, Work]:
        """Linear attention alone, forward and backward, at `rate` FLOP/s; states are fp32."""
        state = 2 * self.state * tokens / rate
        intra = self.chunk * self.heads * (self.key + self.value) * tokens / rate
        size = 4.0 * self.state
        forward = Work(state, intra, state, size=size)
        return forward, Work(state, 2 * intra + state, 2 * state, size=size)

    def layer(self, tokens: float, rate: float) -> tuple[Work, Work]:
        """A whole layer."""
        forward, backward = self.core(tokens, rate)
        qkv, rest = (2 * weights * tokens / rate for weights in (self.qkv, self.rest))
        return (
            replace(forward, before=qkv + forward.before, rest=rest),
            replace(backward, before=2 * rest + backward.before, rest=2 * qkv),
        )

    def using(self, tokens: float, memory_bandwidth: float) -> tuple[float, float]:
        """Seconds in which a state that came can be used, if only bytes take time: q is read, o
        read and written; backward, k and v are read, their gradients read and written."""
        k, v = (2 * tokens * self.heads * size for size in (self.key, self.value))
        return (k + 2 * v) / memory_bandwidth, 3 * (k + v) / memory_bandwidth


LLAMA_1B = Linear(2048, 16, 16, 128, 128, 8192, 128256, gated=False, tied=True, chunk=256)
"""Linear-Llama3-1B of LASP-2."""
GLA_1B = Linear(2048, 24, 4, 256, 512, 5632, 32000, gated=True, tied=False, chunk=64)
"""GLA of 1.3 billion weights as flash-linear-attention builds it: its state is 2 MiB, as large as
that of width 4096 with 32 heads, which the table of collectives has."""


def slower_use(pair: tuple[Work, Work], seconds: tuple[float, float]) -> tuple[Work, Work]:
    """The same work, of which so much must be done before a state can be passed on."""
    found = [
        replace(work, behind=behind, rest=work.rest + max(0.0, work.behind - behind))
        for work, behind in zip(pair, seconds)
    ]
    return found[0], found[1]


def of_pair(
    scheme: Scheme,
    crew: Crew,
    pair: tuple[Work, Work],
    links: dict[str, LinkConfig],
    depth: int = 1,
) -> float:
    """Seconds of so many layers, forward and backward, simulated."""
    program = Program()
    step(program, crew, [pair] * depth, scheme)
    return simulate(program, links).seconds


# LASP-2: speed against length and GPUs


def around_layers(
    model: Linear, tokens: float, gpus: int, rate: float, place: ClusterConfig
) -> float:
    """Seconds of the head, the gradients' all-reduce (fp32) and AdamW on fp32 weights."""
    head = 6 * model.head * tokens / rate
    line = place.links["fabric"]
    sent = 2 * 4 * model.weights * (gpus - 1) / gpus / place.processes_per_node
    reduce = 2 * (gpus - 1) * line.latency + sent / line.bandwidth
    return head + reduce + 30 * model.weights / place.memory_bandwidth


def lasp2_seconds(tokens: float, gpus: int, fixed: float, rate: float) -> float:
    """A step. Ranks do the same and meet in every layer, so one layer stands for all."""
    place = cluster("dgx-a100")
    crew = Crew(tuple(range(gpus)), place.processes_per_node)
    pair = LLAMA_1B.layer(tokens / gpus, rate)
    layers = LLAMA_1B.depth * of_pair(gather, crew, pair, place.links)
    return fixed + layers + around_layers(LLAMA_1B, tokens / gpus, gpus, rate, place)


def lasp2_memory(tokens_per_gpu: float) -> float:
    """Bytes on a GPU, nothing fitted: 18 bytes a weight (bf16, fp32 gradient, fp32 weight and two
    moments), activations of a gated MLP and linear attention without recomputation, logits and
    their gradient in fp32, the states of chunks of 256 tokens that the released code keeps."""
    model = LLAMA_1B
    values = model.heads * model.value
    per_layer = 2 * (4 * model.width + 3 * values + 3 * model.mlp + values)
    states = 4 * model.state / model.chunk
    per_token = model.depth * (per_layer + states) + 2 * 4 * model.vocabulary
    return 18 * model.weights + per_token * tokens_per_gpu


# LASP-2 over LASP-1 and Ring, 64 GPUs


def lasp1_seconds(tokens: float, gpus: int, base: tuple[float, float], in_step: bool) -> float:
    """A step of LASP-1 with the constants of LASP-2's table, nothing fitted; `in_step` lets all
    ranks wait for one another after each layer."""
    fixed, rate = base
    place = cluster("dgx-a100")
    crew = Crew(tuple(range(gpus)), place.processes_per_node)
    bytes_take = LLAMA_1B.using(tokens / gpus, place.memory_bandwidth)
    pair, depth = slower_use(LLAMA_1B.layer(tokens / gpus, rate), bytes_take), LLAMA_1B.depth
    if in_step:
        layers = depth * of_pair(serial, crew, pair, place.links)
    else:
        layers = of_pair(serial, crew, pair, place.links, depth)
    return fixed + layers + around_layers(LLAMA_1B, tokens / gpus, gpus, rate, place)


def ring_seconds(tokens: float, gpus: int, base: tuple[float, float], at_peak: bool) -> float:
    """A step of Ring attention that multiplies all queries with all keys, nothing fitted.

    At peak: the least it can take, half of the products (causal), at the data sheet's rate, links
    without limit.
    """
    fixed, rate = base
    place, model = cluster("dgx-a100"), LLAMA_1B
    crew, local_tokens = Crew(tuple(range(gpus)), place.processes_per_node), tokens / gpus
    products = 4 * local_tokens * tokens * model.width
    dense = 2 * (model.qkv + model.rest) * local_tokens / rate
    around = around_layers(model, local_tokens, gpus, rate, place)
    if at_peak:
        core = 3 * products / 2 / place.peak("bf16")
        return fixed + model.depth * (3 * dense + core) + around
    speed = place.rate("softmax", local_tokens, "bf16")
    sent = 2 * 2.0 * local_tokens * model.width
    forward = Work(dense, products / speed, 0, size=sent)
    backward = Work(2 * dense, 2.5 * products / speed, 0, size=3 * sent)
    return fixed + model.depth * of_pair(ring, crew, (forward, backward), place.links) + around


# ZeCO: collectives, operator, model


def _flat(gpus: int) -> Crew:
    """One class of links, as the fit of two constants knows no more."""
    return Crew(tuple(range(gpus)), gpus)


def best_blocks(gpus: int, size: float, link: LinkConfig) -> int:
    """Blocks of a chain that take the least time: root of (P-2)(m/beta)/alpha."""
    return max(1, round(((gpus - 2) * size / link.bandwidth / link.latency) ** 0.5))


ONE_STATE = 4.0 * 32 * 128 * 128


def collective_seconds(way: str, gpus: int, latency: float, bandwidth: float) -> float:
    """An all-gather or an all-scan of one state of 2 MiB."""
    link, program = LinkConfig(latency, bandwidth), Program()
    work = Work(0, 0, 0, size=ONE_STATE)
    if way == "all-gather":
        gather(program, _flat(gpus), work)
    else:
        scan(program, _flat(gpus), work, best_blocks(gpus, ONE_STATE, link))
    return simulate(program, {"node": link}).seconds


def _scheme(method: str, gpus: int, link: LinkConfig) -> Scheme:
    blocks = best_blocks(gpus, ONE_STATE, link)
    ways: dict[str, Scheme] = {
        "LASP-1": serial,
        "LASP-2": gather,
        "ZeCO": partial(scan, blocks=blocks),
        "no SP": local,
    }
    return ways[method]


def _with_extra(
    method: str, pair: tuple[Work, Work], tokens: float, extra: float
) -> tuple[Work, Work]:
    """What a method adds on its own rank: ZeCO corrects the states of its chunks, reading and
    writing each; LASP-1 and LASP-2 take what the fit says, backward twice as much. LASP-1 passes a
    state on after using it, which takes what its bytes take."""
    place = cluster("8xh100")
    if method == "ZeCO":
        extra = 2 * tokens / GLA_1B.chunk * 4 * GLA_1B.state / place.memory_bandwidth
    if method == "no SP":
        extra = 0.0
    if method == "LASP-1":
        pair = slower_use(pair, GLA_1B.using(tokens, place.memory_bandwidth))
    forward, backward = pair
    return (
        replace(forward, before=forward.before + extra),
        replace(backward, before=backward.before + 2 * extra),
    )


def operator_seconds(method: str, gpus: int, link: LinkConfig, rate: float, extra: float) -> float:
    """Forward and backward of one GLA operator, without projections, 16K tokens a GPU."""
    tokens = 16 * K
    pair = _with_extra(method, GLA_1B.core(tokens, rate), tokens, extra)
    return of_pair(_scheme(method, gpus, link), _flat(gpus), pair, {"node": link})


def model_speed(method: str, gpus: int, link: LinkConfig, rate: float, extra: float) -> float:
    """Tokens a second and GPU of GLA-1B with weights sharded over all GPUs, 32K tokens a GPU."""
    tokens, program, weights = 32 * K, Program(), GLA_1B.qkv + GLA_1B.rest
    pair = _with_extra(method, GLA_1B.layer(tokens, rate), tokens, extra)
    layers, sharded = [pair] * GLA_1B.depth, Sharded(2.0 * weights, 4.0 * weights)
    step(program, _flat(gpus), layers, _scheme(method, gpus, link), sharded)
    head = 6 * GLA_1B.head * tokens / rate
    return tokens / (simulate(program, {"node": link}).seconds + head)


# ALST: the longest sequence


@dataclass(frozen=True)
class Softmax:
    """A stack of softmax layers."""

    width: int
    depth: int
    attention: int
    """Heads times their size."""
    keys: int
    mlp: int
    vocabulary: int
    normed: bool = False
    """Whether queries and keys have norms of their own."""

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return self.width * (2 * self.attention + 2 * self.keys + 3 * self.mlp)

    @property
    def weights(self) -> int:
        return self.depth * self.layer + 2 * self.width * self.vocabulary


ALST_MODELS = {
    "8b": Softmax(4096, 32, 4096, 1024, 14336, 128256),
    "32b": Softmax(5120, 64, 8192, 1024, 25600, 151936, normed=True),
    "70b": Softmax(8192, 80, 8192, 1024, 28672, 128256),
}
HOST_BYTES = 1.9e12
"""Published, of a node."""


def alst_bytes_per_token(model: Softmax, having: set[str], gpus: int, working: float) -> float:
    """Of one GPU, at the worst moment of a backward pass in which every layer is repeated.

    FlashAttention with grouped keys: q, out, their gradients, an fp32 sum of dq, dk and dv of all
    query heads, k, v and their gradients, which are repeated where GPUs outnumber the 8 key heads;
    what is sent to change from tokens to heads; what norms of q and k keep; four hidden states. Or
    the MLP, of which Liger's kernels (they come with its loss) leave five tensors instead of
    eight. Or the logits: bf16, fp32, their logarithm and its gradient.
    """
    hidden, repeats = 8 * model.width, 1.0
    sent = normed = 0
    if "sp" in having:
        repeats = max(1.0, gpus / 8)
        sent = 2 * (model.attention + 2 * model.keys)
    if model.normed:
        normed = 2 * (model.attention + model.keys)
    attention = 16 * model.attention + 8 * model.keys * repeats + sent + normed
    mlp = 0 if "mlp" in having else (10 if "loss" in having else 16) * model.mlp
    logits = 0 if "loss" in having else 14 * model.vocabulary
    kept = 0 if "offload" in having else 2 * model.depth * model.width
    return kept + working * (hidden + max(attention, mlp, logits))


def alst_longest(
    case: tuple[str, str, int, str], reserved: float, working: float
) -> tuple[float, str]:
    """Tokens of the longest sequence, and what ends it: device or host."""
    name, place, gpus, features = case
    model, having = ALST_MODELS[name], set(features.split())
    held = 0 if gpus == 1 else 2 * model.weights / gpus
    gathered = 2 * (model.width * model.vocabulary + 2 * model.layer) + 2 * 5e8 * 2
    free = cluster(place).memory_gib * GIB - held - gathered - reserved
    shared = gpus if "sp" in having else 1
    device = shared * free / alst_bytes_per_token(model, having, gpus, working)
    if "offload" not in having:
        return device, "device"
    nodes = max(1, gpus // 8)
    optimizer = (16 + (2 if gpus == 1 else 0)) * model.weights / nodes
    host = nodes * (HOST_BYTES - optimizer) / (2 * model.depth * model.width)
    return min((device, "device"), (host, "host"))
