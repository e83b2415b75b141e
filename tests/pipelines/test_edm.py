"""Sampling a preconditioned denoiser: guidance, churn, diffusers' schedulers on its folder."""

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from hf_diffusion import EDMHeunScheduler, EDMPipeline, PointDenoiser
from tests.pipelines.tiny import Recorder, make_edm, quiet, sample, seeds, with_random_weights


def make_edm_points(scheduler=None, **scheduling) -> EDMPipeline:
    torch.manual_seed(0)
    network = with_random_weights(PointDenoiser(model_channels=16, num_res_blocks=1), std=0.3)
    return quiet(EDMPipeline(network, scheduler or EDMHeunScheduler(**scheduling)))


def draw(pipe: EDMPipeline, **options):
    return pipe(batch_size=6, generator=seeds(*range(6)), output_type="pt", **options).images


def test_a_step_calls_the_network_twice_but_for_the_last():
    pipe = make_edm(classes=None)
    recorder = Recorder(pipe.unet)
    sample(pipe, batch_size=2, generator=seeds(0, 1), num_inference_steps=5)
    assert len(recorder.calls) == 9
    told = torch.stack([args[1] for _, args, _ in recorder.calls])
    torch.testing.assert_close(told, (pipe.scheduler.sigmas[:-1].log() / 4).float())


def test_guidance_moves_the_denoised_sample_away_from_the_unconditional_one():
    pipe = make_edm()
    plain, null = (sample(pipe, [1], num_inference_steps=1, guidance_scale=w) for w in (1.0, 0.0))
    guided = sample(pipe, [1], num_inference_steps=1, guidance_scale=3.0)
    # one step of Euler's method ends at D
    torch.testing.assert_close(guided, null + 3 * (plain - null), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, null, atol=1e-2)


def test_guidance_is_kept_to_its_noise_levels():
    pipe = make_edm(EDMHeunScheduler(sigma_max=16.0))
    recorder = Recorder(pipe.unet)
    sample(pipe, [1, 2], num_inference_steps=8, guidance_scale=2.0, guidance_interval=(0.3, 3.0))
    rows = [4 if 0.3 <= sigma <= 3.0 else 2 for sigma in pipe.scheduler.sigmas[:-1].tolist()]
    assert recorder.rows == rows and {2, 4} == set(rows)
    with pytest.raises(ValueError, match=r"0 <= low <= high, noise levels sigma, not \(3, 1\)"):
        sample(pipe, [1], guidance_scale=2.0, guidance_interval=(3, 1))


def test_churn_of_the_call_stands_in_for_the_schedulers_own():
    pipe = make_edm_points()
    churn = {"s_churn": 20.0, "s_min": 0.1, "s_max": 10.0, "s_noise": 1.01}
    calm, churned = draw(pipe), draw(pipe, **churn)
    assert not torch.allclose(calm, churned)
    pipe.scheduler = EDMHeunScheduler(**churn)
    assert torch.equal(draw(pipe), churned) and torch.equal(draw(pipe, s_churn=0.0), calm)


def test_schedulers_of_diffusers_sample_the_saved_folder(tmp_path):
    make_edm_points(sigma_data=0.7).save_pretrained(tmp_path)
    pipe = quiet(EDMPipeline.from_pretrained(tmp_path))
    limit = draw(pipe, num_inference_steps=400)
    ours = draw(pipe, num_inference_steps=60)
    pipe.scheduler = EDMHeunScheduler.from_config(pipe.scheduler.config, solver_order=1)
    first_order = draw(pipe, num_inference_steps=60)
    found = {}
    for cls in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler):
        pipe.scheduler = cls.from_pretrained(tmp_path, subfolder="scheduler")
        assert pipe.scheduler.config.sigma_data == 0.7
        found[cls] = draw(pipe, num_inference_steps=60)
        assert pipe.num_timesteps == 60
    # it begins at sqrt(sigma_max^2 + 1)
    torch.testing.assert_close(found[EDMEulerScheduler], first_order, rtol=1e-2, atol=1e-3)

    def error(samples):
        return float((samples - limit).abs().mean())

    assert error(ours) < error(first_order) / 3
    assert error(found[EDMDPMSolverMultistepScheduler]) < error(first_order) / 3


def test_a_scheduler_that_knows_neither_the_preconditioning_nor_churn_is_refused():
    pipe = make_edm_points(preconditioning="vp")
    assert draw(pipe, num_inference_steps=3).isfinite().all()
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="trained with preconditioning 'vp', which EDMEulerScheduler does not know"):
        draw(pipe)
    pipe = make_edm_points(EDMEulerScheduler())
    with pytest.raises(ValueError, match="EDMEulerScheduler cannot be given s_churn; leave it out, or use EDMHeun"):
        draw(pipe, s_churn=1.0)


def test_guidance_without_labels_or_null_class_is_refused():
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs class_labels"):
        sample(make_edm(), batch_size=1, guidance_scale=2.0)
    with pytest.raises(ValueError, match="trained with a null class"):
        sample(make_edm(null_class=False), [1], guidance_scale=2.0)
