"""What the interface names and this version does not do yet: refused in words, never ignored.

One literal table. Who builds a feature removes its line here and adds the real option where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from onnxcar.cli.command import Opt

__all__ = ["LATER", "LATER_VALUES", "later_options", "refuse_later_values"]

#: Command -> flag -> what it will do.
LATER: Mapping[str, Mapping[str, str]] = {
    "prune": {},
}

#: Flag -> values of it that are known and not built; the other values work.
LATER_VALUES: Mapping[str, Mapping[str, str]] = {
    "executor": {"ray": "scoring on many machines"},
    "recover": {},
    "norms": {},
    "criterion": {},
}


def _refusal(what: str, meaning: str) -> str:
    from onnxcar import __version__

    return f"{what} ({meaning}) is not in this version, {__version__}. Leave it out; nothing was done."


def later_options(command: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Hidden options for the flags of ``command`` that are refused."""

    def refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
        if value is not None:
            flag = param.opts[0]
            raise click.UsageError(_refusal(flag, LATER[command][flag]), ctx)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(list(LATER.get(command, {}))):
            # A first argument must not be eaten as the flag's value: every one of them takes a value.
            function = click.option(flag, cls=Opt, hidden=True, default=None, callback=refuse, expose_value=False)(
                function
            )
        return function

    return decorate


def refuse_later_values(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """The value itself, or a usage error for one that is known and not built (``ray://host`` counts as ``ray``)."""
    known = LATER_VALUES.get(param.name or "", {})
    name = str(value).split(":", 1)[0]
    if name in known:
        raise click.UsageError(_refusal(f"{param.opts[0]} {value}", known[name]), ctx)
    return value
