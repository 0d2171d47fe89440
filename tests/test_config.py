"""onnxcar.toml: lookup, tables, types, paths, code."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from onnxcar import cli
from onnxcar.config import COMMANDS, KEYS, defaults, find, load
from onnxcar.data import PRESETS
from onnxcar.errors import ConfigError

EVERYTHING = """
[data]
data = "val"
test_data = "../test.npz"
calibration_data = "data.py:calibration"
label_offset = 1
limit = 500
seed = 3
metric = "top1"
provider = "cpu"
threads = 2
batch_size = 64
memory = "4GiB"
executor = "local"
[preprocess]
preprocess = "imagenet"
size = [240, 320]
crop_pct = 0.875
interpolation = "bicubic"
mean = [0.5, 0.5, 0.5]
std = "0.2,0.2,0.2"
channels = "bgr"
layout = "nchw"
[prune]
max_drop = 0.01
ratio = 0.5
layers = "conv*"
exclude = ["fc", "head"]
classes = ["cat", 7]
multiple_of = "auto"
time_limit = "30m"
json = "-"
journal = "logs/run.jsonl"
verify = false
[compare]
max_drop = 1
html = "page.html"
"""


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "onnxcar.toml"
    path.write_text(text)
    return path


def test_values_types_and_paths(tmp_path: Path) -> None:
    config = load(write(tmp_path, EVERYTHING))
    prune = config.for_command("prune")
    assert prune["data"] == str(tmp_path / "val")
    assert Path(prune["test_data"]).resolve() == tmp_path.parent / "test.npz"
    assert prune["calibration_data"] == f"{tmp_path / 'data.py'}:calibration"
    assert prune["journal"] == str(tmp_path / "logs" / "run.jsonl")
    assert (prune["json"], prune["preprocess"], prune["metric"]) == ("-", "imagenet", "top1")
    assert (prune["size"], prune["mean"], prune["crop_pct"]) == ([240, 320], [0.5, 0.5, 0.5], 0.875)
    assert (prune["layers"], prune["exclude"], prune["classes"]) == (["conv*"], ["fc", "head"], "cat,7")
    assert (prune["verify"], prune["multiple_of"], prune["limit"]) == (False, "auto", 500)


def test_a_command_gets_its_own_tables(tmp_path: Path) -> None:
    config = load(write(tmp_path, EVERYTHING))
    assert (config.for_command("prune")["max_drop"], config.for_command("compare")["max_drop"]) == (0.01, 1)
    assert "max_drop" not in config.for_command("evaluate")
    assert config.for_command("evaluate")["limit"] == 500
    assert config.for_command("doctor") == {}
    assert {table for tables in COMMANDS.values() for table in tables} == set(KEYS)


def test_file_paths_of_the_preprocessing(tmp_path: Path) -> None:
    path = write(tmp_path, '[preprocess]\npreprocess = "timm/config.json"\n')
    assert load(path).for_command("prune")["preprocess"] == str(tmp_path / "timm" / "config.json")
    for name in PRESETS:
        assert (
            load(write(tmp_path, f'[preprocess]\npreprocess = "{name}"\n')).for_command("prune")["preprocess"] == name
        )


def test_looked_up_beside_the_model_then_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    monkeypatch.chdir(here)
    assert find(there / "m.onnx") is None
    assert defaults(there / "m.onnx", tables=("data",)) == {}
    write(here, "[data]\nlimit = 1\n")
    assert defaults(there / "m.onnx", tables=("data",)) == {"limit": 1}
    assert defaults(None, tables=("data",)) == {"limit": 1}
    write(there, "[data]\nlimit = 2\n[prune]\nsteps = 9\n")
    assert defaults(there / "m.onnx", tables=("data",)) == {"limit": 2}
    assert defaults(there / "m.onnx", tables=("data", "prune")) == {"limit": 2, "steps": 9}
    named = tmp_path / "other.toml"
    named.write_text("[data]\nlimit = 3\n")
    assert defaults(there / "m.onnx", tables=("data",), file=named) == {"limit": 3}


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("[data]\nlimits = 1\n", "limits", "Did you mean 'limit'"),
        ("[data]\nlabel-offset = 1\n", "label-offset", "Did you mean 'label_offset'"),
        ("[data]\nsize = 1\n", "size", r"belongs under \[preprocess\]"),
        ("[data]\nxyzzy = 1\n", "xyzzy", "Keys of .* test_data"),
        ("[dat]\nlimit = 1\n", "dat", r"did you mean \[data\]"),
        ("limit = 1\n", "limit", r"under \[data\]"),
        ("[models]\nx = 1\n", "models", r"Tables are \[data\]"),
        ("data = 1\n", "data", r"Write \[data\]"),
        ("[data]\nlimit = '5'\n", "limit", "whole number"),
        ("[data]\nlimit = 5.0\n", "limit", "whole number"),
        ("[data]\nlimit = true\n", "limit", "whole number"),
        ("[data]\ndata = 5\n", "data", "text in quotes"),
        ("[data]\ndata = ''\n", "data", "text in quotes"),
        ("[data]\nmemory = []\n", "memory", "number or a text"),
        ("[prune]\nverify = 1\n", "verify", "true or false"),
        ("[prune]\nratio = nan\n", "ratio", "a number"),
        ("[prune]\nratio = '0.5'\n", "ratio", "a number"),
        ("[prune]\nlayers = [1]\n", "layers", "list of them"),
        ("[prune]\nclasses = [[]]\n", "classes", "list of names"),
        ("[preprocess]\nsize = [1, 2, 3]\n", "size", "list of two"),
        ("[preprocess]\nmean = ['a']\n", "mean", "list of numbers"),
    ],
)
def test_bad_keys_and_values_say_what_is_meant(tmp_path: Path, text: str, key: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as e:
        load(path)
    assert (e.value.key, e.value.path) == (key, path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("content", [b"[data\n", b"\xff\xfe", b"[data]\nlimit = 1\nlimit = 2\n", b"a = " + b"[" * 5000])
def test_what_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "onnxcar.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"Config '.*onnxcar\.toml'"):
        load(path)


def test_named_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config"):
        defaults(None, tables=("data",), file=tmp_path / "no.toml")
    with pytest.raises(ConfigError, match="--config"):
        defaults(None, tables=("data",), file=tmp_path)


@pytest.mark.parametrize("line", ["data = 'evil:run'", "data = 'evil.py:run'", "metric = 'evil:metric'"])
def test_file_beside_a_model_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    path = write(tmp_path / "download", f"[data]\n{line}\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    model = tmp_path / "download" / "m.onnx"
    with pytest.raises(ConfigError, match="wants to run code"):
        defaults(model, tables=("data",))
    assert defaults(model, tables=("data",), file=path)
    monkeypatch.chdir(tmp_path / "download")
    assert defaults(Path("m.onnx"), tables=("data",))


def test_every_flag_of_a_command_is_a_key_of_its_tables() -> None:
    general = {"help", "version", "config", "quiet", "traceback"}
    # What a command without a table of its own asks and prints: said each time, never a habit.
    shown = {"json", "per_class", "groups", "by_class", "by_layer", "plot", "classes", "class_groups", "top_classes"}
    shown |= {"output", "force", "plan", "layers", "exclude", "scores", "no_car", "like", "method"}
    shown |= {"maximise", "similarity"}
    seen = 0
    for name in sorted(set(cli.COMMANDS) & set(COMMANDS)):
        command = cli.app.get_command(click.Context(cli.app), name)
        assert command is not None
        known = {key for table in COMMANDS[name] for key in KEYS[table]}
        for param in command.params:
            flags = {opt[2:].replace("-", "_") for opt in param.opts if opt.startswith("--")}
            if isinstance(param, click.Option) and not flags & (general if name in KEYS else general | shown):
                assert flags & known, f"{name} --{'/'.join(flags)} stands in none of {COMMANDS[name]}"
                seen += 1
    assert seen > 40
