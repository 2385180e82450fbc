"""Packing any samples: the same ones come back, and a key that is there twice is refused."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from autosparse.core.errors import UsageError
from autosparse.data.manifest import MANIFEST, read_manifest
from autosparse.data.samples import scan
from autosparse.data.tars import INDEX, read_index
from tests.data.packed import write_shards


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder for each example."""
    with TemporaryDirectory() as made:
        yield Path(made)


def encoded(grey: int, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (2, 3), grey).save(stream, kind)
    return stream.getvalue()


SPLITS = ("train", "validation", "test")
SAMPLES = st.lists(
    st.tuples(
        st.sampled_from(SPLITS),
        st.builds(encoded, st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "BMP"])),
        st.integers(0, 3),
    ),
    max_size=15,
)


@given(SAMPLES, st.integers(1, 6))
def test_all_samples_come_back_in_their_order(samples, per_shard) -> None:
    with folder() as root:
        write_shards(iter(samples), root, list("abcd"), per_shard=per_shard)
        manifest = read_manifest(root / MANIFEST)
        index = read_index(root / INDEX, manifest.shards)
        found: dict[str, list] = {split: [] for split in SPLITS}
        for shard in manifest.shards:
            members = scan(root / shard.name)
            assert members.tolist() == index[shard.name].tolist()
            assert len(members) == shard.count <= per_shard
            content = (root / shard.name).read_bytes()
            assert len(content) == shard.bytes
            for offset, size, label in members.tolist():
                found[shard.split].append((content[offset : offset + size], label))
        for split in SPLITS:
            assert found[split] == [tuple(more) for each, *more in samples if each == split]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6))
def test_a_key_that_is_there_twice_is_refused(keys) -> None:
    with folder() as root:
        path = root / "some.tar"
        with tarfile.open(path, "w") as tar:
            for number, key in enumerate(keys):
                for name, content in ((f"{key}.png", encoded(number, "PNG")), (f"{key}.cls", b"1")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        if len(set(keys)) == len(keys):
            assert scan(path)[:, 2].tolist() == [1] * len(keys)
            return
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        with pytest.raises(UsageError, match=f"holds the key '{twice}' twice"):
            scan(path)
