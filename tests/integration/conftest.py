"""What takes long to start, once for all: two ranks that have DeepSpeed loaded, a local Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from autosparse.integrations import ray as cluster
from tests.integration.ranks import Group


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    ranks = Group(tmp_path_factory.mktemp("ranks") / "log")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    cluster.connect()
    yield
    ray.shutdown()
