"""Under muP what layers compute, and how far a step moves it, do not depend on the width."""

from typing import Any

import pytest
import torch

from longctx.errors import InputError
from longctx.mixers.gla import GLAConfig
from longctx.mixers.mosa import MosaConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.decoder import Decoder, ModelConfig, initialise
from longctx.model.matrices import growing_matrices, hidden_matrices, thin_matrices
from longctx.parallel import Mesh, ParallelConfig, resolve
from longctx.parallel.engine import Replicated
from longctx.parallel.matrices import spread
from longctx.parallel.muon import Wholes
from longctx.sequence.local import LocalView
from longctx.train.optim import OptimConfig, build_optimizer

VOCABULARY, LENGTH, BASE = 64, 16, 32
WIDE = 128


def config(width: int, base_width: int, pattern: str = "GS", **fields: Any) -> ModelConfig:
    heads = width // 16
    mixers = {
        "S": SoftmaxConfig(num_heads=heads, head_dim=16),
        "G": GLAConfig(num_heads=heads, head_dim=16),
        "R": MosaConfig(num_heads=heads, head_dim=16, sparsity=2, group=8),
    }
    return ModelConfig(
        width=width,
        depth=2,
        pattern=pattern,
        mixers=mixers,
        mlp_hidden=2 * width,
        base_width=base_width,
        init_std=0.1,
        **fields,
    )


def engine_of(model_config: ModelConfig, optim: OptimConfig) -> Replicated:
    model = Decoder(model_config, VOCABULARY)
    initialise(model, 0)
    mesh = Mesh(resolve(ParallelConfig(), model_config.layers, 1, LENGTH), torch.device("cpu"), 60)
    wholes = Wholes(mesh, spread(hidden_matrices(model), None, False), torch.float32)
    return Replicated(model, build_optimizer(model, optim, wholes), 0.0, mesh)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def train(engine: Replicated, lr: float) -> list[float]:
    """Losses of three steps on one batch."""
    losses = []
    for _ in range(3):
        result = engine.model.train()(*batch(), LocalView.whole(4, LENGTH))
        engine.backward(result.cross_entropy / (4 * LENGTH))
        engine.gradient_norm()
        engine.update(lr)
        losses.append(float(result.cross_entropy.detach()))
    return losses


def figures(width: int, base_width: int, kind: str) -> dict[str, float]:
    """Root mean squares of what layers compute after three steps, and of how far these moved it."""
    engine = engine_of(config(width, base_width), OptimConfig(kind=kind))
    seen: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(engine.model.blocks):
        block.mixer.register_forward_hook(
            lambda _m, _i, mixed, n=f"mixer {layer}": seen.update({n: mixed.out})
        )
        block.mlp.register_forward_hook(lambda _m, _i, out, n=f"mlp {layer}": seen.update({n: out}))

    @torch.no_grad()
    def look() -> dict[str, torch.Tensor]:
        engine.model(*batch(), LocalView.whole(4, LENGTH))
        return dict(seen) | {"logits": engine.model.step(batch()[0], 0, [])[0]}

    before = look()
    train(engine, 0.02)
    after = look()
    moved = {f"{name} moves": after[name] - before[name] for name in after}
    return {name: float(x.square().mean().sqrt()) for name, x in (after | moved).items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_nothing_grows_with_the_width(kind):
    narrow = figures(BASE, BASE, kind)
    wide = figures(WIDE, BASE, kind)
    for name, value in narrow.items():
        assert 0.55 < wide[name] / value < 1.5, name


def moved(width: int, kind: str) -> dict[str, float]:
    """Root mean square of what three steps' change of each matrix makes of its input."""
    engine = engine_of(config(width, BASE, "GR"), OptimConfig(kind=kind))
    growing = growing_matrices(engine.model)
    weights = {name: p for name, p in engine.model.named_parameters() if name in growing}
    first = {name: weight.detach().clone() for name, weight in weights.items()}
    seen: dict[str, torch.Tensor] = {}
    for name in weights:
        engine.model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda _m, given, _out, n=name: seen.update({n: given[0].detach()})
        )
    train(engine, 0.02)
    found = {}
    for name, given in seen.items():
        change = weights[name].detach() - first[name]
        made = given @ (change if change.dim() == 3 else change.T)
        found[name] = float(made.square().mean().sqrt())
    return found


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_the_change_of_a_matrix_does_to_its_input_does_not_grow(kind):
    narrow, wide = moved(BASE, kind), moved(16 * BASE, kind)
    assert {"blocks.0.mixer.decay.down.weight", "blocks.1.mixer.query.weight"} <= narrow.keys()
    for name, value in narrow.items():
        assert wide[name] / value < 1.3, name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_without_it_all_grows(kind):
    narrow, wide = figures(BASE, 0, kind), figures(WIDE, 0, kind)
    for name in ("mixer 0", "mlp 1", "mixer 1 moves", "mlp 0 moves"):
        assert wide[name] / narrow[name] > 3, name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_at_the_base_width_it_changes_nothing(kind):
    optim = OptimConfig(kind=kind)
    off, on = (engine_of(config(BASE, base), optim) for base in (0, BASE))
    assert train(off, 0.01) == train(on, 0.01)
    for (name, a), (_, b) in zip(off.model.named_parameters(), on.model.named_parameters()):
        assert torch.equal(a, b), name


def test_first_weights_of_growing_matrices_shrink_and_others_do_not():
    off, on = (Decoder(config(128, base), VOCABULARY) for base in (0, BASE))
    for model in (off, on):
        initialise(model, 0)
    growing = growing_matrices(on)
    assert "blocks.0.mixer.decay.down.weight" in growing
    assert "blocks.0.mixer.decay.up.weight" not in growing
    for (name, a), (_, b) in zip(off.named_parameters(), on.named_parameters()):
        share = 0.5 if name in growing else 1.0
        torch.testing.assert_close(b, a * share, msg=name)


@pytest.mark.parametrize(("kind", "share"), [("adamw", 0.25), ("muon", 0.5)])
def test_rates_of_growing_matrices_shrink_and_decay_as_much_in_a_step(kind, share):
    model = Decoder(config(128, BASE, "GR"), VOCABULARY)
    thin = thin_matrices(model)
    assert {"blocks.0.mixer.decay.down.weight", "blocks.1.mixer.query.weight"} <= thin
    assert "blocks.0.mixer.query.weight" not in thin
    wholes = engine_of(model.config, OptimConfig(kind="muon")).optimizer._wholes
    optimizer = build_optimizer(model, OptimConfig(kind=kind, weight_decay=0.3), wholes)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        expected = share if name in growing_matrices(model) else 1.0
        assert group["lr_share"] == (0.25 if name in thin else expected), name
        decays = parameter.dim() > 1 and name != "embedding.weight"
        assert group["lr_share"] * group["weight_decay"] == (0.3 if decays else 0.0), name


@pytest.mark.parametrize("tied", [True, False])
def test_training_and_generating_scale_the_same_logits(tied):
    model = Decoder(config(128, BASE, tied_head=tied), VOCABULARY).eval()
    initialise(model, 0)
    tokens, labels = batch()
    with torch.no_grad():
        logits = model.step(tokens, 0, [])[0]
        scores = model(tokens, labels, LocalView.whole(4, LENGTH)).scores
    last = torch.nn.functional.cross_entropy(logits, labels[:, -1], reduction="none")
    torch.testing.assert_close(scores.loss_M.view(4, -1)[:, -1], last)


def test_a_negative_base_width_is_refused():
    with pytest.raises(InputError, match=r"model.base_width = -1: must be 0 or positive"):
        config(32, -1)
