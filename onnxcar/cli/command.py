"""The command class: option sections in ``--help``, and defaults out of ``onnxcar.toml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["Command", "Opt"]


class Opt(click.Option):
    """An option that stands under a heading of its own in ``--help``."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


#: What one command writes; set in a table that several commands read, it is meant for the table's own command.
_OUTPUTS = frozenset({"output", "force", "json", "report", "html", "journal"})


class Command(click.Command):
    """A command whose flags may stand in ``onnxcar.toml``; the command line wins.

    Args:
        model: Name of the argument that holds the model, beside which the file is looked for; None: no file.
    """

    def __init__(self, *args: Any, model: str | None = "model", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model = model

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the defaults of the file first: click's own order (line, file, default) does the rest."""
        if self.model is not None and not ctx.resilient_parsing:
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
            asked = self.get_help_option(ctx)
            if asked is None or not given.get(asked.name or ""):
                ctx.default_map = self._defaults(given)
        return super().parse_args(ctx, args)

    def _defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        from onnxcar import config

        model, file = (given.get(key) for key in (self.model or "", "config"))
        tables = config.COMMANDS.get(self.name or "", ())
        found = config.defaults(
            Path(model) if isinstance(model, str) else None,
            tables=tables,
            file=Path(file) if isinstance(file, str) else None,
        )
        known = {param.name for param in self.params}
        if self.name not in tables:
            known -= _OUTPUTS
        return {key: value for key, value in found.items() if key in known}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One block for each section, in the order of definition; the general one last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", "General"), []).append(record)
        general = sections.pop("General", [])
        for title, rows in [*sections.items(), ("General", general)]:
            with formatter.section(title):
                formatter.write_dl(rows, col_max=26)
