"""The network that a run starts from, taken from a trained pipeline."""

import torch

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.loop.checkpoints import MANIFEST
from hf_diffusion.loop.fine_tuning import Trained, check_process, fitted, names_of, newest_checkpoint, open_trained
from hf_diffusion.models.ncsnpp_ddgan import DDGANGenerator
from hf_diffusion.models.unet_adm import ADMGenerator, ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler


def trained_generator(
    config: TrainingConfig, data: TrainingData, process: DDGANScheduler
) -> DDGANGenerator | ADMGenerator:
    """The generator to start from that `init_from` names; ValueError where it does not fit the
    data or the process.

    Its embeddings of classes are carried over by their names.
    """
    config.is_started = True
    is_checkpoint = (newest_checkpoint(config.init_from) / MANIFEST).is_file()
    pipe = None if is_checkpoint else load_pipeline(config.init_from)
    # of the latent's embedding, which is new
    torch.manual_seed(config.seed)
    if is_checkpoint or isinstance(pipe, DDGANPipeline):
        trained = open_trained(config.init_from, (DDGANGenerator, ADMGenerator))
        wanted = {name: value for name, value in process.config.items() if not name.startswith("_")}
        check_process(
            config.init_from, trained.process, {**wanted, "num_timesteps": process.config.num_train_timesteps}
        )
        generator, names = trained.network, trained.class_names
    elif isinstance(getattr(pipe, "unet", None), ADMUNet2DModel) and hasattr(pipe.scheduler, "alphas_cumprod"):
        generator = ADMGenerator.from_denoiser(
            pipe.unet,
            pipe.scheduler.alphas_cumprod,
            pipe.scheduler.config.prediction_type,
            process.alpha_bar[1:],
            config.latent_dim,
        )
        names = names_of(getattr(pipe, "id2label", None))
    else:
        raise ValueError(
            f"init_from {config.init_from} is a {type(pipe).__name__}; a DDGANPipeline, or a pipeline with an "
            "ADMUNet2DModel that was trained on a Gaussian process by train_ddpm.py, is needed"
        )
    shape = generator.config
    size = (shape.sample_size,) * 2 if isinstance(shape.sample_size, int) else tuple(shape.sample_size)
    classes = config.num_class_embeds(data)
    if (shape.in_channels, *size) != tuple(data.sample_shape) or bool(shape.num_class_embeds) != bool(classes):
        channels, height, width = data.sample_shape
        raise ValueError(
            f"init_from {config.init_from} makes images of {size[0]}x{size[1]} with {shape.in_channels} channels and "
            f"{shape.num_class_embeds or 'no'} classes, the training {height}x{width}, {channels} and "
            f"{classes or 'none'}; choose resolution, channels and class_conditional to agree"
        )
    if classes is None or names == tuple(data.class_names):
        return generator
    return fitted(config.init_from, Trained(generator, names, {}), {"num_class_embeds": classes}, data.class_names)
