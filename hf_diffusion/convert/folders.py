"""Whole conversions: a pipeline into others' files, their checkpoint into a pipeline."""

import inspect
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin

from hf_diffusion.convert.glide import networks_from_glide, scheduler_from_glide
from hf_diffusion.convert.glide_text import tokenizer_from_glide
from hf_diffusion.convert.nvlabs import (
    discriminator_from_nvlabs,
    discriminator_to_nvlabs,
    generator_from_nvlabs,
    generator_to_nvlabs,
    read_nvlabs_checkpoint,
    scheduler_from_nvlabs,
)
from hf_diffusion.convert.nvlabs_flags import KNOWN, read_flags, scheduler_flags
from hf_diffusion.convert.openai import (
    classifier_flags,
    classifier_from_openai,
    classifier_to_openai,
    read_openai_checkpoint,
    unet_flags,
    unet_from_openai,
    unet_to_openai,
)
from hf_diffusion.convert.stock import label_row, pipeline_to_stock
from hf_diffusion.files import write_folder, write_whole
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.models.ncsnpp_ddgan import DDGANDiscriminator
from hf_diffusion.models.unet_adm import ADMClassifier, ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.pipelines.pipeline_text_to_image import TextToImagePipeline
from hf_diffusion.sampling.drawing import draw_floats
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, LinearDDPMScheduler


# beside the pipeline, which has no use for it
DISCRIMINATOR = "discriminator"


def write_stock(source: str, output: Path, class_label: str | None) -> None:
    """Write a pipeline in stock classes and say how far its images are from ours."""
    pipe = load_pipeline(source)
    stock = pipeline_to_stock(pipe, class_label)
    is_ddim, total = type(stock).__name__ == "DDIMPipeline", pipe.scheduler.config.num_train_timesteps
    steps = max(n for n in range(1, 11) if total % n == 0)
    call = {"use_clipped_model_output": True, "eta": pipe.scheduler.config.eta} if is_ddim else {}
    row, seeds = label_row(pipe, class_label), range(2)
    labels = None if row in (None, pipe.null_class_id) else [row] * len(seeds)
    ours = draw_floats(pipe, seeds, labels, num_inference_steps=steps)
    theirs = draw_floats(stock, seeds, None, num_inference_steps=steps, **call)
    write_folder(output, stock.save_pretrained, last=stock.config_name)
    arguments = ", ".join(f"{name}={value}" for name, value in call.items())
    print(
        f"{output}: {type(stock).__name__} with {type(stock.unet).__name__} and {type(stock.scheduler).__name__}; "
        f"in {steps} steps its images differ from ours by {np.abs(ours - theirs).max():.1e} at most, on a scale from "
        "0 to 1" + (f"\ncall it as pipe({arguments}, ...)" if call else "")
    )


def write_from_openai(checkpoint: Path, output: Path, flags: str) -> None:
    """Write OpenAI's U-Net as a pipeline, or their classifier as a model.

    `flags` are those of their scripts, or the flags.json that `write_for_openai` wrote.
    """
    if Path(flags).suffix == ".json":
        model_flags, process_flags, unused = *_read_flags(Path(flags)), set()
        is_classifier = "pool" in model_flags
    else:
        given = parse_flags(flags)
        is_classifier = any(name.startswith("classifier_") for name in given)
        functions = (unet_flags, classifier_flags, scheduler_from_openai)
        unused = set(given) - {name for function in functions for name in inspect.signature(function).parameters}
        of_model = classifier_flags if is_classifier else unet_flags
        model_flags = of_model(**_typed(given, of_model))
        process_flags = _typed(given, scheduler_from_openai)
    state = read_openai_checkpoint(checkpoint)
    if is_classifier:
        write_folder(output, classifier_from_openai(state, model_flags).save_pretrained, last=ModelMixin.config_name)
    else:
        unet, scheduler = unet_from_openai(state, model_flags), scheduler_from_openai(**process_flags)
        ClassifierFreeGuidancePipeline(unet, scheduler).save_pretrained(output)
    print(f"{output}: converted from {checkpoint}{_unused(unused)}")


