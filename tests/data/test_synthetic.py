import numpy as np
import pytest
import torch

from longctx.data import IGNORE, DataConfig, build_loaders
from longctx.data.synthetic import MARKER, NOISE, NUM_SIGNS, GeneratedStream
from longctx.errors import InputError

MQAR = DataConfig(task="mqar", pairs=5, answers=3, vocabulary=24)
COPYING = DataConfig(task="selective_copying", answers=4, vocabulary=10)
NEEDLE = DataConfig(task="needle", pairs=5, answers=3, vocabulary=24)
CONFIGS = {"mqar": MQAR, "needle": NEEDLE, "selective_copying": COPYING}
POSSIBLE = {"mqar": 12, "needle": 8, "selective_copying": 8}
TASKS = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
SEQ_LEN, COUNT = 31, 300


def rows(config: DataConfig, seed: int = 0, split: str = "train", count: int = COUNT) -> list:
    """Tokens and labels of the first sequences."""
    stream = GeneratedStream(config, SEQ_LEN, seed, split)
    parts = [stream.slice(index, 0, SEQ_LEN) for index in range(count)]
    return [(part.tokens.tolist(), part.labels.tolist()) for part in parts]


def test_the_answer_of_mqar_is_the_token_after_the_only_earlier_place_of_the_query():
    asked_first = set()
    for tokens, labels in rows(MQAR):
        places = [place for place, label in enumerate(labels) if label != IGNORE]
        assert len(places) == MQAR.answers
        for place in places:
            earlier = [before for before in range(place) if tokens[before] == tokens[place]]
            assert len(earlier) == 1
            assert earlier[0] % 2 == 0
            assert earlier[0] < 2 * MQAR.pairs <= place
            assert labels[place] == tokens[earlier[0] + 1]
        asked_first.add(tokens.index(tokens[places[0]]) // 2)
    assert asked_first == set(range(MQAR.pairs))


def test_the_answer_of_a_needle_is_told_once_anywhere_before_the_questions():
    shown, starts = SEQ_LEN - NEEDLE.answers, set()
    for tokens, labels in rows(NEEDLE):
        assert labels[:shown] == [IGNORE] * shown
        for query, answer in zip(tokens[shown:], labels[shown:]):
            assert tokens[:shown].count(query) == 1
            starts.add(tokens.index(query))
            assert tokens[tokens.index(query) + 1] == answer
            assert tokens.count(answer) == 1
            assert query < 8 <= answer < 16
        assert len(set(tokens[shown:])) == NEEDLE.answers
        assert sum(token >= 16 for token in tokens) == shown - 2 * NEEDLE.pairs
    assert starts == set(range(shown - 1))


def test_mqar_tells_different_keys_and_values_and_fills_with_other_tokens():
    half = MQAR.vocabulary // 2
    filled = set()
    for tokens, labels in rows(MQAR):
        told = tokens[: 2 * MQAR.pairs]
        assert len(set(told)) == len(told)
        assert max(told[::2]) < half <= min(told[1::2])
        rest = zip(tokens[len(told) :], labels[len(told) :])
        fillers = {token for token, label in rest if label == IGNORE}
        assert not fillers & set(told)
        filled |= fillers
    assert filled == set(range(MQAR.vocabulary))


def test_queries_come_at_every_place_after_the_pairs():
    rows_of_places = [np.flatnonzero(np.array(labels) != IGNORE) for _, labels in rows(MQAR)]
    places = {int(place) for row in rows_of_places for place in row}
    assert places == set(range(2 * MQAR.pairs, SEQ_LEN))


def test_selective_copying_asks_for_the_letters_in_their_order():
    shown, places = SEQ_LEN - COPYING.answers, set()
    for tokens, labels in rows(COPYING):
        letters = [token for token in tokens if token >= NUM_SIGNS]
        assert labels == [IGNORE] * shown + letters
        assert tokens[shown:] == [MARKER] * COPYING.answers
        assert set(tokens[:shown]) == {NOISE, *letters}
        places |= {place for place in range(shown) if tokens[place] != NOISE}
    assert places == set(range(shown))


@TASKS
def test_answers_and_tokens_are_uniform(config):
    answers = [label for _, labels in rows(config, count=3000) for label in labels if label >= 0]
    counts = np.bincount(answers)
    possible = counts[counts > 0]
    assert len(possible) == POSSIBLE[config.task]
    assert np.abs(possible / possible.mean() - 1).max() < 0.15


@TASKS
def test_any_sequence_can_be_read_at_any_time_and_in_parts(config):
    stream = GeneratedStream(config, SEQ_LEN, 7, "train")
    for index in (5, 0, 2**40):
        whole = stream.slice(index, 0, SEQ_LEN)
        fresh = GeneratedStream(config, SEQ_LEN, 7, "train")
        parts = [fresh.slice(index, *cut) for cut in ((0, 4), (4, 19), (19, SEQ_LEN))]
        for name in ("tokens", "labels"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(joined, getattr(whole, name))


@TASKS
def test_batches_do_not_depend_on_how_rows_are_dealt_out(config):
    def loaders():
        return build_loaders(config, SEQ_LEN, batch_size=6, seed=3)

    whole = loaders().train.batch(4)
    # Two replicas of two ranks in zigzag, each with a loader of its own.
    for replica in range(2):
        for segments in ([(0, 8), (23, 31)], [(8, 23)]):
            loader = loaders().train
            ids = loader.ids(4)[3 * replica : 3 * replica + 3]
            part = loader.read(ids, segments)
            own = [place for start, stop in segments for place in range(start, stop)]
            rows_of_it = slice(3 * replica, 3 * replica + 3)
            assert torch.equal(part.tokens_BT, whole.tokens_BT[rows_of_it][:, own])
            assert torch.equal(part.labels_BT, whole.labels_BT[rows_of_it][:, own])
            assert part.documents == ((0,),) * 3
    assert loaders().train.num_valid(range(24, 30)) == int((whole.labels_BT != IGNORE).sum())


@TASKS
def test_no_sequence_is_in_both_splits(config):
    tiny = DataConfig(task=config.task, pairs=2, answers=1, vocabulary=6, validation_percent=50)

    def drawn(seed: int, split: str) -> set[tuple]:
        stream = GeneratedStream(tiny, 6, seed, split)
        return {tuple(stream.slice(index, 0, 6).tokens) for index in range(2000)}

    train, validation = drawn(0, "train") | drawn(1, "train"), drawn(0, "validation")
    assert len(train) > 5 < len(validation)
    assert not train & validation
    for seed in (0, 1):
        firsts = {tuple(tokens) for tokens, _ in rows(config, seed)}
        assert not firsts & {tuple(tokens) for tokens, _ in rows(config, 0, "validation")}


@TASKS
def test_seeds_change_training_and_not_validation(config):
    first, second = (build_loaders(config, SEQ_LEN, batch_size=8, seed=seed) for seed in (1, 2))
    assert not torch.equal(first.train.batch(0).tokens_BT, second.train.batch(0).tokens_BT)
    assert torch.equal(first.validation.batch(0).tokens_BT, second.validation.batch(0).tokens_BT)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == config.vocabulary
    assert first.unigram_entropy == pytest.approx(np.log(POSSIBLE[config.task]))


# fmt: off
FIRST_MQAR = [
    0, 21, 2, 20, 11, 17, 9, 13, 1, 16, 19, 10, 5, 6, 4, 3,
    8, 18, 5, 4, 5, 2, 15, 22, 9, 10, 23, 1, 12, 7, 4,
]
FIRST_ANSWERS = [20, 13, 16]
FIRST_COPYING = [
    0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 4, 0, 0,
    3, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1,
]
# fmt: on


def test_the_first_sequences_stay_what_they_are():
    tokens, labels = rows(MQAR)[0]
    copied, letters = rows(COPYING)[0]
    assert tokens == FIRST_MQAR
    assert [label for label in labels if label != IGNORE] == FIRST_ANSWERS
    assert copied == FIRST_COPYING
    assert letters[-4:] == [token for token in FIRST_COPYING if token >= NUM_SIGNS]


MISTAKES = {
    "path": ({"path": "x.txt"}, "data.path = 'x.txt' and data.task = 'mqar'"),
    "answers": ({"answers": 9}, "data.answers = 9 asks for more keys than data.pairs = 8"),
    "no answers": ({"answers": 0}, "data.answers = 0"),
    "vocabulary": ({"vocabulary": 17}, "data.vocabulary = 17: mqar needs at least 18"),
    "letters": ({"task": "selective_copying", "vocabulary": 3}, "data.vocabulary = 3"),
}


@pytest.mark.parametrize(("changes", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_task_that_cannot_be_made_is_refused(changes, words):
    with pytest.raises(InputError) as caught:
        DataConfig(**({"task": "mqar"} | changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("mqar", "train.seq_len = 12 is too short for data.pairs = 5 and data.answers = 3"),
        ("selective_copying", "train.seq_len = 5 is too short for data.answers = 3"),
    ],
)
def test_a_task_that_does_not_fit_the_sequence_is_refused(task, words):
    config = DataConfig(task=task, pairs=5, answers=3)
    config.check_length(13)
    with pytest.raises(InputError, match=words):
        config.check_length(12 if task == "mqar" else 5)


def test_a_task_with_too_few_sequences_to_hold_some_out_is_refused():
    config = DataConfig(task="selective_copying", answers=1, vocabulary=4, validation_percent=1)
    with pytest.raises(InputError, match="draws gave no sequence for"):
        build_loaders(config, 2, 1, 0)


def test_text_is_read_as_before_whatever_the_fields_of_tasks_say(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    config = DataConfig(str(tmp_path), pairs=100, answers=0, vocabulary=1)
    config.check_length(3)
    assert build_loaders(config, 3, 1, 0).vocab_size == 258
