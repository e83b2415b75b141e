"""The section "Use" of a card: code that works as it stands, asked of the pipeline."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline


SHOWN_LABELS = 4


@dataclass(frozen=True)
class Use:
    """What a card says about loading and calling a pipeline, or a network that is saved alone.

    package: what `class_name` is imported from.
    has_code: the folder carries the code of its classes.
    call: lines of Python that draw samples with `pipe`; "" for a network alone.
    class_names: in the order of their numbers; None where there are none.
    is_conditional: whether samples are asked for by class.
    advice: a sentence of the pipeline on solvers and steps, with its source; "" where it has none.
    """

    class_name: str
    package: str
    has_code: bool
    call: str
    class_names: list[str] | None
    is_conditional: bool
    advice: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether the installed package has the class."""
        return self.package == "hf_diffusion"


def use_of_pipeline(pipeline: DiffusionPipeline, has_code: bool, class_names: list[str] | None = None) -> Use:
    """How to use a pipeline; `class_names` of the data stand in where it does not record them."""
    cls, count = type(pipeline), getattr(pipeline, "num_classes", None)
    library = cls.__module__.split(".")[0]
    arguments = example_arguments(pipeline)
    # A pipeline that does not tell the shape of a sample is one of images.
    draws_images = len(getattr(pipeline, "sample_shape", ("C", "H", "W"))) == 3
    output = getattr(pipeline, "output_name", "images" if draws_images else None)
    return Use(
        class_name=cls.__name__,
        package=library if library in ("hf_diffusion", "diffusers") else cls.__module__,
        has_code=has_code,
        call=call_text(arguments, "generator" in _accepted(pipeline), output),
        class_names=_names(getattr(pipeline, "id2label", None), count, class_names),
        is_conditional=bool(count),
        advice=getattr(pipeline, "solver_advice", ""),
    )


def use_of_model(config: dict[str, Any], class_names: list[str] | None = None) -> Use:
    """How to use a network that is saved alone, from its config.json, which may be empty."""
    names = _names(config.get("id2label"), config.get("num_classes"), class_names)
    return Use(config.get("_class_name", ""), "hf_diffusion", False, "", names, False)


def example_arguments(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The arguments of an example call: what the pipeline says, else what its signature tells."""
    if hasattr(pipeline, "example_call"):
        return dict(pipeline.example_call())
    accepted, count = _accepted(pipeline), getattr(pipeline, "num_classes", None)
    if "class_labels" in accepted and count:
        names = _names(getattr(pipeline, "id2label", None), count, None)
        return {"class_labels": (names or list(range(count)))[:SHOWN_LABELS]}
    return {"batch_size": SHOWN_LABELS} if "batch_size" in accepted else {}


def call_text(arguments: Mapping[str, Any], takes_generator: bool = True, output: str | None = "images") -> str:
    """The lines that call `pipe` with these arguments and one seed a sample, if that is clear.

    output: how its output calls the samples; None for any other.
    """
    given = [f"{name}={_literal(value)}" for name, value in arguments.items()]
    asked = arguments.get("class_labels", arguments.get("prompt", ()))
    count, seeds = arguments.get("batch_size") or (0 if isinstance(asked, str) else len(asked)), ""
    if takes_generator and count:
        seeds = f"generators = [torch.Generator().manual_seed(seed) for seed in range({count})]\n"
        given.append("generator=generators")
    elif takes_generator:
        given.append("generator=torch.Generator().manual_seed(0)")
    # The first field of any output of diffusers, whatever its name.
    result = ("samples", "[0]") if output is None else (output, f".{output}")
    return f"{seeds}{result[0]} = pipe({', '.join(given)}){result[1]}"


def _accepted(pipeline: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline.__call__).parameters


def _names(recorded: Mapping | None, count: int | None, of_the_data: list[str] | None) -> list[str] | None:
    """The classes that a model knows; None for one without classes, or with numbers only."""
    if not count:
        return None
    if recorded:
        return [recorded[number] for number in sorted(recorded, key=int)]
    return of_the_data if of_the_data and len(of_the_data) == count else None


def _literal(value: Any) -> str:
    """A value as Python text, with double quotes as code has them."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return f"[{', '.join(map(_literal, value))}]" if isinstance(value, list | tuple) else repr(value)
