"""Sampling with DDGANPipeline: what it draws and calls, labels, seeds, loading in fresh processes, and its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_diffusion
from hf_diffusion.models.ncsnpp_ddgan import DDGANGenerator
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler


NAMES = {0: "cat", 1: "dog", 2: "crane", 3: "crane"}
SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_sizes": (4,),
    "latent_dim": 5,
    "latent_embed_dim": 8,
    "num_latent_layers": 1,
}


def make_pipe(steps: int = 4, classes: int | None = 4, id2label: dict | None = NAMES, **options) -> DDGANPipeline:
    torch.manual_seed(0)
    generator = DDGANGenerator(**SMALL | {"num_class_embeds": classes} | options)
    with torch.no_grad():  # layers that start near zero would hide labels, latents and timesteps
        for parameter in generator.parameters():
            parameter.normal_(std=0.2)
    pipe = DDGANPipeline(generator.eval(), DDGANScheduler(steps), id2label=id2label if classes else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def sample(pipe: DDGANPipeline, labels=None, **options):
    count = len(labels) if labels is not None else options.setdefault("batch_size", 2)
    call = {"generator": seeds(*range(count)), "output_type": "latent"} | options
    return pipe(labels, **call).images


class Recorder:
    """Notes the timestep, the latent and the labels of every call of the pipeline's network."""

    def __init__(self, pipe: DDGANPipeline):
        self.calls: list[tuple] = []
        pipe.generator.register_forward_hook(self.note, with_kwargs=True)

    def note(self, network, args, kwargs, output) -> None:
        self.calls.append((int(args[1]), args[2].clone(), kwargs.get("class_labels"), args[0].dtype))


# --- the process --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_image_takes_one_call_of_the_network_a_step_each_with_a_latent_of_its_own(steps):
    pipe = make_pipe(steps)
    recorder = Recorder(pipe)
    sample(pipe, [0, 1])
    assert [t for t, *_ in recorder.calls] == list(range(steps - 1, -1, -1)) and pipe.num_timesteps == steps
    latents = torch.stack([latent for _, latent, *_ in recorder.calls])
    assert latents.shape == (steps, 2, 5)
    assert len({round(float(value), 6) for value in latents.flatten()}) == latents.numel()


def test_a_sample_is_what_the_loop_written_by_hand_draws():
    pipe = make_pipe()
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(1, 1, 8, 8, generator=rng)
    with torch.no_grad():
        for t in (3, 2, 1, 0):
            z = torch.randn(1, 5, generator=rng)
            x_0 = pipe.generator(x, t, z, torch.tensor([2])).sample
            x = pipe.scheduler.sample_posterior(x_0, x, t, noise=torch.randn(x.shape, generator=rng))
    torch.testing.assert_close(sample(pipe, [2], generator=torch.Generator().manual_seed(3)), x)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 50])
def test_another_number_of_steps_than_that_of_the_training_is_refused(steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps}, but this generator has learned 4 transitions"):
        make_pipe()([0], num_inference_steps=steps)
    assert len(make_pipe()([0], num_inference_steps=4).images) == 1


def test_a_latent_changes_the_image():
    pipe = make_pipe()
    first_noise = torch.randn(2, 1, 8, 8)
    a, b = (sample(pipe, [0, 0], latents=first_noise, generator=seeds(n, n)) for n in (0, 1))
    assert not torch.allclose(a, b)


# --- labels, seeds, batches ---------------------------------------------------------------------------------------------


def test_names_numbers_and_tensors_name_the_same_classes():
    pipe = make_pipe()
    by_number = sample(pipe, [0, 1])
    for labels in (["cat", "dog"], [0, "dog"], torch.tensor([0, 1]), np.array([0, 1])):
        assert torch.equal(sample(pipe, labels), by_number)
    repeated = pipe("dog", num_images_per_label=2, generator=seeds(0, 1), output_type="latent").images
    assert torch.equal(repeated, sample(pipe, [1, 1])) and not torch.allclose(repeated, by_number)


def test_a_model_without_classes_is_called_without_labels():
    pipe = make_pipe(classes=None)
    recorder = Recorder(pipe)
    assert len(pipe(batch_size=3).images) == 3 and len(pipe().images) == 1
    assert all(labels is None for _, _, labels, _ in recorder.calls) and pipe.num_classes is None


def test_an_image_depends_on_its_seed_and_not_on_its_batch():
    pipe = make_pipe()
    batch = sample(pipe, [0, 1, 2], generator=seeds(5, 6, 7))
    alone = torch.cat([sample(pipe, [c], generator=seeds(5 + c)) for c in range(3)])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)  # kernels may sum in another order


def test_micro_batches_do_not_change_the_images():
    pipe = make_pipe()
    recorder = Recorder(pipe)
    whole = sample(pipe, [0, 1, 2, 3, 0], micro_batch_size=100)
    recorder.calls.clear()
    parts = sample(pipe, [0, 1, 2, 3, 0], micro_batch_size=2)
    assert [len(latent) for _, latent, *_ in recorder.calls] == [2, 2, 1] * 4
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert 1 <= make_pipe(sample_size=128, model_channels=64).default_micro_batch_size() < 10


