"""Defaults of the flags from an `onnxcar.toml`.

The file has the tables `[data] [preprocess] [prune] [compare]`; its keys are the flags with `_`, its paths are relative
to the file, and the command line wins. It is looked up beside the model, then in the working folder, unless named.

A file that merely lies beside a model may have come with it, so it cannot name code to run: keys with
`module:callable` values need the file to stand in the working folder or to be named by `--config`.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onnxcar.errors import ConfigError

__all__ = ["COMMANDS", "FILE_NAME", "KEYS", "Config", "Key", "defaults", "find", "load"]

FILE_NAME = "onnxcar.toml"

Kind = Literal["text", "int", "number", "bool", "amount", "int or text", "texts", "names", "numbers", "sizes"]
Place = Literal["path", "path or -", "data", "preset or path", "code", ""]


@dataclass(frozen=True)
class Key:
    """A key of the file: the type of its value and whether it names a path.

    Args:
        kind: What the value may be.
        place: `path`: relative to the file. `path or -`: `-` stays. `data`: a path, or `module:callable`.
            `preset or path`: a preset's name stays. `code`: a name, or `module:function`. Empty: no path.
    """

    kind: Kind = "text"
    place: Place = ""


#: Table -> key -> what its value is. The one list of what the file may hold; a test compares it with the flags.
KEYS: Mapping[str, Mapping[str, Key]] = {
    "data": {
        "data": Key(place="data"),
        "test_data": Key(place="data"),
        "calibration_data": Key(place="data"),
        "label_offset": Key("int"),
        "limit": Key("int"),
        "seed": Key("int"),
        "metric": Key(place="code"),
        "provider": Key(),
        "precision": Key(),
        "threads": Key("int"),
        "batch_size": Key("int"),
        "memory": Key("amount"),
        "executor": Key(),
    },
    "preprocess": {
        "preprocess": Key(place="preset or path"),
        "size": Key("sizes"),
        "crop_pct": Key("amount"),
        "interpolation": Key(),
        "mean": Key("numbers"),
        "std": Key("numbers"),
        "channels": Key(),
        "layout": Key(),
    },
    "prune": {
        "output": Key(place="path"),
        "force": Key("bool"),
        "json": Key(place="path or -"),
        "report": Key(place="path"),
        "journal": Key(place="path"),
        "plan": Key(place="path"),
        "dry_run": Key("bool"),
        "criterion": Key(),
        "scope": Key(),
        "ratio": Key("number"),
        "max_drop": Key("number"),
        "target_macs": Key("number"),
        "target_params": Key("number"),
        "target_latency": Key("number"),
        "sweep": Key("numbers"),
        "guarantee": Key("number"),
        "approximate": Key("number"),
        "time_limit": Key("amount"),
        "steps": Key("int"),
        "per_step": Key("int"),
        "layers": Key("texts"),
        "exclude": Key("texts"),
        "min_filters": Key("int"),
        "multiple_of": Key("int or text"),
        "recover": Key(),
        "recover_every": Key("int"),
        "norms": Key(),
        "classes": Key("names"),
        "drop_outputs": Key("bool"),
        "verify": Key("bool"),
        "dense": Key("bool"),
    },
    "compare": {
        "max_drop": Key("number"),
        "min_score": Key("number"),
        "max_latency_ratio": Key("number"),
        "runs": Key("int"),
        "classes": Key("names"),
        "json": Key(place="path or -"),
        "html": Key(place="path"),
    },
}

#: Command -> tables that hold its flags; of a shared table, a command takes the keys that are its flags.
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "prune": ("data", "preprocess", "prune"),
    "inspect": ("prune",),
    "score": ("data", "preprocess", "prune"),
    "evaluate": ("data", "preprocess"),
    "compare": ("data", "preprocess", "compare"),
    "recover": ("data", "preprocess"),
    "explain": ("data", "preprocess"),
    "quantize": ("data", "preprocess"),
    "finetune": ("data", "preprocess"),
}

_WORDS: Mapping[Kind, str] = {
    "text": "a text in quotes",
    "int": "a whole number",
    "number": "a number",
    "bool": "true or false",
    "amount": "a number or a text in quotes",
    "int or text": "a whole number or a text in quotes",
    "texts": "a text in quotes or a list of them",
    "names": "a text in quotes or a list of names and numbers",
    "numbers": "a number or a list of numbers",
    "sizes": "a whole number or a list of two",
}
_PRESETS = frozenset({"imagenet", "cifar10", "mnist", "tf", "unit", "raw"})  # written out: reading TOML needs no numpy
_CODE = re.compile(r"(?P<file>.+\.py)?(?P<module>(?(file)|[A-Za-z_][\w.]*)):(?P<name>[A-Za-z_][\w.]*)")


@dataclass(frozen=True)
class Config:
    """What a file sets, checked, with paths resolved.

    Args:
        path: The file, None where there is none.
        tables: Table -> key -> value.
    """

    path: Path | None
    tables: Mapping[str, Mapping[str, Any]]

    def for_tables(self, tables: Sequence[str]) -> dict[str, Any]:
        """The values of some tables as one flat dict, the later table winning."""
        return {key: value for table in tables for key, value in self.tables.get(table, {}).items()}

    def for_command(self, command: str) -> dict[str, Any]:
        """The values that may be defaults of a command's flags."""
        return self.for_tables(COMMANDS.get(command, ()))


