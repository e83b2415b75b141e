"""The weights in the repository load and draw, with the package and with the code beside them.

`python -m tests.cards.test_shipped_folders` replaces that code by the present one.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from hf_diffusion import ClassifierFreeGuidancePipeline, ConsistencyPipeline


FOLDERS = Path(__file__).resolve().parents[2] / "model_cards"
SHIPPED = {
    "fashion_mnist_ddpm": (ClassifierFreeGuidancePipeline, {"num_inference_steps": 5, "guidance_scale": 1.5}),
    "fashion_mnist_few_calls": (ConsistencyPipeline, {}),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_package_and_the_shipped_code_draw_the_same_garments_from_the_weights_in_the_repository(name):
    pipeline, options = SHIPPED[name]

    def drawn(pipe) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        labels = ["Trouser", "Trouser", "Bag", "Bag"]
        return pipe(labels, generator=generators, output_type="np", **options).images

    ours = drawn(pipeline.from_pretrained(FOLDERS / name))
    np.testing.assert_array_equal(
        ours, drawn(DiffusionPipeline.from_pretrained(FOLDERS / name, trust_remote_code=True))
    )
    # both legs of trousers leave the sides of the image black, and a bag does not
    sides = ours[:, 10:24, [1, 2, 3, 24, 25, 26]].mean(axis=(1, 2, 3))
    assert sides[:2].max() < 0.1 < sides[2:].min(), sides


def present_code(name: str) -> dict[str, bytes]:
    """The .py files that saving the pipeline writes now, by their place in the folder."""
    with tempfile.TemporaryDirectory() as target:
        SHIPPED[name][0].from_pretrained(FOLDERS / name).save_pretrained(target)
        return {str(path.relative_to(target)): path.read_bytes() for path in sorted(Path(target).rglob("*.py"))}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_code_is_what_the_package_would_save_now(name):
    shipped = {str(path.relative_to(FOLDERS / name)): path.read_bytes() for path in (FOLDERS / name).rglob("*.py")}
    assert shipped == present_code(name), "run: python -m tests.cards.test_shipped_folders"


if __name__ == "__main__":
    for name in SHIPPED:
        present = present_code(name)
        for path in (FOLDERS / name).rglob("*.py"):
            path.unlink()
        for place, code in present.items():
            (FOLDERS / name / place).write_bytes(code)
