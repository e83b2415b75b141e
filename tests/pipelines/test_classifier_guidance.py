"""ClassifierGuidancePipeline: known distributions and loops by hand; see also test_contract.py."""

import math
import textwrap

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from hf_diffusion import (
    ClassifierFreeGuidancePipeline,
    ClassifierGuidancePipeline,
    CosineDDPMScheduler,
    DDIMEtaScheduler,
    LinearDDPMScheduler,
)
from hf_diffusion.pipelines.pipeline_classifier_guidance import classifier_gradient, gradient_of
from tests.pipelines.tiny import make_classifier, sample, seeds
from tests.pipelines.tiny import make_guided as make_pipe


# --- known densities ---
# Images of 1 x 1 x 2 numbers are points of the plane, and the networks below know the answers for
# their distributions.


class Gaussian(ModelMixin, ConfigMixin):
    """The exact noise prediction for x_0 ~ N(0, covariance); alpha_bar (T,) is the scheduler's."""

    @register_to_config
    def __init__(self, covariance: list, alpha_bar: list, sample_size: tuple = (1, 2), in_channels: int = 1):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor(covariance, dtype=torch.float64), requires_grad=False)
        self.levels = torch.tensor(alpha_bar, dtype=torch.float64)

    def noise_map(self, alpha_bar) -> torch.Tensor:
        """B with noise = B x_t."""
        return (1 - alpha_bar).sqrt() * torch.linalg.inv(
            alpha_bar * self.matrix + (1 - alpha_bar) * torch.eye(2, dtype=torch.float64)
        )

    def forward(self, sample, timestep, return_dict=True):
        points = sample.reshape(-1, 2) @ self.noise_map(self.levels[timestep]).T
        return (points.reshape(sample.shape),)


class Mixture(ModelMixin, ConfigMixin):
    """The exact noise prediction of a mixture of two round Gaussians with equal shares."""

    MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
    STD = 0.4

    @register_to_config
    def __init__(self, alpha_bar: list, sample_size: tuple = (1, 2), in_channels: int = 1, num_classes: int = 2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        self.levels = torch.tensor(alpha_bar, dtype=torch.float64)

    def log_densities(self, points, alpha_bar):  # (B, 2) -> (B, 2), of each component at x_t, up to one constant
        offsets = points[:, None] - alpha_bar.sqrt() * self.MEANS
        return -0.5 * (offsets**2).sum(-1) / self.variance(alpha_bar), offsets

    def variance(self, alpha_bar):
        return alpha_bar * self.STD**2 + 1 - alpha_bar

    def forward(self, sample, timestep, return_dict=True):
        alpha_bar = self.levels[timestep]
        log_p, offsets = self.log_densities(sample.reshape(-1, 2), alpha_bar)
        noise = (log_p.softmax(-1)[..., None] * offsets).sum(1) * (1 - alpha_bar).sqrt() / self.variance(alpha_bar)
        return (noise.reshape(sample.shape),)


class MixtureClassifier(Mixture):
    """p(component | x_t) of that mixture."""

    def forward(self, sample, timestep, return_dict=True):
        return (self.log_densities(sample.reshape(-1, 2), self.levels[timestep])[0],)


COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
SEEN, OBSERVED, ERROR = torch.tensor([1.0, -0.5], dtype=torch.float64), 0.8, 0.3  # y = SEEN . x_0 + ERROR * noise


def regressor_gradient(alpha_bar):
    """(G, g) with gradient = G x_t + g, of log p(y = OBSERVED | x_t) for x_0 ~ N(0, COVARIANCE)."""
    marginal = alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2, dtype=torch.float64)
    to_x_0 = alpha_bar.sqrt() * COVARIANCE @ torch.linalg.inv(marginal)  # E[x_0 | x_t] = to_x_0 x_t
    direction = to_x_0.T @ SEEN
    rest = COVARIANCE - alpha_bar.sqrt() * to_x_0 @ COVARIANCE
    variance = SEEN @ rest @ SEEN + ERROR**2
    return -torch.outer(direction, direction) / variance, direction * OBSERVED / variance


