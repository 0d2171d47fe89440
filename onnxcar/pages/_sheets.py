"""Pictures for a page: patches and images packed into a few sheets, as data URIs of bounded size."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from onnxcar.data import Dataset
    from onnxcar.interpret import Look

__all__ = ["Place", "Sheets", "pack", "pixels"]

Pixels = npt.NDArray[np.uint8]
Place = tuple[int, int, int, int, int]  # sheet, left, top, width, height
SIDE = 2048  # of a sheet
SHARP = 20  # pictures up to this side are kept without loss: a codec would mix neighbours
QUALITIES = (80, 65, 50, 35)


@dataclass(frozen=True)
class Sheets:
    """Pictures on sheets.

    Attributes:
        uris: Of the sheets.
        places: Where each picture is, in the order given.
    """

    uris: list[str]
    places: list[Place]


def pixels(data: Dataset, look: Look, indices: Sequence[int], batch: int = 64) -> Iterator[tuple[int, Pixels]]:
    """(index, pixels (h, w, 3)) of some samples, a batch at a time."""
    order = sorted(set(indices))
    for start in range(0, len(order), batch):
        at = order[start : start + batch]
        yield from zip(at, look.pixels(data.inputs(np.asarray(at))[""]), strict=True)


def shrunk(picture: Pixels, side: int) -> Pixels:
    """The picture with its longer side at most `side`."""
    h, w = picture.shape[:2]
    if max(h, w) <= side:
        return picture
    size = (max(1, round(w * side / max(h, w))), max(1, round(h * side / max(h, w))))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), np.uint8)


def pack(pictures: Sequence[Pixels], budget_bytes: int) -> Sheets:
    """Pictures in rows on sheets; small ones without loss, the others as WebP of falling quality until they fit.

    Args:
        pictures: (h, w, 3) each, none larger than a sheet.
        budget_bytes: Of all sheets together; where even the lowest quality takes more, it takes more.
    """
    small = [i for i, picture in enumerate(pictures) if max(picture.shape[:2]) <= SHARP]
    large = [i for i, picture in enumerate(pictures) if max(picture.shape[:2]) > SHARP]
    places: list[Place] = [(0, 0, 0, 0, 0)] * len(pictures)
    files: list[bytes] = []
    for chosen in (small, large):
        sheets = _laid_out([pictures[i] for i in chosen])
        canvases = [Image.fromarray(canvas) for canvas, _ in sheets]
        for number, (_, boxes) in enumerate(sheets):
            for k, box in boxes:
                places[chosen[k]] = (len(files) + number, *box)
        if chosen is small:
            files += [_encoded(canvas, None) for canvas in canvases]
            continue
        best: list[bytes] = []
        for quality in QUALITIES:
            best = [_encoded(canvas, quality) for canvas in canvases]
            if sum(map(len, best)) + sum(map(len, files)) <= budget_bytes:
                break
        files += best
    return Sheets([f"data:image/webp;base64,{base64.b64encode(file).decode()}" for file in files], places)


def _laid_out(pictures: Sequence[Pixels]) -> list[tuple[Pixels, list[tuple[int, tuple[int, int, int, int]]]]]:
    """Sheets with the pictures in rows of equal height, and the box (left, top, width, height) of each by number."""
    order = sorted(range(len(pictures)), key=lambda i: -pictures[i].shape[0])
    sheets: list[list[tuple[int, tuple[int, int, int, int]]]] = []
    x = y = row = 0
    for i in order:
        h, w = pictures[i].shape[:2]
        if sheets and x + w > SIDE:
            x, y, row = 0, y + row, 0
        if not sheets or y + h > SIDE:
            sheets.append([])
            x = y = row = 0
        sheets[-1].append((i, (x, y, w, h)))
        x, row = x + w, max(row, h)
    out = []
    for boxes in sheets:
        width = max(x + w for _, (x, _, w, _) in boxes)
        height = max(y + h for _, (_, y, _, h) in boxes)
        canvas = np.full((height, width, 3), 128, np.uint8)
        for i, (x, y, w, h) in boxes:
            canvas[y : y + h, x : x + w] = pictures[i]
        out.append((canvas, boxes))
    return out


def _encoded(canvas: Image.Image, quality: int | None) -> bytes:
    stream = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality, "method": 4}
    canvas.save(stream, "WEBP", **options)
    return stream.getvalue()
