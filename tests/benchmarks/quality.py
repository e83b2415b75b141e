"""What the same minutes of training give: a plain diffusers script against a recipe from here.

python -m tests.benchmarks.quality --minutes 20 [--family ddpm] [--recipe cifar10_ddpm_cpu20.yaml]
    [--train_data_dir FILE.parquet] [--output_dir runs/quality] [--others torchcfm,smalldiffusion]
    [--features NETWORK.safetensors, and other options of hf-diffusion evaluate]

Plain is what the examples of diffusers do, at sizes for small images: UNet2DModel of 1.8 M
parameters, epsilon, cosine schedule, AdamW 4e-4, EMA, batch 128, flips where the recipe has them,
on all cores. Both are sampled by DDIM in 50 steps, if nothing else is said, and measured by
`hf-diffusion evaluate` with the same options. It takes more than twice the minutes, and once more
for each of the other packages, whose recipes are in other_packages.py.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from diffusers.training_utils import EMAModel

from hf_diffusion.commands.evaluate import EvaluateCommand
from hf_diffusion.data.image_data import ImageData
from hf_diffusion.data.images import load_images
from hf_diffusion.environment import environment
from hf_diffusion.evaluation.evaluate import plan, with_device
from hf_diffusion.evaluation.sweep import SweptPipeline
from tests.benchmarks.networks import networks
from tests.benchmarks.other_packages import OTHERS, Batches, why_missing


BATCH = 128
# Of which a part can be told; both are better when low.
DISTANCES = ("fd", "kd")
RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes"


def plain_pipeline(data: ImageData) -> DDIMPipeline:
    """The stock pipeline, before it has learned anything."""
    torch.manual_seed(0)
    channels, side, _ = data.sample_shape
    model, _ = networks(size=side, channels=channels, blocks=1)
    process = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return DDIMPipeline(model.eval(), DDIMScheduler.from_config(process.config))


def train_plain(data: ImageData, minutes: float, folder: Path) -> int:
    """Train for so many minutes and save a stock pipeline of the averages; the number of steps."""
    pipeline = plain_pipeline(data)
    model = pipeline.unet.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    process, steps = DDPMScheduler.from_config(pipeline.scheduler.config), 0
    end = time.perf_counter() + 60 * minutes
    for x_0 in Batches(data, BATCH):
        noise, t = torch.randn_like(x_0), torch.randint(1000, (len(x_0),))
        loss = F.mse_loss(model(process.add_noise(x_0, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        steps += 1
        if time.perf_counter() > end:
            break
    ema.copy_to(model.parameters())
    model.eval()
    pipeline.save_pretrained(folder)
    return steps


def train_ours(source: list[str], options: argparse.Namespace) -> int:
    """Train by the recipe, one process on all cores; the number of steps."""
    target = options.output_dir / "recipe"
    words = ["train", options.family, "--config", str(RECIPES / options.recipe), *source]
    words += ["--output_dir", str(target), "--overwrite_output_dir"]
    words += ["--max_train_minutes", str(options.minutes), "--sample_steps", "none", "--num_sample_images", "10"]
    subprocess.run([sys.executable, "-m", "hf_diffusion.cli", *words], check=True)
    return json.loads((target / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def train_other(name: str, data: ImageData, options: argparse.Namespace) -> int:
    """Train by the recipe of another package and write its samples; the number of steps."""
    steps, images = OTHERS[name](data, options.minutes, options.num_images)
    np.savez(options.output_dir / f"{name}.npz", images)
    return steps


def words_of_evaluate(samples: Path, is_pipeline: bool, source: list[str], options: argparse.Namespace) -> list[str]:
    """What `hf-diffusion evaluate` is called with."""
    words = [str(samples), *source, "--metrics", options.metrics, "--features", options.features]
    if is_pipeline:
        words += ["--num_images", str(options.num_images)]
        words += ["--num_inference_steps", str(options.num_inference_steps)]
    return [*words, *options.of_evaluate, "--output_dir", str(options.output_dir / f"evaluation_{samples.stem}")]


def check_plain(words: list[str], data: ImageData, folder: Path) -> None:
    """SystemExit for what a stock pipeline cannot be asked for or be measured by."""
    name = "hf-diffusion evaluate"
    asked = EvaluateCommand.parsed(words, name)
    plain_pipeline(data).save_pretrained(folder)
    try:
        asked = with_device(asked)
        plan(asked, SweptPipeline(asked))
    except ValueError as error:
        raise SystemExit(f"{name}: {error}") from error


def measured(samples: Path, source: list[str], options: argparse.Namespace) -> dict:
    """The measures of samples of a pipeline, or of images in a file."""
    words = words_of_evaluate(samples, samples.is_dir(), source, options)
    subprocess.run([sys.executable, "-m", "hf_diffusion.cli", "evaluate", *words], check=True)
    report = options.output_dir / f"evaluation_{samples.stem}" / "metrics.json"
    return json.loads(report.read_text())["results"][0]["measures"]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--family", default="ddpm", help="that the recipe is of (default: ddpm)")
    parser.add_argument("--recipe", default="fashion_mnist_ddpm_cpu20.yaml", help="of training/recipes")
    parser.add_argument("--train_data_dir", help="the recipe's images as a parquet file (default: from the Hub)")
    parser.add_argument("--features", default="trained", help="as in hf-diffusion evaluate")
    parser.add_argument("--metrics", default="fd,pr", help="as in hf-diffusion evaluate; the first is compared")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--num_inference_steps", type=int, default=50, help="of DDIM (default: 50)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quality"))
    parser.add_argument("--others", help=f"of {', '.join(OTHERS)}, those to compare with, too")
    options, options.of_evaluate = parser.parse_known_args(argv)
    if not (RECIPES / options.recipe).is_file():
        parser.error(f"--recipe {options.recipe}: not a file of {RECIPES}")
    if options.metrics.split(",")[0] not in DISTANCES:
        parser.error(f"--metrics {options.metrics}: begin with one of {', '.join(DISTANCES)}, which are compared")
    options.others = options.others.split(",") if options.others else []
    for name in options.others:
        if name not in OTHERS:
            parser.error(f"--others {name}: choose from {', '.join(OTHERS)}")
        if (why := why_missing(name)) is not None:
            parser.error(f"--others: {why}")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    recipe = yaml.safe_load((RECIPES / options.recipe).read_text())
    where = {"dataset_name": recipe["dataset_name"]}
    if options.train_data_dir is not None:
        where = {"train_data_dir": options.train_data_dir}
    source = [word for name, value in where.items() for word in (f"--{name}", value)]
    without_hub = ["--dataset_name", "none"] if options.train_data_dir is not None else []
    plain = options.output_dir / "plain"
    data = load_images(**where, random_flip=recipe.get("random_flip", False))
    # a mistake in these is met before the training
    check_plain(words_of_evaluate(plain, True, source, options), data, plain)
    steps = {
        "plain": train_plain(data, options.minutes, plain),
        "recipe": train_ours([*without_hub, *source], options),
    }
    measures = {name: measured(options.output_dir / name, source, options) for name in steps}
    for name in options.others:
        steps[name] = train_other(name, data, options)
        measures[name] = measured(options.output_dir / f"{name}.npz", source, options)
    values = {name: found[options.metrics.split(",")[0]]["value"] for name, found in measures.items()}
    report = {
        "minutes": options.minutes,
        "recipe": options.recipe,
        "steps": steps,
        "num_inference_steps": options.num_inference_steps,
        "measures": measures,
        "ratio": values["recipe"] / values["plain"],
        **environment(),
    }
    (options.output_dir / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    name = measures["plain"][options.metrics.split(",")[0]]["name"]
    print(f"{name}: plain diffusers {values['plain']:.3g}, {options.recipe} {values['recipe']:.3g}")
    print(f"{report['ratio']:.3f} of it")
    for other in options.others:
        print(f"{name}: {other} {values[other]:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
