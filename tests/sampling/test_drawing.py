"""The one place that draws: seeds, labels, kinds of samples, options, finite values."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

from hf_diffusion.config.options import UsageError
from hf_diffusion.sampling.drawing import call_options, check_call, choose_labels, draw, draw_floats, draw_in_batches
from hf_diffusion.sampling.options import SamplingOptions
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler
from tests.pipelines.tiny import make_classifier_free


def by_hand(seeds, labels) -> np.ndarray:
    """What `Stripes` makes of seeds and labels, as 8-bit images (B, 2, 3, 1)."""
    noise = torch.stack([torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    images = 0.5 + 0.1 * noise + 0.05 * torch.tensor(labels).view(-1, 1, 1, 1)
    return (images * 255).round().clamp(0, 255).byte().numpy()


def test_a_sample_is_decided_by_its_own_seed_and_label(stripes):
    images = draw(stripes, [4, 9, 4], [2, 0, 1])
    np.testing.assert_array_equal(images, by_hand([4, 9, 4], [2, 0, 1]))
    np.testing.assert_array_equal(draw(stripes, [9], None), images[1:2])
    np.testing.assert_array_equal(draw_in_batches(stripes, [4, 9, 4], [2, 0, 1], batch_size=2), images)


def test_floats_are_what_is_rounded_to_images(stripes):
    floats = draw_floats(stripes, [0, 1], [0, 2])
    assert floats.dtype == np.float32 and len(np.unique(floats)) == floats.size
    np.testing.assert_array_equal((floats * 255).round().astype(np.uint8), draw(stripes, [0, 1], [0, 2]))


def test_the_progress_bar_is_silent_unless_asked_for_and_is_given_back(stripes):
    draw(stripes, [0], None)
    draw(stripes, [0], None, progress="samples 1-1 of 1")
    assert [call["bar"]["disable"] for call in stripes.calls] == [True, False]
    assert stripes.calls[1]["bar"]["desc"] == "samples 1-1 of 1"
    assert stripes._progress_bar_config == {"desc": "mine"}
    with pytest.raises(TypeError):
        draw(stripes, [0], None, nonsense=1)
    assert stripes._progress_bar_config == {"desc": "mine"}


def test_what_is_not_finite_is_refused_with_its_seeds(stripes):
    latents = torch.zeros(4, 1, 2, 3)
    latents[1, 0, 0, 0], latents[3, 0, 1, 2] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinity for 2 of 4 samples \(seeds \[11, 13\]"):
        draw(stripes, range(10, 14), None, latents=latents)


class Points(DiffusionPipeline):
    """Points (B, 2) far outside [0, 1], as tensors in half precision, in a tuple."""

    def __init__(self):
        super().__init__()
        self.register_to_config()

    def __call__(self, batch_size: int, generator):
        return (torch.tensor([[1000.0, -0.5]] * batch_size, dtype=torch.bfloat16),)


def test_what_is_no_image_stays_float32_as_it_is():
    points = draw(Points(), [0, 1, 2], None)
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, [[1000, -0.5]] * 3)


def test_options_are_those_that_the_pipeline_says_or_else_those_of_its_signature(stripes):
    check_call(stripes, True, {"num_inference_steps": 2})
    with pytest.raises(
        UsageError, match="--jitter: Stripes does not take it; leave it out, it takes num_inference_steps"
    ):
        check_call(stripes, True, {"jitter": 0.1})
    stripes.sampling_options = ("jitter",)
    check_call(stripes, True, {"jitter": 0.1})
    with pytest.raises(UsageError, match="--num_inference_steps: Stripes does not take it"):
        check_call(stripes, True, {"num_inference_steps": 2})


def test_pipelines_that_need_more_than_noise_and_classes_are_refused():
    with pytest.raises(UsageError, match="Points has no classes; leave the labels out"):
        check_call(Points(), True, {})
    check_call(Points(), False, {})

    class TextToImage(DiffusionPipeline):
        def __call__(self, prompt: str, generator=None):
            raise AssertionError("never called")

    with pytest.raises(UsageError, match="TextToImage does not sample from noise or classes alone"):
        check_call(TextToImage(), False, {})


def test_options_of_the_user_become_arguments_of_the_annotated_type(stripes):
    stripes.sampling_options = ("num_inference_steps", "jitter")
    options = SamplingOptions(pipeline="x", num_inference_steps=3, set_=("jitter=1e-3",))
    assert call_options(stripes, options) == {"num_inference_steps": 3, "jitter": 1e-3}
    assert call_options(stripes, SamplingOptions(pipeline="x")) == {}
    for text, sentence in (
        ("jitter=much", "--set jitter: got 'much'; allowed: a number"),
        ("eta=1", "--set eta=1: write NAME=VALUE, with NAME one of those of Stripes: num_inference_steps, jitter"),
        ("jitter", "--set jitter: write NAME=VALUE"),
    ):
        with pytest.raises(UsageError, match=sentence):
            call_options(stripes, SamplingOptions(pipeline="x", set_=(text,)))


def test_a_process_of_few_steps_is_drawn_in_all_of_them_where_nobody_asks_for_fewer():
    pipe = make_classifier_free(LinearDDPMScheduler(num_train_timesteps=20))
    assert call_options(pipe, SamplingOptions(pipeline="x")) == {"num_inference_steps": 20}
    assert call_options(pipe, SamplingOptions(pipeline="x", num_inference_steps=4)) == {"num_inference_steps": 4}
    assert call_options(make_classifier_free(LinearDDPMScheduler()), SamplingOptions(pipeline="x")) == {}


def test_classes_are_asked_for_by_name_or_number_and_names_go_first(stripes):
    assert choose_labels(stripes, "2, cat,1") == [0, 1, 1]
    assert choose_labels(stripes, "all") == choose_labels(stripes) == [0, 1, 2]
    assert choose_labels(stripes, "none") is None
    with pytest.raises(UsageError, match="--class_labels dog: 'dog' is not a class"):
        choose_labels(stripes, "dog")
    assert choose_labels(Points()) is choose_labels(Points(), "none") is None
    for words in ("0", "all"):
        with pytest.raises(UsageError, match=f"--class_labels {words}: this pipeline has no classes; leave it out"):
            choose_labels(Points(), words)


def test_a_class_may_be_called_none_or_have_a_comma_in_its_name(stripes):
    stripes.id2label = {0: "none", 1: "a,b", 2: "a"}
    assert choose_labels(stripes, '"none", "a,b"') == [0, 1] and choose_labels(stripes, "0,a") == [0, 2]
    assert choose_labels(stripes, "a,b") == [1]
    with pytest.raises(UsageError, match=r"--class_labels none: a class has this name.*write '\"none\"'.*number 0"):
        choose_labels(stripes, "none")
    with pytest.raises(UsageError, match=r"'b' is not a class; a name with a comma is written in double quotes"):
        choose_labels(stripes, "a,b,none")
    stripes.id2label = {0: "a", 1: "b", 2: "a,b"}
    assert choose_labels(stripes, "a,b") == [0, 1] and choose_labels(stripes, '"a,b"') == [2]
    stripes.id2label = {0: "auto", 1: " x", 2: "3"}
    assert choose_labels(stripes, "auto") == [0, 1, 2] and choose_labels(stripes, '"auto"," x",3') == [0, 1, 2]
    with pytest.raises(UsageError, match='--class_labels "a: a quote is not closed'):
        choose_labels(stripes, '"a')


def test_a_stock_pipeline_that_cannot_return_bfloat16_says_so_in_a_sentence():
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    pipe = DDIMPipeline(unet, DDIMScheduler())
    with pytest.raises(UsageError, match="--dtype bf16: DDIMPipeline cannot return images of this precision; give "):
        draw(pipe.to(torch.bfloat16), [0], None, num_inference_steps=1)
    assert draw(pipe.to(torch.float32), [0], None, num_inference_steps=1).shape == (1, 8, 8, 3)
