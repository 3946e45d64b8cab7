"""A small study file beside the config that it extends."""

import pytest

BASE = """
[data]
task = "mqar"
pairs = 2
answers = 2
vocabulary = 12
[model]
width = 16
depth = 1
pattern = "M"
[model.mixers.M]
kind = "softmax"
num_heads = 1
[train]
steps = 4
seq_len = 12
[eval]
sequences = 4
"""


@pytest.fixture
def write(tmp_path):
    """Writes a study with these axes; its path."""

    def write_study(axes: str) -> str:
        (tmp_path / "base.toml").write_text(BASE)
        file = tmp_path / "study.toml"
        file.write_text(f'extends = "base.toml"\n[study]\ndir = "{tmp_path}/out"\n{axes}')
        return str(file)

    return write_study
