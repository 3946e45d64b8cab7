"""The manifest: what a checkpoint consists of, to the last bit.

It names every file with its size and sha256, and holds the sha256 of itself; it is written last. A
hash shows that nothing changed by accident. It says nothing about who wrote a file, so no file is
ever read in a way that could execute it.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from longctx.checkpoint.shards import Sum, shard_name
from longctx.checkpoint.strict import DamageError, canonical, digest, parse_object

FORMAT = 2
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
OWN_SUM = "sha256"


@dataclass(frozen=True)
class Manifest:
    """What a manifest says."""

    step: int
    """Steps that the checkpoint's weights have been trained."""
    config_sha256: str
    """That of the config in the state, written canonically."""
    world: int
    """How many files hold tensors: as many as processes, or more if one had several blocks of a
    tensor."""
    files: dict[str, Sum]
    """Every file but the manifest."""

    def encode(self) -> bytes:
        """The contents of the file."""
        content = {"format": FORMAT, **asdict(self)}
        return _encode(content | {OWN_SUM: digest(canonical(content))})

    @property
    def shards(self) -> list[str]:
        """The files of tensors, in order."""
        return [shard_name(i, self.world) for i in range(self.world)]


def config_sum(state: dict[str, Any]) -> str:
    """The sha256 of the config in a state."""
    return digest(canonical(state.get("config")))


def parse_manifest(data: bytes) -> Manifest:
    """What a manifest says; DamageError if it is not, bit for bit, one that `encode` made."""
    try:
        content = parse_object(data)
    except ValueError as error:
        raise DamageError(MANIFEST_FILE, f"unreadable ({error})") from None
    version = content.pop("format", None)
    if type(version) is int and version != FORMAT:
        raise DamageError(
            MANIFEST_FILE,
            f"format {version} is not the format {FORMAT} that this version of longctx reads",
        )
    try:
        files = {name: Sum(**fields) for name, fields in dict(content.pop("files")).items()}
        content.pop(OWN_SUM)
        manifest = Manifest(files=files, **content)
        if manifest.encode() != data:
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):
        raise DamageError(MANIFEST_FILE, "damaged (its sha256 is not its own)") from None
    _check_contents(manifest)
    return manifest


def _check_contents(manifest: Manifest) -> None:
    """Refuses a manifest that matches its sum, but that longctx never wrote."""
    sums = manifest.files.values()
    numbers = [manifest.step, manifest.world, *(s.bytes for s in sums)]
    texts = [manifest.config_sha256, *(s.sha256 for s in sums)]
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise DamageError(MANIFEST_FILE, "holds something else where a number belongs")
    if not all(type(text) is str for text in texts):
        raise DamageError(MANIFEST_FILE, "holds something else where a sha256 belongs")
    expected = [STATE_FILE]
    expected += [shard_name(i, manifest.world) for i in range(min(manifest.world, len(sums)))]
    for name in manifest.files:
        if name not in expected:
            raise DamageError(name, "is in the manifest, but no such file belongs to a checkpoint")
    for name in expected:
        if name not in manifest.files:
            raise DamageError(name, "is not in the manifest")


def _encode(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"
