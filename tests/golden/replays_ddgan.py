"""Replays of the DDGAN reference: schedules, sampling, losses, penalties, filters and averages."""

import re

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from hf_diffusion.loop.learning_rate import lr_factor
from hf_diffusion.losses.adversarial import fake_loss, generator_loss, gradient_penalty, r1_penalty, real_loss
from hf_diffusion.models import ncsnpp_ddgan
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler, noise_times
from tests.golden.replay import Case


def scheduler_of(case: Case) -> DDGANScheduler:
    s = case.settings
    kind = "geometric" if s["use_geometric"] else "vp"
    return DDGANScheduler(s["num_timesteps"], s["beta_min"], s["beta_max"], kind)


def toy_modules(case: Case) -> dict:
    """The toy networks, from the source in the manifest."""
    names: dict = {"__name__": "toy_modules"}
    exec(case.manifest["toy_modules_source"], names)
    return names


def toy_discriminator(case: Case):
    settings = case.settings | {"channels": case.settings.get("channels", case.settings.get("C"))}
    network = eval(settings.get("discriminator", "TinyD(channels)"), toy_modules(case), settings)
    if any(key.startswith("weight__") for key in case.arrays):
        network.load_state_dict(case.named("weight__"))
    return network


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coefficients(case: Case) -> None:
    s = scheduler_of(case)
    first = torch.tensor([1e-8], dtype=torch.float64)  # the reference keeps a dummy step; ours starts at the data
    betas, signal = torch.cat([first, s.betas]), s.alpha_bar.sqrt()
    kept = (1 - betas).sqrt()
    expected = {
        "betas_full": betas,
        "time_schedule": noise_times(len(s)),
        "fwd_sigmas": betas.sqrt(),
        "fwd_a_s": kept,
        "fwd_a_s_cum": signal,
        "fwd_sigmas_cum": (1 - s.alpha_bar).sqrt(),
        "fwd_a_s_prev": torch.cat([kept[:-1], torch.ones(1, dtype=torch.float64)]),  # never used by the reference
        "pos_betas": s.betas,
        "pos_alphas": 1 - s.betas,
        "pos_alphas_cumprod": s.alpha_bar[1:],
        "pos_alphas_cumprod_prev": s.alpha_bar[:-1],
        "pos_posterior_variance": s.posterior_variance,
        "pos_sqrt_alphas_cumprod": signal[1:],
        "pos_sqrt_recip_alphas_cumprod": 1 / signal[1:],
        "pos_sqrt_recipm1_alphas_cumprod": (1 / s.alpha_bar[1:] - 1).sqrt(),
        "pos_posterior_mean_coef1": s.posterior_x_0_coefficient,
        "pos_posterior_mean_coef2": s.posterior_x_tp1_coefficient,
        "pos_posterior_log_variance_clipped": log_variances(s),
    }
    for name, values in expected.items():
        case.check(name, values, **case.exception(name))


def log_variances(scheduler: DDGANScheduler) -> Tensor:
    x = torch.zeros(len(scheduler), 1, dtype=torch.float64)
    return scheduler.posterior(x, x, torch.arange(len(scheduler)))[1][:, 0]


def q_sample(case: Case) -> None:
    x_t = scheduler_of(case).q_sample(case["x_start"], case["t"], case["noise"])
    case.check("x_t", x_t)
    clean = case["t"] == 0
    assert torch.equal(x_t[clean], case["x_start"][clean])
    assert case.settings["shape"] == list(x_t.shape)


def q_sample_pairs(case: Case) -> None:
    scheduler, x_0, t = scheduler_of(case), case["x_start"], case["t"]
    drawn = seeded(case.settings["torch_seed_of_pairs"])
    for noise in ({"noise_t": case["noise_t"], "noise_tp1": case["noise_tp1"]}, {"generator": drawn}):
        x_t, x_tp1 = scheduler.q_sample_pairs(x_0, t, **noise)
        case.check("x_t", x_t)
        case.check("x_tp1", x_tp1)


def sample_posterior(case: Case) -> None:
    scheduler, x_0, x_tp1, t = scheduler_of(case), case["x_0"], case["x_t"], case["t"]
    case.check("mean", scheduler.posterior(x_0, x_tp1, t)[0])
    case.check("sample", scheduler.sample_posterior(x_0, x_tp1, t, case["noise"]))
    case.check("sample", scheduler.sample_posterior(x_0, x_tp1, t, generator=seeded(case.settings["torch_seed"])))


