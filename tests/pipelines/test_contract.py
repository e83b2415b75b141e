"""What every public pipeline promises, whatever its method; a new one is found and proved here.

The pipelines come from the package's public list. Each needs a tiny instance in
tests/pipelines/tiny.py.
"""

import hashlib
import importlib
import inspect

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hf_diffusion import ClassifierFreeGuidancePipeline, ClassifierGuidancePipeline
from tests.pipelines.tiny import NAMES, TINY, Recorder, public_pipelines, seeds


every_pipeline = pytest.mark.parametrize("cls", public_pipelines(), ids=lambda cls: cls.__name__)


def make(cls: type[DiffusionPipeline], **options) -> DiffusionPipeline:
    if cls not in TINY:
        pytest.fail(f"{cls.__name__} is public, but tests/pipelines/tiny.py makes no tiny instance of it")
    return TINY[cls].make(**options)


def draw(pipe: DiffusionPipeline, numbers: list[int], **options) -> Tensor:
    """One sample for each number, which is its seed and, modulo 3, its class."""
    what = {"batch_size": len(numbers)} if pipe.num_classes is None else {"class_labels": [n % 3 for n in numbers]}
    call = {**what, **TINY[type(pipe)].options, "generator": seeds(*numbers), "output_type": "latent"}
    return pipe(**{**call, **options}).images


def assert_same(samples: Tensor, expected: Tensor) -> None:
    """Equal but for the order in which kernels sum over batches of other sizes."""
    torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-5)


@every_pipeline
def test_one_seed_gives_one_sample_in_any_batch_and_micro_batch(cls):
    pipe = make(cls)
    whole = draw(pipe, [5, 6, 7, 8, 9], micro_batch_size=100)
    assert whole.shape == (5, *pipe.sample_shape) and whole.flatten(1).std(0).min() > 1e-3
    assert_same(torch.cat([draw(pipe, [n]) for n in (5, 6, 7, 8, 9)]), whole)
    assert_same(draw(pipe, [9, 5, 7]), whole[[4, 0, 2]])
    recorder = Recorder(pipe.drawing_network)
    assert_same(draw(pipe, [5, 6, 7, 8, 9], micro_batch_size=2), whole)
    assert max(recorder.rows) == 2


@every_pipeline
def test_one_generator_for_all_is_reproducible(cls):
    pipe = make(cls)
    first, again, other = (draw(pipe, [0, 0], generator=seeds(n)[0]) for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other) and not torch.allclose(first[0], first[1])


@every_pipeline
def test_names_numbers_and_arrays_name_the_same_classes(cls):
    pipe = make(cls)
    assert pipe.id2label == NAMES and pipe.num_classes == 4
    by_number = draw(pipe, [0, 1])
    for labels in (["cat", "dog"], [0, "dog"], (0, 1), torch.tensor([0, 1]), np.array([0, 1])):
        assert torch.equal(draw(pipe, [0, 1], class_labels=labels), by_number)
    repeated = draw(pipe, [0, 1], class_labels="dog", num_images_per_label=2)
    assert torch.equal(repeated, draw(pipe, [0, 1], class_labels=[1, 1]))
    assert not torch.allclose(repeated[0], by_number[0])  # another class, the same seed
    assert torch.equal(repeated[1], by_number[1])


@every_pipeline
def test_given_latents_replace_the_first_noise(cls):
    pipe, generators = make(cls), seeds(0, 1)
    pipe.scheduler.set_timesteps(3)
    latents = torch.cat([torch.randn(1, *pipe.sample_shape, generator=generator) for generator in generators])
    assert torch.equal(pipe.prepare_latents(2, seeds(0, 1), None), latents * pipe.scheduler.init_noise_sigma)
    assert torch.equal(draw(pipe, [0, 1], generator=generators, latents=latents), draw(pipe, [0, 1]))


@every_pipeline
def test_a_callback_sees_every_step_and_can_change_the_latents(cls):
    pipe, seen = make(cls), []

    def erase_at_the_end(pipe, i, t, tensors):
        seen.append((i, float(t)))
        assert list(tensors) == ["latents"] and tensors["latents"].shape == (2, *pipe.sample_shape)
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}

    assert draw(pipe, [0, 1], callback_on_step_end=erase_at_the_end).abs().max() == 0
    # a step of second order calls the network twice; it is named by the first call
    steps = pipe.scheduler.timesteps[:: pipe.scheduler.order].tolist()
    assert seen == list(enumerate(steps)) and pipe.num_timesteps == len(seen) == 3
    unheard = draw(pipe, [0, 1], callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=[])
    assert torch.equal(unheard, draw(pipe, [0, 1]))


@every_pipeline
def test_a_callback_can_stop_the_run(cls):
    pipe, kept = make(cls), []

    def stop(pipe, i, t, tensors):
        kept.append(tensors["latents"])
        pipe._interrupt = i == 1
        return {}

    assert torch.equal(draw(pipe, [0], callback_on_step_end=stop), kept[1]) and len(kept) == 2
    draw(pipe, [0])
    assert not pipe.interrupt


@every_pipeline
def test_output_types_hold_the_same_samples(cls):
    pipe = make(cls)
    latent, pt, array, pil = (draw(pipe, [0, 1], output_type=kind) for kind in ("latent", "pt", "np", "pil"))
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0, :, :, 0] * 255).round().astype(np.uint8))
    what = {"class_labels": [0, 1], "generator": seeds(0, 1), "output_type": "pt"}
    assert torch.equal(pipe(**what, **TINY[cls].options, return_dict=False)[0], pt)