def write_for_openai(source: str, output: Path) -> None:
    """Write a U-Net or a classifier as model.pt, and flags.json for OpenAI's guided-diffusion.

    "model" holds the constructor arguments of their network, "diffusion" flags of their scripts.
    """
    if (Path(source) / ModelMixin.config_name).is_file():
        (state, flags), process = classifier_to_openai(ADMClassifier.from_pretrained(source)), {}
    else:
        pipe = load_pipeline(source)
        unet = getattr(pipe, "unet", None)
        if type(unet) is not ADMUNet2DModel:
            raise ValueError(
                f"{source} holds a {type(pipe).__name__} with no ADMUNet2DModel; --to openai takes a pipeline that "
                "has one, or the folder of an ADMClassifier"
            )
        (state, flags), process = unet_to_openai(unet), openai_process(pipe.scheduler)
    # The weights last: a folder with model.pt is whole.
    write_whole(output / "flags.json", json.dumps({"model": flags, "diffusion": process}, indent=2) + "\n")
    write_whole(output / "model.pt", lambda file: torch.save(state, file))
    print(f"{output}: model.pt with {len(state)} tensors, and flags.json with what builds its network and process")


def _read_flags(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))
        return dict(flags["model"]), dict(flags["diffusion"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'--flags {path} must be the flags.json of `convert --to openai`, with "model" and "diffusion": {error}'
        ) from error


def write_from_nvlabs(checkpoint: Path, output: Path, given: str) -> None:
    """Write a generator of NVlabs' denoising-diffusion-gan as a pipeline.

    The discriminator of a training state goes beside it. Flags given go before those in the file.
    """
    asked = read_flags(given)
    checkpoint_file, checkpoint = checkpoint, read_nvlabs_checkpoint(checkpoint)
    flags = checkpoint.flags | asked
    generator, scheduler = generator_from_nvlabs(checkpoint.generator, flags), scheduler_from_nvlabs(flags)
    critic = checkpoint.discriminator and discriminator_from_nvlabs(checkpoint.discriminator, flags)

    def write(folder: Path) -> None:
        DDGANPipeline(generator, scheduler).save_pretrained(folder)
        if critic is not None:
            critic.save_pretrained(folder / DISCRIMINATOR)

    write_folder(output, write, last=DDGANPipeline.config_name)
    beside = f" (and a DDGANDiscriminator in {DISCRIMINATOR}/)" if critic is not None else ""
    print(
        f"{output}: DDGANPipeline of {len(scheduler)} steps{beside} from {checkpoint_file}, {checkpoint.kind}; "
        f"NVlabs' own weights are for non-commercial use{_unused(set(asked) - KNOWN)}"
    )


def write_for_nvlabs(source: str, output: Path) -> None:
    """Write the generator of a pipeline as netG.pth, and flags.json for NVlabs' two scripts."""
    pipe = load_pipeline(source)
    if not isinstance(pipe, DDGANPipeline):
        raise ValueError(f"{source} holds a {type(pipe).__name__}; --to nvlabs takes a DDGANPipeline")
    state, flags = generator_to_nvlabs(pipe.generator)
    flags |= scheduler_flags(pipe.scheduler.config)
    critic = Path(source) / DISCRIMINATOR
    if critic.is_dir():
        critic_state, critic_flags = discriminator_to_nvlabs(DDGANDiscriminator.from_pretrained(critic))
        flags |= critic_flags
        write_whole(output / "netD.pth", lambda file: torch.save(critic_state, file))
    # The weights last: a folder with netG.pth is whole.
    write_whole(output / "flags.json", json.dumps(flags, indent=2) + "\n")
    write_whole(output / "netG.pth", lambda file: torch.save(state, file))
    print(f"{output}: netG.pth with {len(state)} tensors, and flags.json with the flags that build its network")


def write_from_glide(checkpoint: Path, output: Path, flags: str, tokenizer_folder: Path) -> None:
    """Write the base model of OpenAI's glide-text2im as a pipeline of stock parts.

    `flags` are arguments of `networks_from_glide` and `scheduler_from_glide`, where they are not
    those of the released models. ValueError for the models that no pipeline here draws with.
    """
    given = parse_flags(flags)
    network_flags, process_flags = _typed(given, networks_from_glide), _typed(given, scheduler_from_glide)
    unet, encoder = networks_from_glide(read_openai_checkpoint(checkpoint), **network_flags)
    if (channels := unet.config.in_channels) != 3:
        kind = {6: "upsampling", 7: "inpainting", 10: "upsampling and inpainting"}.get(channels, "another use")
        raise ValueError(
            f"{checkpoint} takes {channels} channels, as GLIDE's model for {kind} does, and no pipeline here draws "
            "with that; give base.pt, or take its networks alone by hf_diffusion.convert.glide.networks_from_glide"
        )
    length = encoder.config.max_position_embeddings
    padding_id = encoder.config.vocab_size - length
    tokenizer = tokenizer_from_glide(tokenizer_folder, padding_id, length)
    scheduler, texts = scheduler_from_glide(**process_flags), {"text_length": length, "padding_id": padding_id}
    TextToImagePipeline(unet, encoder, tokenizer, scheduler, **texts).save_pretrained(output)
    print(
        f"{output}: TextToImagePipeline of a {type(unet).__name__} and a {type(encoder).__name__} from {checkpoint}"
        f"{_unused(set(given) - set(network_flags) - set(process_flags))}"
    )


def _unused(flags: set[str]) -> str:
    return f"; these flags do not concern it: {', '.join(sorted(flags))}" if flags else ""


def parse_flags(text: str) -> dict[str, str]:
    """The flags of a command line of theirs; ValueError unless they are pairs, `--name value`."""
    words = shlex.split(text.replace("=", " "))
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ValueError(f"--flags {text!r} must be pairs of --name and value, as the scripts of OpenAI take them")
    return {name[2:]: value for name, value in zip(words[::2], words[1::2])}


def _typed(given: dict[str, str], function: Callable) -> dict[str, Any]:
    """The flags that a function takes, of the types of its defaults."""
    values = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in given:
            kind, value = type(parameter.default), given[name]
            try:
                values[name] = value.lower() in ("true", "yes", "1") if kind is bool else kind(value)
            except ValueError:
                raise ValueError(f"--flags: {name} must be a number, not {value!r}") from None
    return values


def scheduler_from_openai(
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    learn_sigma: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
) -> SchedulerMixin:
    """The process of their scripts, from their flags; defaults as in script_util.py."""
    if noise_schedule not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule {noise_schedule!r} is not one of theirs; give linear or cosine")
    common = {
        "num_train_timesteps": diffusion_steps,
        "variance_type": "learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large",
        "prediction_type": "sample" if predict_xstart else "epsilon",
    }
    if noise_schedule == "cosine":
        return CosineDDPMScheduler(**common)
    return LinearDDPMScheduler(**common, rescale_betas_by_steps=True)


def openai_process(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The flags of their scripts for a scheduler's process; ValueError where they have none."""
    config = scheduler.config
    for noise_schedule in ("linear", "cosine"):
        flags = {
            "diffusion_steps": config.num_train_timesteps,
            "noise_schedule": noise_schedule,
            "learn_sigma": config.get("variance_type") == "learned_range",
            "sigma_small": config.get("variance_type") == "fixed_small",
            "predict_xstart": config.get("prediction_type") == "sample",
        }
        theirs = scheduler_from_openai(**flags)
        same = theirs.alphas_cumprod.shape == scheduler.alphas_cumprod.shape
        if same and torch.allclose(theirs.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7):
            names = ("prediction_type", "variance_type") if "variance_type" in config else ("prediction_type",)
            if all(theirs.config[name] == config[name] for name in names):
                return flags
    raise ValueError(
        f"guided-diffusion has no process with beta_schedule {config.beta_schedule!r}, prediction_type "
        f"{config.prediction_type!r} and variance_type {config.get('variance_type')!r}; it has linear and cosine "
        "schedules, 'epsilon' and 'sample', fixed variances and 'learned_range'"
    )