def points_of(pipe, count: int, steps: int, seed: int = 0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = options.pop("class_labels", None)
    sizes = {"batch_size": count} if labels is None else {"class_labels": labels, "num_images_per_label": count}
    options |= {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    return pipe(**sizes, **options, micro_batch_size=2 * count, classifier_micro_batch_size=2 * count).images.reshape(
        -1, 2
    )


def known_pipe(scheduler, unet, classifier=None):
    pipe = ClassifierGuidancePipeline(unet, classifier, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_moments(points, mean, covariance, slack: float) -> None:
    count = len(points)
    error = 4.5 * covariance.diag().max().sqrt() / math.sqrt(count)  # of a mean; covariances have about the same
    assert (points.mean(0) - mean).abs().max() < error + slack
    assert (points.T.cov() - covariance).abs().max() < 1.5 * error + slack


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_a_scale_of_1_turns_a_mixture_into_the_component_asked_for(eta):
    scheduler = LinearDDPMScheduler(clip_sample=False) if eta is None else DDIMEtaScheduler(clip_sample=False, eta=eta)
    alpha_bar = scheduler.alpha_bar.tolist()
    pipe = known_pipe(scheduler, Mixture(alpha_bar), MixtureClassifier(alpha_bar))
    points = points_of(pipe, 2000, 250, class_labels=[0, 1], guidance_scale=1.0)
    covariance = Mixture.STD**2 * torch.eye(2, dtype=torch.float64)
    for mean, of_one_class in zip(Mixture.MEANS, points.chunk(2)):
        assert_moments(of_one_class, mean, covariance, slack=0.01)


@pytest.mark.parametrize("scheduler", [LinearDDPMScheduler, DDIMEtaScheduler])
def test_a_scale_of_0_is_the_sampler_without_guidance_exactly(scheduler):
    scheduler = scheduler(clip_sample=False)
    alpha_bar = scheduler.alpha_bar.tolist()
    pipe = known_pipe(scheduler, Mixture(alpha_bar), MixtureClassifier(alpha_bar))
    points = points_of(pipe, 500, 20, class_labels=0, guidance_scale=0.0)
    plain = ClassifierFreeGuidancePipeline(pipe.unet, scheduler)
    plain.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = plain(batch_size=500, num_inference_steps=20, generator=generator, output_type="latent").images
    assert torch.equal(points, images.reshape(-1, 2))
    assert abs((points[:, 0] > 0).double().mean() - 0.5) < 0.1  # both components


@pytest.mark.parametrize("eta", [None, 0.0])
def test_a_regressor_as_guidance_fn_gives_the_posterior_of_a_gaussian(eta):
    scheduler = LinearDDPMScheduler(clip_sample=False) if eta is None else DDIMEtaScheduler(clip_sample=False, eta=eta)
    pipe = known_pipe(scheduler, Gaussian(COVARIANCE.tolist(), scheduler.alpha_bar.tolist()))
    points = points_of(pipe, 4000, 400, guidance_fn=observe(scheduler))
    gain = COVARIANCE @ SEEN / (SEEN @ COVARIANCE @ SEEN + ERROR**2)
    assert_moments(points, gain * OBSERVED, COVARIANCE - torch.outer(gain, SEEN @ COVARIANCE), slack=0.01)


def observe(scheduler):
    def gradient(x_t, t, **others):
        on_x_t, constant = regressor_gradient(scheduler.alpha_bar[t])
        return (x_t.reshape(-1, 2) @ on_x_t.T + constant).reshape(x_t.shape)

    return gradient


@pytest.mark.parametrize("eta", [None, 0.0, 0.6])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_guided_samples_have_the_mean_and_covariance_that_the_chain_of_steps_gives(eta, scale):
    # Gaussian data and a linear gradient make every step affine, so that the moments follow a
    # recursion.
    scheduler = LinearDDPMScheduler(clip_sample=False) if eta is None else DDIMEtaScheduler(clip_sample=False, eta=eta)
    unet = Gaussian(COVARIANCE.tolist(), scheduler.alpha_bar.tolist())
    pipe = known_pipe(scheduler, unet)
    points = points_of(pipe, 8000, 25, guidance_fn=observe(scheduler), guidance_scale=scale)

    mean, covariance = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    levels = scheduler.alpha_bar[torch.arange(0, 1000, 40)].flip(0)
    for a_t, a_s in zip(levels, [*levels[1:], torch.ones((), dtype=torch.float64)]):
        on_x_t, constant = regressor_gradient(a_t)
        noise, one = unet.noise_map(a_t), torch.eye(2, dtype=torch.float64)
        posterior_variance = (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
        # Algorithm 1: the mean of p(x_s | x_t) in terms of the noise, Eq. 11 of DDPM,
        # plus variance * gradient.
        if eta is None:
            beta = 1 - a_t / a_s
            step = (one - beta / (1 - a_t).sqrt() * noise) / (1 - beta).sqrt() + posterior_variance * scale * on_x_t
            shift, variance = posterior_variance * scale * constant, posterior_variance
        else:  # Algorithm 2: the noise minus sqrt(1 - alpha_bar) * gradient in Eq. 12 of DDIM
            variance = eta**2 * posterior_variance
            guided, offset = (
                noise - (1 - a_t).sqrt() * scale * on_x_t,
                -(1 - a_t).sqrt() * scale * constant,
            )
            on_noise = (1 - a_s - variance).clamp(0).sqrt() - (a_s * (1 - a_t) / a_t).sqrt()
            step, shift = (a_s / a_t).sqrt() * one + on_noise * guided, on_noise * offset
        mean, covariance = step @ mean + shift, step @ covariance @ step.T + variance * one
    assert_moments(points, mean, covariance, slack=0)


def test_gradient_steps_follow_a_steep_slope_where_one_step_overshoots():
    scheduler = DDIMEtaScheduler(clip_sample=False)
    pipe = known_pipe(scheduler, Gaussian(COVARIANCE.tolist(), scheduler.alpha_bar.tolist()))
    x_t = torch.randn(5, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(steps, scale):
        options = {"batch_size": 5, "latents": x_t, "timesteps": [400], "output_type": "latent"}
        return pipe(
            **options, guidance_fn=lambda x, t, **_: 2.0 - x, gradient_steps=steps, guidance_scale=scale
        ).images

    unguided = run(1, 0.0)
    weight = scheduler.guidance_weight(x_t, 400, x_t)  # in the run over this one timestep
    for steps in (1, 2, 8):
        kept = (1 - 3.0 * weight / steps) ** steps  # of the way to 2, by Euler steps along the gradient
        torch.testing.assert_close(run(steps, 3.0) - unguided, (1 - kept) * (2.0 - x_t))
    assert abs(1 - 3.0 * weight) > 1 > (1 - 3.0 * weight / 8) ** 8 > 0


# --- loops written by hand ---


def hand_written_noise(generators, t) -> torch.Tensor:
    shape = (1, 1, 8, 8)
    return torch.cat([torch.randn(shape, generator=g) for g in generators]) if t > 0 else torch.zeros(2, *shape[1:])


@pytest.mark.parametrize("learned_variance", [False, True])
def test_ancestral_images_equal_a_loop_written_by_hand_bit_for_bit(learned_variance):
    scheduler = CosineDDPMScheduler(variance_type="learned_range" if learned_variance else "fixed_large")
    pipe = make_pipe(scheduler, learned_variance=learned_variance)
    images = sample(pipe, ["cat", 1], guidance_scale=2.5)

    generators, labels = seeds(0, 1), torch.tensor([0, 1])
    x_t = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators])
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = pipe.unet(x_t, t).sample
        x = x_t.clone().requires_grad_()
        log_p = pipe.classifier(x, t).logits.log_softmax(-1)[range(2), labels]
        gradient = 2.5 * torch.autograd.grad(log_p.sum(), x)[0]
        mean, variance, log_variance, _ = scheduler.p_mean_variance(output, t, x_t)
        noise = hand_written_noise(generators, t)
        by_formula = mean + variance * gradient + (0.5 * log_variance).exp() * noise
        x_t = scheduler.step(output, t, x_t, variance_noise=noise, gradient=gradient).prev_sample
        torch.testing.assert_close(x_t, by_formula, rtol=1e-4, atol=1e-5)
    assert torch.equal(images, x_t)
    assert (images - sample(pipe, [0, 1], guidance_scale=0.0)).abs().max() > 1e-3


def test_classifier_free_and_classifier_guidance_work_together_bit_for_bit():
    pipe = make_pipe(DDIMEtaScheduler(), classes=4)
    images = sample(pipe, [1, 2], guidance_scale=0.5, classifier_free_guidance_scale=3.0)

    labels, scheduler = torch.tensor([1, 2]), pipe.scheduler
    x_t = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in seeds(0, 1)])
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        with torch.no_grad():
            cond, uncond = pipe.unet(x_t, t, labels).sample, pipe.unet(x_t, t, torch.tensor([4, 4])).sample
        gradient = 0.5 * classifier_gradient(pipe.classifier, x_t, t, labels)
        x_t = scheduler.step(uncond + 3.0 * (cond - uncond), t, x_t, gradient=gradient).prev_sample
    assert torch.equal(images, x_t)


def test_a_classifier_free_scale_of_0_uses_the_unet_without_classes():
    pipe = make_pipe(classes=4)
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    sample(pipe, [1, 2], classifier_free_guidance_scale=0.0)
    sample(pipe, [1, 2])
    assert seen == [[4, 4]] * 3 + [[1, 2]] * 3


def test_guidance_acts_only_at_noise_levels_within_the_interval():
    pipe, seen = make_pipe(), []
    pipe.classifier.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    sample(pipe, [0, 1], num_inference_steps=5, guidance_interval=(0.2, 0.6))
    assert seen == [600, 400, 200]


@pytest.mark.parametrize("zero_snr", [False, True])
def test_without_an_interval_ddim_does_not_guide_where_a_gradient_would_weigh_hundreds(zero_snr):
    schedule = {
        "beta_schedule": "squaredcos_cap_v2",
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    scheduler = DDIMEtaScheduler(**schedule, rescale_betas_zero_snr=zero_snr)
    pipe, seen = make_pipe(scheduler), []
    pipe.classifier.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    sample(pipe, [0, 1], num_inference_steps=10)
    assert seen == [899, 799, 699, 599, 499, 399, 299, 199, 99]
    seen.clear()
    pipe.scheduler = CosineDDPMScheduler.from_config(scheduler.config)  # an ancestral step multiplies by a variance
    sample(pipe, [0, 1], num_inference_steps=10)
    assert len(seen) == 10


def test_the_classifier_sees_the_timestep_that_the_unet_sees():
    pipe, seen = make_pipe(), {"unet": [], "classifier": []}
    pipe.unet.register_forward_pre_hook(lambda module, args: seen["unet"].append(int(args[1])))
    pipe.classifier.register_forward_pre_hook(lambda module, args: seen["classifier"].append(int(args[1])))
    sample(pipe, [0], timesteps="2,1")
    assert seen["unet"] == seen["classifier"] == pipe.scheduler.timesteps.tolist()


# --- gradients ---


def test_only_the_classifier_records_a_graph_and_its_parameters_get_no_gradient():
    pipe, modes = make_pipe(), {}
    pipe.unet.register_forward_pre_hook(lambda *_: modes.update(unet=torch.is_grad_enabled()))
    pipe.classifier.register_forward_pre_hook(lambda *_: modes.update(classifier=torch.is_grad_enabled()))
    images = sample(pipe, [0, 1])
    assert modes == {"unet": False, "classifier": True} and not images.requires_grad
    assert all(p.grad is None for model in (pipe.unet, pipe.classifier) for p in model.parameters())


def test_a_frozen_or_checkpointed_classifier_guides_to_the_same_images():
    pipe = make_pipe()
    images = sample(pipe, [0, 1])
    pipe.classifier.requires_grad_(False)
    torch.testing.assert_close(sample(pipe, [0, 1]), images)
    pipe.classifier.enable_gradient_checkpointing()
    torch.testing.assert_close(sample(pipe, [0, 1]), images)


def test_micro_batches_bound_the_classifier_and_do_not_change_the_images():
    pipe, sizes = make_pipe(), []
    pipe.classifier.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    whole = sample(pipe, [0, 1, 2, 3, 0], classifier_micro_batch_size=5)
    parts = sample(pipe, [0, 1, 2, 3, 0], classifier_micro_batch_size=2)
    assert sizes == [5] * 3 + [2, 2, 1] * 3
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


class LinearClassifier(ModelMixin, ConfigMixin):
    """logits = (gain * x, 0), so that the gradient for class 0 is gain * sigmoid(-gain * x)."""

    @register_to_config
    def __init__(self, gain: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, sample, timestep, return_dict=True):
        logit = (sample * self.weight).flatten(1)
        return (torch.cat([logit, torch.zeros_like(logit)], dim=1),)


@pytest.mark.parametrize("gain, x", [(12.0, 1.6), (600.0, 0.0), (12.0, -0.5)])
def test_a_gradient_in_float16_neither_vanishes_nor_overflows(gain, x):
    # 12 / (1 + exp(19.2)) = 5e-8 is below float16's smallest number, and 2^10 * 300 above its
    # largest one
    x_t, labels = torch.full((2, 1, 1, 1), x), torch.tensor([0, 0])
    exact = classifier_gradient(LinearClassifier(gain), x_t, 0, labels)
    half = classifier_gradient(LinearClassifier(gain).half(), x_t, 0, labels)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_classifier_in_half_precision_guides_like_one_in_full(dtype):
    pipe = make_pipe()
    images = sample(pipe, [0, 1], guidance_scale=2.0)
    pipe.classifier.to(dtype)
    half = sample(pipe, [0, 1], guidance_scale=2.0)
    assert half.dtype == torch.float32 and half.isfinite().all()
    torch.testing.assert_close(half, images, rtol=0, atol=0.05)


def test_the_example_of_the_documentation_guides_to_brighter_images():
    text = ClassifierGuidancePipeline.__doc__.split("(mean - 0.5)^2:\n")[1]
    pipe = make_pipe(DDIMEtaScheduler(), classifier=None)
    names = {"pipe": pipe}
    torch.manual_seed(0)
    exec(textwrap.dedent(text), names)
    torch.manual_seed(0)
    unguided = pipe(batch_size=4, guidance_scale=0.0, output_type="pt").images
    assert names["images"].shape == unguided.shape == (4, 1, 8, 8)
    wanted = 0.75  # a mean of 0.5 in [-1, 1], in [0, 1]
    distance = [(images.mean(dim=(1, 2, 3)) - wanted).abs() for images in (names["images"], unguided)]
    assert (distance[0] < 0.5 * distance[1]).all()


def test_gradient_of_a_log_probability_is_its_derivative():
    x = torch.randn(3, 2)
    torch.testing.assert_close(gradient_of(lambda x: -0.5 * (x**2).sum(1), x), -x)
    assert not x.requires_grad


# --- parts that do not fit ---


def test_a_classifier_exchanged_in_a_saved_pipeline_or_another_one_guides_the_same(outcome):
    expected = outcome.references["ClassifierGuidancePipeline"]
    for pipeline in ("no classifier", "no guidance"):
        assert (outcome.images(f"{pipeline}: classifier put in") == expected).all()


def test_a_classifier_of_another_noise_schedule_is_refused():
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    classifier = make_classifier(noise_schedule=schedule)
    with pytest.raises(ValueError, match="beta_schedule='squaredcos_cap_v2', but the scheduler has 'linear'"):
        make_pipe(classifier=classifier)
    assert sample(make_pipe(CosineDDPMScheduler(), classifier=classifier), [0]).shape == (1, 1, 8, 8)


def test_a_classifier_of_other_images_is_refused():
    for changes, message in (
        ({"sample_size": 16}, r"one of \(16, 16\) pixels and the U-Net of \(8, 8\)"),
        ({"in_channels": 3}, "one of 3 channels and the U-Net of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_pipe(classifier=make_classifier(**changes))


def test_a_classifier_exchanged_after_loading_is_checked_at_the_call():
    pipe = make_pipe()
    pipe.register_modules(classifier=make_classifier(in_channels=3))
    with pytest.raises(ValueError, match="one of 3 channels"):
        pipe([0])


def test_a_guidance_fn_that_returns_no_gradient_is_named():
    pipe = make_pipe()
    with pytest.raises(ValueError, match=r"guidance_fn returned \(1,\)"):
        sample(pipe, guidance_fn=lambda x_t, t, **_: torch.zeros(1))
    with pytest.raises(ValueError, match="guidance_fn returned NoneType"):
        sample(pipe, guidance_fn=lambda x_t, t, **_: None)


def test_a_gradient_of_another_shape_is_refused_by_the_step():
    x = torch.zeros(2, 1, 8, 8)
    for scheduler in (LinearDDPMScheduler(), DDIMEtaScheduler()):
        with pytest.raises(ValueError, match=r"gradient has shape \(2, 1\)"):
            scheduler.step(x, 5, x, gradient=torch.zeros(2, 1))
