"""How a run is spread over processes."""

from longctx.parallel.config import ParallelConfig, Split, resolve
from longctx.parallel.mesh import Mesh, world_size

__all__ = ["Mesh", "ParallelConfig", "Split", "resolve", "world_size"]
