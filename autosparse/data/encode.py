"""Images for shards: a file's own bytes, if they can be decoded, or a new JPEG or PNG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from autosparse.data.config import PackConfig
from autosparse.data.decode import DAMAGED, BadImage, decode, eight_bit, read_image

Picture = Path | np.ndarray | bytes
"""An image file, pixels [H, W] or [H, W, 3], or an encoded image."""
DEFAULT_QUALITY = 90
"""JPEG quality of images that are shrunk, as documented at `PackConfig.quality`."""
MAGIC = (
    (0, b"\xff\xd8\xff", "jpg"), (0, b"\x89PNG\r\n\x1a\n", "png"), (8, b"WEBP", "webp"),
    (0, b"BM", "bmp"), (0, b"P5", "pgm"), (0, b"P6", "ppm"), (0, b"II*\0", "tif"),
    (0, b"MM\0*", "tif"),
)  # fmt: skip
TRIAL = 8
"""Side in pixels to which a copied image is decoded, to check that it is whole."""


def encoded(picture: Picture, config: PackConfig) -> tuple[bytes, str]:
    """Return an image as a file's content, and its extension; bytes are copied if they may be.

    Raises BadImage that names the file where it is damaged, cut, empty or not there.
    """
    where = str(picture) if isinstance(picture, Path) else "an image"
    content = read_image(picture) if isinstance(picture, Path) else picture
    if isinstance(content, bytes) and not content:
        raise BadImage(f"{where} is empty")
    if isinstance(content, bytes) and config.resize is None and config.quality is None:
        return _copied(content, where)
    try:
        with (
            Image.open(io.BytesIO(content))
            if isinstance(content, bytes)
            else Image.fromarray(content)
        ) as image:
            return _encoded(image, content, config, where)
    except DAMAGED as error:
        raise BadImage(f"{where} cannot be packed ({error})") from None


def _copied(content: bytes, where: str) -> tuple[bytes, str]:
    """Return the bytes as they are; raise BadImage where training could not decode them."""
    extension = _extension(content, where)
    try:
        decode(content, TRIAL)
    except BadImage as error:
        problem = " ".join(str(error).removeprefix("an image ").split())
        raise BadImage(f"{where} {problem}") from None
    return content, extension


def _encoded(
    image: Image.Image, content: bytes | np.ndarray, config: PackConfig, where: str
) -> tuple[bytes, str]:
    shrunk = config.resize is not None and min(image.size) > config.resize
    if not shrunk and config.quality is None:
        if isinstance(content, bytes):
            return _copied(content, where)
        return _saved(image, "PNG"), "png"
    upright = eight_bit(ImageOps.exif_transpose(image))
    upright = upright if upright.mode == "L" else upright.convert("RGB")
    if shrunk:
        assert config.resize is not None
        ratio = config.resize / min(upright.size)
        width, height = (max(round(side * ratio), config.resize) for side in upright.size)
        upright = upright.resize((width, height), Image.Resampling.BICUBIC)
    return _saved(upright, "JPEG", quality=config.quality or DEFAULT_QUALITY), "jpg"


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _extension(content: bytes, where: str) -> str:
    for place, magic, extension in MAGIC:
        if content.startswith(magic, place):
            return extension
    raise BadImage(
        f"{where} is no JPEG, PNG, WebP, BMP, PPM or TIFF: give a quality to encode it anew"
    )
