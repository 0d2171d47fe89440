"""Preprocessing: from 8-bit pixels to what a network was trained on.

A :class:`Preprocess` says how an image is resized, cropped and normalised. It comes from a preset, from the
`preprocessor_config.json` of Hugging Face, from the `config.json` of timm, or from single parts, and it is plain data:
the pixel work is done in `onnxcar.data._images`.

The arithmetic is `(pixel / scale - mean) / std` in float32, per channel, in the channel order that the network wants.

**Scale of mean and std.** Numbers from papers come on two scales: 0.485 (pixels first divided by 255) and 123.675
(pixels as they are). Where no `scale` is stated, the values themselves say it:

- any of them above 2 in magnitude (`mean=(104, 117, 123)`, `std=256`): pixels stay 0..255, `scale` is 1;
- else, any of them other than the neutral mean 0 and std 1: pixels are divided by 255 first, `scale` is 255;
- only neutral ones: the scale of the preset stays (`raw`: 1, all others: 255).

Overriding only one of `mean` and `std` converts the other one to the same scale, so that no mixture can arise.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from onnxcar.errors import ConfigError

__all__ = ["INTERPOLATIONS", "PARTS", "PRESETS", "Preprocess"]

Channels = Literal["rgb", "bgr", "gray"]
Layout = Literal["nchw", "nhwc"]
Resize = Literal["shortest", "squash", "none"]

#: Interpolation names of timm; the numbers are Pillow's, which Hugging Face stores as `resample`.
INTERPOLATIONS: Mapping[str, int] = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

#: What can be overridden one by one, by flag, by `onnxcar.toml` or by keyword.
PARTS = ("size", "crop_pct", "interpolation", "mean", "std", "channels", "layout", "scale", "resize")

#: Above this magnitude a mean or std cannot be meant for pixels in 0..1.
_LARGEST_UNIT_VALUE = 2.0


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the input of a network.

    Args:
        size: Height and width of the input, one number for both. None: the network's own, see :meth:`for_input`.
        crop_pct: The part of the resized image's shorter side that the centre crop keeps, in (0, 1]: the image is
            resized to `floor(size / crop_pct)`. An image of exactly `size` is taken as it is, whatever `crop_pct` says.
        interpolation: `nearest`, `bilinear`, `bicubic`, `lanczos`, `box` or `hamming`.
        mean: Subtracted, one value or one per channel, in the network's channel order.
        std: Divides, one value or one per channel, all above 0.
        channels: `rgb`, `bgr` or `gray`. None: what the network has, 3 is rgb and 1 is gray.
        layout: `nchw` or `nhwc`. None: what the network has.
        scale: Pixels are divided by it first. None: found from mean and std, see the module's rule.
        resize: `shortest` keeps the aspect ratio, `squash` does not, `none` only crops.

    Raises:
        ConfigError: A value is outside its range.
    """

    size: int | tuple[int, int] | None = None
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    mean: float | tuple[float, ...] = (0.0,)
    std: float | tuple[float, ...] = (1.0,)
    channels: Channels | None = None
    layout: Layout | None = None
    scale: float | None = None
    resize: Resize = "shortest"

    def __post_init__(self) -> None:
        """Bring every value to one form: size (h, w), mean and std tuples, scale a number."""
        put = object.__setattr__  # the only way to normalise a frozen dataclass
        put(self, "size", None if self.size is None else _size(self.size))
        put(self, "crop_pct", _crop_pct(self.crop_pct))
        put(self, "interpolation", _choice("interpolation", self.interpolation, tuple(INTERPOLATIONS)))
        put(self, "mean", _numbers("mean", self.mean))
        put(self, "std", _numbers("std", self.std))
        if self.channels is not None:
            put(self, "channels", _choice("channels", self.channels, ("rgb", "bgr", "gray")))
        if self.layout is not None:
            put(self, "layout", _choice("layout", self.layout, ("nchw", "nhwc")))
        put(self, "resize", _choice("resize", self.resize, ("shortest", "squash", "none")))
        if min(self.stds) <= 0:
            raise ConfigError(
                f"std is {_text(self.stds)}: every value must be above 0. Give the standard deviation, "
                "e.g. --std 0.229,0.224,0.225."
            )
        if len(self.means) > 1 and len(self.stds) > 1 and len(self.means) != len(self.stds):
            raise ConfigError(
                f"mean has {len(self.means)} values and std has {len(self.stds)}. Give one value, or one per channel, "
                "for both."
            )
        scale = _scale_of(self.means, self.stds, 255.0) if self.scale is None else _number("scale", self.scale)
        if scale <= 0:
            raise ConfigError(
                f"scale is {scale:g}: it divides the pixels and must be above 0. Use 255 for 0..1, 1 for 0..255."
            )
        put(self, "scale", scale)

    @property
    def means(self) -> tuple[float, ...]:
        """`mean` as a tuple, on the scale of `pixel / scale`."""
        return cast(tuple[float, ...], self.mean)

    @property
    def stds(self) -> tuple[float, ...]:
        """`std` as a tuple, on the scale of `pixel / scale`."""
        return cast(tuple[float, ...], self.std)

    @property
    def hw(self) -> tuple[int, int] | None:
        """`size` as (height, width), None when the images' own size is used."""
        return cast(tuple[int, int] | None, self.size)

    @property
    def divisor(self) -> float:
        """`scale` as a number."""
        return cast(float, self.scale)

    @classmethod
    def preset(cls, name: str) -> Preprocess:
        """The preset of that name: `imagenet`, `cifar10`, `mnist`, `tf`, `unit` or `raw`.

        Raises:
            ConfigError: There is no such preset.
        """
        return PRESETS[_choice("preprocess", name, tuple(PRESETS))]

    @classmethod
    def from_file(cls, path: str | Path) -> Preprocess:
        """What a timm `config.json` or a Hugging Face `preprocessor_config.json` describes.

        Raises:
            ConfigError: The file is missing, is not JSON, or asks for a step that is not supported.
        """
        from onnxcar.data._preprocess_files import read  # it builds Preprocess objects, so it imports this module

        return read(Path(path))

    @classmethod
    def resolve(cls, source: str | Path | Preprocess | None = None, **parts: Any) -> Preprocess:
        """A preset name or file, with single parts put on top: what the `--preprocess` flags mean.

        Args:
            source: Preset, path of a JSON file, a Preprocess, or None for `unit`.
            parts: Any of `PARTS`; None means not given. Text is understood as on the command line.

        Raises:
            ConfigError: Unknown preset, missing file, or a part outside its range.
        """
        if isinstance(source, Preprocess):
            base = source
        elif source is None:
            base = PRESETS["unit"]
        elif str(source) in PRESETS:
            base = PRESETS[str(source)]
        elif Path(source).suffix == ".json" or os.path.exists(source):  # noqa: PTH110 -- never raises
            base = cls.from_file(source)
        else:
            raise ConfigError(
                f"'{source}' is neither a preset nor a file. Use one of {', '.join(PRESETS)}, or the path of a "
                "preprocessor_config.json.",
                value=str(source),
            )
        return base.override(**parts)

    def override(self, **parts: Any) -> Preprocess:
        """The same preprocessing with some parts replaced; None leaves a part as it is.

        A new `mean` or `std` without a `scale` sets the scale by the module's rule; the one of the two that is not
        given is converted to it.

        Raises:
            ConfigError: Unknown part, or a value outside its range.
        """
        unknown = sorted(set(parts) - set(PARTS))
        if unknown:
            raise ConfigError(
                f"Preprocessing has no part '{unknown[0]}'. Its parts are {', '.join(PARTS)}.", key=unknown[0]
            )
        given = {key: value for key, value in parts.items() if value is not None}
        if "mean" in given or "std" in given:
            mean = _numbers("mean", given["mean"]) if "mean" in given else None
            std = _numbers("std", given["std"]) if "std" in given else None
            scale = (
                _number("scale", given["scale"])
                if "scale" in given
                else _scale_of(mean or (0.0,), std or (1.0,), self.divisor)
            )
            factor = self.divisor / scale
            given["scale"] = scale
            given["mean"] = tuple(m * factor for m in self.means) if mean is None else mean
            given["std"] = tuple(s * factor for s in self.stds) if std is None else std
        return dataclasses.replace(self, **given)

    def for_input(self, shape: Sequence[int | str | None] | None) -> Preprocess:
        """The same preprocessing with what was left open taken from a network's input.

        Args:
            shape: The input's shape, batch first; None or a name stands for an unknown size. Shapes that are not of
                rank 4 leave everything open.

        Raises:
            ConfigError: A part that is set contradicts the network.
        """
        if shape is None or len(shape) != 4:
            return self
        sizes = [n if isinstance(n, int) and n > 0 else None for n in shape]
        layout = self.layout or ("nhwc" if sizes[1] not in (1, 3) and sizes[3] in (1, 3) else "nchw")
        n_channels, h, w = (sizes[1], sizes[2], sizes[3]) if layout == "nchw" else (sizes[3], sizes[1], sizes[2])
        wanted = tuple("?" if n is None else n for n in sizes)
        if n_channels is not None and n_channels not in (1, 3):
            raise ConfigError(
                f"The network's input has shape {wanted}, {n_channels} channels in layout {layout}; images have 1 "
                "or 3. "
                f"{'Give --layout, or feed' if self.layout else 'Feed'} prepared float32 arrays from an .npz.",
                shape=wanted,
            )
        channels = self.channels or (None if n_channels is None else "gray" if n_channels == 1 else "rgb")
        if n_channels is not None and (channels == "gray") != (n_channels == 1):
            raise ConfigError(
                f"Preprocessing makes {channels} images but the network's input has shape {wanted}, {n_channels} "
                f"channels. Use --channels {'gray' if n_channels == 1 else 'rgb'}.",
                shape=wanted,
            )
        size = self.hw
        if h is not None and w is not None:
            if size is not None and size != (h, w):
                raise ConfigError(
                    f"Preprocessing makes images of {size[0]}x{size[1]} but the network's input has shape {wanted}. "
                    f"Use --size {h}x{w}, or leave --size out.",
                    shape=wanted,
                )
            size = (h, w)
        return dataclasses.replace(self, layout=layout, channels=channels, size=size)

    def to_json(self) -> dict[str, Any]:
        """All parts as JSON values, for records and cache keys."""
        return {part: list(value) if isinstance(value := getattr(self, part), tuple) else value for part in PARTS}