def test_given_latents_replace_the_first_noise():
    pipe, latents = make_pipe(1), torch.randn(2, 1, 8, 8)
    z = torch.cat([torch.randn(1, 5, generator=g) for g in seeds(0, 1)])
    with torch.no_grad():
        expected = pipe.generator(latents, 0, z, torch.tensor([0, 1])).sample
    torch.testing.assert_close(sample(pipe, [0, 1], latents=latents), expected)


# --- outputs, precision, callbacks --------------------------------------------------------------------------------------


def test_output_types_hold_the_same_image():
    pipe = make_pipe()
    latent, pt, array, pil = (sample(pipe, [0, 1], output_type=kind) for kind in ("latent", "pt", "np", "pil"))
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0, :, :, 0] * 255).round().astype(np.uint8))
    assert torch.equal(pipe([0, 1], generator=seeds(0, 1), output_type="pt", return_dict=False)[0], pt)


def test_the_process_stays_in_float32_for_a_model_in_half_precision():
    pipe = make_pipe().to(dtype=torch.bfloat16)
    recorder = Recorder(pipe)
    assert sample(pipe, [0]).dtype == torch.float32
    assert {(latent.dtype, dtype) for _, latent, _, dtype in recorder.calls} == {(torch.bfloat16, torch.bfloat16)}


def test_a_callback_can_change_the_latents_and_stop_the_run():
    def erase(pipe, i, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else tensors

    assert sample(make_pipe(), [0, 1], callback_on_step_end=erase).abs().max() == 0
    steps = []

    def stop(pipe, i, t, tensors):
        steps.append((i, int(t)))
        pipe._interrupt = i == 1
        return tensors

    pipe = make_pipe()
    sample(pipe, [0], callback_on_step_end=stop)
    assert steps == [(0, 3), (1, 2)]
    assert len(sample(pipe, [0])) == 1 and not pipe.interrupt


# --- saving and loading -------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_with_its_steps_names_and_images(tmp_path):
    pipe = make_pipe(2)
    pipe.save_pretrained(tmp_path)
    loaded = DDGANPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.id2label == NAMES and len(loaded.scheduler) == 2
    assert torch.equal(sample(loaded, ["cat", 3]), sample(pipe, [0, 3]))


CHILD = """
import json, os, sys
if os.environ["PACKAGE"] == "absent":
    sys.modules["hf_diffusion"] = None  # import hf_diffusion raises ModuleNotFoundError
import numpy as np, torch
if os.environ["PACKAGE"] == "absent":
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
else:
    from hf_diffusion import DDGANPipeline
    pipe = DDGANPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(i) for i in range(2)]
np.save(sys.argv[2], pipe(["cat", 3], generator=generators, output_type="np").images)
print("SEEN", json.dumps([type(part).__module__ for part in (pipe, pipe.generator, pipe.scheduler)]))
"""


@pytest.mark.parametrize("package", ["absent", "present"])
def test_a_fresh_process_loads_it_with_and_without_the_package(tmp_path, package):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "pipe")
    env = os.environ | {
        "PACKAGE": package,
        "PYTHONPATH": str(Path(hf_diffusion.__file__).parents[1]) if package == "present" else "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", CHILD, str(tmp_path / "pipe"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    modules = json.loads(done.stdout.rsplit("SEEN ", 1)[1])
    root = "diffusers_modules.local." if package == "absent" else "hf_diffusion."
    assert all(module.startswith(root) for module in modules), modules
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), sample(pipe, ["cat", 3], output_type="np"))


# --- errors -------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "label too large": ({}, {"class_labels": [4]}, "class label 4 is not a class; this model knows 0 to 3"),
    "fractional label": ({}, {"class_labels": torch.tensor([0.5])}, "class label 0.5"),
    "misspelt name": ({}, {"class_labels": ["dgo"]}, "did you mean 'dog'.*cat, dog"),
    "ambiguous name": ({}, {"class_labels": ["crane"]}, r"stands for the classes \[2, 3\]"),
    "name without names": ({"id2label": None}, {"class_labels": ["cat"]}, "it has numbers only"),
    "labels without classes": ({"classes": None}, {"class_labels": [0]}, "without classes"),
    "labels missing": ({}, {}, "class_labels are missing; this model needs one of 0 to 3"),
    "no images": ({"classes": None}, {"batch_size": 0}, "at least 1"),
    "batch_size against labels": (
        {},
        {"class_labels": [0, 1], "batch_size": 3},
        "batch_size=3, but the labels make 2",
    ),
    "generators": ({}, {"class_labels": [0, 1], "generator": seeds(0)}, "1 generators were given for 2 images"),
    "latents": ({}, {"class_labels": [0], "latents": torch.zeros(1, 3, 8, 8)}, r"this call needs \(1, 1, 8, 8\)"),
    "output_type": ({}, {"class_labels": [0], "output_type": "jpeg"}, "unknown output_type 'jpeg'.*'latent'"),
    "callback inputs": (
        {},
        {"class_labels": [0], "callback_on_step_end_tensor_inputs": ["t"]},
        r"knows \['latents'\], not \['t'\]",
    ),
    "micro_batch_size": ({}, {"class_labels": [0], "micro_batch_size": 0}, "micro_batch_size must be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_what_is_allowed(mistake):
    options, call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make_pipe(**options)(**call)


def test_a_scheduler_of_another_process_is_refused():
    pipe = make_pipe()
    pipe.scheduler = DDIMEtaScheduler()
    with pytest.raises(ValueError, match="a DDIMEtaScheduler cannot sample from this network"):
        pipe([0])
