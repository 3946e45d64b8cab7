"""Token mixers. A file in this folder that defines a MixerConfig with a `kind` is all it takes."""

import importlib
import pkgutil

from longctx.mixers.base import Mixed, Mixer, MixerConfig, Place

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["Mixed", "Mixer", "MixerConfig", "Place"]
