import json

import pytest

from longctx.config import to_toml
from longctx.train.settings import load_settings
from tests import goldens

HINT = "if this change is meant, run `make golden` and review the difference"


def golden(name: str) -> str:
    return (goldens.FOLDER / name).read_text()


def test_ten_losses_in_double_precision():
    expected = json.loads(golden("losses.json"))
    actual = goldens.ten_losses()
    assert max(abs(a - e) for a, e in zip(actual, expected)) <= 1e-9, HINT


def test_every_config_field():
    assert goldens.config_surface() == golden("config_surface.txt"), HINT


def test_public_names():
    assert goldens.public_names() == golden("public_names.txt"), HINT


@pytest.mark.parametrize("preset", goldens.PRESETS)
def test_resolved_preset(preset):
    assert to_toml(load_settings(preset)) == golden(f"{preset}.toml"), HINT
