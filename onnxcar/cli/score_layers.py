"""``score --by-layer``: the score against the part of each layer that is removed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from onnxcar.cli.border import InterruptedRunError
from onnxcar.cli.work import (
    check_outputs,
    header,
    json_target,
    need_data,
    open_data,
    open_provider,
    terminal,
    write_json,
    write_text,
)
from onnxcar.progress import duration

__all__ = ["by_layer"]


def by_layer(params: dict[str, Any], plot: Path | None) -> None:
    """Measure, then table, JSON or CSV, and plot."""
    from onnxcar import record, report
    from onnxcar.model import load
    from onnxcar.progress import open_meter
    from onnxcar.sensitivity import sensitivity

    need_data(params, "--by-layer")
    target = json_target(params["json"], [params["model"]])
    if plot is not None:
        check_outputs([plot], force=True, inputs=[params["model"]])
    model = load(params["model"])
    provider = open_provider(params)
    data = open_data(params, model)
    here = terminal()
    started = time.monotonic()
    same = ("criterion", "metric", "layers", "exclude", "norms", "seed", "threads", "batch_size")
    try:
        with open_meter(here.err, "scoring", "networks", quiet=here.quiet) as meter:
            found = sensitivity(
                model,
                data,
                provider=provider.name,
                memory_bytes=params["memory"],
                progress=meter,
                **{name: params[name] for name in same},
            )
    except KeyboardInterrupt as exc:
        raise InterruptedRunError("Interrupted; nothing was written. Start the same command again.") from exc
    seconds = time.monotonic() - started
    result = {
        **header("score"),
        "model": record.model_entry(model.path, model.sha256, found.space.cost(), model.n_bytes),
        "data": record.data_entry(data),
        "metric": params["metric"],
        "provider": provider.name,
        "seconds": round(seconds, 3),
        **found.to_dict(),
    }
    if target is not None and target.suffix.lower() == ".csv":
        write_text(found.to_csv(), target)
    else:
        write_json(result, params["json"])
    if plot is not None:
        found.draw(plot)
    if params["json"] != "-":
        here.data(report.sensitivity_table(result))
    here.note(f"{len(found.curves)} layers in {duration(seconds)}; one layer at a time, all others whole.")
    if plot is not None:
        here.note(f"Plot    {plot}", command=True)
