"""The flags: all of the interface, all of the config, none ignored, every bad value refused as usage."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from onnxcar import config
from onnxcar.cli import COMMANDS, app, options
from onnxcar.cli.command import Opt
from onnxcar.cli.later import LATER, LATER_VALUES
from onnxcar.cli.types import ALIGN, MEMORY, NUMBERS, SIZE, TIME, Count, Fraction

# Flags of the interface, by the commands they belong to.
DATA = "--data --label-offset --limit --seed --preprocess --size --crop-pct --interpolation --mean --std --channels"
DATA += " --layout --metric --provider --threads --batch-size --memory --executor --config --json --quiet --traceback"
PRUNE = "-o --force --test-data --calibration-data --criterion --scope --ratio --max-drop --target-macs --target-params"
PRUNE += " --target-latency --guarantee --time-limit --steps --per-step --layers --exclude --min-filters --multiple-of"
PRUNE += " --recover --norms --classes --plan --dry-run --journal --report --verify --no-verify"
INTERFACE = {
    "prune": f"{DATA} {PRUNE}",
    "evaluate": f"{DATA} --test-data",
    "score": f"{DATA} --criterion --by-class",
    "compare": f"{DATA} --test-data --max-drop --min-score --max-latency-ratio --html",
    "recover": f"{DATA} --test-data --like --method --plan -o --force",
    "inspect": "--json --groups --norms --config --quiet --traceback",
    "explain": f"{DATA} -o --layers --exclude --plan --scores --no-car",
    "doctor": "--json --quiet --traceback",
}


def flags(name: str) -> set[str]:
    command = app.get_command(click.Context(app), name)
    return {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_the_interface_is_known(name):
    assert set(INTERFACE[name].split()) <= flags(name)


def test_flags_of_the_interface_document_are_those_of_this_test():
    document = Path(__file__).resolve().parents[2] / "shared" / "INTERFACE.md"
    if not document.is_file():
        pytest.skip("no ../shared/INTERFACE.md")
    text = document.read_text(encoding="utf-8")
    text = text[text.index("### Model and data") : text.index("### Exit codes")]
    rows = [line.split("|")[1] for line in re.sub(r"\\\|", "/", text).splitlines() if line.startswith("| `-")]
    found = {flag for row in rows for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", row)}
    found |= set(re.findall(r"single parts override: `([^`]*)`", text)[0].split()) & set(DATA.split())
    assert len(found) > 40
    assert found <= set(f"{DATA} {PRUNE}".split())


def test_every_flag_that_is_not_built_is_refused_with_its_value():
    refused = [(c, flag) for c, table in LATER.items() for flag in table]
    for command, flag in refused:
        arguments = ["m.onnx", "n.onnx"] if command == "compare" else ["m.onnx"]
        result = CliRunner().invoke(app, [command, *arguments, flag, "0.5"])
        assert result.exit_code == 2
        assert f"{flag} (" in result.output
        assert "not in this version" in result.output


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--executor", "ray"), ("--executor", "ray://host:1")],
)
def test_every_value_that_is_not_built_is_refused(flag, value):
    assert value.split(":")[0] in LATER_VALUES[flag.strip("-")]
    result = CliRunner().invoke(app, ["prune", "m.onnx", flag, value])
    assert result.exit_code == 2
    assert "not in this version" in result.output


def test_flags_that_are_not_built_do_not_stand_in_the_help():
    for command, table in LATER.items():
        text = CliRunner().invoke(app, [command, "--help"]).output
        assert not [flag for flag in table if flag in text]


def test_config_keys_are_the_flags():
    known = {name: app.get_command(click.Context(app), name) for name in ("prune", "compare", "evaluate")}
    names = {c: {p.name for p in command.params if isinstance(p, Opt)} for c, command in known.items()}
    of_config = {table: set(keys) for table, keys in config.KEYS.items()}
    assert of_config["data"] | of_config["preprocess"] | of_config["prune"] == names["prune"] - {
        "config",
        "quiet",
        "traceback",
    }
    assert of_config["compare"] <= names["compare"]
    shared = names["compare"] - {"config", "quiet", "traceback"} - of_config["data"] - of_config["preprocess"]
    assert shared == of_config["compare"]


def test_config_tables_name_commands_that_exist_or_will():
    assert set(COMMANDS) - {"doctor"} <= set(config.COMMANDS)


def test_names_written_out_are_those_of_the_tables():
    from onnxcar.criteria import CRITERIA
    from onnxcar.data import INTERPOLATIONS, PRESETS

    assert set(options.CRITERIA) == set(CRITERIA)
    assert set(options.PRESETS) == set(PRESETS)
    assert set(options.INTERPOLATIONS) == set(INTERPOLATIONS)
    assert not set(options.LATER_CRITERIA) & set(CRITERIA)


def test_criteria_said_to_need_no_data_are_those():
    from onnxcar.cli.prune import DATA_FREE, LABELLED
    from onnxcar.criteria import CRITERIA

    assert set(DATA_FREE) == {name for name, row in CRITERIA.items() if not row.needs_data}
    assert set(LABELLED) == {name for name, row in CRITERIA.items() if row.needs_labels}


def test_every_option_stands_under_a_heading_and_has_help():
    for name in COMMANDS:
        for param in app.get_command(click.Context(app), name).params:
            if isinstance(param, click.Option) and param.name != "help":
                assert isinstance(param, Opt), (name, param.name)
                assert param.hidden or (param.help and param.section != "Options"), (name, param.name)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5", "nan", "inf", "half", ""])
def test_ratio_outside_its_range_is_usage(value):
    result = CliRunner().invoke(app, ["prune", "m.onnx", "--ratio", value])
    assert result.exit_code == 2
    assert "not a number in (0, 1)" in result.output


def test_percent_is_recognised():
    result = CliRunner().invoke(app, ["prune", "m.onnx", "--ratio", "30"])
    assert "0.3 is 30 percent" in result.output


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (MEMORY, "4GiB", 4 * 2**30),
        (MEMORY, "500MB", 500_000_000),
        (MEMORY, "2k", 2000),
        (MEMORY, 1048576, 1048576),
        (TIME, "30m", 1800.0),
        (TIME, "1h30m", 5400.0),
        (TIME, "8 h", 28800.0),
        (TIME, 90, 90.0),
        (ALIGN, "auto", "auto"),
        (ALIGN, "8", 8),
        (SIZE, "224", 224),
        (SIZE, "240x320", (240, 320)),
        (SIZE, [240, 320], (240, 320)),
        (NUMBERS, "0.485,0.456, 0.406", (0.485, 0.456, 0.406)),
        (NUMBERS, [1, 2.5], (1.0, 2.5)),
        (NUMBERS, 127.5, (127.5,)),
        (Fraction(low_in=True), "0", 0.0),
        (Fraction(high_in=True), "1", 1.0),
        (Count(), "3", 3),
        (Count(0), "0", 0),
    ],
)
def test_values_are_read(kind, text, value):
    assert kind.convert(text, None, None) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (MEMORY, "4 apples"),
        (MEMORY, "0"),
        (MEMORY, "-1GiB"),
        (TIME, "30x"),
        (TIME, "m30"),
        (TIME, "0s"),
        (ALIGN, "0"),
        (ALIGN, "often"),
        (ALIGN, "2.5"),
        (SIZE, "0"),
        (SIZE, "2x3x4"),
        (NUMBERS, "a,b"),
        (NUMBERS, "nan"),
        (NUMBERS, ""),
        (Fraction(), True),
        (Count(), "0"),
        (Count(), "1.5"),
        (Count(), True),
    ],
)
def test_values_that_make_no_sense_are_refused(kind, text):
    with pytest.raises(click.BadParameter):
        kind.convert(text, None, None)
