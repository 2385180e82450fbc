"""Decoding an image file into a square uint8 tensor.

Plain JPEGs go through simplejpeg where it is installed (the fastest of those measured, see
docs/shards.md), everything else through PIL; both give the same pixels.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from autosparse.core.errors import UsageError

try:
    import simplejpeg
except ImportError:
    simplejpeg: Any = None

logger = logging.getLogger(__name__)
Box = tuple[int, int, int, int]
"""Top, left, height, width."""
SIZES = (0xC0, 0xC1, 0xC2)
"""Markers that give the size of a baseline, extended or progressive JPEG."""
APP1, ORIENTATION = 0xE1, 0x0112
MOST_PIXELS = 1 << 26
"""Larger JPEGs are left to PIL, which warns of decompression bombs from 89 million pixels on."""


DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What PIL raises where an image is damaged."""


class BadImage(UsageError):
    """One image is damaged, cut, empty or not there; `max_bad_images` may allow for it."""


def too_many(problem: str, setting: str, limit: int) -> UsageError:
    """Return the error for one bad image more than a setting allows."""
    return UsageError(f"{problem}; {setting} allows {limit} bad images")


def count_bad(problem: str, setting: str, count: int, limit: int) -> None:
    """Log the bad image that makes `count`; raise UsageError if that is more than is allowed."""
    if count > limit:
        raise too_many(problem, setting, limit)
    logger.warning("%s; bad image %d of at most %d (%s)", problem, count, limit, setting)


_resize = torch.ops.aten._upsample_bilinear2d_aa.out
"""The operator behind interpolate(mode="bilinear", antialias=True), which takes no `out`."""


def centred(height: int, width: int) -> Box:
    """Return the largest square in the middle."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def decode(
    source: str | Path | bytes,
    size: int,
    crop: Callable[[int, int], Box] = centred,
    into: Tensor | None = None,
) -> Tensor:
    """Return uint8 [3, size, size]: the part that `crop` chooses, resized (antialiased bilinear).

    Takes any mode (grey, CMYK, palette, alpha, 16 bits) and honours the EXIF rotation. Raises
    BadImage that names the file when the image is damaged.

    Args:
        source: a file, or its content.
        size: side of the result.
        crop: takes height and width of the upright image; by default the middle square.
        into: uint8 [3, size, size] that the result is written into and returned as.
    """
    where = "an image" if isinstance(source, bytes) else str(source)
    content = source if isinstance(source, bytes) else read_image(Path(source))
    if not content:
        raise BadImage(f"{where} is empty")
    try:
        return _decoded(content, size, crop, into)
    except DAMAGED as error:
        raise BadImage(f"{where} cannot be decoded ({error})") from error


def read_image(path: Path) -> bytes:
    """Return a file's content; raise BadImage that names it where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        dangling = path.is_symlink() and not path.exists()
        reason = "it is a link to nothing" if dangling else error.strerror or error
        raise BadImage(f"{path} cannot be read: {reason}") from None


def _decoded(
    content: bytes, size: int, crop: Callable[[int, int], Box], into: Tensor | None
) -> Tensor:
    plain = plain_jpeg(content) if simplejpeg else None
    if plain is None:
        return _by_pillow(content, size, crop, into)
    box = crop(*plain)
    scale = _scale(box, size)
    pixels = _by_simplejpeg(content, *plain, scale)
    if pixels is None:
        return _by_pillow(content, size, lambda height, width: box, into)
    return _fitted(pixels, box, scale, size, into)


def _scale(box: Box, size: int) -> int:
    """Return the factor, 1, 2, 4 or 8, by which a JPEG may be shrunk while it is decoded."""
    spare = min(box[2], box[3]) // size
    return next((scale for scale in (8, 4, 2) if spare >= scale), 1)


def _by_simplejpeg(content: bytes, height: int, width: int, scale: int) -> np.ndarray | None:
    """Return the pixels [H, W, 3]; None if PIL has to decode this one."""
    wanted = (-(-height // scale), -(-width // scale))
    least = wanted if scale > 1 else (0, 0)
    try:
        pixels = simplejpeg.decode_jpeg(content, min_height=least[0], min_width=least[1])
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == wanted else None


def _by_pillow(
    content: bytes, size: int, crop: Callable[[int, int], Box], into: Tensor | None
) -> Tensor:
    with Image.open(io.BytesIO(content)) as opened:
        turned = opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        height, width = opened.size if turned else opened.size[::-1]
        box = crop(height, width)
        scale = _scale(box, size)
        before = opened.size
        opened.draft("RGB", (before[0] // scale, before[1] // scale))
        scale = scale if opened.size != before else 1
        image = eight_bit(ImageOps.exif_transpose(opened)).convert("RGB")
    return _fitted(np.array(image), box, scale, size, into)


def _fitted(pixels: np.ndarray, box: Box, scale: int, size: int, into: Tensor | None) -> Tensor:
    """Cut the box out of pixels that were shrunk by `scale`, and resize it."""
    top, left = box[0] // scale, box[1] // scale
    tall, wide = max(box[2] // scale, 1), max(box[3] // scale, 1)
    part = torch.from_numpy(pixels).permute(2, 0, 1)[:, top : top + tall, left : left + wide]
    if part.shape[1:] == (size, size):
        return part.contiguous() if into is None else into.copy_(part)
    if into is None:
        into = torch.empty((3, size, size), dtype=torch.uint8)
    _resize(part[None], [size, size], align_corners=False, out=into[None])
    return into


def eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; PIL's own conversion would cut it off at 255."""
    if image.mode not in ("I;16", "I;16B", "I;16L", "I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype("u1"))


def plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """Return height and width of an upright 8-bit JPEG, grey or in colours; None for all else."""
    if content[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 10 <= len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker in SIZES:
            return _size(content[place + 4 : place + 10])
        if marker == APP1 and _turned(content[place + 4 : place + 2 + length]):
            return None
        place += 2 + length
    return None


def _size(header: bytes) -> tuple[int, int] | None:
    height, width = int.from_bytes(header[1:3], "big"), int.from_bytes(header[3:5], "big")
    usual = header[0] == 8 and header[5] in (1, 3) and 0 < height * width <= MOST_PIXELS
    return (height, width) if usual else None


def _turned(segment: bytes) -> bool:
    """Whether by this metadata segment the image must, or may have to, be rotated."""
    if segment.startswith(b"Exif\0"):
        exif = Image.Exif()
        try:
            exif.load(segment)
        except DAMAGED:
            return True  # PIL may still find the image whole.
        return exif.get(ORIENTATION, 1) != 1
    return b"Orientation" in segment
