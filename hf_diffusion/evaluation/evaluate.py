"""One evaluation: everything is loaded and checked, then every setting and the model measured."""

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from diffusers import DiffusionPipeline

from hf_diffusion.config.options import UsageError
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.waiting import LONGEST_WAIT
from hf_diffusion.environment import environment
from hf_diffusion.evaluation.image_files import FileImages, is_image_source, load_image_files
from hf_diffusion.evaluation.inputs import (
    class_names,
    load_real_data,
    number_classes_alike,
    prompts_of,
    proportional_labels,
    sample_shape,
)
from hf_diffusion.evaluation.judge import Judge
from hf_diffusion.evaluation.measures import METRICS, Evaluation
from hf_diffusion.evaluation.model_measures import (
    ModelMeasure,
    ModelMeasureOptions,
    find_model_measure,
    model_measures,
)
from hf_diffusion.evaluation.options import EvaluationOptions
from hf_diffusion.evaluation.report import write_metrics
from hf_diffusion.evaluation.sample_store import Samples, draw_two, sample_images
from hf_diffusion.evaluation.sweep import SweptPipeline
from hf_diffusion.files import remove_partials
from hf_diffusion.sampling.drawing import check_call, choose_labels


# Of consistency and inversion, where no numbers of steps are swept.
DEFAULT_STEPS = (10, 25, 50)


@dataclass
class Report:
    """What an evaluation has found so far; metrics.json in `folder` grows with it.

    `of_samples` has an entry for each setting, `of_model` one for each measure of the model.
    """

    folder: Path
    data_name: str
    count: int
    of_samples: list[dict[str, Any]] = field(default_factory=list)
    of_model: list[dict[str, Any]] = field(default_factory=list)

    def add_samples(self, setting: dict[str, Any], evaluation: Evaluation, seconds: float | None) -> None:
        """Add the measures of one setting, with the seconds that a sample took."""
        self.of_samples.append(_entry(setting, evaluation, seconds))
        self.write()

    def add_model(self, evaluation: Evaluation) -> None:
        """Add one measure of the model."""
        self.of_model.append(_entry({}, evaluation, None))
        self.write()

    def write(self) -> None:
        """Write metrics.json as far as it is known."""
        if PartialState().is_main_process:
            report = {"results": self.of_samples, "model": self.of_model, "environment": environment()}
            write_metrics(self.folder / "metrics.json", report)


def evaluate(options: EvaluationOptions) -> Report:
    """Measure a pipeline, or images in files; all processes call it together.

    ValueError, before anything is drawn, for what cannot be measured or sampled.
    """
    options = with_device(options)
    if PartialState().is_main_process:
        remove_partials(options.output_dir)
    if is_image_source(options.pipeline):
        return evaluate_file(options, load_image_files(Path(options.pipeline)))
    return evaluate_pipeline(options, SweptPipeline(options))


def with_device(options: EvaluationOptions) -> EvaluationOptions:
    """The options with the device that they leave open."""
    # The first one decides the device and the processes for all that ask for it later.
    state = PartialState(cpu=options.device == "cpu", timeout=LONGEST_WAIT)
    return replace(options, device=options.device or str(state.device))


def evaluate_file(options: EvaluationOptions, file: FileImages) -> Report:
    """Measure images that somebody else has drawn."""
    others = [metric for metric in options.metrics if metric not in METRICS]
    if others or options.sweep:
        raise UsageError(
            f"{options.pipeline} holds images alone, which are measured by {', '.join(METRICS)}; "
            f"{', '.join(others) or 'a sweep'} needs a pipeline"
        )
    data = load_real_data(options, file.sample_shape)
    file = replace(file, labels=file.label_numbers(data.class_names, data.num_classes))
    judge = Judge(options, options.metrics, data, data.class_names, len(file))
    judge.check(len(file), file.labels)
    report = Report(options.output_dir, data.name, len(file))
    report.add_samples({}, judge.evaluate(file, file.labels, None), None)
    return report


@dataclass(frozen=True)
class Plan:
    """What of a pipeline is measured against which data, once all of it is known to be possible.

    `judge` is None where nothing is measured of samples. `of_model` are measures by their names.
    """

    data: TrainingData
    labels: list[int] | list[str] | None
    judge: Judge | None
    of_model: dict[str, ModelMeasure]
    asked_of_model: ModelMeasureOptions


