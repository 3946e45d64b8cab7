"""What libraries read from the environment, set before they do; a user's own value stands."""

import os

ENTRIES = 2000
"""Exchanges that torch remembers."""
CUBLAS_WORKSPACE = ":4096:8"


def record_exchanges() -> None:
    """Makes torch remember the last exchanges; call before the first process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(ENTRIES))


def fix_cublas_workspace() -> None:
    """Keeps cuBLAS from adding up in another order each time; call before its first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
