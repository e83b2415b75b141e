"""The command line of a configuration: flags, --help, and one sentence for every mistake."""

import argparse
import dataclasses
import os
import sys
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hf_diffusion.config.options import (
    bounds_in_words,
    check_fields,
    did_you_mean,
    read_config,
    settings,
    take_over,
    typed,
)


Config = TypeVar("Config")
WORDS = {str: "TEXT", int: "INT", float: "FLOAT", Path: "PATH"}


class OneSentenceParser(argparse.ArgumentParser):
    """A parser whose errors are one line: a usage text of fifty flags would bury it."""

    def error(self, message: str) -> NoReturn:
        """End with status 2 and the sentence, which one of several processes says."""
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("RANK", "0") == "0" else None)


class Help(argparse.Action):
    """`--help` with the options that are used often, `--help all` with every one."""

    def __call__(self, parser, namespace, values, option_string=None):
        rest = [action for action in parser._actions if not getattr(action, "often", True)]
        if values != "all" and rest:
            for action in rest:
                action.help = argparse.SUPPRESS
            parser.usage = "%(prog)s [settings]"
            parser.epilog = f"{len(rest)} more settings, in groups: {option_string} all"
        parser.print_help()
        parser.exit()


def parse_config(cls: type[Config], argv: Sequence[str] | None = None, *, prog: str | None = None) -> Config:
    """The configuration that `--config` files and, above them, the flags in `argv` describe.

    Checks types and ranges, then calls `validate()` of the class where there is one. A mistake ends
    the process with status 2 and one sentence on stderr.
    """
    config, parser = _read(cls, argv, prog)
    try:
        if hasattr(config, "validate"):
            config.validate()
    except ValueError as error:
        parser.error(str(error))
    return config


def check_flags(cls: type[Config], argv: Sequence[str], prog: str) -> Config:
    """The settings, which do not contradict each other for certain yet.

    Ends the process as `parse_config` does for --help and for what a single setting shows to be
    wrong.
    """
    return _read(cls, argv, prog)[0]


def _read(cls: type[Config], argv: Sequence[str] | None, prog: str | None) -> tuple[Config, OneSentenceParser]:
    """The settings, each of its type and in its range, and the parser that says what is wrong."""
    parser = _parser(cls, prog)
    # Intermixed: a value without a flag may stand before, between and after the flags.
    given, extra = parser.parse_known_intermixed_args(argv)
    given = vars(given)
    files = given.pop("config", [])
    try:
        if extra:
            raise ValueError(_unexpected_argument(extra, cls))
        values: dict[str, Any] = {}
        for file in files:
            values = take_over(cls, values, read_config(cls, file))
        values = take_over(cls, values, typed(cls, given, place="--{}"))
        for name, field in settings(cls).items():
            if field.default is dataclasses.MISSING and field.name not in values:
                shown = name if field.metadata.get("positional") else f"--{name}"
                raise ValueError(f"{shown} is required; give it on the command line or in a --config file")
        config = cls(**values)
        if hasattr(cls, "given"):
            config.given = frozenset(values)
        check_fields(config)
    except ValueError as error:
        parser.error(str(error))
    return config, parser


def _parser(cls: type, prog: str | None) -> OneSentenceParser:
    # dataclass() writes the signature where there is no docstring.
    documented = cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    parser = OneSentenceParser(
        prog=prog or Path(sys.argv[0]).name,
        description=textwrap.dedent(cls.__doc__).strip() if documented else None,
        # An abbreviation that is unique today is ambiguous after the next release.
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=115),
    )
    parser.add_argument(
        "-h", "--help", nargs="?", metavar="all", action=Help, help="show the settings, or all of them"
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML file of settings, or the name of a recipe of the package; may be repeated, later ones win",
    )
    group, groups, hints = parser, {}, get_type_hints(cls)
    has_often = any(field.metadata.get("often") for field in settings(cls).values())
    for name, field in settings(cls).items():
        title = field.metadata.get("group")
        if title:
            # A subclass may go on with a group of its base.
            group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        _add_argument(group, name, field, hints[field.name], has_often)
    return parser


def _add_argument(
    group: argparse._ActionsContainer, name: str, field: dataclasses.Field, annotation: Any, has_often: bool
) -> None:
    """Add one setting, whose value stays text and may be missing until the files are read."""
    metadata = field.metadata
    words = [bounds_in_words(metadata["bounds"])] if metadata.get("bounds") else []
    words += ["may be repeated"] if metadata.get("repeatable") else []
    words += ["required" if field.default is dataclasses.MISSING else f"default: {_shown(field.default)}"]
    help = f"{metadata.get('help', '')} ({'; '.join(words)})".replace("%", "%%")
    flags = [f"--{word}" for word in (name, metadata.get("also")) if word]
    if metadata.get("positional"):
        action = group.add_argument(name, nargs="?", help=help)
    elif annotation in (bool, bool | None):
        action = group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=help)
    elif metadata.get("repeatable"):
        action = group.add_argument(*flags, action="append", metavar=_metavar(get_args(annotation)[0]), help=help)
    else:
        action = group.add_argument(*flags, metavar=_metavar(annotation), help=help)
    action.often = not has_often or bool(metadata.get("often"))


def _unexpected_argument(extra: Sequence[str], cls: type) -> str:
    flags = [word for word in extra if word.startswith("--")]
    if not flags:
        return (
            f"unexpected argument {extra[0]!r}; every value follows its --flag, a list is one value a,b,c, "
            "a switch takes none"
        )
    hints, given = get_type_hints(cls), flags[0].split("=")[0]
    known = {name: f"--{name}" for name in ["config", *settings(cls)]}
    known |= {f"no_{name}": f"--no-{name}" for name, hint in hints.items() if hint in (bool, bool | None)}
    return f"unknown flag {given}{did_you_mean(given[2:], known)}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _metavar(annotation: Any) -> str:
    """The choices of a Literal, else a short word for the kind of value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (Union, types.UnionType):
        return "|".join(_metavar(part) for part in arguments if part is not types.NoneType)
    if origin is tuple:
        shown = _metavar(arguments[0])
        return f"{shown},..." if arguments[-1] is Ellipsis else ",".join(map(_metavar, arguments))
    return WORDS.get(annotation, "VALUE")
