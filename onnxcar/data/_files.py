"""Find samples and labels in folders, lists and npz files."""

from __future__ import annotations

import csv
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcar.errors import DataError

__all__ = ["LABEL_REMEDY", "Found", "n_cores", "read_list", "read_npz", "scan_folder"]

#: What Pillow reads and data sets of classifiers are made of.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")
LABEL_REMEDY = (
    "Give a folder with one sub-folder a class, an .npz with 'images' and 'labels', or a list of 'path,label' lines."
)
#: Arrays above this are mapped from an uncompressed npz instead of read.
_MAPPED_BYTES = 1 << 30


@dataclass(frozen=True)
class Found:
    """Image files and what is known of them."""

    paths: Sequence[Path]
    labels: NDArray[Any] | None
    classes: tuple[str, ...] | None


def n_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scan_folder(root: Path, *, labelled: bool = True) -> Found:
    """The images below a folder, by class, then by path.

    Raises:
        DataError: No such folder, no class folders, an empty one, or one that `classes.txt` does not name.
    """
    if not root.is_dir():
        raise DataError(f"'{root}' is not a folder. {LABEL_REMEDY}", path=str(root))
    try:
        folders = sorted((p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)
        if not labelled and not folders:
            paths = _images_below(root)
            if not paths:
                raise DataError(f"Folder '{root}' holds no images ({' '.join(SUFFIXES)}).", path=str(root))
            return Found(paths, None, None)
        if not folders:
            raise DataError(
                f"Folder '{root}' has no sub-folders, so its images have no classes. {LABEL_REMEDY}", path=str(root)
            )
        names = [p.name for p in folders]
        classes, ids = _class_ids(root / "classes.txt", names)
        by_class = sorted(zip(ids, folders, strict=True), key=lambda pair: pair[0])
        paths, labels = [], []
        for label, folder in by_class:
            images = _images_below(folder)
            if not images:
                raise DataError(
                    f"Class folder '{folder}' holds no images ({' '.join(SUFFIXES)}). Add some, or remove the folder "
                    "and name all classes in a classes.txt so that the ids stay.",
                    path=str(folder),
                )
            paths += images
            labels += [label] * len(images)
    except OSError as e:
        raise DataError(f"Folder '{root}' cannot be read ({e}). Check its permissions.", path=str(root)) from e
    return Found(paths, np.array(labels, np.int64), classes)


def _images_below(folder: Path) -> list[Path]:
    found = [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    return sorted(found, key=os.fspath)


def _read_classes(path: Path) -> tuple[str, ...] | None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"'{path}' cannot be read as UTF-8 text ({e}). Write one class name a line.", path=str(path)
        ) from e
    return tuple(line.strip() for line in text.rstrip().splitlines()) or None


def _class_ids(file: Path, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Class names and the id of each of `names`: its place in the file, or where there is none, its own."""
    lines = _read_classes(file)
    if lines is None:
        return tuple(names), list(range(len(names)))
    places: dict[str, int] = {}
    for place, line in enumerate(lines):
        for name in (line, line.split(maxsplit=1)[0] if line else ""):  # "n01440764 tench" names the folder n01440764
            if places.setdefault(name, place) != place and name == line:
                raise DataError(
                    f"'{file}' names '{line}' twice, in lines {places[name] + 1} and {place + 1}.", path=str(file)
                )
    missing = [name for name in names if name not in places]
    if missing:
        raise DataError(
            f"'{file}' has no line for '{missing[0]}'{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. "
            "It must name every class, one a line; the line's place is the class id.",
            path=str(file),
        )
    return lines, [places[name] for name in names]


def read_list(file: Path, *, labelled: bool = True) -> Found:
    """The images and labels of a list; `path,label` in a .csv, `path label` or `path,label` in other files.

    Raises:
        DataError: Missing, empty, a line without label, or labels that are neither numbers nor known names.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows = [
            (number, *_split_line(line, comma=file.suffix.lower() == ".csv"))
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(
            f"List '{file}' cannot be read as UTF-8 text ({e}). Write 'path,label' lines.", path=str(file)
        ) from e
    classes = _read_classes(file.parent / "classes.txt")
    if rows and _is_header(rows[0], file.parent, classes):
        rows = rows[1:]
    if not rows:
        raise DataError(f"List '{file}' names no images. Write one 'path,label' a line.", path=str(file))
    bare = [number for number, _, labels in rows if not labels]
    if bare and (labelled or len(bare) < len(rows)):
        raise DataError(f"Line {bare[0]} of '{file}' has no label. Write 'path,label'.", path=str(file), line=bare[0])
    paths = [file.parent / path for _, path, _ in rows]
    labels = None if bare else _parse_labels(file, rows, classes)
    if labels is not None:
        _refuse_conflicts(file, rows, labels)
    return Found(paths, labels, classes)


def _split_line(line: str, *, comma: bool) -> tuple[str, list[str]]:
    """The path and the label texts of a line; paths may contain spaces."""
    line = line.strip()
    head, _, tail = line.partition(",")
    if comma or (tail and (head.lower().endswith(SUFFIXES) or not any(c.isspace() for c in tail.strip()))):
        cells = [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True))]
        return cells[0], [cell for cell in cells[1:] if cell]
    path, _, label = line.rpartition("\t") if "\t" in line else line.rpartition(" ")
    if not path or label.lower().endswith(SUFFIXES):  # a line that is only a path, perhaps with spaces
        return line, []
    return path.strip(), [label]


def _is_header(row: tuple[int, str, list[str]], folder: Path, classes: Sequence[str] | None) -> bool:
    _, path, labels = row
    if path.lower().endswith(SUFFIXES) or (folder / path).is_file():
        return False
    return not labels or not any(_is_number(v) or v in (classes or ()) for v in labels)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_labels(
    file: Path, rows: Sequence[tuple[int, str, list[str]]], classes: tuple[str, ...] | None
) -> NDArray[Any]:
    width = len(rows[0][2])
    names = {name: k for k, name in reversed(list(enumerate(classes or ())))}
    values: list[list[int | float]] = []
    for number, _, labels in rows:
        if len(labels) != width:
            raise DataError(
                f"Line {number} of '{file}' has {len(labels)} labels, line {rows[0][0]} has {width}. "
                "Write as many on every line; quote paths that contain commas.",
                path=str(file),
                line=number,
            )
        parsed: list[int | float] = []
        for label in labels:
            try:
                parsed.append(names[label] if label in names else int(label) if _is_integer(label) else float(label))
            except (ValueError, OverflowError):
                raise DataError(
                    f"Label '{label}' in line {number} of '{file}' is not a number"
                    f"{' and not in classes.txt' if classes else ''}. Use class ids, or write the class names into a "
                    "classes.txt beside the list, one a line.",
                    path=str(file),
                    line=number,
                ) from None
        values.append(parsed)
    is_class = width == 1 and all(isinstance(v[0], int) for v in values)
    try:
        return np.array([v[0] for v in values], np.int64) if is_class else np.array(values, np.float64)
    except OverflowError as e:
        raise DataError(f"A label of '{file}' is too large for 64 bits. Use class ids.", path=str(file)) from e


def _is_integer(text: str) -> bool:
    return text.lstrip("+-").isdecimal()


def _refuse_conflicts(file: Path, rows: Sequence[tuple[int, str, list[str]]], labels: NDArray[Any]) -> None:
    first: dict[str, int] = {}
    for k, (number, path, _) in enumerate(rows):
        j = first.setdefault(path, k)
        if j != k and not np.array_equal(labels[j], labels[k]):
            raise DataError(
                f"'{path}' has different labels in lines {rows[j][0]} and {number} of '{file}'. Remove one of them.",
                path=str(file),
                line=number,
            )


def read_npz(file: Path, *, labelled: bool = True) -> tuple[NDArray[Any], NDArray[Any] | None, tuple[str, ...] | None]:
    """Images, labels and class names of an npz; large uncompressed images are mapped, not read.

    Raises:
        DataError: Not an npz, arrays missing, or arrays of objects, which would have to be unpickled.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = {n.removesuffix(".npy"): n for n in archive.namelist() if n.endswith(".npy")}
            images = next((names[k] for k in ("images", "x") if k in names), None)
            labels = next((names[k] for k in ("labels", "y") if k in names), None)
            for found, wanted in ((images, "'images' (or 'x')"), (labels, "'labels' (or 'y')")):
                if found is None and (labelled or found is not labels):
                    raise DataError(
                        f"'{file}' has no array {wanted}; it has {', '.join(sorted(names)) or 'none'}. "
                        "Write it with numpy.savez(file, images=..., labels=...).",
                        path=str(file),
                    )
            assert images is not None
            pixels = _read_member(file, archive, images)
            values = None if labels is None or not labelled else _read_member(file, archive, labels)
            classes = None
            if "classes" in names:
                classes = tuple(str(v) for v in _read_member(file, archive, names["classes"]).reshape(-1).tolist())
    except DataError:
        raise
    except Exception as e:  # zip, deflate and header parsers raise whatever a damaged file leads them to
        raise DataError(
            f"'{file}' cannot be read as an .npz ({type(e).__name__}: {e}). "
            "Write it with numpy.savez(file, images=..., labels=...).",
            path=str(file),
        ) from e
    return pixels, values, classes


def _read_member(file: Path, archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    info = archive.getinfo(name)
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
        start = member.tell()
    if dtype.hasobject:
        raise DataError(
            f"Array '{name.removesuffix('.npy')}' of '{file}' holds Python objects, which would run code when read. "
            "Store numbers: numpy.savez(file, images=uint8 array, labels=int array).",
            path=str(file),
        )
    n_bytes = dtype.itemsize
    for n in shape:
        n_bytes *= int(n)
    if info.file_size != start + n_bytes:
        raise DataError(
            f"Array '{name.removesuffix('.npy')}' of '{file}' should take {n_bytes} bytes for shape {tuple(shape)} but "
            f"takes {info.file_size - start}. The file is damaged: write it again.",
            path=str(file),
        )
    if n_bytes > _MAPPED_BYTES and info.compress_type == zipfile.ZIP_STORED:
        offset = _data_offset(file, info) + start
        return np.memmap(file, dtype, "r", offset=offset, shape=tuple(shape), order="F" if fortran else "C")
    if n_bytes > _physical_bytes():  # or a small file of zeros takes the machine down
        raise DataError(
            f"Array '{name.removesuffix('.npy')}' of '{file}' takes {n_bytes} bytes, more than this machine's memory. "
            "Write it uncompressed (numpy.savez), then it is mapped instead of read.",
            path=str(file),
        )
    with archive.open(info) as member:
        array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return array


def _physical_bytes() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return float("inf")


def _data_offset(file: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header, whose two last fields vary in length."""
    with file.open("rb") as raw:
        raw.seek(info.header_offset)
        header = raw.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return int(info.header_offset + 30 + name_length + extra_length)
