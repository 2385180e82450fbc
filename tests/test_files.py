"""Files are whole or not there, and what is wrong with one is said in one line."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from autosparse.config import TrainingConfig
from autosparse.errors import RunFailed, UsageError
from autosparse.files import (
    read_card,
    read_json,
    read_tensors,
    replacing,
    sha256_of_file,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)
from autosparse.training import History, PlainStepper

TENSORS = {
    "mask": torch.tensor([3, 0, 255], dtype=torch.uint8),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7),
    "half": torch.tensor([0.5], dtype=torch.bfloat16),
}
CARD = {"name": "ticket é", "levels": [1, 2], "nested": {"b": None, "a": 0.1}}


@contextmanager
def small_disk(size: int):
    """Let no file grow beyond `size` bytes: what is written then fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# replacing


def test_replacing_puts_the_new_content_in_place(tmp_path):
    path = tmp_path / "deep" / "folder" / "file"
    for content in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(content)
            assert temporary.parent == path.parent
        assert path.read_text() == content
    assert names(path.parent) == ["file"]


def test_nothing_is_in_place_before_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False])
def test_failure_leaves_the_old_content_and_no_temporary(tmp_path, error, there):
    path = tmp_path / "file"
    if there:
        path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert names(tmp_path) == (["file"] if there else [])
    assert not there or path.read_text() == "old"


def test_kill_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    program = (
        "import os, signal, sys\n"
        "from autosparse.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half of the n')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def one_line(error: RunFailed, path) -> str:
    text = str(error)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunFailed) as caught:
        write_text(path, "new")
    assert "no room on disk" in one_line(caught.value, path)
    assert (names(tmp_path), path.read_text()) == (["file"], "old")


def test_file_that_cannot_grow_is_said_in_one_line(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with small_disk(1000), pytest.raises(RunFailed) as caught:
        write_bytes(path, bytes(5000))
    assert os.strerror(errno.EFBIG) in one_line(caught.value, path)
    assert (names(tmp_path), path.read_text()) == (["file"], "old")


def test_tensors_that_do_not_fit_are_said_in_one_line(tmp_path):
    path = tmp_path / "t.safetensors"
    with small_disk(1000), pytest.raises(RunFailed) as caught:
        write_tensors(path, {"weight": torch.zeros(5000)}, {})
    one_line(caught.value, path)
    assert names(tmp_path) == []


def test_checkpoint_that_does_not_fit_is_said_in_one_line(tmp_path):
    stepper = PlainStepper(torch.nn.Linear(100, 100), TrainingConfig(), steps_per_epoch=1)
    with small_disk(1000), pytest.raises(RunFailed) as caught:
        stepper.save(tmp_path, History())
    one_line(caught.value, tmp_path / "checkpoint.pt")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_leave_to_write_is_said_in_one_line(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(RunFailed) as caught:
        write_text(folder / "file", "new")
    assert os.strerror(errno.EACCES) in one_line(caught.value, folder / "file")


@pytest.mark.parametrize("below", ["file", "folder/file"])
def test_folder_that_is_a_file_is_said_in_one_line(tmp_path, below):
    (tmp_path / "taken").write_text("old")
    path = tmp_path / "taken" / below
    with pytest.raises(RunFailed) as caught:
        write_text(path, "new")
    one_line(caught.value, path)
    assert (tmp_path / "taken").read_text() == "old"


def test_file_that_is_a_folder_is_said_in_one_line(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunFailed) as caught:
        write_text(tmp_path / "taken", "new")
    one_line(caught.value, tmp_path / "taken")
    assert names(tmp_path) == ["taken"]


# JSON


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "card.json", CARD)
    assert read_json(tmp_path / "card.json") == CARD
    assert (tmp_path / "card.json").read_text().endswith("}\n")


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    write_json(tmp_path / "card.json", CARD)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "card.json", {"loss": float("nan")})
    assert read_json(tmp_path / "card.json") == CARD
    assert names(tmp_path) == ["card.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe{", b"{'a': 1}"])
def test_read_json_names_a_missing_or_garbled_file(tmp_path, content):
    path = tmp_path / "card.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"card\.json"):
        read_json(path)


def test_read_json_names_what_is_no_file(tmp_path):
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path, tmp_path / "file" / "card.json"):
        with pytest.raises(UsageError, match=str(path)):
            read_json(path)


# tensors


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS, CARD)
    found, card = read_tensors(path)
    assert card == read_card(path) == CARD
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    write_tensors(tmp_path / "one", TENSORS, CARD)
    backwards = dict(reversed(TENSORS.items()))
    write_tensors(tmp_path / "two", backwards, dict(reversed(CARD.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("change", ["card", "tensor"])
def test_other_content_gives_other_bytes(tmp_path, change):
    write_tensors(tmp_path / "one", TENSORS, CARD)
    card = {**CARD, "levels": [1, 3]} if change == "card" else CARD
    tensors = {**TENSORS, "scalar": torch.tensor(8)} if change == "tensor" else TENSORS
    write_tensors(tmp_path / "two", tensors, card)
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_card_refuses_what_json_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_tensors(tmp_path / "t", TENSORS, {"loss": float("inf")})
    assert names(tmp_path) == []


@pytest.mark.parametrize("kept", [0, 4, 50, 200, -1])
def test_cut_tensors_are_named(tmp_path, kept):
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS, CARD)
    path.write_bytes(path.read_bytes()[:kept])
    for read in (read_tensors, read_card):
        with pytest.raises(UsageError, match=r"t\.safetensors"):
            read(path)


def test_missing_and_foreign_tensors_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text").write_text("not tensors, but long enough for a header")
    for name in ("nowhere", "foreign.safetensors", "text", "."):
        with pytest.raises(UsageError, match=str(tmp_path / name)):
            read_tensors(tmp_path / name)


def test_sha256_of_file_reads_all_of_it(tmp_path):
    content = bytes(range(256)) * 5000  # More than one block of 1 MiB.
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