@every_pipeline
def test_samples_need_not_be_square(cls):
    pipe = make(cls, sample_size=(4, 8))
    assert pipe.sample_shape == (1, 4, 8) and draw(pipe, [0]).shape == (1, 1, 4, 8)
    assert draw(pipe, [0], output_type="pil")[0].size == (8, 4)


@every_pipeline
def test_the_process_stays_in_float32_for_a_network_in_half_precision(cls):
    pipe = make(cls)
    exact = draw(pipe, [0, 1])
    pipe.to(dtype=torch.bfloat16)
    recorder = Recorder(pipe.drawing_network)
    samples = draw(pipe, [0, 1])
    assert samples.dtype == torch.float32 and {args[0].dtype for _, args, _ in recorder.calls} == {torch.bfloat16}
    assert not torch.equal(samples, exact) and (samples - exact).abs().mean() < 0.1


@every_pipeline
def test_a_pipeline_made_of_another_has_its_parts_names_and_samples(cls):
    pipe = make(cls)
    other = cls.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert all(other.components[name] is part for name, part in pipe.components.items())
    assert other.id2label == NAMES and torch.equal(draw(other, [0, 1]), draw(pipe, [0, 1]))


@every_pipeline
def test_what_it_says_of_itself_is_so(cls):
    pipe = make(cls)
    arguments = inspect.signature(cls.__call__).parameters
    assert cls.sampling_options and set(cls.sampling_options) <= set(arguments)
    assert all(arguments[name].default is not inspect.Parameter.empty for name in cls.sampling_options)
    for place in cls.measures.values():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert pipe.sample_shape == (1, 8, 8) and pipe.image_size == (8, 8) and pipe.null_class_id in (None, 4)


@every_pipeline
@pytest.mark.parametrize("classes", [4, None])
def test_its_example_call_draws_what_a_card_shows(cls, classes):
    pipe = make(cls, classes=classes)
    call = pipe.example_call()
    if hasattr(pipe, "example_prompts") and pipe.num_classes is not None:
        assert call["prompt"] == ["a cat", "a dog", "a crane", "a crane"]
    elif pipe.num_classes is not None:
        assert call["class_labels"] == ["cat", "dog", 2, 3]  # two classes are cranes, so their numbers name them
    images = pipe(**call).images
    assert [image.size for image in images] == [(8, 8)] * 4


@pytest.mark.parametrize("name", [*(cls.__name__ for cls in public_pipelines()), "points", "points-in-few-steps"])
def test_a_fresh_process_draws_the_same_without_the_package_and_with_it(name, outcome):
    assert outcome.references[name].std() > 0.02
    forms = {
        "trusted folder": "diffusers_modules.local.",
        "trusted hub": "diffusers_modules.local.",
        "saved again": "diffusers_modules.local.",
        "own folder": "hf_diffusion.",
        "own hub": "hf_diffusion.",
        "trusted, package present, hub": "diffusers_modules.local.",
    }
    for form, home in forms.items():
        np.testing.assert_array_equal(outcome.images(f"{name}: {form}"), outcome.references[name], err_msg=form)
        found, made = outcome.seen[f"classes of {name}: {form}"], outcome.classes[name]
        assert {part: own for part, (_, own, _) in found.items()} == {part: own for part, (_, own, _) in made.items()}
        for part, (module, _, code) in found.items():
            origin, _, package_code = made[part]
            if not origin.startswith("hf_diffusion."):
                assert module.split(".")[0] == origin.split(".")[0] in ("diffusers", "transformers"), (form, part)
                continue
            # ours: by the package's code, or by that of the folder and nothing else
            shipped = outcome.work / name / part / f"{module.rpartition('.')[2]}.py"
            wanted = package_code if home == "hf_diffusion." else hashlib.sha256(shipped.read_bytes()).hexdigest()
            assert module.startswith(home) and code == wanted, (form, part, module)
    ours = [part for part, (module, *_) in outcome.classes[name].items() if module.startswith("hf_diffusion.")]
    assert {"", "scheduler"} <= set(ours)
    assert "trust_remote_code=True" in outcome.seen[f"{name}: untrusted hub"]


@every_pipeline
def test_numpy_numbers_are_numbers(cls):
    pipe = make(cls)
    numbers = {
        "num_inference_steps": np.int64(3),
        "micro_batch_size": np.int64(1),
        "num_images_per_label": np.int64(1),
    }
    assert torch.equal(draw(pipe, [0, 1], **numbers), draw(pipe, [0, 1], micro_batch_size=1))


@pytest.mark.parametrize(
    "cls, unguided", [(ClassifierFreeGuidancePipeline, 1.0), (ClassifierGuidancePipeline, 0.0)], ids=lambda x: str(x)
)
def test_a_callback_sets_the_guidance_of_the_steps_that_follow(cls, unguided):
    pipe = make(cls)

    def setting(scale, after):
        def callback(pipe, i, t, tensors):
            if i == after:
                pipe._guidance_scale = scale
            return {}

        return callback

    guided, plain = draw(pipe, [0, 1]), draw(pipe, [0, 1], guidance_scale=unguided)
    off = draw(pipe, [0, 1], callback_on_step_end=setting(unguided, after=0))
    assert not torch.equal(off, guided) and not torch.equal(off, plain)
    on = draw(pipe, [0, 1], guidance_scale=unguided, callback_on_step_end=setting(2.0, after=0))
    assert not torch.equal(on, guided) and not torch.equal(on, plain)
    # After the last step nothing follows.
    assert torch.equal(draw(pipe, [0, 1], callback_on_step_end=setting(unguided, after=2)), guided)
    with pytest.raises(ValueError, match="guidance_scale must be .* not nan"):
        draw(pipe, [0, 1], callback_on_step_end=setting(float("nan"), after=0))