def sample_from_model(case: Case) -> None:
    scheduler, settings = scheduler_of(case), dict(case.settings["generator"])
    network = toy_modules(case)[settings.pop("class")](**settings)
    scheduler.set_timesteps(len(scheduler))
    x, batch = case["x_init"], case.settings["shape"][0]
    for j, t in enumerate(scheduler.timesteps):
        case.check("t", torch.stack([t.expand(batch) for t in scheduler.timesteps]))
        torch.testing.assert_close(x, case["trajectory"][j], **case.tolerance("trajectory"))
        x_0 = network(x, t.expand(batch), case["latents"][j])
        x = scheduler.step(x_0, t, x, variance_noise=case["noises"][j]).prev_sample
    case.check("sample", x)

    drawn = seeded(case.settings["torch_seed"])
    x = torch.randn(case.settings["shape"], generator=drawn)
    for t in scheduler.timesteps:
        latent = torch.randn(batch, case.settings["nz"], generator=drawn)
        x = scheduler.step(network(x, t.expand(batch), latent), t, x, generator=drawn).prev_sample
    case.check("sample", x)


def losses(case: Case) -> None:
    real, fake, fooled = (case[n].clone().requires_grad_() for n in ("D_real", "D_fake", "G_fake"))
    on_real, on_fake, on_fooled = (
        real_loss("js", real).mean(),
        fake_loss("js", fake).mean(),
        generator_loss("js", fooled).mean(),
    )
    case.check("errD_real", on_real)
    case.check("errD_fake", on_fake)
    case.check("errD", on_real + on_fake)
    case.check("errG", on_fooled)
    case.check("grad_D_real", torch.autograd.grad(on_real, real)[0])
    case.check("grad_D_fake", torch.autograd.grad(on_fake, fake)[0])
    case.check("grad_G_fake", torch.autograd.grad(on_fooled, fooled)[0])


def r1(case: Case) -> None:
    network, x_t = toy_discriminator(case), case["x_t"].clone().requires_grad_()
    value = network(x_t, case["t"], case["x_tp1"]).view(-1)
    loss = real_loss("js", value).mean()
    penalty = r1_penalty(value, x_t, case.settings["r1_gamma"]).mean()
    case.check("D_real", value)
    case.check("errD_real", loss)
    case.check("grad_real", torch.autograd.grad(value.sum(), x_t, retain_graph=True)[0])
    case.check("grad_norm_sq_mean", 2 / case.settings["r1_gamma"] * penalty)
    case.check("penalty", penalty)
    loss.backward(retain_graph=True)
    for name, parameter in network.named_parameters():
        case.check(f"gradloss__{name}", parameter.grad)
    penalty.backward()
    for name, parameter in network.named_parameters():
        case.check(f"gradtotal__{name}", parameter.grad)


def time_embedding(case: Case) -> None:
    case.check("emb", ncsnpp_ddgan.PositionalTimeFeatures(case.settings["dim"])(case["t"]))


def fir_ops(case: Case) -> None:
    x, taps = case["x"], ncsnpp_ddgan.fir_kernel_2d((1, 3, 3, 1))
    box, kernel = ncsnpp_ddgan.fir_kernel_2d((1, 1)), case["kernel2d"]
    case.check("kernel2d", ncsnpp_ddgan.fir_kernel_2d(kernel.sum(dim=0).tolist()))
    for name in sorted(set(case.arrays) - {"x", "w", "kernel2d"}):
        if match := re.fullmatch(r"upfirdn2d_u(\d)d(\d)p(\d\d|m1)", name):
            gain = 4 if name == "upfirdn2d_u2d1p21" else 1
            pad = (-1, 2) if match[3] == "m1" else (int(match[3][0]), int(match[3][1]))  # as the manifest explains
            case.check(name, ncsnpp_ddgan.upfirdn2d(x, gain * kernel, int(match[1]), int(match[2]), pad))
        elif name == "downsample_2d_gradx_sumsq":
            leaf = x.clone().requires_grad_()
            case.check(name, torch.autograd.grad(ncsnpp_ddgan.downsample_2d(leaf, taps).square().sum(), leaf)[0])
        else:
            functions = {
                "upsample_2d": lambda: ncsnpp_ddgan.upsample_2d(x, taps),
                "downsample_2d": lambda: ncsnpp_ddgan.downsample_2d(x, taps),
                "upsample_2d_box": lambda: ncsnpp_ddgan.upsample_2d(x, box),
                "downsample_2d_box": lambda: ncsnpp_ddgan.downsample_2d(x, box),
                "naive_upsample_2d": lambda: ncsnpp_ddgan.repeat_upsample_2d(x),
                "naive_downsample_2d": lambda: ncsnpp_ddgan.mean_downsample_2d(x),
                "conv_downsample_2d": lambda: ncsnpp_ddgan.conv_downsample_2d(x, case["w"], taps),
            }
            assert name in functions, f"no replay for {name}"
            case.check(name, functions[name]())


