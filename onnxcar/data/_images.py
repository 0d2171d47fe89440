"""Pixels: decode image files, bring them to one size, normalise them.

Decoding follows torchvision and timm: the EXIF orientation is not applied, alpha is dropped, the first frame counts.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnxcar.data._preprocess import INTERPOLATIONS, Preprocess
from onnxcar.errors import DataError

__all__ = ["decode", "fit", "normalize", "to_channels"]

Pixels = NDArray[np.uint8]

#: Added before rounding down, because crop_pct is often itself a rounded ratio: 224 / 0.9868 is meant to be 227.
_SLACK = 0.005


def decode(data: bytes, sample: str) -> Image.Image:
    """The image in an image file's bytes, as 8-bit gray (`L`) or `RGB`.

    Args:
        data: The file's bytes.
        sample: Name for messages, usually the path.

    Raises:
        DataError: No image, truncated, a decompression bomb, or pixels that do not map to 8 bits.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _to_8_bit(image, sample)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise DataError(
            f"Image '{sample}' decodes to more pixels than is safe ({e}). Scale it down or take it out of the set.",
            sample=sample,
        ) from e
    except Exception as e:  # Pillow's decoders raise whatever a damaged file leads them to
        what = "is empty" if not data else f"cannot be read ({type(e).__name__}: {e})"
        raise DataError(f"Image '{sample}' {what}. Replace the file or take it out of the set.", sample=sample) from e


def _to_8_bit(image: Image.Image, sample: str) -> Image.Image:
    mode = image.mode
    if mode in ("L", "RGB"):
        return image.copy()
    if mode in ("1", "LA", "La"):
        return image.convert("LA").convert("L") if mode == "La" else image.convert("L")
    if mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255 instead of scaling them
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise DataError(
                f"Image '{sample}' has values from {values.min()} to {values.max()}, outside 16 bits. Save it with 8 "
                "or 16 bits a channel.",
                sample=sample,
            )
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if mode == "F":
        raise DataError(
            f"Image '{sample}' has float pixels, whose range is unknown. Save it with 8 or 16 bits a channel.",
            sample=sample,
        )
    if mode in ("P", "PA", "RGBa"):  # by way of RGBA, or Pillow warns about transparency given in bytes
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, pre: Preprocess, sample: str) -> Pixels:
    """The image resized, cropped and in the channels that `pre` wants, uint8 (h, w, 1 or 3).

    Raises:
        DataError: The image is smaller than the crop and `pre` does not resize.
    """
    if pre.hw is not None and (image.height, image.width) != pre.hw:
        image = _resize_and_crop(image, pre, pre.hw, sample)
    pixels = np.asarray(image)
    return to_channels(pixels[:, :, None] if pixels.ndim == 2 else pixels, pre)


def _resize_and_crop(image: Image.Image, pre: Preprocess, hw: tuple[int, int], sample: str) -> Image.Image:
    height, width = hw
    # the shorter side rounds down, the longer one to the nearest, the crop's corner down
    box_h, box_w = (math.floor(n / pre.crop_pct + _SLACK) for n in hw)
    if pre.resize == "shortest":
        if box_h * image.width >= box_w * image.height:  # the height needs the larger factor
            new_h, new_w = box_h, max(box_w, round(image.width * box_h / image.height))
        else:
            new_h, new_w = max(box_h, round(image.height * box_w / image.width)), box_w
    elif pre.resize == "squash":
        new_h, new_w = box_h, box_w
    else:
        new_h, new_w = image.height, image.width
        if new_h < height or new_w < width:
            raise DataError(
                f"Image '{sample}' is {new_h}x{new_w}, smaller than the crop {height}x{width}. Let it be resized "
                "(resize='shortest'), or take it out.",
                sample=sample,
            )
    if (new_h, new_w) != (image.height, image.width):
        image = image.resize((new_w, new_h), Image.Resampling(INTERPOLATIONS[pre.interpolation]))
    top, left = (new_h - height) // 2, (new_w - width) // 2
    return image.crop((left, top, left + width, top + height))


def to_channels(pixels: Pixels, pre: Preprocess) -> Pixels:
    """Pixels (..., 1, 3 or 4) in the number and order of channels that `pre` wants, (..., 1 or 3).

    Gray is Pillow's integer form of ITU-R 601-2; gray to colour repeats the value; alpha is dropped.
    """
    n = pixels.shape[-1]
    if n == 4:
        pixels, n = pixels[..., :3], 3
    if pre.channels == "gray" and n == 3:
        r, g, b = (pixels[..., i].astype(np.uint32) for i in range(3))
        return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).astype(np.uint8)[..., None]
    if pre.channels in ("rgb", "bgr") and n == 1:
        return np.repeat(pixels, 3, axis=-1)
    return pixels[..., ::-1] if pre.channels == "bgr" else pixels


def normalize(pixels: Pixels, pre: Preprocess) -> NDArray[np.float32]:
    """Network input from pixels: `(pixel / scale - mean) / std`, float32.

    Args:
        pixels: (n, h, w, c), already in the wanted channel order.
        pre: Its mean and std have one value, or c.

    Returns:
        (n, c, h, w), or (n, h, w, c) for layout `nhwc`; contiguous.

    Raises:
        DataError: mean or std have another number of values than the images have channels.
    """
    n_channels = pixels.shape[-1]
    axis_shape: tuple[int, ...] = (-1,)
    if pre.layout != "nhwc":
        pixels, axis_shape = pixels.transpose(0, 3, 1, 2), (-1, 1, 1)
    out = np.array(pixels, dtype=np.float32, order="C")

    def per_channel(name: str, values: tuple[float, ...]) -> NDArray[Any]:
        if len(values) not in (1, n_channels):
            channels = "1 channel" if n_channels == 1 else f"{n_channels} channels"
            raise DataError(
                f"Images have {channels} but {name} has {len(values)} values. Give one value or {n_channels} "
                f"(--{name}), or other --channels."
            )
        return np.array(values, np.float32).reshape(axis_shape if len(values) > 1 else ())

    # the order of the operations is that of the usual training scripts, so that the bits are theirs too
    if pre.divisor != 1.0:
        out /= np.float32(pre.divisor)
    if any(pre.means):
        out -= per_channel("mean", pre.means)
    if set(pre.stds) != {1.0}:
        out /= per_channel("std", pre.stds)
    return out
