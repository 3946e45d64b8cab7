"""Whatever happens to a file of a checkpoint is noticed, named, and executes nothing."""

import ast
import json
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch

import longctx.checkpoint
from longctx.checkpoint import latest, open_checkpoint, read_state
from longctx.checkpoint.manifest import Manifest, parse_manifest
from longctx.checkpoint.shards import SHARDING, Sum
from longctx.checkpoint.strict import digest
from longctx.errors import InputError
from tests.checkpoint.crews import save, together

SHARD = "shard-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with the checkpoints of steps 3 and 12, written by two processes."""
    folder = tmp_path_factory.mktemp("original")
    for step in (3, 12):
        save(folder, step, 2)
    return folder


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def damage(newest: Path, chance: random.Random) -> str:
    """Does one thing to a checkpoint; the name of the file it was done to."""
    kind = chance.choice(["flip", "flip", "truncate", "swap", "missing", "foreign", "grow"])
    path = chance.choice(sorted(newest.iterdir()))
    if kind == "flip":
        flip(path, chance)
    elif kind == "truncate":
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    elif kind == "grow":
        path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 9)))
    elif kind == "swap":
        shutil.copy(newest.parent / "step-3" / path.name, path)
    elif kind == "missing":
        path.unlink()
    else:
        path = newest / chance.choice([".metadata", "model.pt", "x.safetensors", "__init__.py"])
        path.write_bytes(chance.randbytes(5))
    return path.name


def test_a_hundred_damages_are_named_and_the_older_checkpoint_offered(original, tmp_path):
    found = []
    for seed in range(100):
        folder = tmp_path / str(seed)
        shutil.copytree(original, folder)
        name = damage(folder / "step-12", random.Random(seed))
        with pytest.raises(InputError) as caught:
            open_checkpoint(folder / "step-12")
        assert str(caught.value).startswith(f"{folder}/step-12/{name}: "), seed
        assert str(caught.value).endswith(f"; remove {folder}/step-12 to go on from step-3")
        found.append(name)
        shutil.rmtree(folder)
    assert len(found) == 100
    assert {"manifest.json", "state.json", "shard-00001-of-00002.safetensors"} <= set(found)


def test_every_bit_of_a_manifest_counts(original):
    data = (original / "step-12/manifest.json").read_bytes()
    assert parse_manifest(data).step == 12
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(Exception, match=r"manifest\.json"):
                parse_manifest(bytes(changed))


@pytest.mark.parametrize("readers", [2, 3])
def test_all_processes_raise_the_same_error_wherever_the_damage_is(original, tmp_path, readers):
    for name in sorted(path.name for path in (original / "step-12").iterdir()):
        folder = tmp_path / name
        shutil.copytree(original, folder)
        flip(folder / "step-12" / name, random.Random(0))
        errors = together(readers, lambda crew, f=folder: open_checkpoint(f / "step-12", crew))
        assert {type(error) for error in errors} == {InputError}
        assert len({str(error) for error in errors}) == 1
        assert f"step-12/{name}: " in str(errors[0])


def test_an_older_checkpoint_is_offered_only_if_it_is_good(original, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    save(folder, 20, 2)
    for step in (12, 20):
        flip(folder / f"step-{step}/shard-00002-of-00002.safetensors", random.Random(1))
    with pytest.raises(InputError, match=r"remove .*/step-20 and step-12 to go on from step-3$"):
        open_checkpoint(folder / "step-20")
    flip(folder / "step-3/state.json", random.Random(1))
    with pytest.raises(InputError, match=r"remove .*/step-20; no older checkpoint is good$"):
        open_checkpoint(folder / "step-20")


def test_a_checkpoint_under_the_name_of_another_step_is_refused(original, tmp_path):
    shutil.copytree(original / "step-12", tmp_path / "step-13")
    with pytest.raises(InputError, match=r"step-13/manifest\.json: is of step 12"):
        open_checkpoint(tmp_path / "step-13")
    shutil.copytree(original / "step-12", tmp_path / "best")
    assert open_checkpoint(tmp_path / "best").state["step"] == 12


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"step-1/manifest\.json: missing"):
        open_checkpoint(tmp_path / "step-1")
    for name in ("nothing", "file"):
        with pytest.raises(InputError, match=f"{name}: no checkpoint here"):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_the_state_is_read_only_if_it_is_whole(original, tmp_path, name):
    shutil.copytree(original, tmp_path / "run")
    assert read_state(tmp_path / "run/step-12")["tokens"] == 120
    flip(tmp_path / "run/step-12" / name, random.Random(2))
    with pytest.raises(InputError, match=rf"{name}: .* to go on from step-3$"):
        read_state(tmp_path / "run/step-12")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def small(tmp_path):
    """A folder with the checkpoints of steps 3 and 12, written by one process."""
    for step in (3, 12):
        save(tmp_path / "run", step)
    return tmp_path / "run/step-12"


