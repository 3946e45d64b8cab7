import subprocess

import pytest

from longctx.train.environment import CHANGES_FILE, MOST_CHANGES, write_changes


@pytest.fixture
def checkout(tmp_path):
    """Runs git in a checkout with one committed file."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org")

    def git(*words: str) -> None:
        subprocess.run(["git", *who, "-C", str(folder), *words], check=True, capture_output=True)

    git("init")
    (folder / "source.py").write_bytes("x = 1  # é\n".encode("latin-1"))
    git("add", ".")
    git("commit", "-m", "first")
    return git, folder / "source.py"


def test_what_is_not_committed_is_kept_and_can_be_applied_again(checkout, tmp_path):
    git, source = checkout
    changed = "x = 2  # é\n".encode("latin-1")
    source.write_bytes(changed)
    write_changes(tmp_path, source)
    git("checkout", "source.py")
    git("apply", str(tmp_path / CHANGES_FILE))
    assert source.read_bytes() == changed


def test_a_clean_checkout_leaves_no_patch_of_an_earlier_start(checkout, tmp_path):
    git, source = checkout
    source.write_text("x = 2\n")
    write_changes(tmp_path, source)
    git("checkout", "source.py")
    write_changes(tmp_path, source)
    assert not (tmp_path / CHANGES_FILE).exists()


def test_a_long_patch_is_cut_and_says_so(checkout, tmp_path):
    _, source = checkout
    source.write_text("y\n" * MOST_CHANGES)
    write_changes(tmp_path, source)
    patch = (tmp_path / CHANGES_FILE).read_bytes()
    assert len(patch) < MOST_CHANGES + 100
    assert patch.splitlines()[-1].startswith(b"cut: ")


def test_files_outside_a_checkout_have_no_patch(tmp_path):
    (tmp_path / "source.py").touch()
    write_changes(tmp_path, tmp_path / "source.py")
    assert not (tmp_path / CHANGES_FILE).exists()


def test_a_patch_has_no_secret_and_leaves_code_alone(checkout, tmp_path):
    git, source = checkout
    code = "token = read()\npad_token: str = ''\nmax_token = 5\nkey_token = other_token\n"
    secrets = "url = 's3://me:hunter2@bucket'\napi_key = \"hunter2\"\n# Bearer hunter2hunter2\n"
    source.write_text(code + secrets)
    write_changes(tmp_path, source)
    git("checkout", "source.py")
    git("apply", str(tmp_path / CHANGES_FILE))
    assert code in source.read_text()
    assert "hunter2" not in source.read_text()
    assert "s3://[redacted]@bucket" in source.read_text()
