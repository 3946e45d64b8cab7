import numpy as np
import pytest

from longctx.data import sources as sources_module
from longctx.data.config import DataConfig, MixtureConfig
from longctx.data.mixture import BLOCK, MixedStream, shares
from longctx.data.opening import build_loaders
from longctx.data.packing import PackedStream
from longctx.data.tokenize import TokenizeConfig, tokenize
from longctx.errors import InputError
from tests.data.stores import make_store
from tests.data.test_tokenizer import train_words

WEIGHTS = {"a": 5.0, "b": 2.0, "c": 0.01}
STORES = {name: make_store([5, 9, 4, 12]) for name in WEIGHTS}


def mixed(seed: int = 0) -> MixedStream:
    streams = {name: PackedStream(STORES[name], 6, seed) for name in WEIGHTS}
    return MixedStream(streams, WEIGHTS, seed)


def test_shares_are_weights_rounded_by_largest_remainder():
    assert shares({"a": 1, "b": 1, "c": 1}).tolist() == [3334, 3333, 3333]
    assert shares({"a": 2, "b": 1}).tolist() == [6667, 3333]
    assert shares({"a": 9999, "b": 1}).tolist() == [9999, 1]
    assert shares(WEIGHTS).sum() == BLOCK


def test_a_share_too_small_to_be_held_is_refused():
    with pytest.raises(InputError, match=r"data.mixture.b.weight = 1 is less than 1/10000"):
        shares({"a": 10_000, "b": 1})


def test_of_every_source_sequences_come_in_order_without_a_gap():
    stream = mixed()
    places = [stream.place(index) for index in range(3 * BLOCK)]
    for source, share in enumerate(shares(WEIGHTS)):
        numbers = [number for found, number in places if found == source]
        assert numbers == list(range(3 * share))
    blocks = np.split(np.array([source for source, _ in places]), 3)
    assert not np.array_equal(blocks[0], blocks[1])


def test_early_sequences_have_about_the_shares_of_all():
    stream = mixed()
    sources = [stream.place(index)[0] for index in range(1000)]
    assert abs(sources.count(0) / 1000 - shares(WEIGHTS)[0] / BLOCK) < 0.05


def test_the_order_is_keyed_by_the_seed_and_never_changes_between_versions():
    found = [[mixed(seed).place(index)[0] for index in range(20)] for seed in (0, 1)]
    assert ["".join(map(str, sources)) for sources in found] == [
        "00000101000001000000",
        "00000000001000010110",
    ]


def test_a_sequence_is_that_of_its_source():
    stream = mixed()
    plain = PackedStream(STORES["a"], 6, 0)
    for index in [*range(50), BLOCK - 1, BLOCK, 5 * BLOCK + 7]:
        _, number = stream.place(index)
        left, right = stream.slice(index, 1, 5), plain.slice(number, 1, 5)
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.labels, right.labels)
        assert stream.document_starts(index) == plain.document_starts(number)
        assert stream.num_labels(index) == plain.num_labels(number)
        assert stream.num_joined(index) == plain.num_joined(number)


class Streamed(PackedStream):
    """A stream with a state."""

    def state(self, index: int) -> dict[str, int]:
        return {"sequence": index}

    def load_state(self, state: dict[str, int]) -> None:
        self.loaded = state


def test_a_state_is_that_of_each_source_at_its_next_sequence():
    streams = {name: Streamed(STORES[name], 6, 0) for name in WEIGHTS}
    streams["b"] = PackedStream(STORES["b"], 6, 0)
    stream = MixedStream(streams, WEIGHTS, 0)
    for index in (0, 1, 77, BLOCK, 2 * BLOCK + 99):
        state = stream.state(index)
        places = [stream.place(earlier) for earlier in range(index)]
        counts = np.bincount([source for source, _ in places], minlength=3)
        assert state == {"a": {"sequence": counts[0]}, "c": {"sequence": counts[2]}}
        stream.load_state(state)
        assert (streams["a"].loaded, streams["c"].loaded) == (state["a"], state["c"])
    stream.load_state({})


