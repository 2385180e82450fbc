"""scikit-learn's digits: 1,797 real 8 x 8 scans of handwritten digits, embedded, the default.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from __future__ import annotations

import torch

from autosparse.data.augment import choose
from autosparse.data.config import DataConfig
from autosparse.data.memory import MemorySplit, in_memory, resized
from autosparse.data.source import DataSource
from autosparse.data.splitting import stratified

TEST_FRACTION = 0.2
"""Of 1,797 images: 359, so that 1 % of accuracy is 3 to 4 images."""


def load_digits(config: DataConfig) -> DataSource:
    """Return digits as grey images of side 16 unless told otherwise; a fifth is the test split."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    pixels = torch.from_numpy(bunch.images)[:, None] * (255 / 16)
    images = resized(pixels.round().byte(), config.image_size or 16)
    whole = MemorySplit(images, torch.from_numpy(bunch.target).long())
    rest, held_out = stratified(whole.labels, TEST_FRACTION, salt=2)
    return in_memory(
        "digits",
        whole.part(rest),
        whole.part(held_out),
        config,
        num_classes=10,
        augment=choose(config.augment, "shift"),
    )
