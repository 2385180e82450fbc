"""Files are whole or not there, and what is wrong with one is said in one line."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import (
    check_file,
    is_local,
    local_place,
    place,
    read_card,
    read_json,
    read_tensors,
    remove_tree,
    replacing,
    set_aside,
    sha256_of_file,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import History, PlainStepper

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


def test_processes_of_one_number_on_two_hosts_have_temporaries_of_their_own(tmp_path):
    """As in containers on shared storage, where every first process has the number 1."""
    path = tmp_path / "file"
    with replacing(path) as ours, replacing(path) as theirs:
        ours.write_text("ours")
        theirs.write_text("theirs")
        assert ours.read_text() == "ours"
    assert path.read_text() == "ours"
    assert names(tmp_path) == ["file"]


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
        "from autosparse.core.files import replacing\n"
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


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_a_file_is_replaced_where_its_folder_may_be_written_to(tmp_path, monkeypatch, locked):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda asked, _: (asked == path) == (locked == "folder"))
    if locked == "file":
        check_file(path)
    else:
        with pytest.raises(RunFailed, match=f"cannot write {tmp_path}: .* may not be written to"):
            check_file(path)


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


def test_a_file_that_comes_and_goes_is_read_or_named(tmp_path):
    kept, path = tmp_path / "kept", tmp_path / "t.safetensors"
    write_tensors(kept, TENSORS, CARD)
    comes_and_goes = (
        f"import os\nwhile True: os.link({str(kept)!r}, {str(path)!r}), os.unlink({str(path)!r})"
    )
    other = subprocess.Popen([sys.executable, "-c", comes_and_goes])
    read, named = 0, 0
    try:
        while other.poll() is None and (read < 100 or named < 10_000):
            try:
                assert read_tensors(path)[1] == CARD
                read += 1
            except UsageError as error:
                assert str(path) in str(error)
                named += 1
    finally:
        other.kill()
        other.wait()
    assert read >= 100 and named >= 10_000


def test_sha256_of_file_reads_all_of_it(tmp_path):
    content = bytes(range(256)) * 5000  # More than one block of 1 MiB.
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# places


def test_local_paths_are_paths(tmp_path):
    for given in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        assert place(given) == tmp_path
        assert isinstance(place(given), Path)
        assert is_local(given)
    assert place("corpus/digits") == Path("corpus/digits")
    assert is_local("corpus")


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given in ("~/corpus", Path("~/corpus")):
        assert place(given) == tmp_path / "corpus"
    assert place("~corpus") == Path("~corpus")
    write_text("~/corpus/file", "new")
    assert (tmp_path / "corpus" / "file").read_text() == "new"


def test_where_only_a_local_place_will_do_a_url_is_refused(tmp_path, remote):
    for given in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        assert local_place(given) == tmp_path
    for given in (remote, str(remote)):
        with pytest.raises(UsageError, match=f"{remote} is a URL; a local folder is needed"):
            local_place(given)


def test_urls_are_places_that_are_not_local(remote):
    for given in (remote, str(remote), "memory://elsewhere/corpus"):
        found = place(given)
        assert not isinstance(found, Path)
        assert not is_local(given)
        assert not is_local(found)
        assert str(found) == str(given)
        assert str(found / "a" / "b") == f"{given}/a/b"


@pytest.mark.parametrize("url", ["s4://bucket/corpus", "nothing://x"])
def test_a_url_that_nobody_knows_is_named(url):
    with pytest.raises(UsageError, match=f"cannot open {url}: ") as caught:
        place(url)
    assert "\n" not in str(caught.value)


def test_what_is_written_to_a_file_url_is_a_local_file(tmp_path):
    write_tensors(f"file://{tmp_path}/t", TENSORS, CARD)
    assert read_tensors(tmp_path / "t")[1] == read_tensors(f"file://{tmp_path}/t")[1] == CARD
    assert names(tmp_path) == ["t"]


@pytest.mark.parametrize("where", ["tmp_path", "remote"])
def test_a_tree_is_removed_also_when_it_is_gone(where, request):
    folder = request.getfixturevalue(where)
    for name in ("tree/a", "tree/deep/b", "other"):
        write_text(folder / name, name)
    for _ in range(2):
        remove_tree(folder / "tree")
        assert names(folder) == ["other"]
        assert not (folder / "tree").exists()


@pytest.mark.parametrize("where", ["tmp_path", "remote"])
def test_a_damaged_file_is_set_aside(where, request):
    path = request.getfixturevalue(where) / "level.safetensors"
    for content in ("first", "second"):
        write_text(path, content)
        error = set_aside(path, "do it again", ValueError("it is damaged"))
        assert isinstance(error, UsageError)
        assert str(error) == (
            "it is damaged; set aside as level.safetensors.damaged, start again to do it again"
        )
        assert names(path.parent) == ["level.safetensors.damaged"]
        assert path.with_name("level.safetensors.damaged").read_text() == content


@pytest.mark.parametrize("where", ["tmp_path", "remote"])
def test_a_file_that_cannot_be_set_aside_is_to_be_removed(where, request):
    path = request.getfixturevalue(where) / "gone"
    error = set_aside(path, "do it again", ValueError("it is damaged"))
    assert isinstance(error, UsageError)
    assert str(error).startswith(f"it is damaged; remove {path} and start again (")


# places that are not local


def test_remote_content_is_what_was_written(remote):
    path = remote / "deep" / "folder" / "file"
    for content in (b"first", b"", bytes(range(256)) * 5000):
        write_bytes(path, content)
        assert path.read_bytes() == content
        assert sha256_of_file(path) == sha256_of_file(str(path))
        assert sha256_of_file(path) == hashlib.sha256(content).hexdigest()
    write_json(str(path), CARD)
    assert read_json(path) == read_json(str(path)) == CARD
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_the_old_remote_content(remote, error):
    write_text(remote / "file", "old")
    with pytest.raises(error), replacing(remote / "file") as temporary:
        temporary.write_text("half of the n")
        assert (remote / "file").read_text() == "old"
        raise error
    assert (remote / "file").read_text() == "old"
    assert names(remote) == ["file"]


def test_an_upload_that_fails_is_said_in_one_line(remote, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(remote), "write_bytes", full)
    with pytest.raises(RunFailed) as caught:
        write_text(remote / "file", "new")
    assert "no room on disk" in one_line(caught.value, remote / "file")


def test_too_little_room_for_what_is_to_be_uploaded_is_said_in_one_line(remote):
    with small_disk(1000), pytest.raises(RunFailed) as caught:
        write_bytes(remote / "file", bytes(5000))
    assert os.strerror(errno.EFBIG) in one_line(caught.value, "/file")
    assert not (remote / "file").exists()


def test_remote_tensors_round_trip(remote, tmp_path):
    write_tensors(remote / "t", TENSORS, CARD)
    write_tensors(tmp_path / "t", TENSORS, CARD)
    assert (remote / "t").read_bytes() == (tmp_path / "t").read_bytes()
    for path in (remote / "t", f"{remote}/t"):
        found, card = read_tensors(path)
        assert card == read_card(path) == CARD
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("kept", [0, 4, 8, 50, 200, -1])
def test_cut_remote_tensors_are_named(remote, kept):
    path = remote / "t.safetensors"
    write_tensors(path, TENSORS, CARD)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match=r"memory://.*/t\.safetensors"):
        read_tensors(path)


@pytest.mark.parametrize("header", [b"[1]", b"null", b'{"__metadata__": 3}', b"{}", b"\xff"])
def test_garbled_remote_headers_are_named(remote, header):
    path = remote / "t.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UsageError, match=r"t\.safetensors"):
        read_card(path)


def test_what_is_missing_in_a_remote_place_is_named(remote):
    for read in (read_json, read_card, read_tensors):
        with pytest.raises(UsageError, match=f"no such file: {remote}/nowhere"):
            read(remote / "nowhere")
