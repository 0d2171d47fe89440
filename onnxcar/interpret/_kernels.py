"""Kernels that read the image: their pictures, their colour, the orientation of their stripes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcar.channels import ChannelSpace, Layer
from onnxcar.interpret._fields import Field
from onnxcar.interpret._pictures import Look

__all__ = ["image_kernels", "kernel_colour", "kernel_pictures", "orientation"]

Floats = npt.NDArray[np.float64]
PADDED = 32  # side of the Fourier transform: fine enough for angles of a few degrees


def image_kernels(
    space: ChannelSpace, layer: Layer, look: Look | None, fields: dict[str, Field | None]
) -> Floats | None:
    """Kernels over pixels, red first, (filters, h, w, 3); None where the layer does not read the image itself."""
    node = space.model.proto.graph.node[layer.position]
    field = next((fields[name] for name in node.input if name in fields), None)
    if look is None or layer.kind != "conv" or field is None or field.size != (1.0, 1.0):
        return None
    weight = np.asarray(space.weight(layer), np.float64)
    if weight.ndim != 4 or weight.shape[1] != len(look.mean):
        return None
    kernels = np.moveaxis(weight, 1, -1) / np.asarray(look.std)
    return np.asarray(kernels[..., list(look.order)])


def kernel_pictures(kernels: Floats) -> npt.NDArray[np.uint8]:
    """Kernels as pixels, (filters, h, w, 3): zero is middle gray, the largest weight of each filter full."""
    largest = np.abs(kernels).max(axis=(1, 2, 3), keepdims=True)
    shown = np.clip(np.rint(127.5 + 127.5 * kernels / np.maximum(largest, 1e-12)), 0, 255)
    return np.asarray(shown, np.uint8)


def kernel_colour(kernels: Floats) -> Floats:
    """Share of each kernel's energy off the gray axis, (filters,): 0 = sees only brightness, 1 = none of it."""
    off = kernels - kernels.mean(-1, keepdims=True)
    energy = np.square(kernels).sum(axis=(1, 2, 3))
    return np.asarray(np.square(off).sum(axis=(1, 2, 3)) / np.maximum(energy, 1e-30))


def orientation(kernels: Floats) -> tuple[Floats, Floats]:
    """Angle of each kernel's stripes and how clear it is, (filters,) each.

    The structure tensor of the kernel, computed in the frequency domain: the second moments of its power spectrum,
    all colours together and the mean left out (Bigün and Granlund 1987). The stripes run across the main frequency.

    Returns:
        Degrees in [0, 180), 0 = horizontal stripes, 90 = vertical, counter-clockwise; and the coherence, 0 = no
        direction at all, 1 = a pure grating.
    """
    plain: Any = kernels - kernels.mean(axis=(1, 2), keepdims=True)
    power = np.square(np.abs(np.fft.fft2(plain, (PADDED, PADDED), axes=(1, 2)))).sum(-1)
    frequency = np.fft.fftfreq(PADDED)
    fy, fx = frequency[:, None], frequency[None, :]
    xx, yy, xy = ((power * term).sum(axis=(1, 2)) for term in (fx * fx, fy * fy, fx * fy))
    total = np.maximum(xx + yy, 1e-30)
    coherence = np.hypot(xx - yy, 2 * xy) / total
    main = 0.5 * np.arctan2(-2 * xy, xx - yy)  # rows run down, angles up
    return np.asarray((np.degrees(main) + 90) % 180), np.asarray(coherence)
