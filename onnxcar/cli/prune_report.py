"""``prune --report``: the path of the search and the two networks side by side, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcar.cli.work import check_outputs, open_reported, terminal, this_command

if TYPE_CHECKING:
    from onnxcar.search import Run

__all__ = ["check_report", "write_report"]


def check_report(params: Mapping[str, Any]) -> None:
    """Refuse a folder that could not be written, before hours are spent.

    Raises:
        OutputError: It is a file, its parent is missing, or it holds a report and ``--force`` is off.
    """
    folder = params["report"]
    if folder is None:
        return
    if params["dry_run"]:
        raise click.UsageError("--dry-run writes no model that --report could show. Leave one of them out.")
    check_outputs([folder / "index.html" if folder.is_dir() else folder], force=params["force"])


def write_report(run: Run, record: Mapping[str, Any], params: Mapping[str, Any]) -> Path:
    """Write ``index.html`` into the folder of ``--report`` and return its path."""
    from onnxcar.comparison import compare

    original = run.space.model
    data = open_reported(params, original)
    memory = {"batch_size": params["batch_size"], "memory_bytes": params["memory"]}
    found = compare(
        {params["model"].stem: original, "pruned": run.model},
        data,
        metric=params["metric"],
        provider=record["provider"],
        threads=params["threads"],
        **(memory if data is not None else {}),
    )
    folder: Path = params["report"]
    folder.mkdir(exist_ok=True)
    context = {
        "provider": record["provider"],
        "threads": params["threads"],
        "optimistic": data is not None and params["test_data"] is None,
    }
    page = found.to_html(folder / "index.html", record=record, context=context, command=this_command())
    terminal().note(f"Report  {page}", command=True)
    return page
