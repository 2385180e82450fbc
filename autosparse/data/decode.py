"""Decoding an image file into a square uint8 tensor."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from autosparse.errors import UsageError


def decode(source: str | Path | bytes, size: int) -> Tensor:
    """Return uint8 [3, size, size]: shorter side resized to `size`, the centre cut out.

    Takes any mode (grey, CMYK, palette, alpha) and honours the EXIF rotation. Raises UsageError
    that names the file when the image is damaged.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.draft("RGB", (size, size))
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        where = "an image" if isinstance(source, bytes) else str(source)
        raise UsageError(f"{where} cannot be decoded ({error})") from error
    fitted = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)
