"""A pipeline under varied sampling settings: every combination of what `--sweep` names."""

import itertools
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline

from hf_diffusion.config.coercion import coerce
from hf_diffusion.config.options import UsageError
from hf_diffusion.evaluation.options import EvaluationOptions
from hf_diffusion.sampling.drawing import call_options, sampling_options
from hf_diffusion.sampling.loading import (
    SCHEDULERS,
    check_scale_is_given,
    guided_by,
    kind_of_guidance,
    load_for_sampling,
    replace_scheduler,
)
from hf_diffusion.sampling.speed import speed_up


# Settings that are no arguments of the pipeline's call.
SPACINGS = ("leading", "trailing", "linspace")
OF_THE_PIPELINE = ("guidance", "scheduler", "timestep_spacing")


class SweptPipeline:
    """A pipeline whose guidance, scheduler and call follow a setting.

    `settings` are all combinations of the swept values, by name. `pipeline` is that of no setting.
    """

    def __init__(self, options: EvaluationOptions):
        plain = load_for_sampling(replace(options, guide_by=None))
        self.by_guidance = {"classifier_free": plain}
        self.pipeline = plain
        if options.guide_by is not None:
            self.pipeline = guided_by(plain, options.guide_by).to(plain.device)
            self.by_guidance[kind_of_guidance(self.pipeline)] = self.pipeline
            check_scale_is_given(self.pipeline, options, [text.partition("=")[0] for text in options.sweep])
            if options.fast:
                speed_up(self.pipeline, options.compile_mode)
        self.scheduler = plain.scheduler
        self.fixed = call_options(self.pipeline, options)
        swept = dict(self._values(text) for text in options.sweep)
        self.settings = [dict(zip(swept, values)) for values in itertools.product(*swept.values())]

    def at(self, setting: dict[str, Any]) -> tuple[DiffusionPipeline, dict[str, Any]]:
        """The pipeline with a setting's scheduler and guidance, and the options of its call."""
        pipeline = self.by_guidance[setting["guidance"]] if "guidance" in setting else self.pipeline
        named = (setting.get("scheduler"), setting.get("timestep_spacing"))
        # Made anew, since a scheduler keeps the state of its last run.
        pipeline.scheduler = replace_scheduler(type(self.scheduler).from_config(self.scheduler.config), *named)
        of_call = {name: value for name, value in setting.items() if name not in OF_THE_PIPELINE}
        call = self.fixed | of_call
        if setting.get("guidance") == "clip":
            # the scale of its gradient, beside plain conditional sampling
            call |= {"clip_guidance_scale": call.get("guidance_scale", 1.0), "guidance_scale": 1.0}
        return pipeline, call

    def _values(self, text: str) -> tuple[str, list[Any]]:
        """Name and values of one --sweep; UsageError for what cannot be varied."""
        name, _, words = text.partition("=")
        if name == "guidance" and len(self.by_guidance) < 2:
            raise UsageError(
                f"--sweep {text}: comparing kinds of guidance needs --guide_by, a classifier, clip or checkpoint"
            )
        choices = {"guidance": self.by_guidance, "scheduler": SCHEDULERS, "timestep_spacing": SPACINGS}.get(name)
        if choices is None:
            convert = self._converter(name, text)
            return name, [convert(word) for word in words.split(",")]
        values = words.split(",")
        for value in values:
            if value not in choices:
                raise UsageError(f"--sweep {text}: unknown {name} {value!r}; choose from {', '.join(choices)}")
        return name, values

    def _converter(self, name: str, text: str) -> Callable[[str], Any]:
        """What reads a value of an argument of the pipeline's call, by its annotation there."""
        known = sampling_options(self.pipeline)
        if name not in known:
            raise UsageError(
                f"--sweep {text}: write NAME=A,B, with NAME one of {', '.join((*known, *OF_THE_PIPELINE))}"
            )
        annotation = typing.get_type_hints(type(self.pipeline).__call__).get(name, float)

        def convert(word: str) -> Any:
            try:
                return coerce(word, annotation, f"--sweep {name}")
            except ValueError as error:
                raise UsageError(str(error)) from None

        return convert
