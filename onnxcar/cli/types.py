"""Parameter types: what a flag's text may be; every refusal names the value and shows one that works."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import click

__all__ = ["ALIGN", "MEMORY", "NUMBER", "NUMBERS", "SIZE", "TIME", "Count", "Fraction"]

if TYPE_CHECKING:
    _Type = click.ParamType[Any, Any]
else:
    _Type = click.ParamType  # generic since click 8.4 only

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{k}b": v for k, v in _UNITS.items() if k not in ("", "b")}
_UNITS |= {f"{k}{b}": 2 ** (10 * i) for i, k in enumerate("kmgt", 1) for b in ("i", "ib")}
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


class Fraction(_Type):
    """A number in a range whose ends are out unless ``low_in`` or ``high_in`` says otherwise; never nan."""

    name = "fraction"

    def __init__(self, low: float = 0.0, high: float = 1.0, *, low_in: bool = False, high_in: bool = False) -> None:
        self.low, self.high, self.low_in, self.high_in = low, high, low_in, high_in

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a usage error that states the range."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        above = number >= self.low if self.low_in else number > self.low
        below = number <= self.high if self.high_in else number < self.high
        if above and below:
            return number
        ends = f"{'[' if self.low_in else '('}{self.low:g}, {self.high:g}{']' if self.high_in else ')'}"
        hint = f" {float(value) / 100:g} is {value} percent." if self._percent(value) else ""
        return self.fail(f"{value!s} is not a number in {ends}.{hint}", param, ctx)

    def _percent(self, value: Any) -> bool:
        try:
            return self.high == 1 and 2 <= float(value) < 100
        except (TypeError, ValueError):
            return False


class Count(_Type):
    """A whole number from ``low`` on."""

    name = "n"

    def __init__(self, low: int = 1) -> None:
        self.low = low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, or a usage error that states the range."""
        try:
            number = self.low - 1 if isinstance(value, bool | float) else int(value)
        except (TypeError, ValueError):
            number = self.low - 1
        if number < self.low:
            self.fail(f"{value!s} is not a whole number from {self.low} on.", param, ctx)
        return number


class _Number(_Type):
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!s} is not a finite number.", param, ctx)
        return number


class _Numbers(_Type):
    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        parts = value.replace(",", " ").split() if isinstance(value, str) else value
        try:
            numbers = tuple(float(x) for x in (parts if isinstance(parts, list | tuple) else [parts]))
        except (TypeError, ValueError):
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)):
            self.fail(f"{value!s} is not a list of numbers; write them like 0.485,0.456,0.406.", param, ctx)
        return numbers


class _Size(_Type):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        parts = re.split(r"[x,]", value.lower()) if isinstance(value, str) else value
        try:
            sizes = tuple(int(str(x)) for x in (parts if isinstance(parts, list | tuple) else [parts]))
        except ValueError:
            sizes = ()
        if not 1 <= len(sizes) <= 2 or min(sizes) < 1:
            self.fail(f"{value!s} is not a size in pixels; write 224, or 240x320 for height x width.", param, ctx)
        return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


class _Memory(_Type):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([a-z]*)", str(value).strip().lower())
        n_bytes = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
        if n_bytes < 1:
            self.fail(f"{value!s} is not an amount of memory; write 4GiB, 500MB or a number of bytes.", param, ctx)
        return n_bytes


class _Time(_Type):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        parts = re.findall(r"(\d+(?:\.\d*)?)\s*([a-z]*)", str(value).strip().lower())
        whole = "".join(a + b for a, b in parts) == re.sub(r"\s+", "", str(value).lower())
        seconds = sum(float(a) * _SECONDS[b] for a, b in parts) if whole and all(b in _SECONDS for _, b in parts) else 0
        if not seconds > 0:
            self.fail(f"{value!s} is not a time; write 30m, 8h, 1h30m or a number of seconds.", param, ctx)
        return float(seconds)


class _Align(_Type):
    name = "n|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        try:
            number = 0 if isinstance(value, bool) else int(str(value))
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"{value!s} is neither 'auto' nor a whole number from 1 on.", param, ctx)
        return number


NUMBER, NUMBERS, SIZE, MEMORY, TIME, ALIGN = _Number(), _Numbers(), _Size(), _Memory(), _Time(), _Align()
