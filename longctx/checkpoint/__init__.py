"""Checkpoints: verified safetensors and JSON that any number of processes write and read.

A checkpoint is a folder: `shard-I-of-N.safetensors` of each process, `state.json`, and
`manifest.json` with the size and sha256 of the others. docs/adr/0004 says why nothing is a pickle.
"""

from longctx.checkpoint.boxes import whole
from longctx.checkpoint.config import Address, CheckpointConfig
from longctx.checkpoint.contents import (
    check_model,
    load_model,
    load_random,
    random_boxes,
)
from longctx.checkpoint.crew import Crew, Solo
from longctx.checkpoint.finding import latest, resolve
from longctx.checkpoint.reading import Checkpoint, open_checkpoint, read_state
from longctx.checkpoint.saving import Checkpoints
from longctx.parallel.box import Box, model_tensors

__all__ = [
    "Address",
    "Box",
    "Checkpoint",
    "CheckpointConfig",
    "Checkpoints",
    "Crew",
    "Solo",
    "check_model",
    "latest",
    "load_model",
    "load_random",
    "model_tensors",
    "open_checkpoint",
    "random_boxes",
    "read_state",
    "resolve",
    "whole",
]
