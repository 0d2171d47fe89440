"""Recovery without training: the layers of a compact model refitted to what the original computes."""

from onnxcar.recovery._match import plan_of
from onnxcar.recovery._reconstruct import Reconstruction
from onnxcar.recovery._recover import METHODS, recover
from onnxcar.recovery._result import LayerFit, Recovered

__all__ = ["METHODS", "LayerFit", "Reconstruction", "Recovered", "plan_of", "recover"]
