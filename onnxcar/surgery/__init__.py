"""Plans, and the two readings of one plan: `remove` changes shapes, `mask` multiplies what readers read by zero."""

from onnxcar.surgery._mask import mask
from onnxcar.surgery._outputs import keep_outputs
from onnxcar.surgery._plan import Plan
from onnxcar.surgery._remove import remove
from onnxcar.surgery._verify import Verified, verify

__all__ = ["Plan", "Verified", "keep_outputs", "mask", "remove", "verify"]
