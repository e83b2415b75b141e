"""A pipeline as the user wants it: its scheduler, precision, device, what guides it."""

import inspect
import typing
from collections.abc import Sequence

import torch
from diffusers import (
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
)
from transformers import AutoTokenizer

from hf_diffusion.config.options import UsageError
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.models.clip_noisy import NoisyCLIP
from hf_diffusion.models.unet_adm import ADMClassifier
from hf_diffusion.pipelines.pipeline_classifier_guidance import ClassifierGuidancePipeline
from hf_diffusion.sampling.autoguidance import autoguided, open_guide
from hf_diffusion.sampling.drawing import sampling_options
from hf_diffusion.sampling.options import CALL_OPTIONS, SamplingOptions
from hf_diffusion.sampling.speed import speed_up
from hf_diffusion.schedulers.scheduling_edm import EDMHeunScheduler
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler, ImprovedPNDMScheduler, LinearDDPMScheduler
from hf_diffusion.schedulers.scheduling_unipc import UniPCTimestepsScheduler


# Each takes over the process from the configuration of a compatible one.
SCHEDULERS = {
    "ddim": DDIMEtaScheduler,
    "ddpm": LinearDDPMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCTimestepsScheduler,
    "deis": DEISMultistepScheduler,
    "ipndm": ImprovedPNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "edm-heun": EDMHeunScheduler,
    "edm-euler": EDMEulerScheduler,
    "edm-dpm++": EDMDPMSolverMultistepScheduler,
}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_for_sampling(options: SamplingOptions) -> DiffusionPipeline:
    """The pipeline with all that the options name."""
    if options.compile_mode and not options.fast:
        raise ValueError(f"compile_mode {options.compile_mode} says how --fast compiles; add --fast, or leave it out")
    pipeline = load_pipeline(
        options.pipeline,
        trust_remote_code=options.trust_remote_code,
        dtype=DTYPES[options.dtype],
        verify=options.verify,
        **options.where(),
    )
    asked = (options.scheduler, options.timestep_spacing)
    # A pipeline need not have one.
    if asked != (None, None):
        check_takes_others(pipeline, options.scheduler)
        pipeline.scheduler = replace_scheduler(getattr(pipeline, "scheduler", None), *asked, ways_of_its_own(pipeline))
    found = getattr(getattr(pipeline, "scheduler", None), "tuned_timesteps", lambda steps: None)
    if options.timesteps is None and (tuned := found(options.num_inference_steps)):
        print(f"timesteps {','.join(map(str, tuned))}, which tune-steps has found for this model")
    if options.guide_by is not None:
        pipeline = guided_by(pipeline, options.guide_by)
        check_scale_is_given(pipeline, options)
    pipeline = pipeline.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.fast:
        print(f"fast: {speed_up(pipeline, options.compile_mode)}")
    return pipeline


def check_takes_others(pipeline: DiffusionPipeline, name: str | None) -> None:
    """UsageError for a scheduler in a pipeline that was written for one with more to ask.

    Such are diffusers' DDIMPipeline and DDPMPipeline, which give their scheduler's steps all that
    it takes.
    """
    written_for = typing.get_type_hints(type(pipeline).__init__).get("scheduler")
    if name not in SCHEDULERS or not hasattr(written_for, "step") or written_for is SchedulerMixin:
        return
    asked, taken = (inspect.signature(cls.step).parameters.keys() for cls in (written_for, SCHEDULERS[name]))
    if missing := asked - taken:
        raise UsageError(
            f"--scheduler {name}: {type(pipeline).__name__} asks {written_for.__name__} for "
            f"{', '.join(sorted(missing))}, which {SCHEDULERS[name].__name__} does not take; leave it out"
        )


def ways_of_its_own(pipeline: DiffusionPipeline) -> str:
    """What to do instead of giving another scheduler: the options that a pipeline samples by."""
    hints, own = typing.get_type_hints(type(pipeline).__call__), []
    for name in sampling_options(pipeline):
        flag = f"--{name}" if name in CALL_OPTIONS else f"--set {name}="
        words = [word for word in typing.get_args(hints.get(name)) if typing.get_origin(word) is typing.Literal]
        own.append(flag + " or ".join(str(choice) for word in words for choice in typing.get_args(word)))
    return f"leave it out, {type(pipeline).__name__} samples by {', '.join(own) or 'nothing else'}"