def exponential_average(parameters, decay: float) -> EMAModel:
    """diffusers' average, told to begin as the reference does.

    A copy of the first update, then the decay itself.
    """
    return EMAModel(parameters, decay=decay, min_decay=decay)


def ema(case: Case) -> None:
    names = sorted(key.removesuffix("_init") for key in case.arrays if key.endswith("_init"))
    numbers, decay = [name.removeprefix("p") for name in names], case.settings["ema_decay"]
    parameters = [torch.nn.Parameter(case[f"{name}_init"].clone()) for name in names]
    optimizer = torch.optim.SGD(parameters, lr=case.settings["sgd_lr"])
    averages: dict[str, EMAModel] = {}
    for step in range(case.settings["steps"]):
        for number, parameter in zip(numbers, parameters, strict=True):
            gradient = case[f"s{step}_grad{number}"]
            parameter.grad = None if gradient.isnan().any() else gradient.clone()
        optimizer.step()
        for number, parameter in zip(numbers, parameters, strict=True):
            if parameter.grad is not None and decay > 0:  # 0 turns the average off
                averages.setdefault(number, exponential_average([parameter], decay)).step([parameter])
            case.check(f"s{step}_p{number}", parameter)
            average = (
                averages[number].shadow_params[0] if number in averages else torch.full_like(parameter, torch.nan)
            )
            case.check(f"s{step}_ema{number}", average)
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in averages:
            averages[number].copy_to([parameter])
        case.check(f"swapped_p{number}", parameter)


def lr_schedule(case: Case) -> None:
    epochs = case.settings["num_epoch"]
    rates = [decayed(case.settings["lr"], epoch, epochs) for epoch in range(epochs + 1)]
    case.check("lr", torch.tensor(rates, dtype=torch.float64))


def decayed(lr: float, epoch: int, epochs: int) -> float:
    """The reference's cosine decay by epochs, to 1e-5."""
    return 1e-5 + (lr - 1e-5) * lr_factor(epoch, epochs, "cosine", warmup_steps=0)


def divergences_derived(case: Case) -> None:
    inputs = {"V_real", "V_fake", "V_fake_for_G"}
    names = sorted({key.split("__")[0] for key in case.arrays} - inputs)
    for dtype in (torch.float64, torch.float32):
        for name in names:
            terms = {
                "D_real": (case["V_real"], lambda v, name=name: real_loss(name, v, exp_limit=80)),
                "D_fake": (case["V_fake"], lambda v, name=name: fake_loss(name, v, exp_limit=80)),
                "G_saturating": (
                    case["V_fake_for_G"],
                    lambda v, name=name: generator_loss(name, v, True, exp_limit=80),
                ),
                "G_nonsaturating": (
                    case["V_fake_for_G"],
                    lambda v, name=name: generator_loss(name, v, False, exp_limit=80),
                ),
            }
            for term, (values, loss) in terms.items():
                v = values.to(dtype).requires_grad_()
                each = loss(v)
                case.check(f"{name}__elem_{term}", each, dtype)
                case.check(f"{name}__loss_{term}", each.mean(), dtype)
                case.check(f"{name}__grad_{term}", torch.autograd.grad(each.mean(), v)[0], dtype)


def wgan_gp_derived(case: Case) -> None:
    network, t, x_tp1 = toy_discriminator(case), case["t"], case["x_tp1"]

    def penalties(weight: float, scale: float) -> Tensor:
        return gradient_penalty(
            lambda x: network(x, t, x_tp1), case["x_real"], case["x_fake"], case["alpha"], weight, scale
        )

    penalty = penalties(case.settings["lambda"], 1.0)
    case.check("penalty", penalty.mean())
    # with weight 1 the penalty is (norm - 1)^2: doubling the norm tells its size
    case.check("grad_norm", ((penalties(1.0, 2.0) - 2 * penalties(1.0, 1.0) + 1) / 2).sqrt())
    penalty.mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name in case.named("grad__"):
        case.check(f"grad__{name}", gradients[name])
        gradients.pop(name)
    assert all(g is None or not g.any() for g in gradients.values())


REPLAYS = {
    "coefficients": coefficients,
    "q_sample": q_sample,
    "q_sample_pairs": q_sample_pairs,
    "sample_posterior": sample_posterior,
    "sample_from_model": sample_from_model,
    "losses": losses,
    "r1": r1,
    "time_embedding": time_embedding,
    "fir_ops": fir_ops,
    "ema": ema,
    "lr_schedule": lr_schedule,
    "divergences_derived": divergences_derived,
    "wgan_gp_derived": wgan_gp_derived,
}
