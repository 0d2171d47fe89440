"""Scores of one whole model."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcar._judge import Judge
from onnxcar.errors import DataError
from onnxcar.metrics import Metric, Outcomes, Score, Tally, gives_probabilities, metric
from onnxcar.model import Model
from onnxcar.runtime import Network, Provider, open_network

if TYPE_CHECKING:
    from onnxcar.data import Dataset

__all__ = ["evaluate", "feeds", "free_bytes", "judge_for", "samples_per_run"]

Array = npt.NDArray[Any]
CACHE_BYTES, FEW = 4 << 20, 8  # of them in one run of small samples, but no fewer samples than so many
BATCH_BYTES = 48 << 20  # of inputs and large activations in one run: beyond that caches gain nothing
ON_DEVICE = 32  # a GPU takes so many times the bytes and rows in a run
SHARE = 4  # of free memory, by default one part in so many is used


def free_bytes(where: Provider | None = None) -> int:
    """Memory that can be used without swapping, bytes; 4 GiB where the system does not say.

    Args:
        where: Where networks run: on a GPU no more than is free there, if its driver's tool says so.
    """
    if where is not None and where.name != "cpu":
        return min([free_bytes(), *_gpu_bytes()[:1]])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def _gpu_bytes() -> list[int]:
    """Free memory of each GPU, the first one being what ONNX Runtime takes."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        command = [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return [int(line) << 20 for line in said.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def feeds(network: Network, data: Dataset, indices: npt.NDArray[np.int64]) -> dict[str, Array]:
    """Network inputs of some samples under the graph's own names and in its types."""
    return network.session.bind(data.inputs(indices))


def judge_for(network: Network, data: Dataset, how: Metric) -> Judge:
    """The metric bound to the labels of `data`, after a look at the outputs of a few samples.

    Raises:
        DataError: There are no samples or no labels.
    """
    if len(data) == 0:
        raise DataError("The data set has no samples. Point --data at a folder, npz or list that has some.")
    if not data.has_labels:
        raise DataError(f"Data {data.path!r} has no labels, and a score needs them. Give --data with labels.")
    few = np.arange(min(4, len(data)), dtype=np.int64)
    outputs = network.run(feeds(network, data, few))[0]
    return Judge(how, data.labels, outputs, softmax=gives_probabilities(network.proto), columns=data.outputs)


def samples_per_run(network: Network, sample: dict[str, Array], memory_bytes: int, batch_size: int | None) -> int:
    """Samples of one run of a whole network."""
    if batch_size is not None:
        return max(1, batch_size)
    one = max(1, sum(value[:1].nbytes for value in sample.values()))
    # Activations of a convolutional network take some ten times its input.
    scale = 1 if network.session.provider.name == "cpu" else ON_DEVICE
    room = min(scale * BATCH_BYTES, memory_bytes // 4) // (10 * one)
    # Where samples are small, memory that is touched for the first time costs more than a run does besides.
    return int(np.clip(min(room, max(FEW, scale * CACHE_BYTES // (10 * one))), 1, 256 * min(scale, 4)))


def evaluate(
    model: Model,
    data: Dataset,
    *,
    metric: str | Metric = "top1",
    provider: str = "auto",
    threads: int | None = None,
    memory_bytes: int | None = None,
    batch_size: int | None = None,
) -> Score:
    """The score of a model, with what it said of each sample.

    Args:
        model: What to run.
        data: Labelled samples.
        metric: Name, or a `Metric`.
        provider: Where it runs.
        threads: Of a run; None = all cores.
        memory_bytes: Bound; None = a quarter of what is free.
        batch_size: Samples of a run; None = chosen from the bound.

    Raises:
        DataError: Samples of a wrong shape, labels outside the classes, none at all.
        MetricError: The metric does not fit labels or outputs.
        ModelError: ONNX Runtime cannot run the model.
    """
    few = np.arange(min(4, len(data)), dtype=np.int64)
    sample = data.inputs(few) if len(few) else None
    network = open_network(model, provider=provider, threads=threads, sample=_named(sample))
    how = judge_for(network, data, _metric(metric))
    assert sample is not None
    step = samples_per_run(network, sample, memory_bytes or free_bytes() // SHARE, batch_size)
    tally, parts, rest = Tally(), [], []
    for start in range(0, len(data), step):
        at = np.arange(start, min(start + step, len(data)), dtype=np.int64)
        rows = how.rows(network.run(feeds(network, data, at))[0], at)
        tally.add(how.tally(rows, at))
        parts.append(rows)
        if not how.metric.additive:
            rest.append(rows.outputs)
    outcomes = None
    if how.labelled:
        outcomes = Outcomes(
            pred=np.concatenate([rows.outputs.argmax(1) for rows in parts]).astype(np.int64),
            correct=np.concatenate([rows.top1 for rows in parts]),
            top5=np.concatenate([rows.top5 for rows in parts]),
            loss=np.concatenate([rows.loss for rows in parts]) / float(1 << 30),
            labels=how.targets,
        )
    found = how.score(tally, np.concatenate(rest) if rest else None, outcomes)
    return found if how.labelled else replace(found, answers=how.answers(parts))


_metric = metric


def _named(sample: dict[str, Array] | None) -> dict[str, Array] | None:
    """Only what `open_network` can use to try a freed batch: at least two samples."""
    if sample is None or any(len(value) < 2 for value in sample.values()):
        return None
    return sample
