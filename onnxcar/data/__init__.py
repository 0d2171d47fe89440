"""Labelled samples, from wherever they lie: opened, preprocessed, drawn from, hashed."""

from onnxcar.data._dataset import Dataset, DataWarning
from onnxcar.data._open import FromCallable, ImageFolder, ListFile, Npz, open_dataset, overlap
from onnxcar.data._preprocess import INTERPOLATIONS, PRESETS, Preprocess

__all__ = [
    "INTERPOLATIONS",
    "PRESETS",
    "DataWarning",
    "Dataset",
    "FromCallable",
    "ImageFolder",
    "ListFile",
    "Npz",
    "Preprocess",
    "open_dataset",
    "overlap",
]