def test_a_mixture_is_a_table_of_paths_and_weights(tmp_path):
    for name in "xy":
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / str(number)).write_text(name * (20 + number))
    sources = {n: MixtureConfig(path=str(tmp_path / n), weight=w) for n, w in (("x", 3), ("y", 1))}
    loaders = build_loaders(DataConfig(mixture=sources), seq_len=15, batch_size=400, seed=0)
    tokens = loaders.train.batch(0).tokens_BT
    shares_of_bytes = [float((tokens == ord(name)).sum()) / tokens.numel() for name in "xy"]
    assert shares_of_bytes[0] / sum(shares_of_bytes) == pytest.approx(0.75, abs=0.05)
    # Each text has a single byte, so the entropy is that of the weights.
    assert loaders.unigram_entropy == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    one = build_loaders(DataConfig(str(tmp_path / "x")), seq_len=15, batch_size=1, seed=0)
    assert loaders.fingerprint != one.fingerprint


def test_a_mixture_has_one_validation_path_for_all(tmp_path):
    for name in "xyz":
        (tmp_path / name).write_text(name * 50)
    sources = {name: MixtureConfig(path=str(tmp_path / name)) for name in "xy"}
    config = DataConfig(mixture=sources, validation_path=str(tmp_path / "z"))
    loaders = build_loaders(config, seq_len=10, batch_size=26, seed=0)
    tokens = loaders.validation.batch(0).tokens_BT.flatten()
    assert loaders.tokenizer.decode(tokens) == "z" * 250
    assert (tokens[:52] == tokens[52:104]).all()
    assert loaders.unigram_entropy == 0


def test_sources_of_different_vocabularies_are_refused(tmp_path):
    train_words(tmp_path / "words.json")
    (tmp_path / "texts").mkdir()
    for number in range(9):
        (tmp_path / "texts" / str(number)).write_text("text " * 9)
    for name, tokenizer in (("x", ""), ("y", str(tmp_path / "words.json"))):
        options = TokenizeConfig(output=str(tmp_path / name), tokenizer=tokenizer, workers=1)
        tokenize(str(tmp_path / "texts"), options)
    mixture = {name: MixtureConfig(path=str(tmp_path / name)) for name in "xy"}
    message = r"data.mixture.y has ids of another tokenizer .* than data.mixture.x \(bytes, 258\)"
    with pytest.raises(InputError, match=message):
        build_loaders(DataConfig(mixture=mixture), seq_len=8, batch_size=1, seed=0)
    for path, held_out in ("xy", "yx", ("texts", "y")):
        config = DataConfig(str(tmp_path / path), validation_path=str(tmp_path / held_out))
        with pytest.raises(InputError, match=r"^data\.validation_path = .* ids of another tokeniz"):
            build_loaders(config, seq_len=8, batch_size=1, seed=0)


def test_the_order_of_the_tables_changes_nothing(tmp_path):
    for name in "xy":
        (tmp_path / name).write_text(name * 500)
    one = {name: MixtureConfig(path=str(tmp_path / name)) for name in "xy"}
    configs = [DataConfig(mixture=one), DataConfig(mixture=dict(reversed(one.items())))]
    assert configs[0] == configs[1]
    first, second = (build_loaders(c, seq_len=10, batch_size=40, seed=0) for c in configs)
    for name in ("train", "validation"):
        tokens = [getattr(loaders, name).batch(0).tokens_BT for loaders in (first, second)]
        assert (tokens[0] == tokens[1]).all()


def test_a_validation_path_is_read_once_and_as_the_table_says(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"body": "xx"}\n')
    (tmp_path / "y").write_text("yy")
    (tmp_path / "z.jsonl").write_text('{"words": "zz"}\n')
    sources = {
        "x": MixtureConfig(str(tmp_path / "x.jsonl"), format="jsonl", column="body"),
        "y": MixtureConfig(str(tmp_path / "y")),
    }
    opened = []
    real = sources_module.open_store
    monkeypatch.setattr(
        sources_module, "open_store", lambda s, *rest: opened.append(s.path) or real(s, *rest)
    )
    path = str(tmp_path / "z.jsonl")
    config = DataConfig(mixture=sources, column="words", validation_path=path)
    loaders = build_loaders(config, seq_len=4, batch_size=1, seed=0)
    assert loaders.tokenizer.decode(loaders.validation.batch(0).tokens_BT.flatten()) == "zz"
    assert opened.count(path) == 1


def test_what_is_set_beside_a_mixture_without_effect_is_refused(tmp_path):
    mixture = {"x": MixtureConfig(str(tmp_path))}
    for name, value in (("column", "body"), ("streaming", True), ("bad_rows", "skip")):
        with pytest.raises(InputError, match=rf"^data\.{name} = .* has no effect beside"):
            DataConfig(mixture=mixture, **{name: value})
