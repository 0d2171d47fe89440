"""The page of `onnxcar explain`: facts as compact rows for the script, pictures on sheets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcar.interpret import LayerResponses, Responses, kernel_pictures
from onnxcar.pages._html import render
from onnxcar.pages._sheets import Pixels, Place, pack, pixels, shrunk

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["explanation"]

PATCHES = 9
MADE = 64  # side of an image made for a filter, pixels
CELL = 44  # side of a patch as it is shown at most, pixels
BUDGET = 11_000_000  # bytes of pictures; base64 makes them a third larger
SIDES = ((400, 144), (1200, 112), (3000, 80))  # images up to that number, side of their thumbnails
SMALLEST = 56


def explanation(facts: Mapping[str, Any], responses: Responses, data: Dataset) -> str:
    """The page as text.

    Args:
        facts: What `Explanation.to_dict` gives.
        responses: Strongest responses and their places.
        data: The images.
    """
    pictures = _Pictures(facts, responses, data)
    model = facts["model"]["path"]
    return render(
        "explanation.html",
        scripts=("explanation.js",),
        title=Path(model).name if model else "model",
        facts=facts,
        n_filters=len(facts["filters"]),
        widest=max((layer["before"] for layer in facts["layers"]), default=1),
        rows=[_row(row, pictures, i) for i, row in enumerate(facts["filters"])],
        page={
            "layers": [_layer(layer) for layer in facts["layers"]],
            "images": pictures.captions,
            "sheets": len(pictures.uris),
        },
        sheets=pictures.uris,
    )


def _layer(layer: Mapping[str, Any]) -> list[Any]:
    return [layer["node"], layer["kind"], layer["before"], layer["after"], layer["clusters"], layer["field"]]


def _row(row: Mapping[str, Any], pictures: _Pictures, i: int) -> dict[str, Any]:
    """One filter for the script: short keys, what is not known left out."""
    short = {
        "l": row["layer"],
        "i": row["filter"],
        "v": row["importance"],
        "r": row["rank"],
        "t": row["tied"] if row["tied"] > 1 else None,
        "s": "protected" if row["protected"] else None,
        "x": True if row["removed"] else None,
        "d": True if row["dead"] else None,
        "m": row["mean"],
        "c": row["contribution"],
        "k": row["cluster"],
        "w": row["twins"],
        "h": row["colour"],
        "a": row["orientation"] if (row["coherence"] or 0) >= 0.3 else None,
        "b": row["by_class"],
        "e": [[f"class {name}" if name.isdecimal() else name, value] for name, value in row["responds"]],
        "z": pictures.made[i],
        "u": round(row["made"] / row["largest"], 2) if row["made"] is not None and (row["largest"] or 0) > 0 else None,
        "p": pictures.patches[i],
        "q": pictures.kernels[i],
    }
    return {key: value for key, value in short.items() if value is not None and value != []}


class _Pictures:
    """Patches, kernels and captions of all filters."""

    def __init__(self, facts: Mapping[str, Any], responses: Responses, data: Dataset) -> None:
        """Cut the patches out of the images and pack them."""
        n = len(facts["filters"])
        self.patches: list[list[list[int]]] = [[] for _ in range(n)]
        self.kernels: list[Place | None] = [None] * n
        self.made: list[Place | None] = [None] * n
        self.captions: list[str] = []
        self.uris: list[str] = []
        stock: list[Pixels] = []
        kernels, made = self._kernels(responses, stock), self._made(responses, stock)
        if responses.look is not None:
            self._cut(responses, data, stock, kernels, made)

    @staticmethod
    def _made(responses: Responses, stock: list[Pixels]) -> dict[int, int]:
        """Filter number -> number in the stock of the image made for it."""
        found: dict[int, int] = {}
        start = 0
        for state in responses.layers:
            if state.made is not None:
                for i in np.flatnonzero(state.made.done):
                    found[start + int(i)] = len(stock)
                    stock.append(shrunk(state.made.pictures[i], MADE))
            start += state.layer.filters
        return found

    def _kernels(self, responses: Responses, stock: list[Pixels]) -> dict[int, int]:
        """Filter number -> its kernel's number in the stock."""
        found: dict[int, int] = {}
        start = 0
        for state in responses.layers:
            made = _kernels_of(state, responses)
            for i in range(state.layer.filters if made is not None else 0):
                assert made is not None
                found[start + i] = len(stock)
                stock.append(made[i])
            start += state.layer.filters
        return found

    def _cut(
        self,
        responses: Responses,
        data: Dataset,
        stock: list[Pixels],
        kernels: dict[int, int],
        made: dict[int, int],
    ) -> None:
        assert responses.look is not None
        used = sorted({int(i) for state in responses.layers for i in np.unique(state.top_images[:PATCHES])})
        number = {image: k for k, image in enumerate(used)}
        side = next((s for most, s in SIDES if len(used) <= most), SMALLEST)
        wanted: dict[int, list[tuple[int, int, tuple[int, int, int, int]]]] = {}
        size = next(iter(pixels(data, responses.look, used[:1])))[1].shape[:2]
        start = 0
        for state in responses.layers:
            for i in range(state.layer.filters):
                for k in range(min(PATCHES, len(state.top))):
                    if state.top[k, i] > state.low[i]:
                        box = _box(state, i, k, size)
                        wanted.setdefault(int(state.top_images[k, i]), []).append((start + i, k, box))
            start += state.layer.filters
        thumbs: dict[int, tuple[int, float]] = {}
        own: list[tuple[int, int, int, int]] = []  # filter, place, image, number in the stock
        crops: list[tuple[int, int, int, tuple[int, int, int, int]]] = []
        for image, picture in pixels(data, responses.look, used):
            scale = min(1.0, side / max(size))
            thumbs[image] = (len(stock), scale)
            stock.append(shrunk(picture, side))
            for i, k, box in wanted.get(image, ()):
                top, left, bottom, right = box
                longer = max(bottom - top, right - left)
                if scale == 1.0 or longer * scale >= CELL * 0.9:
                    crops.append((i, k, image, box))
                else:
                    own.append((i, k, image, len(stock)))
                    stock.append(shrunk(picture[top:bottom, left:right], CELL))
        sheets = pack(stock, BUDGET)
        self.uris = sheets.uris
        self.captions = [_caption(data, image) for image in used]
        for i, at in kernels.items():
            self.kernels[i] = sheets.places[at]
        for i, at in made.items():
            self.made[i] = sheets.places[at]
        found: dict[int, list[tuple[int, list[int]]]] = {}
        for i, k, image, at in own:
            found.setdefault(i, []).append((k, [number[image], *sheets.places[at]]))
        for i, k, image, box in crops:
            at, scale = thumbs[image]
            found.setdefault(i, []).append((k, [number[image], *_inside(sheets.places[at], box, scale)]))
        for i, entries in found.items():
            self.patches[i] = [entry for _, entry in sorted(entries)]


def _kernels_of(state: LayerResponses, responses: Responses) -> Pixels | None:
    kernels = state.kernels
    return None if kernels is None or kernels.shape[1] * kernels.shape[2] < 2 else kernel_pictures(kernels)


def _box(state: LayerResponses, i: int, k: int, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """What the k-th strongest response of a filter sees: top, left, bottom, right."""
    if state.field is None:
        return 0, 0, size[0], size[1]
    row, column = divmod(int(state.top_places[k, i]), state.width)
    return state.field.box(row, column, size[0], size[1])


def _inside(place: Place, box: tuple[int, int, int, int], scale: float) -> list[int]:
    """A box of an image as a place on the sheet that holds its thumbnail."""
    sheet, x, y, w, h = place
    top, left, bottom, right = (round(v * scale) for v in box)
    left, top = min(left, w - 1), min(top, h - 1)
    return [sheet, x + left, y + top, max(1, min(w, right) - left), max(1, min(h, bottom) - top)]


def _caption(data: Dataset, image: int) -> str:
    name = Path(data.name(image)).name
    if not data.has_labels or data.labels.ndim > 1:
        return name
    label = int(data.labels[image])
    known = data.classes
    return f"{known[label] if known is not None and 0 <= label < len(known) else label} · {name}"