def find(model: Path | None) -> Path | None:
    """The `onnxcar.toml` beside the model, else in the working folder, else None."""
    folders = [] if model is None else [model.parent]
    return next((p for folder in [*folders, Path()] if os.path.isfile(p := folder / FILE_NAME)), None)  # noqa: PTH113 -- never raises


def defaults(model: Path | None, *, tables: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """Defaults of a command's flags: from `file`, else from the `onnxcar.toml` of the model or the working folder.

    Args:
        model: Beside which the file is looked for.
        tables: That hold the command's flags.
        file: The file to use instead, named by the user.

    Raises:
        ConfigError: The named file is missing, or a file is not as it should be.
    """
    path = file or find(model)
    if path is None:
        return {}
    trusted = file is not None or path.parent.resolve() == Path.cwd().resolve()
    return load(path, trusted=trusted).for_tables(tables)


def load(path: Path, *, trusted: bool = True) -> Config:
    """The file, every key known and every value of its type.

    Args:
        path: The file.
        trusted: Whether it may name code to run.

    Raises:
        ConfigError: Missing, not TOML, an unknown table or key, a value of another type, or code in an untrusted file;
            facts `path` and `key`.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"Config '{path}' cannot be read ({e}). Correct --config or its permissions.", path=path
        ) from e
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"Config '{path}' is not TOML: {e}. Correct that line.", path=path) from e
    tables: dict[str, dict[str, Any]] = {}
    for table, values in content.items():
        if table not in KEYS:
            raise ConfigError(_unknown_table(path, table), path=path, key=table)
        if not isinstance(values, dict):
            raise ConfigError(f"'{table}' in '{path}' is a value, not a table. Write [{table}].", path=path, key=table)
        tables[table] = {key: _value(path, table, key, value, trusted=trusted) for key, value in values.items()}
    return Config(path, tables)


def _unknown_table(path: Path, table: str) -> str:
    homes = [name for name, keys in KEYS.items() if table.replace("-", "_") in keys]
    if homes:
        return f"'{path}': key '{table}' stands in no table. Put it under [{homes[0]}]."
    near = _nearest(table, KEYS)
    return (
        f"'{path}': there is no table or key '{table}'{f', did you mean [{near}]?' if near else '.'} "
        f"Tables are {', '.join(f'[{name}]' for name in KEYS)}."
    )


def _nearest(word: str, known: Mapping[str, Any]) -> str | None:
    return next(iter(difflib.get_close_matches(word.lower().replace("-", "_"), list(known), 1, 0.5)), None)


def _value(path: Path, table: str, name: str, value: Any, *, trusted: bool) -> Any:
    key = KEYS[table].get(name)
    if key is None:
        near = _nearest(name, KEYS[table])
        homes = [other for other, keys in KEYS.items() if name in keys]
        if homes:
            advice = f"It belongs under [{homes[0]}]."
        elif near:
            advice = f"Did you mean '{near}'?"
        else:
            advice = f"Keys of [{table}] are {', '.join(KEYS[table])}."
        raise ConfigError(f"'{path}': [{table}] has no key '{name}'. {advice}", path=path, key=name)
    if not _is(key.kind, value):
        raise ConfigError(
            f"'{path}': [{table}] {name} is {value!r}. It must be {_WORDS[key.kind]}.", path=path, key=name
        )
    if key.kind == "texts" and isinstance(value, str):
        return [value]  # a flag that may be repeated
    if key.kind == "names" and isinstance(value, list):
        return ",".join(map(str, value))  # one flag, LIST
    return _resolved(path, name, key, value, trusted=trusted) if key.place else value


def _is(kind: Kind, value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or (isinstance(value, float) and math.isfinite(value))
    text = isinstance(value, str) and bool(value)
    many = value if isinstance(value, list) and value else ()
    return {
        "text": text,
        "int": whole,
        "number": number,
        "bool": isinstance(value, bool),
        "amount": text or number,
        "int or text": text or whole,
        "texts": text or (bool(many) and all(isinstance(v, str) for v in many)),
        "names": text or (bool(many) and all(_is("int or text", v) for v in many)),
        "numbers": number or (bool(many) and all(_is("number", v) for v in many)) or text,
        "sizes": whole or text or (len(many) == 2 and all(_is("int", v) for v in many)),
    }[kind]


def _resolved(path: Path, name: str, key: Key, value: str, *, trusted: bool) -> str:
    code = _CODE.fullmatch(value) if key.place in ("data", "code") else None
    if code is not None:
        if not trusted:
            raise ConfigError(
                f"'{path}' wants to run code: {name} = '{value}'. A file found beside a model may have come with it; "
                f"name it if you trust it: --config {path}.",
                path=path,
                key=name,
            )
        return f"{path.parent / code['file']}:{code['name']}" if code["file"] else value
    if key.place == "code" or (key.place == "path or -" and value == "-"):
        return value
    if key.place == "preset or path" and value in _PRESETS:
        return value
    return str(path.parent / Path(value).expanduser())