def replace_scheduler(
    scheduler: SchedulerMixin,
    name: str | None = None,
    timestep_spacing: str | None = None,
    instead: str = "leave it out",
) -> SchedulerMixin:
    """A scheduler of the same process, of a class of SCHEDULERS and with this spacing.

    None keeps what is there. UsageError where the class cannot take over the process, or knows no
    spacing; where none can, `instead` says what to do.
    """
    if name is None and timestep_spacing is None:
        return scheduler
    if name is not None and name not in SCHEDULERS:
        raise UsageError(f"--scheduler {name}: there is no such scheduler; choose from {', '.join(SCHEDULERS)}")
    cls = type(scheduler) if name is None else SCHEDULERS[name]
    if not can_take_over(cls, type(scheduler)):
        fitting = [word for word, other in SCHEDULERS.items() if can_take_over(other, type(scheduler))]
        raise UsageError(
            f"--scheduler {name}: the process of this pipeline's {type(scheduler).__name__} is not one that "
            f"{cls.__name__} can sample; {'choose from ' + ', '.join(fitting) if fitting else instead}"
        )
    if timestep_spacing is not None and "timestep_spacing" not in inspect.signature(cls.__init__).parameters:
        raise UsageError(f"--timestep_spacing {timestep_spacing}: {cls.__name__} has no spacing; leave it out")
    changes = {} if timestep_spacing is None else {"timestep_spacing": timestep_spacing}
    # Of ours alone, such as eta; diffusers would warn of them.
    accepted = inspect.signature(cls.__init__).parameters
    config = {key: value for key, value in scheduler.config.items() if key.startswith("_") or key in accepted}
    if timestep_spacing is not None:
        # a spacing that is asked for stands above timesteps that a search has found
        config.pop("_tuned_timesteps", None)
    return cls.from_config(config, **changes)


def can_take_over(cls: type[SchedulerMixin], former: type[SchedulerMixin]) -> bool:
    """Whether a scheduler class samples the process that the configuration of another describes.

    So it is where the two have a base class of their own, or where one names the other as
    compatible. A class that names no other has a process of its own. It may be named all the same:
    diffusers' EDMEulerScheduler is, by schedulers that would replace its noise levels by betas of
    their own.
    """
    bases = set(cls.__mro__) & set(former.__mro__) - set(SchedulerMixin.__mro__)
    if any(issubclass(base, SchedulerMixin) for base in bases):
        return True
    names = former.__name__ in cls._compatibles or cls.__name__ in former._compatibles
    return names and bool(former._compatibles)


def guided_by(pipeline: DiffusionPipeline, guide: str) -> DiffusionPipeline:
    """A pipeline that is guided by what a folder or repository holds.

    A saved classifier of noisy images guides a class-conditional pipeline, a saved CLIP of them a
    text-to-image one. Any other network of the package, alone, in a pipeline or in a checkpoint, is
    a weaker one that guidance leads away from.
    """
    if "clip" in pipeline.components:
        clip = NoisyCLIP.from_pretrained(guide, dtype=pipeline.unet.dtype)
        pipeline.register_modules(clip=clip, clip_tokenizer=AutoTokenizer.from_pretrained(guide))
        return pipeline
    unet, scheduler = getattr(pipeline, "unet", None), pipeline.scheduler
    if unet is None:
        name = type(pipeline).__name__
        raise UsageError(f"--guide_by: a {name} has no U-Net that a classifier could guide; leave it out")
    is_gaussian, takes_networks = can_take_over(DDIMEtaScheduler, type(scheduler)), "guide_unet" in pipeline.components
    network, process = open_guide(guide, unet.dtype) if is_gaussian or takes_networks else (None, {})
    if network is not None and not isinstance(network, ADMClassifier):
        return autoguided(pipeline, network, process, guide)
    if not is_gaussian:
        name = type(scheduler).__name__
        raise UsageError(f"--guide_by: a classifier guides a Gaussian process, not that of {name}; leave it out")
    return ClassifierGuidancePipeline(
        unet=unet,
        classifier=network,
        scheduler=scheduler,
        id2label=getattr(pipeline, "id2label", None),
    )


def kind_of_guidance(pipeline: DiffusionPipeline) -> str:
    """By what `guided_by` has made a pipeline guided: classifier, clip or autoguidance."""
    if isinstance(pipeline, ClassifierGuidancePipeline):
        return "classifier"
    return "clip" if "clip" in pipeline.components else "autoguidance"


def check_scale_is_given(pipeline: DiffusionPipeline, options: SamplingOptions, swept: Sequence[str] = ()) -> None:
    """UsageError for a weaker network beside a scale of 1, at which it would do nothing."""
    given = options.guidance_scale not in (None, 1) or "guidance_scale" in swept
    given = given or any(text.startswith("guidance_scale=") for text in options.set_)
    if kind_of_guidance(pipeline) == "autoguidance" and not given:
        raise UsageError(
            f"--guide_by {options.guide_by}: at a guidance_scale of 1 it guides nothing; give --guidance_scale, such "
            "as 2"
        )
