"""``onnxcar doctor``: what is installed and what would make the GPU work."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from onnxcar.cli.border import REFUSED
from onnxcar.cli.command import Command
from onnxcar.cli.options import general_options, json_option
from onnxcar.cli.work import header, json_target, terminal, write_json


@click.command("doctor", cls=Command, model=None, short_help="Versions, providers, what would make the GPU work.")
@json_option
@general_options
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> None:
    """Versions, providers, CUDA libraries found, and what would make the GPU work. Exits 1 if no model can be run."""
    from onnxcar import report
    from onnxcar.doctor import diagnose

    json_to = params["json"]
    json_target(json_to)
    found = diagnose()
    result = {**header("doctor"), "ok": found.ok, **asdict(found)}
    write_json(result, json_to)
    if json_to != "-":
        terminal().data(*report.doctor_tables(result))
    if not found.ok:
        ctx.exit(REFUSED)
