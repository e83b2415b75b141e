"""The network that a run starts from, taken from a trained pipeline."""

import torch

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.models.ncsnpp_ddgan import DDGANGenerator
from hf_diffusion.models.unet_adm import ADMGenerator, ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler


def trained_generator(
    config: TrainingConfig, data: TrainingData, process: DDGANScheduler
) -> DDGANGenerator | ADMGenerator:
    """The generator to start from that `init_from` names; ValueError where it does not fit the data or the process."""
    pipe = load_pipeline(config.init_from)
    torch.manual_seed(config.seed)  # of the latent's embedding, which is new
    if isinstance(pipe, DDGANPipeline):
        wanted = {name: value for name, value in process.config.items() if not name.startswith("_")}
        differing = [name for name, value in wanted.items() if pipe.scheduler.config.get(name) != value]
        if differing:
            name = differing[0]
            raise ValueError(
                f"init_from {config.init_from} was trained with {name} {pipe.scheduler.config.get(name)}, and this run has "
                f"{process.config[name]}; give what it was trained with"
            )
        generator = pipe.generator
    elif isinstance(getattr(pipe, "unet", None), ADMUNet2DModel):
        generator = ADMGenerator.from_denoiser(
            pipe.unet,
            pipe.scheduler.alphas_cumprod,
            pipe.scheduler.config.prediction_type,
            process.alpha_bar[1:],
            config.latent_dim,
        )
    else:
        raise ValueError(
            f"init_from {config.init_from} is a {type(pipe).__name__}; a DDGANPipeline or a pipeline with an ADMUNet2DModel is needed"
        )
    shape = generator.config
    size = (shape.sample_size,) * 2 if isinstance(shape.sample_size, int) else tuple(shape.sample_size)
    classes = config.num_class_embeds(data)
    if (shape.in_channels, *size) != tuple(data.sample_shape) or shape.num_class_embeds != classes:
        channels, height, width = data.sample_shape
        raise ValueError(
            f"init_from {config.init_from} makes images of {size[0]}x{size[1]} with {shape.in_channels} channels and "
            f"{shape.num_class_embeds or 'no'} classes, the training {height}x{width}, {channels} and "
            f"{classes or 'none'}; choose resolution, channels and class_conditional to agree"
        )
    return generator