def _scale_of(mean: Sequence[float], std: Sequence[float], default: float) -> float:
    values = [m for m in mean if m != 0.0] + [s for s in std if s != 1.0]
    if not values:
        return default
    return 1.0 if max(abs(v) for v in values) > _LARGEST_UNIT_VALUE else 255.0


def _number(part: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{part} is {value!r}, not a number.", key=part) from None
    if not math.isfinite(number):
        raise ConfigError(f"{part} is {value!r}, not a finite number.", key=part)
    return number


def _numbers(part: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        value = [v for v in value.replace(",", " ").split() if v]
    elif hasattr(value, "tolist"):  # a number or an array of numpy's
        value = value.tolist()
    numbers = tuple(_number(part, v) for v in (value if isinstance(value, Sequence) else [value]))
    if len(numbers) not in (1, 3):
        raise ConfigError(
            f"{part} has {len(numbers)} values. Give one, or one for each of three channels: "
            f"{'0.485,0.456,0.406' if part == 'mean' else '0.229,0.224,0.225'} for pixels in 0..1, "
            f"{'123.7,116.3,103.5' if part == 'mean' else '58.4,57.1,57.4'} for 0..255.",
            key=part,
        )
    return numbers


def _size(value: Any) -> tuple[int, int]:
    remedy = "Give one number, or height and width, e.g. --size 224 or --size 240x320."
    parts: list[Any]
    if isinstance(value, str):
        parts = value.lower().replace("x", " ").replace(",", " ").split()
    elif isinstance(value, Sequence):
        parts = list(value)
    else:
        parts = [value]
    try:
        sizes = [int(p) for p in parts if not isinstance(p, bool) and int(p) == float(p)]
    except (TypeError, ValueError):
        sizes = []
    if len(sizes) != len(parts) or len(sizes) not in (1, 2) or min(sizes) < 1 or max(sizes) > 65500:
        raise ConfigError(f"size is {value!r}. {remedy}", key="size")
    return (sizes[0], sizes[-1])


def _crop_pct(value: Any) -> float:
    if isinstance(value, str) and value.count("/") == 1:  # "224/227": the exact ratio, where decimals would round
        top, bottom = (_number("crop_pct", v) for v in value.split("/"))
        value = top / bottom if bottom else math.nan
    pct = _number("crop_pct", value)
    if not 0 < pct <= 1:
        raise ConfigError(
            f"crop_pct is {pct:g}, outside (0, 1]. It is the part of the image that is kept: 0.875 keeps 224 of 256 "
            "pixels.",
            key="crop_pct",
        )
    return pct


def _choice(part: str, value: Any, allowed: Sequence[str]) -> str:
    name = str(value).lower()
    if name not in allowed:
        raise ConfigError(f"{part} is '{value}'. Use one of {', '.join(allowed)}.", key=part)
    return name


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{v:g}" for v in values)


#: Preset name -> preprocessing. Sizes stay open: the network knows them.
PRESETS: Mapping[str, Preprocess] = {
    # torchvision's and timm's default for ImageNet
    "imagenet": Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    # the training set's own statistics; images are not cropped
    "cifar10": Preprocess(crop_pct=1.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), channels="rgb"),
    "mnist": Preprocess(crop_pct=1.0, mean=(0.1307,), std=(0.3081,), channels="gray"),
    # -1..1, as Keras' mode "tf" and the TensorFlow slim networks
    "tf": Preprocess(mean=(127.5,), std=(127.5,)),
    "unit": Preprocess(crop_pct=1.0, scale=255.0),
    "raw": Preprocess(crop_pct=1.0, scale=1.0),
}
