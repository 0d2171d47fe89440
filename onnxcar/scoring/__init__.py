"""Scores: of a whole model, of every candidate in full, and of the lowest by exact elimination."""

from onnxcar.metrics import Score
from onnxcar.scoring._evaluate import evaluate
from onnxcar.scoring._precision import Agreement, check_precision
from onnxcar.scoring._reliability import Reliability, reliability
from onnxcar.scoring._scorer import Pick, Scorer, Work

__all__ = [
    "Agreement",
    "Pick",
    "Reliability",
    "Score",
    "Scorer",
    "Work",
    "check_precision",
    "evaluate",
    "reliability",
]
