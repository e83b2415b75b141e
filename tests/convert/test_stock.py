"""Pipelines in diffusers' own classes: the same images, or the reason why not."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from hf_diffusion import (
    ADMUNet2DModel,
    ClassifierFreeGuidancePipeline,
    ClassifierGuidancePipeline,
    CosineDDPMScheduler,
    DDGANGenerator,
    DDGANPipeline,
    DDGANScheduler,
    DDIMEtaScheduler,
    LinearDDPMScheduler,
    cli,
)
from hf_diffusion.convert.folders import parse_flags
from hf_diffusion.convert.openai import unet_to_openai
from hf_diffusion.convert.stock import pipeline_to_stock
from tests.launching import run_claims


SMALL = {
    "sample_size": 16, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1, 2, 2),
    "num_res_blocks": 1, "attention_resolutions": (2, 4), "num_heads": 2, "norm_num_groups": 4,
}  # fmt: skip
CLASSES = {"num_class_embeds": 3, "null_class": True}


def make_pipe(scheduler, **settings) -> ClassifierFreeGuidancePipeline:
    torch.manual_seed(0)
    unet = ADMUNet2DModel(**{**SMALL, **settings})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.2)
    names = {0: "cat", 1: "dog", 2: "7"} if "num_class_embeds" in settings else None
    return ClassifierFreeGuidancePipeline(unet.eval(), scheduler, id2label=names)


def images(pipe, **call) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(**call, num_inference_steps=10, generator=seeds, output_type="np").images


NETWORKS = {
    "plain": {},
    "resampling inside residual blocks": {"resblock_updown": True},
    "the other order of attention, heads by width": {"use_new_attention_order": True, "num_head_channels": 4},
    "the condition added": {"use_scale_shift_norm": False, "attention_resolutions": (1,), "num_head_channels": 4},
    "height and width": {"sample_size": (16, 8), "num_res_blocks": 2},
}


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_a_stock_unet_computes_the_same(settings):
    pipe = make_pipe(CosineDDPMScheduler(), **settings)
    stock = pipeline_to_stock(pipe)
    x, t = torch.randn(2, 1, 16, 8 if settings.get("num_res_blocks") == 2 else 16), torch.tensor([3, 800])
    with torch.no_grad():
        torch.testing.assert_close(stock.unet(x, t).sample, pipe.unet(x, t).sample, rtol=1e-5, atol=1e-5)


SCHEDULERS = {
    "cosine DDPM": CosineDDPMScheduler(),
    "DDPM, trailing": LinearDDPMScheduler(timestep_spacing="trailing"),
    "DDPM, fixed_large": LinearDDPMScheduler(variance_type="fixed_large"),
    "DDPM of betas of one's own": LinearDDPMScheduler(trained_betas=list(np.linspace(1e-4, 0.05, 100))),
    "DDIM with noise on a schedule that DDIMScheduler lacks": DDIMEtaScheduler(eta=0.5, beta_schedule="sigmoid"),
    "DDIM, v, zero SNR": DDIMEtaScheduler(
        timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_stock_pipeline_samples_the_same_images(scheduler):
    pipe = make_pipe(scheduler)
    call = (
        {"eta": scheduler.config.eta, "use_clipped_model_output": True}
        if isinstance(scheduler, DDIMEtaScheduler)
        else {}
    )
    ours, stock = images(pipe, batch_size=2), images(pipeline_to_stock(pipe), batch_size=2, **call)
    np.testing.assert_allclose(stock, ours, atol=1e-4)
    assert ours.std() > 0.1


def test_a_learned_variance_is_kept_by_ddpm():
    pipe = make_pipe(LinearDDPMScheduler(variance_type="learned_range"), out_channels=2)
    np.testing.assert_allclose(images(pipeline_to_stock(pipe), batch_size=2), images(pipe, batch_size=2), atol=1e-4)


@pytest.mark.parametrize("label, ours", [("dog", [1, 1]), ("1", [1, 1]), ("7", [2, 2]), ("none", None)])
def test_one_class_of_a_conditional_model_becomes_an_unconditional_stock_pipeline(label, ours):
    pipe = make_pipe(CosineDDPMScheduler(), **CLASSES)
    call = {"batch_size": 2} if ours is None else {"class_labels": ours}
    np.testing.assert_allclose(images(pipeline_to_stock(pipe, label), batch_size=2), images(pipe, **call), atol=1e-4)


REFUSED = [
    (CosineDDPMScheduler(), {"patch_size": 2}, None, "no patch_size 2"),
    (CosineDDPMScheduler(), {"residual_rescale": True}, None, "no residual_rescale"),
    (CosineDDPMScheduler(), {"conv_resample": False}, None, "without convolutions"),
    (CosineDDPMScheduler(), {"channel_mult": (2, 2), "attention_resolutions": (2,)}, None, "first level"),
    (CosineDDPMScheduler(), {"channel_mult": (1, 2, 4)}, None, "heads of different widths"),
    (CosineDDPMScheduler(), {"num_heads_upsample": 4}, None, "heads in the decoder"),
    (CosineDDPMScheduler(), CLASSES, None, "choose one class by --class_label"),
    (CosineDDPMScheduler(), {}, "dog", "a model without classes"),
    (CosineDDPMScheduler(), {"num_class_embeds": 3}, "none", "needs a model that was trained with a null class"),
    (LinearDDPMScheduler(prediction_type="previous_mean"), {}, None, "previous_mean"),
    (DDIMEtaScheduler(variance_type="learned_range"), {"out_channels": 2}, None, "second half of a learned variance"),
    (
        LinearDDPMScheduler(timestep_spacing="trailing", variance_type="fixed_large"),
        {},
        None,
        "noise in the last step",
    ),
]


@pytest.mark.parametrize("scheduler, settings, label, reason", REFUSED, ids=[case[3] for case in REFUSED])
def test_what_stock_classes_cannot_express_is_refused_with_the_reason(scheduler, settings, label, reason):
    with pytest.raises(ValueError, match=reason):
        pipeline_to_stock(make_pipe(scheduler, **settings), label)


def test_pipelines_that_diffusers_does_not_have_are_refused():
    generator = DDGANGenerator(sample_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
    with pytest.raises(ValueError, match="a DDGANPipeline with a DDGANGenerator has no counterpart"):
        pipeline_to_stock(DDGANPipeline(generator, DDGANScheduler(4)))
    pipe = make_pipe(DDIMEtaScheduler())
    with pytest.raises(ValueError, match="a ClassifierGuidancePipeline with a ADMUNet2DModel has no counterpart"):
        pipeline_to_stock(ClassifierGuidancePipeline(pipe.unet, None, pipe.scheduler))


WITHOUT_THE_PACKAGE = """
import numpy as np, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("stock")
seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
np.save("there.npy", pipe(batch_size=2, num_inference_steps=10, generator=seeds, output_type="np", **OPTIONS).images)
ours = ("hf_diffusion", "diffusers_modules")
claims["ours"] = [name for name, module in sys.modules.items() if module and name.startswith(ours)]
claims["classes"] = [type(pipe).__name__, *(type(x).__module__.split(".")[0] for x in (pipe, pipe.unet))]
"""


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_process_without_the_package_draws_the_same_images(tmp_path, sampler):
    pipe = make_pipe(CosineDDPMScheduler() if sampler == "ddpm" else DDIMEtaScheduler(eta=0.3), **CLASSES)
    pipe.save_pretrained(tmp_path / "ours")
    command = ["convert", str(tmp_path / "ours"), str(tmp_path / "stock"), "--to", "diffusers", "--class_label", "dog"]
    assert cli.main(command) == 0
    options = {} if sampler == "ddpm" else {"eta": 0.3, "use_clipped_model_output": True}
    source = f"OPTIONS = {options}\n{WITHOUT_THE_PACKAGE}"
    claims = run_claims(source, tmp_path, with_package=False)
    assert claims == {"ours": [], "classes": [f"{sampler.upper()}Pipeline", "diffusers", "diffusers"]}
    ours = images(pipe, class_labels=["dog", "dog"])
    np.testing.assert_allclose(np.load(tmp_path / "there.npy"), ours, atol=1e-4)
    assert ours.std() > 0.1


def test_the_command_writes_a_pipeline_that_loads_without_our_code(tmp_path, capsys):
    pipe = make_pipe(DDIMEtaScheduler(), **CLASSES)
    pipe.save_pretrained(tmp_path / "ours")
    command = ["convert", str(tmp_path / "ours"), str(tmp_path / "stock"), "--to", "diffusers", "--class_label", "cat"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "DDIMPipeline with UNet2DModel" in said and "use_clipped_model_output=True, eta=0.0" in said
    assert not list((tmp_path / "stock").rglob("*.py"))
    index = json.loads((tmp_path / "stock" / "model_index.json").read_text())
    assert index["_class_name"] == "DDIMPipeline" and {index[part][0] for part in ("unet", "scheduler")} == {
        "diffusers"
    }
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    stock = images(loaded, batch_size=2, use_clipped_model_output=True)
    np.testing.assert_allclose(stock, images(pipe, class_labels=["cat", "cat"]), atol=1e-4)
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "stock"), "--to", "diffusers"]) == 1
    assert "holds something already" in capsys.readouterr().err


def test_the_command_reads_a_checkpoint_of_openai_by_the_flags_of_their_scripts(tmp_path, capsys):
    torch.manual_seed(0)
    settings = {
        "sample_size": 64,
        "out_channels": 6,
        "model_channels": 32,
        "channel_mult": (1, 2, 3, 4),
        "num_res_blocks": 1,
    }
    unet = ADMUNet2DModel(**settings, attention_resolutions=(8,), num_heads=4).eval()
    state, _ = unet_to_openai(unet)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    flags = "--image_size 64 --num_channels 32 --num_res_blocks 1 --attention_resolutions 8 --learn_sigma True"
    flags += " --noise_schedule cosine"
    arguments = ["convert", str(tmp_path / "model.safetensors"), str(tmp_path / "ours"), "--from", "openai", "--flags"]
    assert cli.main([*arguments, flags + " --use_fp16 True"]) == 0
    assert "these flags do not concern it: use_fp16" in capsys.readouterr().out
    loaded = ClassifierFreeGuidancePipeline.from_pretrained(tmp_path / "ours")
    assert (
        isinstance(loaded.scheduler, CosineDDPMScheduler) and loaded.scheduler.config.variance_type == "learned_range"
    )
    assert all(torch.equal(a, b) for a, b in zip(loaded.unet.state_dict().values(), unet.state_dict().values()))
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["unet"][1] == "ADMUNet2DModel"


def test_flags_that_are_no_pairs_are_refused():
    assert parse_flags("--image_size 64 --class_cond=True") == {"image_size": "64", "class_cond": "True"}
    with pytest.raises(ValueError, match="pairs of --name and value"):
        parse_flags("--image_size --class_cond True")
