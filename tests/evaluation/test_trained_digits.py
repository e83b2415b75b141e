"""DDIM's promises on a trained model, arXiv:2010.02502: Table 1, consistency, inversion, paths.

The model is that of training/recipes/digits.yaml with what the paper trained, a prediction of the
noise on the linear schedule, and evenly spaced ("leading") timesteps. Distances are Frechet
distances of pixels to all 1,797 digits: the features of a classifier of digits do not see the noise
that too few ancestral steps leave (there fixed_small is level with DDIM at 10 steps and ahead of it
at 20). Figures in docstrings: one CPU core, seed 0, as the test computes them.
"""

from pathlib import Path

import numpy as np
import pytest

from hf_diffusion import ClassifierFreeGuidancePipeline, DDIMEtaScheduler, LinearDDPMScheduler
from hf_diffusion.data.images import load_images
from hf_diffusion.evaluation.determinism import consistency, measure_inversion
from hf_diffusion.evaluation.feature_networks import load_feature_network
from hf_diffusion.evaluation.inputs import proportional_labels
from hf_diffusion.evaluation.measures import Measure, measure_samples
from hf_diffusion.evaluation.model_measures import ModelMeasureOptions
from hf_diffusion.evaluation.reference import reference_statistics
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.sampling.interpolation import interpolate
from hf_diffusion.training import train_ddpm


pytestmark = pytest.mark.slow
RECIPE = Path(__file__).resolve().parents[2] / "training" / "recipes" / "digits.yaml"
SAMPLERS = {
    "ddim": (DDIMEtaScheduler, {"eta": 0.0}),
    "posterior": (LinearDDPMScheduler, {"variance_type": "fixed_small"}),  # eta = 1 in the paper
    "sigma hat": (LinearDDPMScheduler, {"variance_type": "fixed_large"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("digits")
    flags = "--prediction_type epsilon --beta_schedule linear --sample_steps none --num_sample_images 10 --seed 0"
    assert (
        train_ddpm.main(
            ["--config", str(RECIPE), "--output_dir", str(output), "--overwrite_output_dir", *flags.split()]
        )
        == 0
    )
    return output


@pytest.fixture
def pipeline(folder) -> ClassifierFreeGuidancePipeline:
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    data = load_images("digits")
    network = load_feature_network("pixels", data.sample_shape)
    return data, network, reference_statistics(data, network, tmp_path_factory.mktemp("cache"))


def distance(pipeline, judge, sampler: str, steps: int, count: int) -> Measure:
    """Frechet distance of the seeds 0 to count - 1, classes as frequent as in the data."""
    data, network, reference = judge
    cls, changes = SAMPLERS[sampler]
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, timestep_spacing="leading", **changes)
    labels = proportional_labels(data.labels, count)
    images = draw(pipeline, range(count), labels, num_inference_steps=steps)
    chunks = [(np.arange(count), images, np.array(labels))]
    return measure_samples(chunks, count, network, reference, ["fd"], all_labels=labels)["fd"]


def test_ddim_is_better_than_strided_ddpm_at_few_steps_and_the_less_so_the_more_steps(pipeline, judge):
    """N = 300, error 0.02 to 0.11:

    | steps | ddim | posterior | sigma hat |
    |---|---|---|---|
    | 10 | 0.65 | 1.08 | 2.51 |
    | 20 | 0.55 | 0.76 | 1.08 |
    | 50 | 0.53 | 0.60 | 0.67 |
    """
    found = {(s, n): distance(pipeline, judge, s, n, 300).value for n in (10, 20, 50) for s in SAMPLERS}
    ratios = {s: [found[s, n] / found["ddim", n] for n in (10, 20, 50)] for s in ("posterior", "sigma hat")}
    for sampler, (at_10, at_20, at_50) in ratios.items():
        assert at_10 > at_20 > at_50, (sampler, found)
    assert ratios["posterior"][0] > 1.3 and ratios["posterior"][1] > 1.1, found
    assert ratios["sigma hat"][0] > 2 and ratios["sigma hat"][1] > 1.4 and ratios["sigma hat"][2] > 1.05, found
    assert all(found["sigma hat", n] > found["posterior", n] for n in (10, 20)), found


def test_with_all_steps_ddpm_is_as_good_as_ddim(pipeline, judge):
    """N = 150: 0.91 ± 0.12 for DDPM with 1000 steps of either variance, 0.88 ± 0.08 for DDIM.

    The paper's DDPM is ahead there (3.17 against 4.04 on CIFAR-10, N = 50,000); 150 digits cannot
    tell the two apart.
    """
    ddpm, ddim = distance(pipeline, judge, "posterior", 1000, 150), distance(pipeline, judge, "ddim", 50, 150)
    assert abs(ddpm.value - ddim.value) < 2.5 * (ddpm.error**2 + ddim.error**2) ** 0.5, (ddpm, ddim)


def test_images_of_one_noise_keep_their_content_over_step_counts(pipeline):
    """Differences to 200 steps, in [0, 1]."""
    pipeline.scheduler = DDIMEtaScheduler.from_config(pipeline.scheduler.config)
    found = consistency(pipeline, range(64), [i % 10 for i in range(64)], [10, 20, 50, 200])
    assert found[10] > found[20] > found[50], found
    assert found[10] < 0.25 * found[0] and found[50] < 0.06 * found[0], found


def test_real_images_come_back_from_their_noise_the_better_the_more_steps(pipeline, judge):
    """Squared error a dimension of images in [0, 1], as Table 2 of the paper."""
    measured = measure_inversion(pipeline, judge[0], ModelMeasureOptions(steps=(10, 20, 50, 100)))
    found = {n: measured.measures[f"inversion_{n}"].value for n in (10, 20, 50, 100)}
    assert found[10] > 2 * found[20] > 4 * found[50] > 4 * found[100], found
    assert found[10] < 0.02 and found[100] < 0.001, found


def test_between_two_noises_of_a_class_lie_images_of_it(pipeline):
    """A classifier of real digits names the middles of paths as often as their ends."""
    from hf_diffusion.training.demo_digits import judge as names_right

    pipeline.scheduler = DDIMEtaScheduler.from_config(pipeline.scheduler.config)
    pairs, labels = [(2 * row, 2 * row + 1) for row in range(40)], [row % 10 for row in range(40)]
    images = interpolate(pipeline, pairs, 5, labels, num_inference_steps=20).reshape(40, 5, 8, 8)
    ends, middles = (names_right(images[:, column], np.array(labels)) for column in (0, 2))
    assert ends > 0.85 and middles > 0.85, (ends, middles)
    distances = np.abs(np.diff(images.astype(int), axis=1)).mean((2, 3))  # (40, 4): no step is a jump
    assert distances.max(1).mean() < 2.5 * distances.mean()
