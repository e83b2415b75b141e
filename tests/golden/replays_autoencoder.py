"""Replays of first stages of latent diffusion (CompVis/latent-diffusion, taming-transformers)."""

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, VectorQuantizer

from hf_diffusion.losses.autoencoding import (
    adaptive_weight,
    critic_loss,
    fooling_loss,
    latent_statistics,
    negative_log_likelihood,
    perplexity,
    posterior,
    posterior_kl,
    quantise,
    reconstruction_errors,
    sample_posterior,
)
from hf_diffusion.losses.autoencoding_game import critic_joins
from tests.golden.manifests import read_arrays
from tests.golden.replay import Case


def toy_perceptual(x, y):
    return ((2 * x).sin() - (2 * y).sin()).square().mean((1, 2, 3))


def toy_critic(x, weights, bias):
    h = (1.5 * (x * weights.reshape(1, -1, 1, 1)).sum(1, keepdim=True) + bias).tanh()
    return 2 * torch.nn.functional.avg_pool2d(h, 2)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def decoded(h, last_layer):
    return torch.einsum("ck,nkyx->ncyx", last_layer, h)


def replay_gaussian(case: Case) -> None:
    moments, noise = case["parameters"], case["noise"]
    mean, logvar = posterior(moments)
    case.check("mode", mean)
    case.check("std", (logvar / 2).exp())
    case.check("sample", sample_posterior(moments, noise))
    case.check("kl", posterior_kl(moments))
    # between two Gaussians nothing of ours is needed: the host's class has it
    host = DiagonalGaussianDistribution(moments)
    other = DiagonalGaussianDistribution(torch.cat([case["other_mean"], case["other_logvar"]], dim=1))
    case.check("kl_other", host.kl(other))
    case.check("nll", host.nll(case["other_mean"]))


def replay_critic(case: Case) -> None:
    real, fake = case["logits_real"], case["logits_fake"]
    for kind in ("hinge", "vanilla"):
        case.check(kind, critic_loss(kind, real, fake).mean())
    case.check("generator", fooling_loss(fake).mean())
    factors = [float(critic_joins(int(step), start)) for step, start in zip(case["steps"], [100] * 4)]
    case.check("disc_factor", torch.tensor(factors))


def replay_kl_loss(case: Case) -> None:
    set_to, x, h = case.settings, case["x"], case["h"]
    last_layer = case["W"].clone().requires_grad_()
    moments = case["moments"].clone().requires_grad_()
    logvar = torch.tensor(set_to["logvar"], dtype=x.dtype, requires_grad=True)
    reconstruction = decoded(h, last_layer)
    case.check("reconstruction", reconstruction)
    errors = reconstruction_errors(x, reconstruction, set_to["perceptual_weight"] * toy_perceptual(x, reconstruction))
    case.check("rec_loss", errors)
    nll = negative_log_likelihood(errors, logvar).mean()
    case.check("nll_loss", nll)
    weighted = nll
    if "weights" in case.arrays:
        # weights of pixels belong to the terms, of which the last is the log scale
        weighted = (case["weights"] * (errors / logvar.exp() + logvar)).flatten(1).sum(1).mean()
    case.check("weighted_nll", weighted)
    kl = posterior_kl(moments).mean()
    case.check("kl_loss", kl)
    critic = case["disc_w"], case["disc_b"]
    fooling = fooling_loss(toy_critic(reconstruction, *critic)).mean()
    case.check("g_loss", fooling)
    for name, loss in (("nll_grad_norm", nll), ("g_grad_norm", fooling)):
        case.check(name, torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm())
    weight = set_to["disc_weight"] * adaptive_weight(nll, fooling, last_layer)
    case.check("d_weight", weight)
    factor = set_to["disc_factor"] * critic_joins(set_to["global_step"], set_to["disc_start"])
    loss = weighted + set_to["kl_weight"] * kl + weight * factor * fooling
    case.check("loss", loss)
    loss.backward()
    for name, leaf in (("grad_W", last_layer), ("grad_logvar", logvar), ("grad_moments", moments)):
        case.check(name, leaf.grad)
    real, fake = toy_critic(x, *critic), toy_critic(reconstruction.detach(), *critic)
    case.check("d_loss", factor * critic_loss(set_to["disc_loss"], real, fake).mean())


def replay_quantisation(case: Case) -> None:
    if case.record.name == "first_stage":
        replay_quantised_stage(case)
        return
    beta, legacy = case.settings["beta"], case.settings["legacy"]
    z, codebook = case["z"].clone().requires_grad_(), case["codebook"].clone().requires_grad_()
    weights = {"commitment": 1.0, "attraction": beta} if legacy else {"commitment": beta, "attraction": 1.0}
    found = quantise(z, codebook, **weights)
    case.check("indices", found.indices)
    case.check("z_q", found.z_q)
    case.check("loss", found.loss.mean())
    (found.loss.mean() + (found.z_q * case["grad_out"]).sum()).backward()
    case.check("grad_z", z.grad)
    case.check("grad_codebook", codebook.grad)
    host = VectorQuantizer(len(codebook), codebook.shape[1], beta, legacy=legacy).double()
    host.embedding.weight.data.copy_(codebook.detach())
    z_again = z.detach().clone().requires_grad_()
    z_q, loss, _ = host(z_again)
    (loss + (z_q * case["grad_out"]).sum()).backward()
    torch.testing.assert_close(z_again.grad, z.grad)
    torch.testing.assert_close(host.embedding.weight.grad, codebook.grad)


def replay_quantised_stage(case: Case) -> None:
    set_to, root = case.settings, case.record.folder
    other = {name: torch.from_numpy(array) for name, array in read_arrays(root / "kl_loss.npz").items()}
    x, h, layer, *critic = (other[f"after_start/{name}"] for name in ("x", "h", "W", "disc_w", "disc_b"))
    last_layer = layer.clone().requires_grad_()
    reconstruction = decoded(h, last_layer)
    errors = reconstruction_errors(x, reconstruction, set_to["perceptual_weight"] * toy_perceptual(x, reconstruction))
    nll = errors.mean()
    case.check("nll_loss", nll)
    fooling = fooling_loss(toy_critic(reconstruction, *critic)).mean()
    case.check("g_loss", fooling)
    weight = set_to["disc_weight"] * adaptive_weight(nll, fooling, last_layer)
    case.check("d_weight", weight)
    codes = {name: torch.from_numpy(array) for name, array in read_arrays(root / case.record.file).items()}
    z, codebook = codes["beta_on_commitment/z"], codes["beta_on_commitment/codebook"]
    found = quantise(z, codebook)
    case.check("codebook_loss", found.loss.mean().reshape(1))
    case.check("loss", nll + weight * fooling + set_to["codebook_weight"] * found.loss.mean())
    case.check("perplexity", perplexity(found.indices, len(codebook)), rtol=1e-6)
    case.check("cluster_usage", len(found.indices.unique()))


def replay_scaling(case: Case) -> None:
    moments, noise = case["moments"], case["noise"]
    z = sample_posterior(moments, noise)
    case.check("z", z)
    found = latent_statistics(z.split(3))
    case.check("scale_factor", double(1 / found.std))
    case.check("z_scaled", z / found.std)
    case.check("std_scaled", double(latent_statistics([z / found.std]).std))
    case.check("scale_factor_mode", double(1 / latent_statistics([posterior(moments)[0]]).std))


REPLAYS = {
    "gaussian": replay_gaussian,
    "adversarial": replay_critic,
    "kl_loss": replay_kl_loss,
    "vq": replay_quantisation,
    "scaling": replay_scaling,
}
