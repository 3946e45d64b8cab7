"""A run and the tokenizer that its ids come from."""

import pytest
from tokenizers import ByteLevelBPETokenizer

from longctx.cli import main
from longctx.errors import InputError
from longctx.eval.generate import GenerateConfig, generate
from longctx.train.trainer import train


@pytest.fixture
def tokenizer(tmp_path, corpus):
    """Makes a small tokenizer of the corpus."""

    def make(name: str, size: int):
        trained = ByteLevelBPETokenizer()
        files = [str(file) for file in sorted(corpus.iterdir())]
        trained.train(files, vocab_size=size, show_progress=False, special_tokens=["</s>"])
        trained.save(str(tmp_path / name))
        return tmp_path / name

    return make


def test_text_is_sampled_with_the_tokenizer_of_the_run(settings, tokenizer):
    file = tokenizer("own.json", 290)
    run = settings("words", data__tokenizer=file, train__steps=2)
    train(run)
    content = file.read_bytes()
    assert (run.run.path / "tokenizer.json").read_bytes() == content
    file.unlink()
    text = generate(str(run.run.path), GenerateConfig(prompt="7 times", tokens=5))
    assert text.startswith("7 times")
    other = str(tokenizer("other.json", 280))
    for path in (other, "bytes"):
        with pytest.raises(InputError, match="another tokenizer than"):
            generate(str(run.run.path), GenerateConfig(tokenizer=path))


def test_weights_are_not_taken_from_a_run_with_another_tokenizer(settings, tokenizer, capsys):
    first = settings("first", data__tokenizer=tokenizer("a.json", 290), train__steps=1)
    train(first)
    second = settings(
        "second", data__tokenizer=tokenizer("b.json", 280), run__init_from=first.run.path
    )
    with pytest.raises(InputError, match=r"init_from = .*another tokenizer"):
        train(second)
    assert not second.run.path.exists()
    assert main(["generate", str(first.run.path), "--tokenizer", "nowhere.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_is_not_resumed_with_another_tokenizer(settings, tokenizer):
    file = tokenizer("a.json", 290)
    train(settings("run", data__tokenizer=file, train__steps=2, train__stop_after=1))
    file.write_bytes(tokenizer("b.json", 280).read_bytes())
    with pytest.raises(InputError, match="other data"):
        train(settings("run", data__tokenizer=file, train__steps=2))