def plan(options: EvaluationOptions, swept: SweptPipeline) -> Plan:
    """Load everything and try every setting; ValueError for what cannot be measured or sampled."""
    pipeline = swept.pipeline
    of_samples, of_model = split_metrics(pipeline, options.metrics)
    form = {"form": pipeline.data_form()} if hasattr(pipeline, "data_form") else {}
    data = load_real_data(options, sample_shape(pipeline), **form)
    number_classes_alike(data, class_names(pipeline))
    labels = labels_of_samples(pipeline, options, data)
    judge = Judge(options, of_samples, data, class_names(pipeline)) if of_samples else None
    if judge is not None:
        judge.check(options.num_images, labels)
        for setting in swept.settings:
            pipeline, call = swept.at(setting)
            check_call(pipeline, labels is not None, call)
            judge.network.features(draw_two(pipeline, options.seed, labels, call))
    pipeline, call = swept.at({})
    asked = model_options(options, swept, labels, call)
    found = {name: find_model_measure(pipeline, name) for name in of_model}
    for measure in found.values():
        if hasattr(measure, "check"):
            measure.check(pipeline, data, asked)
    return Plan(data, labels, judge, found, asked)


def evaluate_pipeline(options: EvaluationOptions, swept: SweptPipeline) -> Report:
    """Draw and measure every setting, then measure the model."""
    made = plan(options, swept)
    report = Report(options.output_dir, made.data.name, options.num_images)
    for number, setting in enumerate(swept.settings if made.judge is not None else [], 1):
        if len(swept.settings) > 1 and PartialState().is_main_process:
            described = ", ".join(f"{name} {value}" for name, value in setting.items())
            print(f"[{number}/{len(swept.settings)}] {described}", flush=True)
        samples = draw_setting(swept, setting, options, made.labels)
        measured = made.judge.evaluate(samples, made.labels, options.seed)
        report.add_samples(setting, measured, samples.seconds_per_image())
    for name, measure in made.of_model.items():
        pipeline, _ = swept.at({})
        report.add_model(_checked_evaluation(name, measure(pipeline, made.data, made.asked_of_model)))
    return report


def draw_setting(
    swept: SweptPipeline, setting: dict[str, Any], options: EvaluationOptions, labels: list[int] | None
) -> Samples:
    """The samples of one setting, those that are on disk already left as they are."""
    pipeline, call = swept.at(setting)
    seeds = range(options.seed, options.seed + options.num_images)
    return sample_images(pipeline, seeds, labels, options.output_dir / "samples", options.batch_size, **call)


def split_metrics(pipeline: DiffusionPipeline, metrics: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The metrics of samples and those of the model; UsageError for what the pipeline has not."""
    of_model = model_measures(pipeline)
    are_texts = getattr(pipeline, "output_name", "images") == "texts"
    for metric in metrics:
        if are_texts and metric in METRICS:
            raise UsageError(
                f"--metrics {metric} compares values, which texts have none of; give {', '.join(of_model)}"
            )
        if metric not in METRICS and metric not in of_model:
            name = type(pipeline).__name__
            model = f"{', '.join(of_model)} of its model" if of_model else "nothing of its model"
            raise UsageError(
                f"--metrics {metric}: choose from {', '.join(METRICS)} of samples and {model}, which is all that a "
                f"{name} can be measured by"
            )
    return [m for m in metrics if m in METRICS], [m for m in metrics if m not in METRICS]


def labels_of_samples(
    pipeline: DiffusionPipeline, options: EvaluationOptions, data: TrainingData
) -> list[int] | list[str] | None:
    """The class of every sample: as asked for, in turn; else as frequent as in the data.

    Of a pipeline that is asked by texts the text.
    """
    classes = choose_labels(pipeline, options.class_labels)
    if classes is None:
        return prompts_of(pipeline, data, options.num_images) if options.class_labels == "auto" else None
    names = class_names(pipeline)
    alike = data.num_classes == len(classes) and (not names or names == data.class_names)
    if options.class_labels == "auto" and data.labels is not None and alike:
        return proportional_labels(data.labels, options.num_images)
    return list(itertools.islice(itertools.cycle(classes), options.num_images))


def model_options(
    options: EvaluationOptions, swept: SweptPipeline, labels: list[int] | None, call: dict[str, Any]
) -> ModelMeasureOptions:
    """What the measures of the model are told."""
    steps = {s["num_inference_steps"] for s in swept.settings if s.get("num_inference_steps") is not None}
    return ModelMeasureOptions(
        count=options.model_images,
        steps=tuple(sorted(steps)) or DEFAULT_STEPS,
        num_timesteps=options.bpd_steps,
        seed=options.seed,
        batch_size=min(64, options.batch_size),
        labels=labels,
        sampling=call,
    )


def _checked_evaluation(name: str, found: Any) -> Evaluation:
    if not isinstance(found, Evaluation):
        raise TypeError(f"the measure {name} gave a {type(found).__name__}; it must give an Evaluation")
    return found


def _entry(setting: dict[str, Any], evaluation: Evaluation, seconds: float | None) -> dict[str, Any]:
    return {
        "settings": setting,
        "measures": evaluation.measures,
        "seconds_per_image": seconds,
        "protocol": evaluation.protocol,
    }
