"""Stock solvers on our process, with a known answer: data of four independent Gaussian pixels.

The perfect network for such data is a formula, and a deterministic solver of an equation that is
linear in x_t gives Gaussian samples, whose mean and standard deviation are read off two noises. The
distance of those from the data's is what is left of the solver's error.
"""

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from hf_diffusion import (
    ClassifierFreeGuidancePipeline,
    DDIMEtaScheduler,
    ImprovedPNDMScheduler,
    LinearDDPMScheduler,
)
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import UNFIT_SOLVERS, UNFIT_SPACINGS


MEAN = torch.tensor([[0.5, -0.4], [0.0, 0.2]])
STD = torch.tensor([[0.5, 0.1], [0.25, 0.05]])
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
SCHEDULES = {
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "cosine, trailing": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    "cosine, leading": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"},
    "cosine, x_0": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "linear, zero SNR": {"beta_schedule": "linear", **ZERO_SNR},
    "cosine, zero SNR": {"beta_schedule": "squaredcos_cap_v2", **ZERO_SNR},
    "scaled linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "60 steps": {"num_train_timesteps": 60, "rescale_betas_by_steps": True},
}
SPACINGS_OF_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
STEPS = (4, 5, 10, 25, 50)
# A tenth of the mean standard deviation of the pixels; by so much more than DDIM's in half as many
# steps an error may be.
ROOM = 0.02


class PerfectDenoiser(ModelMixin, ConfigMixin):
    """What the best network says of x_t (B, 1, 2, 2), for timesteps between two levels, too."""

    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: int = 2):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # its dtype and device are the network's
        self.process = None

    def forward(self, sample, timestep, class_labels=None, return_dict=False):
        levels = self.process.alpha_bar.log().numpy()
        alpha_bar = math.exp(np.interp(float(timestep), np.arange(len(levels)), levels))
        x_t, a, b = sample.double(), math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x_0 = MEAN + a * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar) * (x_t - a * MEAN)
        noise = (x_t - a * x_0) / b
        outputs = {"sample": x_0, "epsilon": noise, "v_prediction": a * noise - b * x_0}
        return (outputs[self.process.config.prediction_type].to(sample.dtype),)


def process(schedule: str) -> LinearDDPMScheduler:
    return LinearDDPMScheduler(clip_sample=False, **SCHEDULES[schedule])


def pipeline(process: LinearDDPMScheduler, scheduler) -> ClassifierFreeGuidancePipeline:
    network = PerfectDenoiser()
    network.process = process
    pipe = ClassifierFreeGuidancePipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def error(pipe: ClassifierFreeGuidancePipeline, steps: int) -> float:
    """Distance of mean and standard deviation of the samples from the data's, over the pixels."""
    if type(pipe.scheduler).__name__ != "DDPMScheduler":
        noises = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
        mean, end = pipe(batch_size=2, num_inference_steps=steps, latents=noises, output_type="latent").images
        std = (end - mean).abs()
    else:
        # an ancestral step draws noise
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
        samples = pipe(batch_size=4000, micro_batch_size=4000, **options).images
        mean, std = samples.mean(0), samples.std(0)
    return math.sqrt(((mean - MEAN) ** 2 + (std - STD) ** 2).sum())


