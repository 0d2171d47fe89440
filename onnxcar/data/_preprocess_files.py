"""Preprocessing read from what timm and Hugging Face store beside their models.

timm: `config.json` with a `pretrained_cfg`, or the resolved data config alone. Hugging Face:
`preprocessor_config.json` of an image processor. Keys that would change the pixels in a way :class:`Preprocess` cannot
say are refused, not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxcar.data._preprocess import INTERPOLATIONS, Preprocess
from onnxcar.errors import ConfigError

__all__ = ["read"]

#: Hugging Face switches for steps that change the pixels and have no counterpart here.
_REFUSED = ("do_pad", "do_thumbnail", "do_align_long_axis", "do_color_quantize", "do_split_image", "do_image_splitting")
#: ConvNeXt's image processor crops below this size and squashes from it on.
_CONVNEXT_SQUASH_FROM = 384


def read(path: Path) -> Preprocess:
    """The preprocessing that the file describes.

    Raises:
        ConfigError: Missing, not JSON, of no known kind, or with a step that is not supported.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(
            f"Preprocessing file '{path}' cannot be read as JSON ({e}). Give timm's config.json or a Hugging Face "
            "preprocessor_config.json.",
            path=str(path),
        ) from e
    if not isinstance(config, dict):
        config = {}
    try:
        if isinstance(timm := config.get("pretrained_cfg"), dict):
            return _timm(timm)
        if "input_size" in config and not any(key.startswith("do_") for key in config):
            return _timm(config)
        if any(
            key in config for key in ("do_resize", "do_normalize", "do_rescale", "image_mean", "image_processor_type")
        ):
            return _hugging_face(config)
    except ConfigError as e:
        raise ConfigError(f"{e} (in '{path}')", path=str(path)) from e
    raise ConfigError(
        f"'{path}' describes no preprocessing: it has neither timm's pretrained_cfg or input_size nor Hugging Face's "
        "do_resize, do_normalize or image_mean. Give the parts as flags: --size --mean --std.",
        path=str(path),
    )


def _timm(config: Mapping[str, Any]) -> Preprocess:
    shape = config.get("input_size", (3, 224, 224))
    if not isinstance(shape, (list, tuple)) or len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"input_size is {shape!r}, not (1 or 3, height, width).", key="input_size")
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ConfigError(f"crop_mode is '{mode}'; only 'center' and 'squash' are supported.", key="crop_mode")
    interpolation = config.get("interpolation") or "bicubic"  # timm's own default
    return Preprocess(
        size=tuple(shape[1:]),
        crop_pct=config.get("crop_pct") or 0.875,
        interpolation="bilinear" if interpolation == "random" else interpolation,
        mean=_values(config.get("mean", (0.485, 0.456, 0.406))),
        std=_values(config.get("std", (0.229, 0.224, 0.225))),
        channels="gray" if shape[0] == 1 else "rgb",
        scale=255.0,  # timm's numbers are for 0..1, whatever their size
        resize="squash" if mode == "squash" else "shortest",
    )


def _hugging_face(config: Mapping[str, Any]) -> Preprocess:
    for key in _REFUSED:
        if config.get(key):
            raise ConfigError(f"{key} is set, a step that is not supported. Prepare the inputs in an .npz.", key=key)
    size, crop_pct, resize = _hf_size(config)
    scale = 1.0
    if config.get("do_rescale", True):
        factor = config.get("rescale_factor", 1 / 255)
        if not isinstance(factor, (int, float)) or not factor > 0:
            raise ConfigError(f"rescale_factor is {factor!r}, not above 0.", key="rescale_factor")
        scale = 1 / factor
        scale = float(round(scale)) if abs(scale - round(scale)) < 1e-6 else scale  # 1 / 0.00392156862745098 is 255
    mean, std = _values(0.0), _values(1.0)
    if config.get("do_normalize", True):
        mean, std = _values(config.get("image_mean", 0.5)), _values(config.get("image_std", 0.5))
    if config.get("do_rescale", True) and config.get("rescale_offset"):  # EfficientNet: pixel * factor - 1
        mean = tuple(m + 1.0 for m in mean)
    resample = config.get("resample", INTERPOLATIONS["bilinear"])
    names = {code: name for name, code in INTERPOLATIONS.items()}
    if isinstance(resample, bool) or resample not in names:
        raise ConfigError(f"resample is {resample!r}, not one of Pillow's codes {sorted(names)}.", key="resample")
    return Preprocess(
        size=size,
        crop_pct=crop_pct,
        interpolation=names[resample],
        mean=mean,
        std=std,
        channels="bgr" if config.get("do_flip_channel_order") else "gray" if config.get("do_grayscale") else "rgb",
        scale=scale,
        resize=resize,
    )


def _hf_size(config: Mapping[str, Any]) -> tuple[tuple[int, int] | None, float, Any]:
    """Output size, crop_pct and way of resizing.

    An int is the shorter side where a crop follows, both sides where none does, which is what the processors that still
    store an int mean by it.
    """
    crop = _hf_hw(config.get("crop_size"), "crop_size") if config.get("do_center_crop") else None
    size = config.get("size")
    if not config.get("do_resize", True) or size is None:
        return crop, 1.0, "none" if crop else "shortest"
    if isinstance(size, Mapping) and "shortest_edge" in size and not {"height", "width"} & size.keys():
        edge = _whole(size["shortest_edge"], "size")
    elif isinstance(size, int) and (crop is not None or "crop_pct" in config):
        edge = _whole(size, "size")
    else:
        hw = _hf_hw(size, "size")
        assert hw is not None
        if crop is None or crop == hw:
            return hw, 1.0, "squash"
        if crop[0] > hw[0] or crop[1] > hw[1] or crop[0] * hw[1] != crop[1] * hw[0]:
            raise ConfigError(f"size {hw} and crop_size {crop} are not of one shape.", key="crop_size")
        return crop, crop[0] / hw[0], "squash"
    if crop is not None:
        if max(crop) > edge:
            raise ConfigError(f"crop_size {crop} is larger than the resized shorter side {edge}.", key="crop_size")
        return crop, min(crop) / edge, "shortest"
    if "crop_pct" in config:
        if edge >= _CONVNEXT_SQUASH_FROM:
            return (edge, edge), 1.0, "squash"
        return (edge, edge), config.get("crop_pct") or 0.875, "shortest"
    return (edge, edge), 1.0, "shortest"  # a network needs one size: the centre is taken


def _hf_hw(value: Any, key: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        if {"height", "width"} <= value.keys():
            return _whole(value["height"], key), _whole(value["width"], key)
        if "shortest_edge" in value:
            edge = _whole(value["shortest_edge"], key)
            return edge, edge
        raise ConfigError(f"{key} is {dict(value)}; known forms are an int, height and width, shortest_edge.", key=key)
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return _whole(value[0], key), _whole(value[1], key)
    edge = _whole(value, key)
    return edge, edge


def _whole(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} is {value!r}, not a whole number above 0.", key=key)
    return value


def _values(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
