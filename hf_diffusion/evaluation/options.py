"""What a user says about an evaluation: measures, samples and data."""

from dataclasses import dataclass
from pathlib import Path

from hf_diffusion.config.options import UsageError, option
from hf_diffusion.sampling.options import SamplingOptions


# Those that a run's config.yaml records under the same names.
DATA_OPTIONS = (
    "dataset_name",
    "dataset_config_name",
    "train_data_dir",
    "image_column",
    "text_column",
    "label_column",
    "cache_dir",
)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(SamplingOptions):
    """What is measured, of how many samples, against which data.

    Sample i has the seed `seed` + i. The pipeline may also be a folder of image files, an .npz file
    with images (N, H, W[, C]) uint8 and labels (N,), or an .npy file of images.
    """

    # The pipeline knows which measures its model has beyond those of samples.
    metrics: tuple[str, ...] = option(
        ("fd", "kd", "pr"),
        "fd, kd, pr, label_accuracy of samples, and what the pipeline's model is measured by, such as bpd",
        group="measures",
    )
    num_images: int = option(1000, "samples to draw", at_least=1)
    seed: int = option(0, "seed of the first sample", at_least=0)
    class_labels: str = option(
        "auto",
        "numbers or names separated by commas, in double quotes where a name has one, taken in turn, 'all' or 'none'; "
        "auto is as frequent as in the data",
    )
    sweep: tuple[str, ...] = option(
        (), "NAME=A,B: measure every combination of the values of these sampling options", repeatable=True
    )
    features: str = option(
        "auto",
        "'pixels' (raw values), 'imagenet' (EfficientNet-Lite0, an extra of 17 MB), 'inception', 'trained' (a small "
        "classifier of the real images, trained once), a TorchScript or .safetensors file, or the folder of a saved "
        "classifier; auto is pixels where they are few enough, else trained",
    )
    inception_weights: Path | None = option(
        None, "inception-2015-12-05.pt (TorchScript), or weights for torch-fidelity"
    )
    classifier: str | None = option(None, "file or folder of a network for label_accuracy, as for features")
    model_images: int = option(64, "real samples, or seeds, for the measures of the model", at_least=1)
    bpd_steps: int | None = option(None, "timesteps of the bound; none is all", at_least=1)

    dataset_name: str | None = option(
        None, "the real data: a Hub id or 'digits'; none is what the pipeline's config.yaml names", group="real data"
    )
    dataset_config_name: str | None = option(None, "configuration of the data set")
    train_data_dir: str | None = option(None, "folder, .parquet or .zip file of real images")
    image_column: str | None = option(None, "column of the images")
    text_column: str | None = option(None, "column of the texts")
    # Text, where "none" means no labels.
    label_column: str = option("auto", "column of the classes; 'none' takes none")
    cache_dir: str | None = option(None, "folder for downloaded data sets")
    split: str = option("train", "split of the real data")
    max_reference_images: int | None = option(
        None, "evenly spaced real samples to measure against; none is all", at_least=1
    )
    reference_cache: Path | None = option(
        None, "folder for statistics of real data; none is one in the Hugging Face cache"
    )

    output_dir: Path = option(
        Path("evaluation"),
        "for metrics.json, the figures and the samples, from which an interrupted run goes on",
        group="results",
    )

    def validate(self) -> None:
        """UsageError for what is wrong without looking at the pipeline."""
        if not self.metrics:
            raise UsageError("--metrics is empty; name at least one, such as fd")
        swept = []
        for text in self.sweep:
            name, equals, values = text.partition("=")
            if not equals or not all((name, values)):
                raise UsageError(f"--sweep {text}: write NAME=A,B,..., such as num_inference_steps=10,50")
            given = dict(vars(self), **{text.partition("=")[0]: text for text in self.set_})
            if name in swept or given.get(name) is not None:
                raise UsageError(f"--sweep {text}: {name} is given twice; leave one out")
            swept.append(name)
