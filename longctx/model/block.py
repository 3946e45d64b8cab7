"""One layer of the decoder, and what it keeps for its backward pass."""

from typing import Any

import torch
from longctx_kernels.keeping import Keeper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longctx.mixers import Mixer
from longctx.mixers.base import Mixed, RMSNorm
from longctx.model.memory import BlockMemory
from longctx.model.offload import WaitingRoom
from longctx.model.tiles import by_tiles, tile_count
from longctx.sequence.local import LocalView
from longctx.sequence.view import SequenceView


class Block(nn.Module):
    """Pre-norm mixer and feed-forward layer around the residual stream; one of them may lack."""

    def __init__(
        self,
        mixer: tuple[RMSNorm, Mixer] | None,
        mlp: tuple[RMSNorm, nn.Module] | None,
        dropout: float,
        memory: BlockMemory,
    ):
        super().__init__()
        self.mixer: Mixer | None = None
        self.mlp: nn.Module | None = None
        if mixer is not None:
            self.mixer_norm, self.mixer = mixer
        if mlp is not None:
            self.mlp_norm, self.mlp = mlp
        self.dropout, self.memory = dropout, memory

    def forward(self, x_BTD: Tensor, view: SequenceView, room: WaitingRoom | None = None) -> Mixed:
        """New residual stream, and the mixer's losses and statistics.

        If the block is checkpointed its input may wait in a room.
        """
        if self.memory.checkpointing == "none" or not torch.is_grad_enabled():
            return self._pass(x_BTD, view)
        if room is None:
            return self._checkpointed(x_BTD, view)
        with room.hooks(x_BTD):
            return self._checkpointed(x_BTD, view)

    def _checkpointed(self, x_BTD: Tensor, view: SequenceView) -> Mixed:
        """The same; what the backward pass needs is computed once more.

        Keys and values on the view's shelf come and go as tensors of the checkpoint: by the time
        of the second pass the shelf has those of later layers. A second pass ends early only in a
        feed-forward layer, which is behind all that ranks exchange.
        """
        taken = tuple(view.shelf or ()) if self.memory.takes_keys else ()

        def run(x_BTD: Tensor, *taken: Tensor) -> tuple[Mixed, tuple[Tensor, ...]]:
            own = view if view.shelf is None else view.with_shelf(taken)
            return self._pass(x_BTD, own), tuple(own.shelf or ())

        keeper = Keeper(self.memory.checkpointing == "keep")
        mixed, left = checkpoint(
            run,
            x_BTD,
            *taken,
            use_reentrant=False,
            preserve_rng_state=False,
            early_stop=self.mlp is not None,
            context_fn=keeper.passes,
        )
        if left and view.shelf is not None:
            view.shelf[:] = left
        return mixed

    def _pass(self, x_BTD: Tensor, view: SequenceView) -> Mixed:
        losses: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        if self.mixer is not None:
            out_BTD, losses, statistics = self.mixer(self.mixer_norm(x_BTD), view)
            x_BTD = x_BTD + self._drop(out_BTD, view, "mixer dropout")
        if self.mlp is not None:
            x_BTD = x_BTD + self._drop(self._feed_forward(x_BTD, view), view, "mlp dropout")
        return Mixed(x_BTD, losses, statistics)

    def _feed_forward(self, x_BTD: Tensor, view: SequenceView) -> Tensor:
        assert self.mlp is not None
        if not self.memory.mlp_tokens:
            return self.mlp(self.mlp_norm(x_BTD))
        count = tile_count(view.plan, self.memory.mlp_tokens)
        return by_tiles(x_BTD, (self.mlp_norm, self.mlp), count)

    def _drop(self, x_BTD: Tensor, view: SequenceView, purpose: str) -> Tensor:
        if not (self.dropout and self.training):
            return x_BTD
        kept_BTD = view.uniform(purpose, x_BTD.shape[-1]) >= self.dropout
        return x_BTD * kept_BTD / (1 - self.dropout)

    def step(self, x_BTD: Tensor, view: LocalView, memory: Any) -> tuple[Tensor, Any]:
        """The same for the next tokens of a sequence."""
        if self.mixer is not None:
            out_BTD, memory = self.mixer.step(self.mixer_norm(x_BTD), view, memory)
            x_BTD = x_BTD + out_BTD
        if self.mlp is not None:
            x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD, memory
