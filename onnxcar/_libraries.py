"""Shared libraries that a provider of ONNX Runtime was linked to, and which of them this machine lacks."""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["CUDNN", "DRIVER", "missing_libraries", "needed_libraries", "provider_file", "remedy"]

#: Comes with the NVIDIA driver and with nothing else.
DRIVER = "libcuda.so.1"
#: Opened when the first Conv runs; newer builds of ONNX Runtime are not linked to it
#: (github.com/microsoft/onnxruntime/pull/29252).
CUDNN = "libcudnn.so.9"
# Parts of the C library and of the loader: who runs Python has them.
_SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so|ld-linux|libonnxruntime")
# From the ELF specification: types of program headers and tags of the dynamic section.
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRTAB = 1, 5


def provider_file(package: Path, provider: str) -> Path | None:
    """The library of a provider in an installed wheel, None if it has none.

    Args:
        package: Folder of the package onnxruntime.
        provider: "cuda" or "tensorrt".
    """
    path = package / "capi" / f"libonnxruntime_providers_{provider}.so"
    return path if path.is_file() else None


def needed_libraries(path: Path) -> tuple[str, ...]:
    """Names of the libraries that one was linked to, in its order, without those of the system.

    Read from the file's dynamic section (64-bit little-endian ELF); empty for any other file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return tuple(name for name in _needed(data) if not _SYSTEM.match(name))
    except (OSError, ValueError, struct.error):
        return ()


def _needed(data: mmap.mmap) -> list[str]:
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    table, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, table + i * size) for i in range(count)]

    def offset(address: int) -> int:
        for kind, _, start, virtual, _, length, *_ in headers:
            if kind == _LOAD and virtual <= address < virtual + length:
                return int(address - virtual + start)
        raise ValueError(address)

    entries = [
        struct.unpack_from("<qQ", data, start + i)
        for kind, _, start, _, _, length, *_ in headers
        if kind == _DYNAMIC
        for i in range(0, length, 16)
    ]
    strings = next((offset(value) for tag, value in entries if tag == _STRTAB), 0)
    starts = [strings + value for tag, value in entries if tag == _NEEDED]
    return [data[i : data.find(b"\0", i)].decode() for i in starts]


def missing_libraries(names: Iterable[str]) -> dict[str, str]:
    """Libraries that the loader cannot open -> its words; what it can open stays loaded.

    A library that is there but lacks one of its own is listed with that one's name in the loader's words.
    """
    found = {}
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError as exc:
            found[name] = str(exc)
    return found


def remedy(missing: Mapping[str, str], version: str, wanted: str) -> str:
    """What is missing and what to do about it, in sentences.

    Args:
        missing: As `missing_libraries` gives it, not empty.
        version: Of the installed ONNX Runtime.
        wanted: "cuda" or "tensorrt".
    """
    absent = {name for name, why in missing.items() if "cannot open shared object file" in why}
    broken = [f"{name} ({why})" for name, why in missing.items() if name not in absent]
    trt = sorted(name for name in absent if name.startswith(("libnvinfer", "libnvonnxparser")))
    cuda = sorted(absent - {DRIVER, *trt})
    said = []
    if cuda:
        said.append(
            f'{_list(cuda)} not found: pip install "onnxruntime-gpu[cuda,cudnn]=={version}" brings all of them.'
        )
    if trt and wanted == "tensorrt":
        major = trt[0].rpartition(".")[2]
        said.append(f"{_list(trt)} not found: install TensorRT {major}, or take --provider cuda.")
    if broken:
        said.append(f"The loader refuses {_list(broken, plain=True)}: bring it to the version that this build wants.")
    if DRIVER in absent:
        inside = " A container sees it only if it was started with the GPU (docker run --gpus all)." if _linux() else ""
        said.append(f"{DRIVER} was not found: it comes with the NVIDIA driver, which has to be installed.{inside}")
    return " ".join(said)


def _list(names: Iterable[str], *, plain: bool = False) -> str:
    some = list(names)
    text = some[0] if len(some) == 1 else f"{', '.join(some[:-1])} and {some[-1]}"
    return text if plain else f"{text} {'was' if len(some) == 1 else 'were'}"


def _linux() -> bool:
    return sys.platform == "linux"
