"""Configuration: strict TOML decoded into frozen dataclasses, registries by `kind`, overrides.

A file and a command line pass through one decoder, so both give the same messages.
"""

from longctx.config.decoding import decode
from longctx.config.fields import first_difference, flatten, to_dict
from longctx.config.files import load_table, merge, to_toml
from longctx.config.overrides import apply_overrides
from longctx.config.packaged import find_config
from longctx.config.registry import Registered

__all__ = [
    "Registered",
    "apply_overrides",
    "decode",
    "find_config",
    "first_difference",
    "flatten",
    "load_table",
    "merge",
    "to_dict",
    "to_toml",
]
