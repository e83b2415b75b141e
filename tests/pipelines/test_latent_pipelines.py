"""Pipelines with a vae: they draw latents, decode them last, and load where none was saved."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel

from hf_diffusion import (
    ClassifierFreeGuidancePipeline,
    DDIMEtaScheduler,
    EDMPipeline,
    FlowMatchingPipeline,
    LinearDDPMScheduler,
)
from hf_diffusion.data.autoencoders import decode
from hf_diffusion.evaluation.model_measures import model_measures
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.pipelines import sampling_parts
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.sampling.interpolation import interpolate
from tests.data.autoencoders import make_autoencoder
from tests.launching import run_claims
from tests.pipelines.tiny import TINY, seeds


PIPELINES = [ClassifierFreeGuidancePipeline, EDMPipeline, FlowMatchingPipeline]
every_pipeline = pytest.mark.parametrize("cls", PIPELINES, ids=lambda cls: cls.__name__)
SCALED = {"latents_mean": [0.1, -0.2], "latents_std": [0.5, 3.0], "scaling_factor": 1.0}


def make(cls, vae=None, **options):
    """A pipeline of latents (2, 4, 4), which are images of 8x8."""
    if cls is ClassifierFreeGuidancePipeline:
        options.setdefault("scheduler", DDIMEtaScheduler(clip_sample=False))
    pipe = TINY[cls].make(in_channels=2, out_channels=2, sample_size=4, **options)
    pipe.register_modules(vae=make_autoencoder(**SCALED) if vae is None else vae)
    return pipe


def call(pipe, **options):
    options = {"class_labels": [0, 1, 2], "num_inference_steps": 3, "generator": seeds(0, 1, 2), **options}
    return pipe(**options).images


@every_pipeline
@torch.no_grad()
def test_what_is_drawn_is_what_the_vae_decodes_of_the_unscaled_latents(cls):
    pipe = make(cls)
    latents, images = call(pipe, output_type="latent"), call(pipe, output_type="pt")
    assert latents.shape == (3, 2, 4, 4) and images.shape == (3, 1, 8, 8) and pipe.sample_shape == (1, 8, 8)
    mean, std = (torch.tensor(SCALED[name]).reshape(1, 2, 1, 1) for name in ("latents_mean", "latents_std"))
    wanted = pipe.vae.decode(latents * std + mean).sample
    torch.testing.assert_close(images, (wanted / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    # what data make of the same latents
    torch.testing.assert_close(decode(pipe.vae, latents), wanted, rtol=1e-4, atol=1e-5)


@every_pipeline
def test_given_noise_has_the_shape_of_the_latents_and_paths_lead_through_it(cls):
    pipe = make(cls)
    noise = torch.cat([torch.randn(1, 2, 4, 4, generator=generator) for generator in seeds(0, 1, 2)])
    generators = seeds(0, 1, 2)
    for generator in generators:
        torch.randn(1, 2, 4, 4, generator=generator)
    given = call(pipe, latents=noise, generator=generators, output_type="np")
    np.testing.assert_allclose(given, call(pipe, output_type="np"))
    with pytest.raises(ValueError, match=r"latents have shape \(3, 1, 8, 8\), but this call needs \(3, 2, 4, 4\)"):
        call(pipe, latents=torch.zeros(3, 1, 8, 8))
    path = interpolate(pipe, [(0, 1)], 3, class_labels=[1], num_inference_steps=3)
    np.testing.assert_array_equal(path[:1], draw(pipe, [0], [1], num_inference_steps=3))


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel])
def test_every_kind_of_autoencoder_decodes(kind):
    channels = 3 if kind is AutoencoderDC else 1
    pipe = make(ClassifierFreeGuidancePipeline, make_autoencoder(kind, channels))
    assert pipe.sample_shape == (channels, 8, 8) and call(pipe, output_type="np").shape == (3, 8, 8, channels)


def test_decoding_goes_a_few_at_a_time_and_changes_nothing(monkeypatch):
    pipe, rows = make(ClassifierFreeGuidancePipeline), []
    whole = call(pipe, output_type="np")
    pipe.vae.post_quant_conv.register_forward_pre_hook(lambda layer, inputs: rows.append(len(inputs[0])))
    # the largest map of an image: 8 channels of 8x8 numbers of 4 bytes
    monkeypatch.setattr(sampling_parts, "CPU_FEATURE_MAP_BYTES", 2 * 8 * 64 * 4)
    np.testing.assert_allclose(call(pipe, output_type="np"), whole, atol=1e-5)
    assert rows == [2, 1]


@pytest.mark.parametrize("force, computed", [(True, torch.float32), (False, torch.float16)])
def test_half_precision_decodes_in_float32_where_the_config_asks_for_it(force, computed):
    pipe, seen = make(ClassifierFreeGuidancePipeline, make_autoencoder(force_upcast=force)), []
    pipe.vae.half()
    pipe.vae.post_quant_conv.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].dtype))
    assert np.isfinite(call(pipe, output_type="np")).all()
    assert seen == [computed] and pipe.vae.dtype == torch.float16


def test_latents_that_would_be_clipped_or_do_not_fit_are_refused():
    pipe = make(ClassifierFreeGuidancePipeline, scheduler=LinearDDPMScheduler())
    with pytest.raises(
        ValueError, match="clip_sample of LinearDDPMScheduler would clip latents, which have no bounds"
    ):
        call(pipe)
    pipe.scheduler = LinearDDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=True)
    with pytest.raises(ValueError, match="thresholding of LinearDDPMScheduler would clip latents"):
        call(pipe)
    other = TINY[FlowMatchingPipeline].make(sample_size=4)
    other.register_modules(vae=make_autoencoder())
    with pytest.raises(ValueError, match="the vae decodes latents of 2 channels, and the network draws 1"):
        call(other)


@every_pipeline
def test_nothing_is_claimed_to_be_measured_of_latents(cls):
    assert model_measures(make(cls)) == {} and model_measures(TINY[cls].make()) == dict(cls.measures)


@every_pipeline
def test_a_folder_of_before_there_was_a_vae_loads_without_one(cls, tmp_path):
    pipe = TINY[cls].make()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("vae") == [None, None]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for loaded in (cls.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        assert loaded.vae is None and loaded.sample_shape == (1, 8, 8)


def test_stock_diffusers_loads_and_draws_without_the_package(tmp_path):
    pipes = {cls.__name__: make(cls) for cls in PIPELINES}
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
    source = f"""
        import torch
        from diffusers import DiffusionPipeline
        for name in {sorted(pipes)}:
            pipe = DiffusionPipeline.from_pretrained("{tmp_path}/" + name, trust_remote_code=True)
            pipe.set_progress_bar_config(disable=True)
            generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
            call = {{"class_labels": [0, 1, 2], "num_inference_steps": 3, "generator": generators}}
            images = pipe(**call, output_type="pt").images
            claims[name] = [type(pipe.vae).__name__, list(images.shape), images.flatten().tolist()]
    """
    claims = run_claims(source, with_package=False)
    for name, pipe in pipes.items():
        kind, shape, values = claims[name]
        assert (kind, shape) == ("AutoencoderKL", [3, 1, 8, 8])
        wanted = call(pipe, output_type="pt").flatten()
        torch.testing.assert_close(torch.tensor(values), wanted, rtol=1e-4, atol=1e-4)
