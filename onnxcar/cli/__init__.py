"""The command line: ``onnxcar COMMAND``. Commands are imported when they are asked for, so that start-up is quick."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from onnxcar import __version__
from onnxcar.cli.border import run

__all__ = ["COMMANDS", "app", "main"]

#: Command -> its line in the help. The module `onnxcar.cli.<command>` holds a click command named `command`.
COMMANDS = {
    "prune": "Choose filters, remove them, verify, write the compact model and its record.",
    "recover": "Repair a pruned model from unlabelled images, without training.",
    "inspect": "Layers, filters, groups, params, MACs, what is protected and why.",
    "score": "Importance of every group by a criterion; removes nothing.",
    "evaluate": "The metrics of one model on a data set.",
    "compare": "Accuracy, agreement, size, MACs and latency side by side; gates.",
    "explain": "What each filter does: pictures, classes, colour, redundancy; HTML.",
    "doctor": "Versions, providers, what would make the GPU work.",
}


class _Lazy(click.Group):
    """A group that knows its commands by name and imports only the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            near = difflib.get_close_matches(cmd_name, COMMANDS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Commands are {', '.join(COMMANDS)}."
            raise click.UsageError(f"There is no command {cmd_name!r}. {hint}", ctx)
        command = importlib.import_module(f"onnxcar.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="onnxcar", message="%(prog)s %(version)s")
def app() -> None:
    """Prune the filters of an exported ONNX CNN by what they cost in accuracy.

    \b
    onnxcar inspect model.onnx
    onnxcar prune model.onnx --data images --preprocess imagenet --max-drop 0.01
    onnxcar compare model.onnx model.pruned.onnx --test-data test --preprocess imagenet

    Exit codes: 0 done, 1 refused, 2 usage, 3 gate not met, 130 interrupted.
    """  # noqa: D301 - click reads \b


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(run(app, args))
