"""`hf-diffusion convert`: our pipelines in diffusers' own classes, and checkpoints of OpenAI and NVlabs as our
pipelines and back."""

import argparse
import inspect
import pickle
import shlex
from pathlib import Path
from typing import Any


def add_convert_parser(commands: argparse._SubParsersAction) -> None:
    """Add `convert`."""
    convert = commands.add_parser(
        "convert", allow_abbrev=False, help="change between our classes and those of others",
        description="--to diffusers: write a pipeline that needs no code of ours. --from openai: read a checkpoint of OpenAI's "
        "guided-diffusion or improved-diffusion with the flags of their scripts. --from nvlabs: read netG_<epoch>.pth or content.pth of NVlabs' "
        "denoising-diffusion-gan with the flags of its train_ddgan.py, --to nvlabs: write netG.pth and flags.json for it.",
    )  # fmt: skip
    add = convert.add_argument
    add("source", help="folder or repository of a pipeline; the file of a checkpoint")
    add("output", type=Path, help="folder to write, which must not hold anything yet")
    direction = convert.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=("diffusers", "nvlabs"))
    direction.add_argument("--from", dest="origin", choices=("openai", "nvlabs"))
    add("--class_label", help="with --to: the class that the stock pipeline samples, or 'none' for the null class")
    add(
        "--flags",
        default="",
        help="with --from: the flags of their script, as in '--image_size 64 --class_cond True'; with --from nvlabs also a .json or .yaml "
        "file of them, and nothing for content.pth, which carries its own",
    )
    add("--traceback", action="store_true", help="on an error, show where in the code it arose")
    convert.set_defaults(run=convert_command)


def convert_command(args: argparse.Namespace) -> None:
    """`hf-diffusion convert`."""
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"{args.output} holds something already; give another folder")
    if args.to == "diffusers":
        write_stock(args.source, args.output, args.class_label)
    elif args.to == "nvlabs":
        write_for_nvlabs(args.source, args.output)
    elif args.origin == "nvlabs":
        write_from_nvlabs(Path(args.source), args.output, args.flags)
    else:
        write_from_openai(Path(args.source), args.output, args.flags)


def write_stock(source: str, output: Path, class_label: str | None) -> None:
    """Write a pipeline in stock classes and say how far its images are from ours."""
    import numpy as np
    import torch

    from hf_diffusion.convert.stock import label_row, pipeline_to_stock
    from hf_diffusion.hub.loading import load_pipeline

    pipe = load_pipeline(source)
    stock = pipeline_to_stock(pipe, class_label)
    is_ddim, total = type(stock).__name__ == "DDIMPipeline", pipe.scheduler.config.num_train_timesteps
    steps = max(n for n in range(1, 11) if total % n == 0)
    options = {"num_inference_steps": steps, "output_type": "np"}
    call = {"use_clipped_model_output": True, "eta": pipe.scheduler.config.eta} if is_ddim else {}
    row = label_row(pipe, class_label)
    labels = {"batch_size": 2} if row in (None, pipe.null_class_id) else {"class_labels": [row] * 2}
    images = []
    for pipeline, arguments in ((pipe, labels), (stock, {"batch_size": 2, **call})):
        pipeline.set_progress_bar_config(disable=True)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
        images.append(pipeline(**arguments, **options, generator=seeds).images)
    stock.save_pretrained(output)
    arguments = ", ".join(f"{name}={value}" for name, value in call.items())
    print(
        f"{output}: {type(stock).__name__} with {type(stock.unet).__name__} and {type(stock.scheduler).__name__}; in {steps} steps its images "
        f"differ from ours by {np.abs(images[0] - images[1]).max():.1e} at most, on a scale from 0 to 1"
        + (f"\ncall it as pipe({arguments}, ...)" if call else "")
    )


