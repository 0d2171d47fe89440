"""What a library was linked to, read from the file, and what the loader says of it."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest

from onnxcar import _libraries, _providers
from onnxcar._libraries import missing_libraries, needed_libraries, provider_file, remedy

linux = pytest.mark.skipif(sys.platform != "linux", reason="ELF files")
ABSENT = "cannot open shared object file: No such file or directory"


def elf(names):
    """A file with nothing but program headers and a dynamic section that needs `names`."""
    strings = b"\0"
    entries = []
    for name in names:
        entries.append((1, len(strings)))
        strings += name.encode() + b"\0"
    header, address = 64 + 2 * 56, 0x10000
    dynamic = struct.pack("<qQ", 5, address + header + 16 * (len(entries) + 2))
    dynamic += b"".join(struct.pack("<qQ", *entry) for entry in entries) + struct.pack("<qQ", 0, 0)
    size = header + len(dynamic) + len(strings)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    made = ident + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    made += struct.pack("<IIQQQQQQ", 1, 5, 0, address, address, size, size, 4096)
    made += struct.pack("<IIQQQQQQ", 2, 6, header, address + header, address + header, len(dynamic), len(dynamic), 8)
    return made + dynamic + strings


def test_what_a_library_needs_is_read_from_the_file(tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(elf(["libcublasLt.so.13", "libc.so.6", "libstdc++.so.6", "libcuda.so.1", "libcudart.so.13"]))
    assert needed_libraries(path) == ("libcublasLt.so.13", "libcuda.so.1", "libcudart.so.13")


@linux
def test_a_real_library_can_be_read():
    path = sys.modules["numpy._core._multiarray_umath"].__file__ if np.__version__ >= "2" else None
    if path is None:
        pytest.skip("an older numpy")
    with open(path, "rb") as file:  # noqa: PTH123
        names = _libraries._needed(__import__("mmap").mmap(file.fileno(), 0, access=1))
    assert "libc.so.6" in names
    assert "libc.so.6" not in needed_libraries(type(_libraries.Path())(path))


@pytest.mark.parametrize("content", [b"", b"MZ\x90\0", b"\x7fELF\x01\x01" + bytes(80), elf(["x"])[:150]])
def test_other_files_need_nothing(tmp_path, content):
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    assert needed_libraries(path) == ()
    assert needed_libraries(tmp_path / "none") == ()


@linux
def test_the_loader_says_what_it_lacks(tmp_path):
    broken = tmp_path / "libbroken.so.1"
    broken.write_bytes(b"no library")
    found = missing_libraries(["libc.so.6", "libnosuch.so.9", str(broken)])
    assert set(found) == {"libnosuch.so.9", str(broken)}
    assert ABSENT in found["libnosuch.so.9"]


def test_the_remedy_names_every_library_and_what_brings_it():
    names = ["libcublas.so.13", "libcudnn.so.9", "libcuda.so.1", "libnvinfer.so.10"]
    said = remedy({name: f"{name}: {ABSENT}" for name in names}, "1.31.1", "tensorrt")
    assert 'libcublas.so.13 and libcudnn.so.9 were not found: pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"' in said
    assert "libnvinfer.so.10 was not found: install TensorRT 10" in said
    assert "libcuda.so.1 was not found: it comes with the NVIDIA driver" in said
    refused = remedy({"libcudnn.so.9": "version `GLIBC_2.99' not found"}, "1.31.1", "cuda")
    assert "The loader refuses libcudnn.so.9 (version `GLIBC_2.99' not found)" in refused
    assert "pip install" not in refused


def test_the_provider_is_found_in_the_wheel(tmp_path):
    assert provider_file(tmp_path, "cuda") is None
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(elf(["libcudart.so.13"]))
    assert needed_libraries(provider_file(tmp_path, "cuda")) == ("libcudart.so.13",)


def test_the_probe_runs_a_network_and_keeps_the_log_off_the_terminal(capfd):
    import onnxruntime

    assert _providers._probe(onnxruntime, "CPUExecutionProvider") is None
    with _providers._heard() as log:
        import os

        os.write(2, b"2026 [E:x] [ONNXRuntimeError] : 1 : FAIL : CUDA failure 35: driver too old ; GPU=0\n")
        heard = log()
    assert _providers._sentence(heard) == "CUDA failure 35: driver too old."
    assert _providers._sentence("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no Conv") == "no Conv."
    assert _providers._sentence("") == "no reason given."
    assert _providers._probe(onnxruntime, "NoSuchExecutionProvider") not in (None, "")
    assert capfd.readouterr().err == ""
