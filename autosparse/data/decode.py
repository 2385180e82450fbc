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
            image = _eight_bit(ImageOps.exif_transpose(opened)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        where = "an image" if isinstance(source, bytes) else str(source)
        raise UsageError(f"{where} cannot be decoded ({error})") from error
    fitted = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; PIL's own conversion would cut it off at 255."""
    if image.mode not in ("I;16", "I;16B", "I;16L", "I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype("u1"))
