"""What autosparse says beside results: one line on stderr, without a source location."""

from __future__ import annotations

import subprocess
import sys
import warnings

import autosparse

SAID = f"""
import logging, warnings
from autosparse.core import logs

logging.getLogger("autosparse.data").warning("%s is\\nnot shown twice", "this")
logs.to_stderr()
logs.to_stderr()
logging.getLogger("autosparse.data").warning("%s is\\ndamaged", "shard 3")
logging.getLogger("autosparse.data").info("not said")
warnings.warn_explicit("paths\\ncannot be followed", UserWarning, {autosparse.__file__!r}, 7)
warnings.warn_explicit("theirs", UserWarning, "/elsewhere/module.py", 7)
"""


def test_a_command_says_one_line_each_and_leaves_others_warnings_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAID], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "this is", "not shown twice",  # Python's own way, where nobody has asked for ours.
        "warning: shard 3 is damaged",
        "warning: paths cannot be followed",
        "/elsewhere/module.py:7: UserWarning: theirs",
    ]  # fmt: skip


def test_torchs_word_on_deepspeeds_calls_is_left_out_and_nothing_else() -> None:
    from autosparse.integrations import deepspeed_ranks

    module = "torch.distributed.c10d_logger"
    theirs = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another instead."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        deepspeed_ranks.silence()
        for text, category, where in (
            (theirs, FutureWarning, module),
            (
                theirs.replace("all_gather_into_tensor", "reduce_scatter_tensor"),
                FutureWarning,
                module,
            ),
            (theirs.replace("all_gather_into_tensor", "gather"), FutureWarning, module),
            (theirs, FutureWarning, "somewhere.else"),
            (theirs, UserWarning, module),
        ):
            warnings.warn_explicit(text, category, "file.py", 1, module=where)
    assert len(seen) == 3
