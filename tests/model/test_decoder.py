import pytest
import torch

from longctx.mixers.linear import LinearConfig
from longctx.mixers.moh import MoHConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.sequence.local import LocalView
from tests.tolerances import assert_close

VOCABULARY = 50


def hybrid(depth: int = 4, **changes) -> ModelConfig:
    routed = MoHConfig(inner=SoftmaxConfig(num_heads=4, num_kv_heads=2), active_heads=2)
    mixers = {"L": LinearConfig(num_heads=4), "S": routed}
    return ModelConfig(width=32, depth=depth, pattern="LLS", mixers=mixers, **changes)


def build(config: ModelConfig) -> Decoder:
    model = Decoder(config, VOCABULARY)
    initialise(model, seed=3)
    return model.double()


def example(length: int = 40) -> tuple[torch.Tensor, LocalView]:
    tokens = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros(2, length, dtype=torch.int32)
    documents[:, 13:] = 1
    return tokens, LocalView.of_ids(documents)


def test_pattern_is_repeated_until_the_depth_is_reached():
    kinds = [config.kind for config in hybrid(depth=5).layers]
    assert kinds == ["linear", "linear", "moh", "linear", "linear"]


def test_initial_weights_depend_on_name_and_seed_only():
    short, long = build(hybrid(depth=2)), build(hybrid(depth=4))
    name = "blocks.0.mixer.query.weight"
    assert torch.equal(short.state_dict()[name], long.state_dict()[name])
    ratio = long.blocks[0].mlp.project_out.weight / short.blocks[0].mlp.project_out.weight
    assert_close(ratio, torch.full_like(ratio, 0.5**0.5), "fp32")


def test_every_parameter_gets_a_gradient():
    model = build(hybrid())
    tokens, view = example()
    losses = model(tokens, tokens, view)
    (losses.cross_entropy + losses.mixers["balance"]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_head_is_tied_unless_asked_otherwise():
    tied, untied = build(hybrid()), build(hybrid(tied_head=False))
    assert untied.num_parameters() - tied.num_parameters() == VOCABULARY * 32


def test_loss_of_packed_rows_is_the_sum_over_documents():
    model = build(hybrid())
    tokens, view = example()
    labels = tokens.roll(-1, 1)
    whole = model(tokens, labels, view).cross_entropy
    parts = [
        model(row[None], target[None], LocalView.whole(1, len(row))).cross_entropy
        for tokens_T, labels_T in zip(tokens, labels, strict=True)
        for row, target in ((tokens_T[:13], labels_T[:13]), (tokens_T[13:], labels_T[13:]))
    ]
    assert_close(whole, sum(parts), "fp64")


def test_generation_step_by_step_equals_one_pass():
    model = build(hybrid())
    tokens, _ = example()
    expected, _ = model.step(tokens, 0, [])
    _, memory = model.step(tokens[:, :30], 0, [])
    for t in range(30, 40):
        logits, memory = model.step(tokens[:, t : t + 1], t, memory)
    assert_close(logits, expected, "fp64")


def test_flops_add_up_over_kinds_of_layers():
    model = build(hybrid())
    contexts = torch.arange(1, 11)
    flops = model.flops(contexts)
    assert set(flops) == {"linear", "moh", "mlp", "head"}
    assert flops["head"] == 2 * 10 * VOCABULARY * 32
    assert flops["mlp"] == 2 * 10 * sum(p.numel() for b in model.blocks for p in b.mlp.parameters())


@pytest.mark.parametrize("layer", [0, 2], ids=["linear", "moh of softmax"])
def test_a_block_compiles_without_graph_breaks_and_equals_eager(layer):
    block = build(hybrid()).blocks[layer]
    view = LocalView(((0,), (0, 13)), 40).at(layer)
    x_BTD = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0)).double()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (block, compiled):
        leaf_BTD = x_BTD.clone().requires_grad_()
        call(leaf_BTD, view)[0].square().sum().backward()
        gradients.append(leaf_BTD.grad)
    assert torch.equal(*gradients)
