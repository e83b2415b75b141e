"""Text to values, by annotation.

Understood are str, int, float, bool, Path, Literal, tuple[X, ...], tuple[X, Y] and unions of these
and None. Settings are text wherever they come from, YAML included, and the annotation alone decides
what they become. So `1e-4`, `no` or `20231101` cannot turn into something else. `none` and `null`
mean None in every field that may be None.
"""

import math
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NOTHING = ("none", "null", "~", "")
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


def coerce(value: Any, annotation: Any, name: str) -> Any:
    """`value` (text, or a list of texts) as the annotated type.

    ValueError names the key, the value and what is allowed.
    """
    try:
        return _convert(value, annotation)
    except ValueError:
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed(annotation)}") from None


def allowed(annotation: Any) -> str:
    """What a field of this annotation takes, in words: "a whole number or none"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(part) for part in arguments)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple and arguments[-1] is not Ellipsis:
        example = "28,36 or 28x36" if set(arguments) == {int} else ",".join("a" * len(arguments))
        return f"{len(arguments)} values such as {example}"
    if origin is tuple:
        return f"a list a,b,c of which each is {allowed(arguments[0])}" if arguments[0] is not str else "a list a,b,c"
    return "none" if annotation is types.NoneType else KINDS[annotation]


def _convert(value: Any, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_to_first(value, arguments)
    if origin is tuple:
        return _convert_tuple(value, arguments)
    if isinstance(value, (list, tuple, dict)):
        raise ValueError
    text = str(value).strip()
    if origin is Literal and text in map(str, arguments):
        return next(choice for choice in arguments if str(choice) == text)
    if annotation is types.NoneType and text.lower() in NOTHING:
        return None
    if annotation is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if annotation is int and re.fullmatch(r"[+-]?\d[\d_]*", text):
        return int(text)
    # 1e5, also from YAML.
    if annotation is int and float(text).is_integer():
        return int(float(text))
    # YAML writes infinity with a dot.
    if annotation is float and not math.isnan(float(text.replace(".inf", "inf"))):
        return float(text.replace(".inf", "inf"))
    if annotation is str:
        return str(value)
    if annotation is Path and text:
        return Path(text).expanduser()
    raise ValueError


def _convert_to_first(value: Any, annotations: tuple) -> Any:
    """`value` as the first of the annotations that takes it, None before text."""
    for annotation in sorted(annotations, key=lambda annotation: annotation is not types.NoneType):
        try:
            return _convert(value, annotation)
        except ValueError:
            continue
    raise ValueError


def _convert_tuple(value: Any, annotations: tuple) -> tuple:
    numbers = not set(annotations) - {int, float, Ellipsis}
    if not isinstance(value, (list, tuple)):
        text = str(value).strip().strip("[]()")
        value = [] if text.lower() in NOTHING else re.split(r"[,x]" if numbers else ",", text)
    # A flag that may be repeated comes as a list.
    elif [str(part).strip().lower() for part in value] == ["none"] and annotations[-1] is Ellipsis:
        value = []
    if annotations[-1] is Ellipsis:
        annotations = (annotations[0],) * len(value)
    if len(value) != len(annotations):
        raise ValueError
    values = [part.strip() if isinstance(part, str) else part for part in value]
    return tuple(_convert(part, annotation) for part, annotation in zip(values, annotations))
