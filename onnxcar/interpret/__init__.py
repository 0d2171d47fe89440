"""What filters do: which classes they serve, what they respond to, which of them do the same."""

from onnxcar.interpret._classes import ClassEffects, ClassSets, class_sets, effects, joined

__all__ = ["ClassEffects", "ClassSets", "class_sets", "effects", "joined"]
