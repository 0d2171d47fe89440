"""What filters do: which classes they serve, what they respond to, which of them do the same."""

from onnxcar.interpret._classes import ClassEffects, ClassSets, class_sets, effects, joined
from onnxcar.interpret._fields import Field, receptive_fields
from onnxcar.interpret._kernels import image_kernels, kernel_colour, kernel_pictures, orientation
from onnxcar.interpret._maximise import Made, maximise, need_torch
from onnxcar.interpret._pictures import Look, look
from onnxcar.interpret._responses import LayerResponses, Responses, contribution, responses
from onnxcar.interpret._similar import clusters, redundancy, twin_distance, twins

__all__ = [
    "ClassEffects",
    "ClassSets",
    "Field",
    "LayerResponses",
    "Look",
    "Made",
    "Responses",
    "class_sets",
    "clusters",
    "contribution",
    "effects",
    "image_kernels",
    "joined",
    "kernel_colour",
    "kernel_pictures",
    "look",
    "maximise",
    "need_torch",
    "orientation",
    "receptive_fields",
    "redundancy",
    "responses",
    "twin_distance",
    "twins",
]