def rewrite_manifest(folder: Path, **names: bytes) -> None:
    """Makes the manifest match the files that lie in a folder, whatever they are."""
    before = parse_manifest((folder / "manifest.json").read_bytes())
    contents = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} | names
    del contents["manifest.json"]
    files = {name: Sum(len(data), digest(data)) for name, data in contents.items()}
    manifest = Manifest(before.step, before.config_sha256, before.world, files)
    (folder / "manifest.json").write_bytes(manifest.encode())


PLANTED = [SHARD, "state.json", "manifest.json", ".metadata", "__init__.py", "model.pt", "x.pkl"]


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("matched", [False, True], ids=["planted", "in the manifest"])
@pytest.mark.parametrize("name", [*PLANTED, "shard-00002-of-00001.safetensors", "sub/evil.pt"])
def test_a_planted_pickle_is_never_executed(small, tmp_path, name, matched, kind):
    mark = tmp_path / "executed"
    path = small / name
    path.parent.mkdir(exist_ok=True)
    if kind == "torch":
        torch.save(Bomb(mark), tmp_path / "saved.pt")
        (tmp_path / "saved.pt").rename(path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    if matched and name != "manifest.json":
        rewrite_manifest(small, **({name: path.read_bytes()} if "/" in name else {}))
    with pytest.raises(InputError) as caught:
        open_checkpoint(small)
    assert path.name in str(caught.value) or path.parent.name in str(caught.value)
    assert str(caught.value).endswith("to go on from step-3")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is a dud"


@pytest.mark.parametrize("name", ["../../evil.pt", "/tmp/evil.pt", "a/../state.json", ""])
def test_a_manifest_cannot_name_files_elsewhere(small, name):
    rewrite_manifest(small, **{name: b"anything"})
    with pytest.raises(InputError, match="no such file belongs to a checkpoint"):
        open_checkpoint(small)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b"[" * 10**6, b'{"format": 2}'])
