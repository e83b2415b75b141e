"""Replays of classifier guidance.

Single guided steps of both schedulers, and whole loops through the pipeline.
"""

import functools

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from hf_diffusion.pipelines.pipeline_classifier_guidance import ClassifierGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler
from tests.golden.replay import Case, toy
from tests.golden.replays_openai_schedulers import (
    kept_timesteps,
    model_timestep,
    scheduler_of,
    toy_network,
)


def replay_guided_steps(case: Case) -> None:
    ancestral = scheduler_of(case.settings)
    ddim = scheduler_of(case.settings, DDIMEtaScheduler, eta=case.settings["eta"])
    t = kept_timesteps(ancestral)[case.input("t")]
    s = ancestral.previous_timestep(t)
    for dtype in case.dtypes():
        x, output, gradient, noise = (case.input(name, dtype) for name in ("x", "model_output", "gradient", "noise"))
        mean, variance, _, _ = ancestral.p_mean_variance(output, t, x)
        case.check("condition_mean", mean + variance * gradient, dtype)
        for scheduler, name in ((ancestral, "p_sample"), (ddim, "ddim")):
            steps = [
                scheduler.step(
                    output[[i]],
                    int(t[i]),
                    x[[i]],
                    variance_noise=noise[[i]],
                    gradient=gradient[[i]],
                    return_dict=False,
                )
                for i in range(len(t))
            ]
            samples, predictions = (torch.cat(column) for column in zip(*steps))
            case.check("p_sample" if name == "p_sample" else "ddim_sample", samples, dtype)
            case.check(f"{name}_pred_xstart", predictions, dtype)
        # the last predictions are DDIM's, whose x_0 follows from the shifted noise
        case.check("score_pred_xstart", predictions, dtype)
        case.check("score_mean", ddim.posterior(predictions, x, t, s)[0], dtype)


class ToyUNet(ModelMixin, ConfigMixin):
    """The toy network of a case as a component; `seen` holds the timesteps that it received."""

    @register_to_config
    def __init__(self, sample_size: tuple[int, int], in_channels: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # says dtype and device
        self.seen = []

    def forward(self, sample, timestep, return_dict=True):
        self.seen.append(timestep)
        return (self.network(sample, timestep),)


def replay_guided_loop(case: Case) -> None:
    """A whole loop through the pipeline.

    X_T as latents, the gradient as guidance_fn, the step noise handed to `step`.
    """
    params, ddim = case.settings, case.settings["sampler"] == "ddim"
    formula = toy(case.manifest["toy_functions"]["guidance"][params["toy_grad"]])
    y = case.input("y").reshape(-1, 1, 1, 1)
    for dtype in case.dtypes():
        scheduler = scheduler_of(params, DDIMEtaScheduler, eta=params["eta"]) if ddim else scheduler_of(params)
        x_T = case.input("x_T", dtype)
        unet = ToyUNet(sample_size=tuple(x_T.shape[2:]), in_channels=x_T.shape[1]).to(dtype)
        unet.network = toy_network(case)
        steps = record_steps(scheduler, case.input("step_noise", dtype))

        def gradient(x_t, t, dtype=dtype, **_):
            t = model_timestep(params, t).to(dtype)
            return formula(x=x_t, t=t, y=y.to(dtype), s=params["guidance_scale"])

        pipe = ClassifierGuidancePipeline(unet, None, scheduler)
        pipe.set_progress_bar_config(disable=True)
        final = pipe(
            batch_size=len(x_T),
            latents=x_T,
            timesteps=params["respacing"] or list(range(params["T"]))[::-1],
            guidance_fn=gradient,
            guidance_scale=1.0,
            guidance_interval=(0.0, 1.0),  # the reference guides also where there is next to no signal
            output_type="latent",
        ).images
        trajectory, x_0s = (torch.stack(column) for column in zip(*steps))
        case.check("final", final, dtype)
        case.check("trajectory", trajectory, dtype)
        case.check("pred_xstart", x_0s, dtype)
        case.check("model_timesteps", torch.stack([model_timestep(params, t) for t in unet.seen]), dtype)


def record_steps(scheduler, noise: torch.Tensor) -> list:
    """Make `step` take the k-th entry of `noise` at its k-th call.

    Returns the list of its results, filled as it is called.
    """
    step, results = scheduler.step, []

    @functools.wraps(step)
    def noisy_step(*args, **options):
        results.append(step(*args, variance_noise=noise[len(results)], **options))
        return results[-1]

    scheduler.step = noisy_step
    return results


REPLAYS = {
    "classifier guidance, single steps": replay_guided_steps,
    "classifier guidance, full loops": replay_guided_loop,
}
