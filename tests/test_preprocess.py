"""Preprocessing: scale rule, presets, files of timm and Hugging Face, pixels."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from onnxcar.data import PRESETS, Preprocess
from onnxcar.data._images import decode, fit, normalize, to_channels
from onnxcar.errors import ConfigError, DataError

RGB = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)


def run(pre: Preprocess, pixels: np.ndarray = RGB) -> np.ndarray:
    return normalize(to_channels(pixels, pre), pre)


# --- scale of mean and std ---


def test_small_mean_is_for_pixels_in_0_to_1_bit_for_bit() -> None:
    pre = Preprocess.resolve("cifar10", mean="0.485,0.456,0.406", std="0.229,0.224,0.225")
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    want = ((RGB.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert np.ptp(want) > 2
    np.testing.assert_array_equal(run(pre), want)


def test_large_mean_is_for_pixels_in_0_to_255_bit_for_bit() -> None:
    pre = Preprocess.resolve("cifar10", mean="123.675,116.28,103.53", std="58.395,57.12,57.375")
    mean, std = np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)
    np.testing.assert_array_equal(run(pre), ((RGB.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("name", "parts", "want"),
    [
        ("raw", {}, lambda x: x),
        ("unit", {}, lambda x: x / 255),
        ("tf", {}, lambda x: x / 127.5 - 1),
        ("raw", {"mean": "0", "std": "1"}, lambda x: x),  # neutral values keep the preset's scale
        ("unit", {"mean": "0", "std": "1"}, lambda x: x / 255),
        ("mnist", {"mean": 0, "std": 256, "channels": "rgb"}, lambda x: x / 256),
        ("raw", {"mean": "0", "std": "256"}, lambda x: x / 256),
        ("raw", {"mean": "128", "std": "1"}, lambda x: x - 128),
        ("raw", {"mean": 128.0}, lambda x: x - 128),
        ("raw", {"mean": "0.5", "std": "0.5"}, lambda x: (x / 255 - 0.5) / 0.5),
        ("imagenet", {"mean": "104,117,123", "std": "1"}, lambda x: x - np.array([104, 117, 123])),
        ("unit", {"mean": "127.5", "std": "127.5"}, lambda x: x / 127.5 - 1),
        ("raw", {"mean": "127.5", "std": "127.5"}, lambda x: x / 127.5 - 1),
        # one of the two: the other is converted to its scale
        (
            "imagenet",
            {"mean": "123.675,116.28,103.53"},
            lambda x: (x - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375],
        ),
        ("tf", {"std": "0.5"}, lambda x: x / 127.5 - 1),
        ("unit", {"mean": "100"}, lambda x: (x - 100) / 255),
        ("raw", {"mean": 0.5, "std": 0.5, "scale": 1}, lambda x: (x - 0.5) / 0.5),
    ],
)
def test_scale_rule(name: str, parts: dict[str, Any], want: Any) -> None:
    got = run(Preprocess.resolve(name, **parts))
    exact = np.broadcast_to(want(RGB.astype(np.float64)), RGB.shape).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=3e-5)  # float32 arithmetic on values up to 255


def test_mean_is_in_the_order_of_the_network() -> None:
    pre = Preprocess.resolve("raw", mean="104,117,123", channels="bgr")
    np.testing.assert_array_equal(run(pre)[:, 0], RGB[..., 2].astype(np.float32) - 104)
    np.testing.assert_array_equal(run(pre)[:, 2], RGB[..., 0].astype(np.float32) - 123)


def test_layout_and_gray() -> None:
    nhwc = Preprocess.resolve("imagenet", layout="nhwc")
    np.testing.assert_array_equal(run(nhwc), run(PRESETS["imagenet"]).transpose(0, 2, 3, 1))
    gray = run(Preprocess.resolve("raw", channels="gray"))
    pillow = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in RGB])
    np.testing.assert_array_equal(gray, pillow[:, None].astype(np.float32))
    assert gray.std() > 1


def test_three_means_do_not_fit_gray_images() -> None:
    with pytest.raises(DataError, match="1 channel but mean has 3 values"):
        run(Preprocess.resolve("imagenet", channels="gray"))


# --- parts ---


@pytest.mark.parametrize(
    ("part", "bad", "words"),
    [
        ("size", "big", "size is 'big'"),
        ("size", 0, "--size 224"),
        ("size", (1, 2, 3), "size is"),
        ("size", True, "size is"),
        ("size", 22.5, "size is"),
        ("crop_pct", 0, "outside"),
        ("crop_pct", 1.2, "outside"),
        ("crop_pct", "1/0", "not a finite"),
        ("crop_pct", "nan", "finite"),
        ("interpolation", "magic", "nearest, lanczos, bilinear"),
        ("mean", "a,b,c", "not a number"),
        ("mean", "1,2", "2 values"),
        ("mean", [], "0 values"),
        ("std", "0", "above 0"),
        ("std", -1, "above 0"),
        ("std", "inf", "finite"),
        ("scale", 0, "above 0"),
        ("channels", "cmyk", "rgb, bgr, gray"),
        ("layout", "chwn", "nchw, nhwc"),
        ("resize", "stretch", "shortest"),
    ],
)
def test_bad_part_is_refused_with_a_remedy(part: str, bad: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Preprocess.resolve("unit", **{part: bad})


def test_unknown_part_and_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="no part 'crop'"):
        Preprocess().override(crop=1)
    with pytest.raises(ConfigError, match="imagenet, cifar10, mnist, tf, unit, raw"):
        Preprocess.resolve("imagnet")


def test_constructor_of_the_interface() -> None:
    pre = Preprocess(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert (pre.hw, pre.divisor, pre.crop_pct) == ((224, 224), 255.0, 0.875)
    assert pre == Preprocess.resolve(pre, size="224x224")
    assert hash(pre) != hash(pre.override(crop_pct="224/227"))
    assert Preprocess(**pre.to_json()) == pre
    assert Preprocess(mean=np.float32(0.5), std=np.full(3, 0.25)).stds == (0.25, 0.25, 0.25)


@given(
    st.sampled_from(sorted(PRESETS)),
    st.floats(0.01, 1.0),
    st.tuples(*[st.floats(-255, 255)] * 3),
    st.tuples(*[st.floats(0.01, 255)] * 3),
)
def test_overriding_both_forgets_the_preset(
    name: str, crop: float, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    pre = PRESETS[name].override(mean=mean, std=std, crop_pct=crop, scale=1)
    assert (pre.means, pre.stds, pre.divisor, pre.crop_pct) == (mean, std, 1.0, crop)
    assert pre.override() == pre


# --- what a network's input tells ---


@pytest.mark.parametrize(
    ("shape", "size", "channels", "layout"),
    [
        (("N", 3, 32, 48), (32, 48), "rgb", "nchw"),
        ((1, 1, 28, 28), (28, 28), "gray", "nchw"),
        ((None, 32, 32, 3), (32, 32), "rgb", "nhwc"),
        (("N", 3, "h", "w"), None, "rgb", "nchw"),
        (("N", "c", "h", "w"), None, None, "nchw"),
        (("N", 10), None, None, None),
        (None, None, None, None),
    ],
)
def test_open_parts_come_from_the_input(shape: Any, size: Any, channels: Any, layout: Any) -> None:
    pre = Preprocess().for_input(shape)
    assert (pre.hw, pre.channels, pre.layout) == (size, channels, layout)


def test_contradictions_to_the_input_are_refused() -> None:
    with pytest.raises(ConfigError, match="--size 32x32"):
        Preprocess(size=28).for_input(("N", 3, 32, 32))
    with pytest.raises(ConfigError, match="--channels gray"):
        Preprocess(channels="rgb").for_input(("N", 1, 28, 28))
    with pytest.raises(ConfigError, match="12 channels"):
        Preprocess().for_input(("N", 12, 28, 28))
    assert Preprocess(channels="bgr").for_input(("N", 3, 8, 8)).channels == "bgr"


# --- pixels of files ---


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_resize_and_crop_follow_the_reference() -> None:
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 401, 3), np.uint8))
    got = fit(wide, Preprocess(size=224, crop_pct=0.875), "x")
    resized = wide.resize((342, 256), Image.Resampling.BILINEAR)  # 401 * 256 / 300 = 342.2
    np.testing.assert_array_equal(got, np.asarray(resized)[16:240, 59:283])
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert fit(tall, Preprocess(size=(120, 60)), "x").shape == (120, 60, 3)


def test_an_image_of_the_right_size_is_taken_as_it_is() -> None:
    image = Image.fromarray(RGB[0])
    np.testing.assert_array_equal(fit(image, Preprocess(size=(5, 4), crop_pct=0.5), "x"), RGB[0])
    np.testing.assert_array_equal(fit(image, Preprocess(), "x"), RGB[0])


@pytest.mark.parametrize("pct", ["224/227", 0.98678, 0.9868])
def test_crop_of_224_from_227_takes_the_centre_without_resizing(pct: Any) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (227, 227, 3), np.uint8)
    got = fit(Image.fromarray(pixels), Preprocess.resolve("unit", size=224, crop_pct=pct), "x")
    np.testing.assert_array_equal(got, pixels[1:225, 1:225])


def test_every_part_of_resizing_changes_the_pixels() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 41, 3), np.uint8))
    base = Preprocess(size=16, crop_pct=1.0)
    variants = [base, base.override(crop_pct=0.8), base.override(resize="squash"), base.override(resize="none")]
    variants += [base.override(interpolation=name) for name in ("nearest", "bicubic", "lanczos", "box", "hamming")]
    assert len({fit(image, pre, "x").tobytes() for pre in variants}) == len(variants)
    with pytest.raises(DataError, match="smaller than the crop"):
        fit(image, Preprocess(size=35, resize="none"), "x")


def test_modes_become_8_bit_colour() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray = Image.fromarray(ramp)
    colour = Image.merge("RGB", (gray, gray.rotate(90), gray.rotate(180)))
    for image, want in [
        (gray, gray),
        (colour, colour),
        (colour.convert("RGBA"), colour),
        (Image.merge("LA", (gray, gray)), gray),
        (gray.convert("1"), gray.convert("1").convert("L")),
        (colour.convert("P"), colour.convert("P").convert("RGB")),
    ]:
        got = decode(encoded(image), "x")
        assert got.mode in ("L", "RGB")
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    cmyk = decode(encoded(colour.convert("CMYK"), "TIFF"), "x")
    assert cmyk.mode == "RGB"
    assert np.abs(np.asarray(cmyk, int) - np.asarray(colour, int)).max() <= 1


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = np.asarray(decode(encoded(Image.fromarray(ramp)), "x"))
    np.testing.assert_array_equal(got, np.arange(256, dtype=np.uint8).reshape(16, 16))


def test_palette_with_transparency_gives_no_warning() -> None:
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    got = decode(encoded(image, transparency=bytes(range(200, 216))), "x")  # warnings are errors in these tests
    assert got.mode == "RGB"


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.new("RGB", (7, 3)), "JPEG", exif=exif), "x").size == (7, 3)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "broken"])
def test_unreadable_image_is_named(damage: str) -> None:
    good = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    data = {"empty": b"", "text": b"hello", "truncated": good[: len(good) // 2], "broken": good[:20] + bytes(200)}[
        damage
    ]
    with pytest.raises(DataError, match=r"'cats/1\.jpg'.*(Replace|take)") as e:
        decode(data, "cats/1.jpg")
    assert e.value.sample == "cats/1.jpg"


def test_decompression_bomb_is_refused() -> None:
    bomb = encoded(Image.new("1", (20_000, 10_000)))
    assert len(bomb) < 100_000
    with pytest.raises(DataError, match="more pixels than is safe"):
        decode(bomb, "bomb.png")


def test_float_pixels_are_refused() -> None:
    with pytest.raises(DataError, match="float pixels"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"), "x.tif")


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_bytes_raise_data_error_only(noise: bytes, at: int) -> None:
    good = encoded(Image.fromarray(RGB[0]))
    data = good[:at] + noise + good[at + len(noise) :]
    with contextlib.suppress(DataError):
        assert decode(data, "x").mode in ("L", "RGB")


# --- files ---


def written(folder: Path, content: Any) -> Path:
    path = folder / "preprocessor_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


HALF = (0.5, 0.5, 0.5)
VIT = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {
    "do_center_crop": True,
    "do_resize": True,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "crop_size": {"height": 224, "width": 224},
    "size": {"shortest_edge": 256},
    "resample": 3,
}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (
            {**VIT, "size": {"height": 224, "width": 192}, "resample": 2, "rescale_factor": 0.00392156862745098},
            Preprocess((224, 192), 1.0, "bilinear", HALF, HALF, "rgb", resize="squash"),
        ),
        ({**VIT, "size": 224, "resample": 3}, Preprocess(224, 1.0, "bicubic", HALF, HALF, "rgb", resize="squash")),
        (CLIP, Preprocess(224, 0.875, "bicubic", CLIP["image_mean"], CLIP["image_std"], "rgb")),
        (
            {**CLIP, "size": 256, "crop_size": 224, "resample": 2},
            Preprocess(224, 0.875, "bilinear", CLIP["image_mean"], CLIP["image_std"], "rgb"),
        ),
        (
            {**VIT, "size": {"shortest_edge": 224}, "crop_pct": 0.95},
            Preprocess(224, 0.95, "bilinear", HALF, HALF, "rgb"),
        ),
        (
            {**VIT, "size": {"shortest_edge": 384}, "crop_pct": 1.0},
            Preprocess(384, 1.0, "bilinear", HALF, HALF, "rgb", resize="squash"),
        ),
        ({**VIT, "size": {"shortest_edge": 96}}, Preprocess(96, 1.0, "bilinear", HALF, HALF, "rgb")),
        (
            {**VIT, "do_resize": False, "do_normalize": False, "size": 224},
            Preprocess(None, 1.0, "bilinear", channels="rgb"),
        ),
        (
            {**VIT, "size": 224, "do_normalize": False, "do_rescale": False},
            Preprocess(224, 1.0, "bilinear", channels="rgb", scale=1, resize="squash"),
        ),
        (
            {**VIT, "size": 224, "do_flip_channel_order": True, "do_normalize": False},
            Preprocess(224, 1.0, "bilinear", channels="bgr", resize="squash"),
        ),
        (
            {**VIT, "size": 300, "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
            Preprocess(300, 1.0, "bilinear", 1.0, 1.0, "rgb", scale=127.5, resize="squash"),
        ),
        (
            {
                "architecture": "resnet",
                "pretrained_cfg": {
                    "input_size": [3, 240, 240],
                    "interpolation": "bicubic",
                    "crop_pct": 0.95,
                    "mean": [0.1, 0.2, 0.3],
                    "std": [1, 1, 1],
                    "test_input_size": [3, 288, 288],
                },
            },
            Preprocess(240, 0.95, "bicubic", (0.1, 0.2, 0.3), (1, 1, 1), "rgb", scale=255),
        ),
        (
            {"input_size": [1, 28, 28], "mean": [0.13], "std": [0.3], "crop_mode": "squash"},
            Preprocess(28, 0.875, "bicubic", 0.13, 0.3, "gray", resize="squash"),
        ),
    ],
)
def test_files_of_timm_and_hugging_face(tmp_path: Path, config: dict[str, Any], want: Preprocess) -> None:
    got = Preprocess.resolve(written(tmp_path, config))
    assert got == want


def test_parts_override_a_file(tmp_path: Path) -> None:
    pre = Preprocess.resolve(str(written(tmp_path, CLIP)), size=96, mean="104,117,123", std="1")
    assert (pre.hw, pre.divisor, pre.interpolation) == ((96, 96), 1.0, "bicubic")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "as JSON"),
        ("[]", "describes no preprocessing"),
        ({"hidden_size": 7}, "describes no preprocessing"),
        ({**VIT, "size": {"longest_edge": 4}}, "known forms"),
        ({**VIT, "size": "big"}, "whole number"),
        ({**VIT, "size": 224, "do_pad": True}, "do_pad"),
        ({**VIT, "size": 224, "resample": 9}, "resample"),
        ({**VIT, "size": 224, "rescale_factor": 0}, "rescale_factor"),
        ({**VIT, "size": 224, "image_std": [0, 0, 0]}, "above 0"),
        ({**CLIP, "size": {"shortest_edge": 200}}, "larger than"),
        ({"pretrained_cfg": {"input_size": [4, 2, 2]}}, "input_size"),
        ({"pretrained_cfg": {"input_size": [3, 8, 8], "crop_mode": "border"}}, "crop_mode"),
        ({"pretrained_cfg": {"input_size": [3, 8, 8], "interpolation": "x"}}, "interpolation"),
    ],
)
def test_file_that_cannot_be_followed_is_refused_by_name(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as e:
        Preprocess.from_file(written(tmp_path, content))
    assert "preprocessor_config.json" in str(e.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Preprocess.resolve("nowhere.json")
