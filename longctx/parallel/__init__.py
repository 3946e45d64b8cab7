"""How a run is spread over processes."""

from longctx.parallel.config import ParallelConfig, Split, resolve
from longctx.parallel.mesh import Mesh, is_first_process, world_size

__all__ = ["Mesh", "ParallelConfig", "Split", "is_first_process", "resolve", "world_size"]
