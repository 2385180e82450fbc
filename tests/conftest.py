"""What many tests share: digits, tiny models, quick settings, and a quiet environment."""

from __future__ import annotations

import atexit
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import secrets
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import nn

from autosparse.core import logs
from autosparse.core.files import place, remove_tree
from autosparse.corpus import store
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.data.sets import DataSource
from autosparse.irp.config import IRPConfig
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.training.config import TrainingConfig

logs.to_stderr()  # Tests read what a command says.

# The same examples every time; a process that waits for the other core is no fault.
hypothesis.settings.register_profile(
    "same", max_examples=30, stateful_step_count=12, derandomize=True, deadline=None
)
hypothesis.settings.load_profile("same")

MOST_WORKERS = 8
DEAR = {"local_ray": "local_ray", "group: Group": "ranks"}
"""Words of files that use a session fixture that takes long to start, and the name of their group:
they run in one process, and first."""
APART = ("test_timm_families.py", "test_slim_families.py", "test_gpu.py")
"""Files of long tests that share nothing: each goes where there is time."""


@cache
def _group(path: Path) -> str:
    text = path.read_text() if path.parent.name == "integration" else ""
    return next((name for words, name in DEAR.items() if words in text), str(path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core where the whole quick suite is run; none for a part of it.

    A part starts sooner in one process; slow tests want the machine alone.
    """
    asked = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not asked.keyword
    cores = min(os.cpu_count() or 1, MOST_WORKERS)
    return cores if whole and asked.markexpr == "not slow" and cores > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process, so that its fixtures are made once.

    By the paths of tests: marks of groups are lost where pytest 9.2 meets xdist 3.8.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = config.rootpath / super()._split_scope(nodeid)
            return nodeid if path.name in APART else _group(path)

    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _group(item.path) not in DEAR.values())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Weights that a test draws without a seed are the same whatever ran before it."""
    torch.manual_seed(0)


STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave once Python's exit functions have run, without tearing down C++ libraries.

    Native threads go on after what started them was closed (Ray's opencensus harvester does, after
    `ray.shutdown()`); two whole runs of six, all tests passed, ended in a segmentation fault of
    such a thread, while C++ destructors ran.
    """
    if STATUS not in config.stash:
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(config.stash[STATUS])


OUTPUTS = (
    "*.db", "*.safetensors", "mlruns", "mlartifacts", "corpus", "trained", "tickets", "quickstart",
    "sweep", "figures", "comparison", "data",
)  # fmt: skip
"""What autosparse writes into the current folder unless it is told otherwise."""


@pytest.fixture(autouse=True, scope="session")
def checkout_stays_clean() -> Iterator[None]:
    """No test writes where it was started."""

    def there() -> set[Path]:
        return {path for name in OUTPUTS for path in Path.cwd().glob(name)}

    start, before = Path.cwd(), there()
    yield
    assert Path.cwd() == start, "a test has changed the current folder"
    assert there() == before, "a test has left something in the checkout"


QUICK = TrainingConfig(epochs=1, batch_size=100, checkpoint_epochs=0)
SMALL_DIGITS = DataConfig(train_limit=300)


@pytest.fixture(scope="session")
def digits() -> DataSource:
    return sets.load(SMALL_DIGITS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Both devices: what holds on one holds on the other; skipped where there is no GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are no slower on one thread, and do not wait for a second core that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture()
def remote() -> Iterator[Path]:
    """A folder that is no local one: in fsspec's memory."""
    folder = place(f"memory://{secrets.token_hex(8)}")
    yield folder
    remove_tree(folder)


def few(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Return values (a tuple is several) as cases of a test: slow but for the quick ones."""
    return [
        pytest.param(
            *(each if isinstance(each, tuple) else [each]),
            marks=() if each in quick else pytest.mark.slow,
        )
        for each in values
    ]


def grid(rows: Iterable[Any], columns: Iterable[Any], each: int = 2) -> list[Any]:
    """Return all pairs as cases of a test: slow but for a few, so that a quick run meets every one.

    Row i has `each` columns that are quick, from the i-th group of so many on; more where there
    would be columns that no row has.
    """
    rows, columns = list(rows), list(columns)
    each = max(each, -(-len(columns) // len(rows)))
    quick = {
        (place, (place * each + more) % len(columns))
        for place in range(len(rows)) for more in range(each)
    }  # fmt: skip
    return [
        pytest.param(row, column, marks=() if (r, c) in quick else pytest.mark.slow)
        for r, row in enumerate(rows) for c, column in enumerate(columns)
    ]  # fmt: skip


def make_model(name: str = "test_byobnet", seed: int = 0, **options) -> nn.Module:
    """A tiny timm model for digits at 16 px."""
    if "vit" in name:
        options.setdefault("patch_size", 4)
    config = ModelConfig(name, options)
    return zoo.create(config, num_classes=10, in_chans=1, image_size=16, seed=seed)


def quick_irp(out: str, **changes) -> IRPConfig:
    """An IRP run of two levels that takes about a second."""
    settings = {
        "model": ModelConfig("test_byobnet"),
        "data": SMALL_DIGITS,
        "training": QUICK,
        "levels": 2,
        "final_density": 0.1,
        "device": "cpu",
    }
    return IRPConfig(**{**settings, "out": out, **changes})


def tiny_run(run_id: str = "run1", scale: float = 1.0) -> store.IRPRun:
    """A run of two levels over a layer of four weights and one of three, made by hand."""
    initial = {
        "a.weight": torch.tensor([[0.5, -1.0], [2.0, 0.25]]) * scale,
        "b.weight": torch.tensor([3.0, -4.0, 5.0]) * scale,
    }
    survival = {
        "a.weight": torch.tensor([[0, 1], [2, 2]], dtype=torch.uint8),
        "b.weight": torch.tensor([2, 0, 1], dtype=torch.uint8),
    }
    card = {
        "run_id": run_id,
        "prunable": ["a.weight", "b.weight"],
        "prunable_weights": 7,
        "model": {"name": "m"},
        "versions": {},
        "config": {
            "model": {"name": "m"}, "data": {"name": "d"}, "seed": 0, "label": "magnitude",
            "schedule": "linear", "levels": 2, "final_density": 0.5,
        },
        "levels": [
            {
                "level": level, "density": 1 - level / 4, "validation_accuracy": 0.5 + level / 10,
                "seconds": 2.0,
            }
            for level in range(3)
        ],
    }  # fmt: skip
    return store.IRPRun(initial, survival, {"a.bias": torch.zeros(2)}, card)


def flip(path: Path, position: int, bit: int = 1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(bytes(content))


HOLDER = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from autosparse.core.locks import claimed\n"
    "with claimed(Path(sys.argv[1]), **dict(zip(['name'], sys.argv[2:]))):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


@contextmanager
def holder(folder: Path, *name: str) -> Iterator[subprocess.Popen]:
    """Run a process that holds the claim on a folder (or that `name`) until it is killed."""
    command = [sys.executable, "-c", HOLDER, str(folder), *name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
