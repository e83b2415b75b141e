"""DDGANPipeline: what it draws and what it asks the network; see also test_contract.py."""

import pytest
import torch

from hf_diffusion import DDIMEtaScheduler
from tests.pipelines.tiny import Recorder, sample, seeds
from tests.pipelines.tiny import make_ddgan as make_pipe


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_image_takes_one_call_of_the_network_a_step_each_with_a_latent_of_its_own(steps):
    pipe = make_pipe(steps)
    recorder = Recorder(pipe.generator)
    sample(pipe, [0, 1], num_inference_steps=None)
    assert [int(args[1]) for _, args, _ in recorder.calls] == list(range(steps - 1, -1, -1))
    latents = torch.stack([args[2] for _, args, _ in recorder.calls])
    assert latents.shape == (steps, 2, 5)
    assert len({round(float(value), 6) for value in latents.flatten()}) == latents.numel()


def test_a_sample_is_what_the_loop_written_by_hand_draws():
    pipe = make_pipe(4)
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(1, 1, 8, 8, generator=rng)
    with torch.no_grad():
        for t in (3, 2, 1, 0):
            z = torch.randn(1, 5, generator=rng)
            x_0 = pipe.generator(x, t, z, torch.tensor([2])).sample
            x = pipe.scheduler.sample_posterior(x_0, x, t, noise=torch.randn(x.shape, generator=rng))
    images = sample(pipe, [2], generator=torch.Generator().manual_seed(3), num_inference_steps=4)
    torch.testing.assert_close(images, x)


def test_another_number_of_steps_than_that_of_the_training_is_refused():
    pipe = make_pipe(4)
    for steps in (1, 3, 5, 50):
        with pytest.raises(ValueError, match=f"num_inference_steps={steps}, but this generator has learned 4 "):
            pipe([0], num_inference_steps=steps)
    assert len(pipe([0], num_inference_steps=4).images) == 1


def test_a_latent_changes_the_image():
    pipe = make_pipe()
    first_noise = torch.randn(2, 1, 8, 8)
    a, b = (sample(pipe, [0, 0], latents=first_noise, generator=seeds(n, n)) for n in (0, 1))
    assert not torch.allclose(a, b)


def test_the_latent_reaches_a_network_in_half_precision_in_its_dtype():
    pipe = make_pipe().to(dtype=torch.bfloat16)
    recorder = Recorder(pipe.generator)
    sample(pipe, [0])
    assert {args[2].dtype for _, args, _ in recorder.calls} == {torch.bfloat16}


def test_a_callback_can_look_at_what_each_step_predicts():
    pipe, seen, made = make_pipe(), [], []
    pipe.generator.register_forward_hook(lambda network, args, output: made.append(output[0]))

    def keep(pipe, i, t, tensors):
        seen.append(tensors["x_0"])
        return {}

    sample(pipe, [0, 1], callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["x_0"])
    assert len(seen) == 3 and all(torch.equal(x_0, output) for x_0, output in zip(seen, made))


def test_a_model_without_classes_is_called_without_labels():
    pipe = make_pipe(classes=None)
    recorder = Recorder(pipe.generator)
    assert len(pipe(batch_size=3).images) == 3 and len(pipe().images) == 1
    assert recorder.labels == [None] * 6 and pipe.num_classes is None


def test_a_scheduler_of_another_process_is_refused():
    pipe = make_pipe()
    pipe.scheduler = DDIMEtaScheduler()
    with pytest.raises(ValueError, match="a DDIMEtaScheduler cannot sample from this network"):
        pipe([0])
