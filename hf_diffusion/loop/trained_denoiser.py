"""A trained denoiser to start from, and its process in the words of a ConsistencyScheduler."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.classes import match_classes
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.loop.checkpoints import MANIFEST
from hf_diffusion.loop.fine_tuning import Trained, fitted, names_of, newest_checkpoint, open_trained
from hf_diffusion.models.mlp_points import PointDenoiser
from hf_diffusion.models.transformer_pixel import PixelTransformer2DModel
from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.pipelines.sampling_parts import sides
from hf_diffusion.schedulers.scheduling_edm import EDMHeunScheduler
from hf_diffusion.schedulers.scheduling_flow import FlowMatchingScheduler
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler


def variance_preserving(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The noise level of x_t / sqrt(alpha_bar) is sqrt(1 / alpha_bar - 1)."""
    alpha_bar = pipe.scheduler.alphas_cumprod.double()
    # with a terminal signal of 0 the last level is infinite
    sigmas = (1 / alpha_bar[alpha_bar > 0] - 1).sqrt()
    return {
        "prediction_type": pipe.scheduler.config.prediction_type,
        "sigma_data": 1.0,
        # as many digits as float32 has
        "trained_sigmas": tuple(float(f"{sigma:.8g}") for sigma in sigmas.tolist()),
    }


def preconditioned(pipe: DiffusionPipeline) -> dict[str, Any]:
    """EDM's networks have the parametrisation of consistency models, but for the shift."""
    config = pipe.scheduler.config
    if config.preconditioning != "edm":
        raise ValueError(
            f"a network of preconditioning {config.preconditioning} cannot be tuned; take one of preconditioning edm"
        )
    return {"prediction_type": "preconditioned", "sigma_data": config.sigma_data, "time_scale": 0.25}


def flow_matching(pipe: DiffusionPipeline) -> dict[str, Any]:
    """x / (1 - s) of the straight path has the noise level s / (1 - s)."""
    if pipe.config.noise_scale != 1:
        raise ValueError(f"a flow with noise_scale {pipe.config.noise_scale} cannot be tuned; take one with 1")
    return {
        "prediction_type": f"flow_{pipe.config.prediction_type}",
        "sigma_data": 0.5,
        "time_scale": float(pipe.scheduler.config.num_train_timesteps),
    }


def of_consistency(pipe: DiffusionPipeline) -> dict[str, Any]:
    """A consistency model is tuned further as what it is."""
    names = ("prediction_type", "sigma_data", "trained_sigmas", "time_scale")
    return {name: pipe.scheduler.config[name] for name in names}


# Which processes are understood, each by what its scheduler has; a family adds its line.
PROCESSES: dict[str, Callable[[DiffusionPipeline], dict[str, Any]]] = {
    "network_timestep": of_consistency,
    "alphas_cumprod": variance_preserving,
    "preconditioning": preconditioned,
    "sigma_of": flow_matching,
}


def of_checkpoint(folder: Path) -> SimpleNamespace:
    """The averaged network of a checkpoint, with the scheduler that its run's settings describe, as
    a pipeline has them; ValueError where they describe none that can be tuned.
    """
    trained = open_trained(str(folder), (ADMUNet2DModel, PixelTransformer2DModel, PointDenoiser))
    settings, scheduler = trained.process, None
    if {"ddpm_num_steps", "beta_schedule", "prediction_type"} <= set(settings):
        same = ("beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr", "prediction_type")
        process = {name: settings[name] for name in same}
        scheduler = LinearDDPMScheduler(num_train_timesteps=settings["ddpm_num_steps"], **process)
    elif "preconditioning" in settings:
        kinds = {name: settings[name] for name in ("preconditioning", "sigma_data")}
        scheduler = EDMHeunScheduler(**kinds)
    elif "sigma_floor" in settings:
        scheduler = FlowMatchingScheduler(num_train_timesteps=settings["num_train_timesteps"])
    if scheduler is None:
        raise ValueError(
            f"init_from {folder} is a checkpoint of a run that is none of train_ddpm.py, train_edm.py and "
            "train_flow.py; give the pipeline that it saves at the end"
        )
    config = SimpleNamespace(**{name: settings.get(name) for name in ("prediction_type", "noise_scale")})
    names = trained.class_names and dict(enumerate(trained.class_names))
    return SimpleNamespace(unet=trained.network, scheduler=scheduler, config=config, id2label=names)


def trained_denoiser(config: TrainingConfig, data: TrainingData) -> tuple[nn.Module, dict[str, Any]]:
    """The network that `init_from` names, and what a ConsistencyScheduler must know of its process.

    ValueError where it does not fit the data, or its process is not understood.
    """
    config.is_started = True
    folder = newest_checkpoint(config.init_from)
    pipe = of_checkpoint(folder) if (folder / MANIFEST).is_file() else load_pipeline(config.init_from)
    network, scheduler = getattr(pipe, "unet", None), getattr(pipe, "scheduler", None)
    read = next((read for attribute, read in PROCESSES.items() if hasattr(scheduler, attribute)), None)
    if network is None or read is None:
        raise ValueError(
            f"init_from {config.init_from} is a {type(pipe).__name__} with a {type(scheduler).__name__}; a pipeline "
            "with a unet and a scheduler of noise levels or timesteps is needed, such as that of train_ddpm.py, "
            "train_edm.py or train_flow.py"
        )
    shape = (network.config.in_channels, *sides(network.config.sample_size))
    known, classes = network.config.get("num_class_embeds"), config.num_class_embeds(data)
    if shape != tuple(data.sample_shape) or known != classes:
        raise ValueError(
            f"init_from {config.init_from} makes samples of shape {shape} with {known or 'no'} classes, and the "
            f"training wants {tuple(data.sample_shape)} and {classes or 'none'}; choose resolution, channels and "
            "class_conditional to agree"
        )
    names = names_of(getattr(pipe, "id2label", None))
    if classes is not None and names is not None and names != tuple(data.class_names):
        # Other names are refused; the same ones may have other numbers.
        match_classes(data.class_names, names, f"data set {data.name}")
        network = fitted(config.init_from, Trained(network, names, {}), {}, data.class_names)
    return network, read(pipe)
