"""A YAML file and command-line overrides become a validated dataclass."""

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

Arguments = TypeVar("Arguments")
SETTINGS = "Settings stand in the file, or on the command line, which wins."


class Parser(HfArgumentParser):
    """Whatever is wrong is a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that says which default a field has, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def parse_arguments(kind: type[Arguments], argv: list[str], command: str) -> Arguments:
    """A dataclass from ``[FILE.yaml] --key value ...``; the command line wins over the file.

    Args:
        kind: a dataclass whose fields are single values, made by `fastpo.config.option`.
        argv: of the command line, without the command.
        command: what help calls it.

    Raises:
        ValueError, TypeError: an unknown key (naming the nearest), or a value of the wrong kind or out of range.
        SystemExit: 0, where help was asked for, which is printed.
    """
    usage = f"{command} [FILE.yaml] [--key value ...]"
    parser = Parser(
        kind, prog=command, usage=usage, description=SETTINGS, allow_abbrev=False, formatter_class=_Formatter
    )
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    path, overrides = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    said = {} if path is None else read_yaml(path)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    types = get_type_hints(kind)  # not the fields' own, from which the parser takes the None
    for key, value in said.items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(str(key), known)}")
        if isinstance(value, list | dict) or (value is None and type(None) not in get_args(types[key])):
            raise ValueError(f"{path}: {key} must be one value, got {value!r}")
    check_known(overrides, known)
    # argparse converts a default, and so checks it, where it is a string.
    parser.set_defaults(**{key: str(x) if isinstance(x, bool | int | float) else x for key, x in said.items()})
    (parsed,) = parser.parse_args_into_dataclasses(overrides, look_for_args_file=False)
    return parsed


def check_known(overrides: list[str], known: set[str]) -> None:
    """Raise ValueError for an option ``--name`` that is none of the known names."""
    for flag in overrides:
        name = flag.split("=")[0].removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name.removeprefix("no_") not in known and name not in known:
            raise ValueError(f"unknown option {flag.split('=')[0]!r}{nearest(name, known)}")


def read_yaml(path: str) -> dict[str, Any]:
    """Keys and values of a recipe file.

    Raises:
        ValueError: no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"recipe must be an existing YAML file, got {path!r}")
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(recipe).__name__}")
    return recipe


def nearest(name: str, known: set[str]) -> str:
    """What an unknown name may have meant, for a message."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
