"""One template, one style sheet, one script and data in: one HTML file out."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from onnxcar import __version__
from onnxcar.errors import OutputError

__all__ = ["data_block", "render", "write"]

_RISKY = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def _part(name: str) -> str:
    return resources.files("onnxcar.pages").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def data_block(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(_RISKY.get(c, c) for c in text) if any(c in text for c in _RISKY) else text


def render(template: str, *, scripts: Sequence[str] = (), **values: Any) -> str:
    """A template of this folder with its style, its scripts and a policy that allows nothing else.

    Args:
        template: Its file name.
        scripts: File names of scripts, run in that order.
        values: For the template; text is escaped.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(_part),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(_FILTERS)
    style = _part("page.css")
    code = [_part(name) for name in scripts]
    allowed = " ".join(map(_hash, code)) or "'none'"
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(style)}",
            f"script-src {allowed}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return environment.get_template(template).render(
        style=Markup(style),  # our own files
        scripts=[Markup(text) for text in code],
        policy=policy,
        version=__version__,
        block=lambda value: Markup(data_block(value)),  # escaped for where it stands
        **values,
    )


def _count(number: float | None) -> str:
    if number is None:
        return "-"
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= power:
            return f"{number / power:.3g} {letter}"
    return f"{number:.3g}" if isinstance(number, float) else str(number)


def _percent(number: float | None) -> str:
    return "-" if number is None else f"{100 * number:.1f} %"


def _signed(number: float | None) -> str:
    return "-" if number is None else f"{number:+.4f}"


def _fixed(number: float | None, digits: int = 4) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


_FILTERS: Mapping[str, Any] = {"count": _count, "percent": _percent, "signed": _signed, "fixed": _fixed}


def write(text: str, path: str | pathlib.Path, *, force: bool = True) -> pathlib.Path:
    """Write a page, whole or not at all, and return its path.

    Raises:
        OutputError: It exists and ``force`` is off, or it cannot be written.
    """
    target = pathlib.Path(path)
    if target.exists() and not force:
        raise OutputError(f"{target} exists. Name another file, or give --force to replace it.", path=target)
    draft: pathlib.Path | None = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            draft = pathlib.Path(file.name)
            file.write(text.encode("utf-8", "replace"))
        mask = os.umask(0o077)
        os.umask(mask)
        draft.chmod(0o666 & ~mask)  # a temporary file is private, a result is not
        draft.replace(target)
    except OSError as exc:
        raise OutputError(
            f"Cannot write {target}: {exc.strerror or exc}. Name a file in a folder that exists and can be written.",
            path=target,
        ) from exc
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)
    return target