def bound(process: LinearDDPMScheduler, steps: int) -> float:
    """The error of DDIM, on the spacing that ends at pure noise, with half the steps, and ROOM."""
    ddim = DDIMEtaScheduler.from_config(process.config, timestep_spacing="trailing")
    return error(pipeline(process, ddim), max(1, steps // 2)) + ROOM


def options_of(cls: type) -> list[str]:
    return [option for option in SPACINGS_OF_SIGMAS if option in inspect.signature(cls.__init__).parameters]


COMPATIBLES = [*LinearDDPMScheduler._compatibles, "ImprovedPNDMScheduler"]


def find(name: str) -> type:
    return ImprovedPNDMScheduler if name == "ImprovedPNDMScheduler" else getattr(diffusers, name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_compatible_scheduler_draws_the_data_on_every_schedule_with_every_spacing(schedule):
    ours = process(schedule)
    bounds = {steps: bound(ours, steps) for steps in STEPS}
    for name in COMPATIBLES:
        cls = find(name)
        for option in (None, *options_of(cls)):
            pipe = pipeline(ours, cls.from_config(ours.config, **({option: True} if option else {})))
            for steps in STEPS:
                found = error(pipe, steps)
                assert found < bounds[steps], f"{name}, {option}, {steps} steps: {found:.3f} of {bounds[steps]:.3f}"


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_ten_steps_over_karras_levels_beat_ddim_in_ten_on_the_cosine_schedule(name):
    ours = process("cosine")
    karras = getattr(diffusers, name).from_config(ours.config, use_karras_sigmas=True)
    assert error(pipeline(ours, karras), 10) < error(pipeline(ours, DDIMEtaScheduler.from_config(ours.config)), 10)


def test_a_solver_without_an_answer_and_a_spacing_without_details_are_refused_in_a_sentence():
    ours = process("cosine")
    for name in UNFIT_SOLVERS:
        assert name not in LinearDDPMScheduler._compatibles
        with pytest.raises(ValueError, match=f"^{name} cannot sample on every schedule .* use UniPC"):
            pipeline(ours, getattr(diffusers, name).from_config(ours.config))(batch_size=1)
    for option in UNFIT_SPACINGS:
        for name in LinearDDPMScheduler._compatibles:
            cls = getattr(diffusers, name)
            if option in inspect.signature(cls.__init__).parameters:
                with pytest.raises(ValueError, match=f"^{option} of {name} leaves out the noise levels"):
                    pipeline(ours, cls.from_config(ours.config, **{option: True}))(batch_size=1)


def test_what_is_refused_is_wrong_by_measurement(monkeypatch):
    """Solvers are beyond the bound, spacings twice as far from the data as without them."""
    pipe_module = inspect.getmodule(ClassifierFreeGuidancePipeline)
    monkeypatch.setattr(pipe_module, "UNFIT_SOLVERS", ())
    monkeypatch.setattr(pipe_module, "UNFIT_SPACINGS", ())
    ours = process("cosine")
    linear = process("linear")
    for name in ("HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2DiscreteScheduler"):
        assert error(pipeline(ours, getattr(diffusers, name).from_config(ours.config)), 4) > 1.3 * bound(ours, 4)
    for option in UNFIT_SPACINGS:
        for base in (ours, linear):
            plain, spaced = (
                pipeline(base, diffusers.DPMSolverMultistepScheduler.from_config(base.config, **changes))
                for changes in ({}, {option: True})
            )
            assert error(spaced, 10) > 2 * error(plain, 10), option


def test_as_many_steps_as_the_training_are_refused_where_a_solver_would_divide_by_zero():
    ours = process("60 steps")
    pipe = pipeline(ours, diffusers.UniPCMultistepScheduler.from_config(ours.config))
    with pytest.raises(ValueError, match="num_inference_steps=60 gives two steps of UniPC.* the same noise level"):
        pipe(batch_size=1, num_inference_steps=60)


# --- iPNDM


def test_ipndm_is_ddim_in_its_first_step_and_exact_where_the_noise_is_constant():
    x_t, output = torch.randn(2, 4, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    ours, ddim = (cls(beta_schedule="squaredcos_cap_v2") for cls in (ImprovedPNDMScheduler, DDIMEtaScheduler))
    for scheduler in (ours, ddim):
        scheduler.set_timesteps(10)
    t = ours.timesteps[0]
    torch.testing.assert_close(ours.step(output, t, x_t).prev_sample, ddim.step(output, t, x_t).prev_sample)
    x_0, noise = 0.5 * x_t.clamp(-1, 1), output
    ours.set_timesteps(10)
    for t in ours.timesteps:
        x = ours.step(noise, t, ours.add_noise(x_0, noise, t)).prev_sample
        s = ours.previous_timestep(int(t))
        torch.testing.assert_close(x, x_0 if s < 0 else ours.add_noise(x_0, noise, s), rtol=1e-6, atol=1e-6)


def test_ipndm_extrapolates_the_noise_with_adams_and_bashforths_weights():
    scheduler = ImprovedPNDMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    noises, x = torch.randn(5, 3, generator=torch.manual_seed(0), dtype=torch.float64), torch.zeros(3).double()
    expected = [
        noises[0],
        (3 * noises[1] - noises[0]) / 2,
        (23 * noises[2] - 16 * noises[1] + 5 * noises[0]) / 12,
        (55 * noises[3] - 59 * noises[2] + 37 * noises[1] - 9 * noises[0]) / 24,
        (55 * noises[4] - 59 * noises[3] + 37 * noises[2] - 9 * noises[1]) / 24,
    ]
    for i, t in enumerate(scheduler.timesteps):
        s = scheduler.previous_timestep(int(t))
        a, b = scheduler.alpha_bar[t], scheduler.alpha_bar[s] if s >= 0 else torch.ones(()).double()
        wanted = (b / a).sqrt() * (x - (1 - a).sqrt() * expected[i]) + (1 - b).sqrt() * expected[i]
        x = scheduler.step(noises[i], t, x).prev_sample
        torch.testing.assert_close(x, wanted)


def test_a_second_run_of_ipndm_forgets_the_first():
    ours = process("cosine")
    pipe = pipeline(ours, ImprovedPNDMScheduler.from_config(ours.config))
    first = error(pipe, 5)
    assert error(pipe, 5) == first and first < error(pipeline(ours, DDIMEtaScheduler.from_config(ours.config)), 5)
