"""The border: every exception becomes one message and an exit code; nothing else decides them."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Sequence

import click

from onnxcar.cli.terminal import Terminal
from onnxcar.errors import OnnxcarError

__all__ = ["DONE", "GATE", "INTERRUPTED", "REFUSED", "USAGE", "GateNotMetError", "InterruptedRunError", "run"]

DONE, REFUSED, USAGE, GATE, INTERRUPTED = 0, 1, 2, 3, 130


class GateNotMetError(Exception):
    """The work was done and a gate says no; the message names the gate and both numbers."""


class InterruptedRunError(Exception):
    """The user stopped the run; the message says how to go on."""


def run(command: click.Command, args: Sequence[str] | None = None) -> int:
    """The exit code of ``command``, after every message was said."""
    terminal = Terminal()
    with warnings.catch_warnings():
        terminal.show_warnings()
        try:
            code = command.main(
                None if args is None else list(args), prog_name="onnxcar", standalone_mode=False, obj=terminal
            )
            return code if isinstance(code, int) else DONE
        except click.exceptions.Exit as exc:
            return exc.exit_code
        except click.ClickException as exc:
            exc.show()
            return exc.exit_code
        except SystemExit:
            raise  # click's own word for a reader that left (`| head`): exit 1, nothing said
        except BaseException as exc:
            return _explain(exc, terminal)


def _explain(exc: BaseException, terminal: Terminal) -> int:
    if terminal.traceback and not isinstance(exc, GateNotMetError):
        traceback.print_exception(exc)
    if isinstance(exc, GateNotMetError):
        terminal.error(str(exc))
        return GATE
    if isinstance(exc, InterruptedRunError):
        terminal.error(str(exc))
        return INTERRUPTED
    if isinstance(exc, click.Abort | KeyboardInterrupt):
        terminal.error("Interrupted; no file was written.")
        return INTERRUPTED
    if isinstance(exc, OnnxcarError):
        terminal.error(str(exc))
        return REFUSED
    if isinstance(exc, MemoryError):
        terminal.error("Out of memory. Give less with --memory or --batch-size, or close other programs.")
        return REFUSED
    if isinstance(exc, Exception):
        text = " ".join(str(exc).split())
        text = f"{type(exc).__name__}: {text[:300]}" if text else type(exc).__name__
        terminal.error(f"internal error ({text}). This is a bug of onnxcar: please report it; --traceback shows all.")
        return REFUSED
    raise exc
