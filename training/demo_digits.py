"""`make demo`: train a class-conditional model on handwritten digits, draw from it, load it in a
new process, judge it.

The judge is a support vector classifier of scikit-learn that has only seen real digits: the share
of samples that it names as they were asked for.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


# One thread for so small a network: on two quiet cores a second one brings a quarter more (890
# against 725 images/s), and on busy ones the two wait for each other most of the time (50 to 300
# images/s).
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
OUTPUT = Path("runs/demo")
PER_CLASS = 50

# Run by a new interpreter: stock diffusers and the folder, nothing else of this package is named.
LOAD_AND_DRAW = """
import sys, numpy as np, torch
from diffusers import DiffusionPipeline
folder, target, per_class = sys.argv[1], sys.argv[2], int(sys.argv[3])
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
labels = [digit for digit in range(10) for _ in range(per_class)]
generator = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
images = pipe(class_labels=labels, generator=generator, num_inference_steps=50, output_type="np").images
np.savez(target, images=(images * 255).round().astype(np.uint8), labels=np.array(labels))
"""


def train(output: Path) -> None:
    from hf_diffusion.training.train_ddpm import main as train_ddpm

    status = train_ddpm(
        [
            "--config",
            os.path.relpath(HERE / "recipes" / "digits.yaml"),
            "--output_dir",
            str(output),
            "--overwrite_output_dir",
        ]
    )
    if status:
        raise SystemExit(status)


def draw_in_a_new_process(folder: Path, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Load the saved folder with the stock DiffusionPipeline in a fresh interpreter and sample:
    uint8 (N, 8, 8), labels (N,).
    """
    target = folder / "demo_samples.npz"
    subprocess.run([sys.executable, "-c", LOAD_AND_DRAW, str(folder), str(target), str(per_class)], check=True)
    with np.load(target) as arrays:
        return arrays["images"].reshape(-1, 8, 8), arrays["labels"]


def judge(images: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images (N, 8, 8) in [0, 255] that a classifier of real digits names as asked."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    real, digits = load_digits(return_X_y=True)
    # scikit-learn's own example; 16 grey levels, 64 pixels
    classifier = SVC(gamma=0.001).fit(real, digits)
    return float((classifier.predict(images.reshape(len(images), 64) * (16 / 255)) == labels).mean())


def main() -> int:
    began = time.perf_counter()
    train(OUTPUT)
    trained = time.perf_counter()
    images, labels = draw_in_a_new_process(OUTPUT, PER_CLASS)
    from hf_diffusion.figures.grid import labelled_grid
    from hf_diffusion.files import write_shown

    first = np.concatenate([np.flatnonzero(labels == digit)[:8] for digit in range(10)])
    grid = labelled_grid(images[first], columns=8, row_labels=[str(digit) for digit in range(10)])
    write_shown(OUTPUT / "demo_grid", grid)
    accuracy = judge(images, labels)
    drawn = time.perf_counter() - trained
    print(
        f"\nA classifier of real digits names {accuracy:.1%} of {len(images)} samples as asked (no guidance, 50 "
        f"steps, seeds 0 to {len(images) - 1}).\n"
        f"Training took {trained - began:.0f} s, loading in a new process and sampling {drawn:.0f} s.\n\n"
        f"  the grid, one row a digit     {OUTPUT / 'demo_grid.png'}\n"
        f'  the pipeline                  {OUTPUT}  (DiffusionPipeline.from_pretrained("{OUTPUT}", '
        "trust_remote_code=True))\n"
        f"  its card, curve and samples   {OUTPUT / 'README.md'}, {OUTPUT / 'loss_curve.png'}, "
        f"{OUTPUT / 'samples'}\n\n"
        f"  more of them: {VENV_BIN / 'hf-diffusion'} sample {OUTPUT} --class_labels 3,7 --num_images 64 --output "
        "sevens_and_threes.png"
    )
    return 0


VENV_BIN = Path(sys.executable).parent


if __name__ == "__main__":
    sys.exit(main())
