"""Guidance away from a weaker network, in the pipelines that take one, from Python and typed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin

from hf_diffusion import (
    ADMUNet2DModel,
    ClassifierFreeGuidancePipeline,
    DDIMEtaScheduler,
    EDMPipeline,
    FlowMatchingPipeline,
)
from hf_diffusion.cli import main
from hf_diffusion.hub.checkpoint_files import read_network
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.sampling.drawing import draw, draw_floats
from tests.launching import run_claims
from tests.pipelines.tiny import TINY, seeds
from tests.training.test_train_ddpm import run


GUIDED = (ClassifierFreeGuidancePipeline, EDMPipeline, FlowMatchingPipeline)
every_guided = pytest.mark.parametrize("cls", GUIDED, ids=lambda cls: cls.__name__)


def weaker(unet: ADMUNet2DModel) -> ADMUNet2DModel:
    """Of the same shape, with other weights."""
    network = ADMUNet2DModel.from_config(unet.config)
    with torch.no_grad():
        for ours, theirs in zip(network.parameters(), unet.parameters(), strict=True):
            ours.copy_(theirs.flip(0))
    return network.eval()


class Mixed(ModelMixin, ConfigMixin):
    """worse + w * (better - worse) as one network, for samples of given classes."""

    config_name = "config.json"

    def __init__(self, better: ModelMixin, worse: ModelMixin, scale: float):
        super().__init__()
        self.better, self.worse, self.scale, self._internal_dict = better, worse, scale, better.config

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        worse, better = (net(sample, timestep, class_labels).sample for net in (self.worse, self.better))
        return (worse + self.scale * (better - worse),)


def call(pipe, **options) -> torch.Tensor:
    given = {**TINY[type(pipe)].options, "generator": seeds(1, 2), "output_type": "latent", **options}
    return pipe(class_labels=[0, 2], **given).images


@every_guided
def test_the_guided_output_is_the_worse_one_plus_w_times_what_the_better_one_adds(cls):
    pipe = TINY[cls].make()
    guide, plain = weaker(pipe.unet), call(pipe, guidance_scale=1.0)
    guided = cls.from_pipe(pipe, guide_unet=guide)
    torch.testing.assert_close(call(guided, guidance_scale=1.0), plain, rtol=0, atol=0)
    expected = cls.from_pipe(pipe)
    expected.register_modules(unet=Mixed(pipe.unet, guide, 2.5))
    torch.testing.assert_close(
        call(guided, guidance_scale=2.5), call(expected, guidance_scale=1.0, micro_batch_size=2), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(call(guided, guidance_scale=2.5), plain, atol=1e-3)
    # away from itself it leads nowhere
    same = cls.from_pipe(pipe, guide_unet=pipe.unet)
    torch.testing.assert_close(call(same, guidance_scale=2.5), plain, rtol=1e-4, atol=1e-4)


@every_guided
def test_a_model_without_classes_is_guided_too_and_only_within_the_interval(cls):
    pipe = TINY[cls].make(classes=None)
    guided = cls.from_pipe(pipe, guide_unet=weaker(pipe.unet))
    given = {"num_inference_steps": 3, "output_type": "latent", "batch_size": 2}
    plain, inside, outside = (
        guided(**given, generator=seeds(1, 2), guidance_scale=scale, guidance_interval=interval).images
        for scale, interval in ((1.0, (0.0, 1.0)), (3.0, (0.0, 1.0)), (3.0, (0.9999, 0.9999)))
    )
    assert torch.equal(plain, outside)
    assert not torch.allclose(plain, inside, atol=1e-3)


@every_guided
def test_a_network_of_other_samples_or_classes_is_refused_and_one_without_classes_is_not(cls):
    pipe = TINY[cls].make()
    without = ADMUNet2DModel.from_config({**pipe.unet.config, "num_class_embeds": None, "null_class": False})
    assert call(cls.from_pipe(pipe, guide_unet=without), guidance_scale=2.0).isfinite().all()
    for change, words in (
        ({"in_channels": 3, "out_channels": 3}, r"shape \(3, 8, 8\) with 4 classes.* for \(1, 8, 8\) with 4"),
        ({"num_class_embeds": 7}, r"with 7 classes.* with 4; give one of the same data"),
    ):
        other = ADMUNet2DModel.from_config({**pipe.unet.config, **change})
        with pytest.raises(ValueError, match=words):
            call(cls.from_pipe(pipe, guide_unet=other), guidance_scale=2.0)


STRANGER = """
import json, os
import numpy as np, torch
from pathlib import Path
from diffusers import DiffusionPipeline
folder = Path(os.environ["FOLDER"])
def images():
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    what = {"class_labels": [0, 1], "num_inference_steps": 3, "generator": generators, "output_type": "np"}
    return pipe, pipe(**what, guidance_scale=2.0).images.tolist()