def test_any_other_manifest_is_refused(small, content):
    (small / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json: .* to go on from step-3$"):
        open_checkpoint(small)


def test_a_manifest_of_a_million_processes_is_refused_at_once(small):
    manifest = parse_manifest((small / "manifest.json").read_bytes())
    many = Manifest(manifest.step, manifest.config_sha256, 10**12, manifest.files)
    (small / "manifest.json").write_bytes(many.encode())
    with pytest.raises(InputError, match="no such file belongs to a checkpoint"):
        open_checkpoint(small)


def test_another_format_is_refused(small):
    file = small / "manifest.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(InputError, match="format 3 is not the format 2"):
        open_checkpoint(small)


@pytest.mark.parametrize("name", [SHARD, "state.json", "manifest.json"])
def test_a_link_is_not_followed(small, tmp_path, name):
    (small / name).rename(tmp_path / "elsewhere")
    (small / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{name}: is no ordinary file"):
        open_checkpoint(small)


def shard(entries: dict, sharding: dict | None = None, data: bytes = b"", **header) -> bytes:
    """The bytes of a safetensors file with any header."""
    if sharding is None:
        sharding = {n: {"saved_offsets": [0], "shape": e["shape"]} for n, e in entries.items()}
    text = {"__metadata__": {SHARDING: json.dumps(sharding)}} | entries | header
    encoded = json.dumps(text).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(shape: list, start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def twice(content: bytes) -> bytes:
    """A shard whose header says all of it two times."""
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    header = header[:-1] + b"," + header[1:]
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


FOUR = bytes(16)
BOMBS = {
    "no header": b"abc",
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "a deep header": struct.pack("<Q", 10**6) + b"[" * 10**6,
    "a header that is no object": struct.pack("<Q", 2) + b"[]",
    "a header that is no text": struct.pack("<Q", 2) + b"\xff\xfe",
    "a name twice": twice(shard({"w": entry([4], 0, 16)}, data=FOUR)),
    "no sharding": shard({}, __metadata__={}),
    "metadata that is no object": shard({}, __metadata__=[1]),
    "sharding of other tensors": shard({"w": entry([4], 0, 16)}, {"v": {}}, FOUR),
    "an unknown type": shard({"w": entry([4], 0, 16, "X9")}, data=FOUR),
    "a type that is a list": shard({"w": entry([4], 0, 16, ["F32"])}, data=FOUR),
    "an entry that is no object": shard({"w": 7}, {"w": {}}),
    "a negative shape": shard({"w": entry([-4], 0, 16)}, data=FOUR),
    "a fractional shape": shard({"w": entry([4.0], 0, 16)}, data=FOUR),
    "a shape of truths": shard({"w": entry([True], 0, 4)}, data=FOUR[:4]),
    "a shape beyond memory": shard({"w": entry([10**30], 0, 16)}, data=FOUR),
    "an empty shape beyond memory": shard(
        {"w": entry([0, 10**30], 0, 0)}, {"w": {"saved_offsets": [0, 0], "shape": [0, 10**30]}}
    ),
    "a number of many digits": struct.pack("<Q", 10**5) + b"1" * 10**5,
    "data beyond the file": shard({"w": entry([4], 0, 16)}, data=FOUR[:8]),
    "data after the tensors": shard({"w": entry([4], 0, 16)}, data=FOUR + b"x"),
    "less data than the shape": shard({"w": entry([4], 0, 8)}, data=FOUR[:8]),
    "data backwards": shard({"w": entry([4], 16, 0)}, data=FOUR),
    "overlapping data": shard({"v": entry([4], 0, 16), "w": entry([4], 0, 16)}, data=FOUR),
    "a gap": shard({"w": entry([2], 8, 16)}, data=FOUR),
    "a block outside": shard(
        {"w": entry([4], 0, 16)}, {"w": {"saved_offsets": [1], "shape": [4]}}, FOUR
    ),
    "offsets of another rank": shard(
        {"w": entry([4], 0, 16)}, {"w": {"saved_offsets": [], "shape": []}}, FOUR
    ),
    "a tensor larger than its pieces": shard(
        {"w": entry([4], 0, 16)}, {"w": {"saved_offsets": [0], "shape": [2**40]}}, FOUR
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_malicious_shard_is_one_short_error(small, bomb):
    (small / SHARD).write_bytes(BOMBS[bomb])
    rewrite_manifest(small)
    with pytest.raises(InputError) as caught:
        open_checkpoint(small)
    text = str(caught.value)
    assert SHARD in text or "only 4 of" in text
    assert "\n" not in text
    assert len(text.replace(str(small.parent), "")) < 300


def test_the_crafted_shards_are_refused_for_their_fault_alone(small):
    (small / SHARD).write_bytes(shard({"w": entry([4], 0, 16)}, data=FOUR))
    rewrite_manifest(small)
    assert open_checkpoint(small).read("w").tolist() == [0.0] * 4


def test_the_state_must_be_of_the_manifest(small):
    file = small / "state.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    rewrite_manifest(small)
    with pytest.raises(InputError, match=r"state\.json: is of another step or config"):
        open_checkpoint(small)


def test_nothing_here_can_unpickle():
    for path in Path(longctx.checkpoint.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            banned = ("pickle", "dill", "shelve", "marshal", "torch.load", "torch.distributed")
            assert not [name for name in names if name.startswith(banned)], path


def test_reading_executes_nothing(small, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    checkpoint = open_checkpoint(latest(small.parent))
    for name in checkpoint.names:
        checkpoint.read(name)