def write_from_openai(checkpoint: Path, output: Path, flags: str) -> None:
    """Write OpenAI's U-Net as a pipeline, or their classifier as a model."""
    from hf_diffusion.convert.openai import classifier_flags, classifier_from_openai, unet_flags, unet_from_openai

    given = parse_flags(flags)
    state = load_weights(checkpoint)
    if any(name.startswith("classifier_") for name in given):
        classifier_from_openai(state, classifier_flags(**_typed(given, classifier_flags))).save_pretrained(output)
    else:
        from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline

        unet = unet_from_openai(state, unet_flags(**_typed(given, unet_flags)))
        scheduler = scheduler_from_openai(**_typed(given, scheduler_from_openai))
        ClassifierFreeGuidancePipeline(unet, scheduler).save_pretrained(output)
    known = {
        name
        for function in (unet_flags, classifier_flags, scheduler_from_openai)
        for name in inspect.signature(function).parameters
    }
    unused = sorted(set(given) - known)
    print(
        f"{output}: converted from {checkpoint}"
        + (f"; these flags do not concern it: {', '.join(unused)}" if unused else "")
    )


def write_from_nvlabs(checkpoint: Path, output: Path, given: str) -> None:
    """Write a generator of NVlabs' denoising-diffusion-gan as a pipeline; flags that are given go before those in the
    file."""
    from hf_diffusion.convert.nvlabs import generator_from_nvlabs, load_nvlabs_generator, scheduler_from_nvlabs
    from hf_diffusion.convert.nvlabs_flags import KNOWN, read_flags
    from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline

    asked = read_flags(given)
    state, stored, which = load_nvlabs_generator(checkpoint)
    flags = stored | asked
    generator, scheduler = generator_from_nvlabs(state, flags), scheduler_from_nvlabs(flags)
    DDGANPipeline(generator, scheduler).save_pretrained(output)
    unused = sorted(set(asked) - KNOWN)
    print(
        f"{output}: DDGANPipeline of {len(scheduler)} steps from {checkpoint}, {which}; NVlabs' own weights are for non-commercial use"
        + (f"; these flags do not concern it: {', '.join(unused)}" if unused else "")
    )


def write_for_nvlabs(source: str, output: Path) -> None:
    """Write the generator of a pipeline as netG.pth, and as flags.json what train_ddgan.py and test_ddgan.py of NVlabs
    need."""
    import json

    import torch

    from hf_diffusion.convert.nvlabs import generator_to_nvlabs
    from hf_diffusion.convert.nvlabs_flags import scheduler_flags
    from hf_diffusion.hub.loading import load_pipeline
    from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline

    pipe = load_pipeline(source)
    if not isinstance(pipe, DDGANPipeline):
        raise ValueError(f"{source} holds a {type(pipe).__name__}; --to nvlabs takes a DDGANPipeline")
    state, flags = generator_to_nvlabs(pipe.generator)
    flags |= scheduler_flags(pipe.scheduler.config)
    output.mkdir(parents=True, exist_ok=True)
    # the weights last, under their name in one piece: a folder with netG.pth is whole
    (output / "flags.json").write_text(json.dumps(flags, indent=2) + "\n")
    torch.save(state, output / "netG.pth.partial")
    (output / "netG.pth.partial").replace(output / "netG.pth")
    print(f"{output}: netG.pth with {len(state)} tensors, and flags.json with the flags that build its network")


def parse_flags(text: str) -> dict[str, str]:
    """The flags of a command line of theirs, `--name value` each; ValueError where they are not in pairs."""
    words = shlex.split(text.replace("=", " "))
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ValueError(f"--flags {text!r} must be pairs of --name and value, as the scripts of OpenAI take them")
    return {name[2:]: value for name, value in zip(words[::2], words[1::2])}


def _typed(given: dict[str, str], function) -> dict[str, Any]:
    """The flags that a function takes, of the types of its defaults."""
    values = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in given:
            kind = type(parameter.default)
            values[name] = given[name].lower() in ("true", "yes", "1") if kind is bool else kind(given[name])
    return values


def scheduler_from_openai(
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    learn_sigma: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
):
    """The process that their scripts train and sample with, from their flags (defaults as in script_util.py)."""
    from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, LinearDDPMScheduler

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


def load_weights(path: Path) -> dict:
    """The tensors of a .pt or .safetensors file, without running code that a pickle may hold."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and is not read, since it could run code; give a checkpoint as they publish it"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, not tensors by name; give a checkpoint as they publish it"
        )
    return state