claims["guided"] = images()[1]
index = json.loads((folder / "model_index.json").read_text())
(folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "guide_unet"}))
pipe, claims["as of earlier versions"] = images()
claims["guide"] = str(pipe.guide_unet)
"""


@pytest.mark.slow
def test_a_guided_pipeline_is_saved_whole_and_loaded_by_diffusers_alone(tmp_path):
    pipe = TINY[EDMPipeline].make()
    guided = EDMPipeline.from_pipe(pipe, guide_unet=weaker(pipe.unet))
    guided.save_pretrained(tmp_path)
    seen = run_claims(STRANGER, env={"FOLDER": str(tmp_path)}, with_package=False)
    expected = draw_floats(guided, [5, 6], [0, 1], guidance_scale=2.0, num_inference_steps=3)
    np.testing.assert_allclose(np.array(seen["guided"]), expected, atol=1e-6)
    # without the part, classifier-free
    expected = draw_floats(pipe, [5, 6], [0, 1], guidance_scale=2.0, num_inference_steps=3)
    np.testing.assert_allclose(np.array(seen["as of earlier versions"]), expected, atol=1e-6)
    assert seen["guide"] == "None"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 5 steps, with checkpoints of steps 3 and 5, and an EDM beside it."""
    folder = tmp_path_factory.mktemp("guides")
    run(folder / "run", "--max_train_steps", "5")
    TINY[EDMPipeline].make(classes=None).save_pretrained(folder / "edm")
    scheduler = DDIMEtaScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    TINY[ClassifierFreeGuidancePipeline].make(scheduler, classes=None).save_pretrained(folder / "epsilon")
    return folder


def test_a_checkpoint_guides_by_its_averaged_weights_as_typed(trained, tmp_path):
    words = ["sample", f"{trained}/run", "--class_labels", "0,1", "--num_images", "4", "--device", "cpu"]
    words += ["--num_inference_steps", "3", "--npz", str(tmp_path / "x.npz")]
    checkpoint = trained / "run" / "checkpoint-00000003"
    assert main([*words, "--guide_by", str(checkpoint), "--guidance_scale", "3"]) == 0
    pipe = load_pipeline(trained / "run")
    guide, _ = read_network(checkpoint, lambda name: ADMUNet2DModel)
    guided = type(pipe).from_pipe(pipe, guide_unet=guide.eval())
    expected = draw(guided, range(4), [0, 0, 1, 1], guidance_scale=3.0, num_inference_steps=3)
    assert np.array_equal(np.load(tmp_path / "x.npz")["images"], expected[..., 0])
    plain = draw(pipe, range(4), [0, 0, 1, 1], num_inference_steps=3)
    assert not np.array_equal(expected, plain)
    guided = ["--guide_by", str(checkpoint), "--guidance_scale", "3"]
    assert main([*words, *guided, "--guidance_interval", "0,0"]) == 0
    assert np.array_equal(np.load(tmp_path / "x.npz")["images"], plain[..., 0])


def test_both_kinds_of_guidance_are_compared_by_a_sweep(trained, tmp_path):
    words = ["evaluate", f"{trained}/run", "--metrics", "kd", "--num_images", "20", "--device", "cpu"]
    words += ["--num_inference_steps", "2", "--guide_by", f"{trained}/run/checkpoint-00000003"]
    words += ["--sweep", "guidance=autoguidance,classifier_free", "--sweep", "guidance_scale=1,3"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--max_reference_images", "100"]) == 0
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    values = [result["measures"]["kd"]["value"] for result in results]
    # at scale 1 both are the plain sampler
    assert values[0] == values[2] and len(set(values)) == 3


@pytest.mark.parametrize(
    ("guide", "scale", "words"),
    [
        ("run/checkpoint-00000003", (), "at a guidance_scale of 1 it guides nothing; give --guidance_scale, such as"),
        ("", ("2",), "the folder holds no checkpoint, pipeline or network"),
        ("edm", ("2",), "it was trained by another method than this ClassifierFreeGuidancePipeline"),
        ("epsilon", ("2",), "trained with prediction_type epsilon, and this ClassifierFreeGuidancePipeline with v_"),
        ("nowhere/at/all", ("2",), "nowhere/at/all"),
    ],
)  # fmt: skip
def test_a_guide_that_does_not_fit_is_one_sentence(trained, tmp_path, capsys, guide, scale, words):
    words_of_scale = ["--guidance_scale", *scale] if scale else []
    status = main(["sample", f"{trained}/run", "--device", "cpu", "--guide_by", f"{trained}/{guide}", *words_of_scale])
    error = capsys.readouterr().err
    assert status in (1, 2) and "Traceback" not in error
    assert words in error.splitlines()[-1]
