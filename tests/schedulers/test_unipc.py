"""UniPCTimestepsScheduler: the stock solver, where its steps are, and elsewhere."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from hf_diffusion import CosineDDPMScheduler, DDIMEtaScheduler, UniPCTimestepsScheduler
from hf_diffusion.sampling.loading import can_take_over


def made(**options) -> UniPCTimestepsScheduler:
    return UniPCTimestepsScheduler.from_config(CosineDDPMScheduler(prediction_type="v_prediction").config, **options)


def walk(scheduler, x: torch.Tensor, variance: float = 0.2) -> torch.Tensor:
    """The end of a run with the exact v of data N(0, variance)."""
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[t].double()
        x_0 = alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar) * x
        noise = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        x = scheduler.step(alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0, t, x, return_dict=False)[0]
    return x


NOISE = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_at_the_timesteps_of_the_stock_class_it_is_the_stock_class(final):
    ours = made(final_sigmas_type=final, timestep_spacing="trailing")
    stock = UniPCMultistepScheduler.from_config(ours.config)
    stock.set_timesteps(6)
    ours.set_timesteps(timesteps=stock.timesteps.tolist())
    torch.testing.assert_close(ours.sigmas, stock.sigmas)
    assert torch.equal(ours.timesteps, stock.timesteps) and ours.num_inference_steps == 6
    assert torch.equal(walk(ours, NOISE), walk(stock, NOISE))
    ours.set_timesteps(6)
    assert torch.equal(ours.timesteps, stock.timesteps)


def test_timesteps_of_ones_own_lead_to_the_data_and_are_not_those_of_the_spacing():
    scheduler = made()
    scheduler.set_timesteps(timesteps=[*range(999, 500, -50), *range(490, 0, -40)])
    torch.testing.assert_close(walk(scheduler, NOISE), 0.2**0.5 * NOISE, rtol=0.03, atol=0.01)
    scheduler.set_timesteps(timesteps=(900, 500))
    rough = walk(scheduler, NOISE)
    assert scheduler.timesteps.tolist() == [900, 500] and not torch.allclose(rough, 0.2**0.5 * NOISE, rtol=0.03)


@pytest.mark.parametrize("timesteps", [[], [5, 5], [1, 2], [1000, 1], [3, -1]])
def test_timesteps_that_do_not_fall_within_the_process_are_refused(timesteps):
    with pytest.raises(ValueError, match="must fall and lie between 0 and 999"):
        made().set_timesteps(timesteps=timesteps)


def test_levels_are_not_chosen_twice():
    with pytest.raises(ValueError, match="timesteps and use_karras_sigmas both choose"):
        made(use_karras_sigmas=True).set_timesteps(timesteps=[9, 5])


def test_it_takes_over_gaussian_processes_and_gives_them_back():
    for cls in (CosineDDPMScheduler, DDIMEtaScheduler, UniPCMultistepScheduler):
        assert can_take_over(UniPCTimestepsScheduler, cls) and can_take_over(cls, UniPCTimestepsScheduler)
    back = CosineDDPMScheduler.from_config(made().config)
    torch.testing.assert_close(back.alphas_cumprod, CosineDDPMScheduler().alphas_cumprod)
