"""One run of `hf-diffusion evaluate`: what it needs, loaded and checked; then every setting drawn and measured."""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from hf_diffusion.commands.evaluate import DEFAULT_STEPS, GUIDANCE, OF_THE_SCHEDULER, SAMPLE_METRICS
from hf_diffusion.environment import environment
from hf_diffusion.evaluation.feature_networks import load_classifier, load_feature_network
from hf_diffusion.evaluation.feature_training import trained_network_file
from hf_diffusion.evaluation.inputs import load_image_file, load_reference_images
from hf_diffusion.evaluation.latent_space import consistency, require_deterministic
from hf_diffusion.evaluation.measures import Measure, check_metrics, measure_images, network_features
from hf_diffusion.evaluation.model_measures import (
    check_model_measures,
    measure_bits_per_dim,
    measure_inversion,
    proportional_labels,
)
from hf_diffusion.evaluation.reference import reference_statistics
from hf_diffusion.evaluation.report import bound_figure, card_results, sweep_figure, table, write_metrics
from hf_diffusion.evaluation.sampling import (
    OPTIONS,
    check_call,
    draw,
    drawing_network,
    images_protocol,
    sample_images,
    sampling_protocol,
)
from hf_diffusion.model_card import update_card_results
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline


class EvaluationRun:
    """The parts of a run and its results; all processes hold one."""

    def __init__(self, args: argparse.Namespace, metrics: list[str], settings: list[dict[str, Any]]):
        self.args, self.metrics, self.settings = args, metrics, settings
        self.of_samples = [metric for metric in metrics if metric in SAMPLE_METRICS]
        self.state = PartialState(cpu=args.device == "cpu")
        args.device = args.device or str(self.state.device)
        self.pipeline = self.file = None
        if str(args.pipeline).endswith(".npz"):
            self.file = load_image_file(Path(args.pipeline))
            _, height, width, channels = self.file.all_images.shape
        else:
            from hf_diffusion.cli import load_for_sampling

            self.pipeline = load_for_sampling(args)
            self.guided = self.pipeline  # by the classifier of --guide_by, where there is one
            self.scheduler = self.pipeline.scheduler
            size = drawing_network(self.pipeline).config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            channels = drawing_network(self.pipeline).config.in_channels
        self.data = load_reference_images(args, (height, width), channels)
        load = {"channels": channels, "size": (height, width), "device": args.device}
        features = (
            trained_network_file(self.data, args.reference_cache) if args.features == "trained" else args.features
        )
        self.network = load_feature_network(features, inception_weights=args.inception_weights, **load)
        self.classifier = load_classifier(args.classifier, **load) if args.classifier else None
        self.count = args.num_images if self.file is None else len(self.file.all_images)
        self.labels = self.choose_labels() if self.file is None else self.file.labels
        swept = {s["num_inference_steps"] for s in settings if "num_inference_steps" in s}
        self.steps = sorted(swept) or list(DEFAULT_STEPS)  # of consistency and inversion
        self.results: list[dict[str, Any]] = []  # of settings
        self.model_results: list[dict[str, Any]] = []
        self.bound = None

    # --- before the hours of sampling -----------------------------------------------------------------------------------

    def choose_labels(self) -> list[int] | None:
        """The class of every image: as asked for, in turn; else as frequent as in the data, or all classes in turn."""
        from hf_diffusion.cli import UsageError

        given, classes = self.args.class_labels, drawing_network(self.pipeline).config.get("num_class_embeds")
        if classes is None and given not in (None, "none"):
            raise UsageError(f"--class_labels {given}: this pipeline has no classes; leave it out")
        if classes is None or given == "none":
            return None
        if given is not None:
            words = [word.strip() for word in given.split(",")]
            names = set((getattr(self.pipeline, "id2label", None) or {}).values())
            chosen = [int(w) if w.isdecimal() and w not in names else w for w in words]
            chosen = self.pipeline.get_label_ids(chosen) if hasattr(self.pipeline, "get_label_ids") else chosen
            return list(itertools.islice(itertools.cycle(chosen), self.count))
        if self.data.labels is not None and self.data.num_classes == classes:
            return proportional_labels(self.data.labels, self.count)
        return list(itertools.islice(itertools.cycle(range(classes)), self.count))

    def check(self) -> None:
        """ValueError for whatever cannot be measured or sampled, found by counting, and by a draw of two images a setting."""
        classifies = (self.classifier or self.network).classifier is not None
        check_metrics(self.of_samples, self.count, len(self.data), self.network, classifies, self.labels is not None)
        if "label_accuracy" in self.of_samples:
            pixels = torch.zeros(1, self.data.channels, *self.data.size)
            known = (self.classifier or self.network).classify(pixels).shape[1]
            if max(self.labels) >= known:
                raise ValueError(
                    f"the classifier knows {known} classes, but images of class {max(self.labels)} are asked for"
                )
        if self.file is not None:
            if len(self.of_samples) < len(self.metrics) or self.args.sweep:
                raise ValueError(
                    f"{self.args.pipeline} holds images alone; bpd, consistency, inversion, sweeps need a pipeline"
                )
            return
        labels = None if self.labels is None else self.labels[:2]
        for setting in self.settings if self.of_samples else []:
            options = self.options_of(setting)
            check_call(self.pipeline, labels is not None, options)
            # a few steps show a mistake as well as a thousand; a GAN has few, and takes neither fewer nor more
            few = {"num_inference_steps": min(2, options.get("num_inference_steps", 2))}
            trial = {**options, **(few if hasattr(self.pipeline, "unet") else {})}
            seeds = range(self.args.seed, self.args.seed + (2 if labels is None else len(labels)))
            images = draw(self.pipeline, seeds, labels, **trial)
            network_features(self.network, images)
        if "consistency" in self.metrics:
            self.options_of({})
            require_deterministic(self.pipeline, self.args.eta)
        check_model_measures(self.metrics, self.pipeline, self.data, self.steps, self.args.bpd_steps)

    def options_of(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Set the pipeline's scheduler for a setting; the options of its call."""
        from hf_diffusion.cli import SCHEDULERS, scheduler_class

        chosen, spacing = (setting.get(name) for name in OF_THE_SCHEDULER)
        if chosen is not None and chosen not in SCHEDULERS:
            raise ValueError(f"unknown scheduler {chosen!r}; choose from {', '.join(SCHEDULERS)}")
        cls = type(self.scheduler) if chosen is None else scheduler_class(chosen)
        changes = {} if spacing is None else {"timestep_spacing": spacing}
        if "guidance" in setting:
            self.pipeline = self.of_guidance(setting["guidance"])
        self.pipeline.scheduler = cls.from_config(self.scheduler.config, **changes)
        fixed = {name: getattr(self.args, name) for name in OPTIONS if getattr(self.args, name) is not None}
        of_call = {name: value for name, value in setting.items() if name not in (*OF_THE_SCHEDULER, "guidance")}
        return fixed | of_call

    def of_guidance(self, kind: str) -> DiffusionPipeline:
        """The pipeline of one of GUIDANCE around the same U-Net."""
        if kind == GUIDANCE[0]:
            return self.guided
        parts = {"unet": self.guided.unet, "scheduler": self.guided.scheduler, "id2label": self.guided.id2label}
        return ClassifierFreeGuidancePipeline(**parts)

    # --- the work -------------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Draw and measure every setting, then measure the model itself; metrics.json grows with each."""
        if self.of_samples:
            reference = reference_statistics(self.data, self.network, self.args.reference_cache)
        for number, setting in enumerate(self.settings if self.of_samples else [], 1):
            if len(self.settings) > 1:
                self.say(f"[{number}/{len(self.settings)}] " + ", ".join(f"{k} {v}" for k, v in setting.items()))
            samples, seconds = self.file, None
            if samples is None:
                seeds = range(self.args.seed, self.args.seed + self.count)
                folder = self.args.output_dir / "samples"
                options = self.options_of(setting)
                samples = sample_images(self.pipeline, seeds, self.labels, folder, self.args.batch_size, **options)
                seconds = samples.seconds_per_image()
            share = samples.chunks(self.state.process_index, self.state.num_processes)
            measures = measure_images(
                share, self.count, self.network, reference, self.of_samples, self.classifier, self.labels
            )
            protocol = self.protocol(samples.protocol) | {"reference": reference.protocol}
            self.results.append(_result(setting, measures, protocol, seconds))
            self.write()
        self.measure_model()

    def measure_model(self) -> None:
        """Bits per dimension, consistency and inversion."""
        args = self.args
        real = {"count": min(args.model_images, len(self.data)), "seeds": None, "sampling": None}
        real["reference"] = {
            key: self.data.describe().get(key) for key in ("name", "split", "images", "resize", "fingerprint")
        }
        if "bpd" in self.metrics:
            self.bound = measure_bits_per_dim(
                self.pipeline, self.data, args.model_images, args.bpd_steps, args.seed, min(64, args.batch_size)
            )
            self.model_results.append(
                _result({}, {"bpd": self.bound.total, "prior_bpd": self.bound.prior}, self.protocol(None) | real)
            )
        if "inversion" in self.metrics:
            found = measure_inversion(self.pipeline, self.data, self.steps, args.model_images)
            self.model_results.append(
                _result({}, {f"inversion_{n}": m for n, m in found.items()}, self.protocol(None) | real)
            )
        if "consistency" in self.metrics:
            self.model_results.append(self.measure_consistency(self.steps))
        self.write()

    def measure_consistency(self, steps: list[int]) -> dict[str, Any]:
        """How much the images of a noise change with the number of steps; every process computes it, it is small."""
        options, count = self.options_of({}), self.args.model_images
        options.pop("num_inference_steps", None)
        seeds = range(self.args.seed, self.args.seed + count)
        labels = None if self.labels is None else list(itertools.islice(itertools.cycle(self.labels), count))
        measures = {}
        for n, value in consistency(self.pipeline, seeds, labels, [*steps, 2 * steps[-1]], **options).items():
            text = f"{n} steps" if n else "images of other noise"
            measures[f"consistency_{n}"] = Measure(
                f"difference of {text} from {2 * steps[-1]} steps ({count} seeds)", value
            )
        protocol = self.protocol(sampling_protocol(self.pipeline, count, options))
        return _result({}, measures, protocol | {"count": count, "seeds": [seeds[0], seeds[-1]]})

    def protocol(self, sampling: dict[str, Any] | None) -> dict[str, Any]:
        """What the measures of a setting hold for."""
        seed = None if self.file else self.args.seed
        return images_protocol(self.count, seed, self.labels, sampling, self.network, self.classifier)

    # --- results --------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write metrics.json as far as it is known."""
        if self.state.is_main_process:
            self.args.output_dir.mkdir(parents=True, exist_ok=True)
            report = {"results": self.results, "model": self.model_results, "bound": self.bound}
            write_metrics(self.args.output_dir / "metrics.json", {**report, "environment": environment()})

    def finish(self, command: str) -> None:
        """Print the table, draw the figures, renew the card."""
        if not self.state.is_main_process:
            return
        folder, made = self.args.output_dir, [self.args.output_dir / "metrics.json"]
        figures: dict[Path, str] = {}  # with their captions
        if self.results:
            name = Path(str(self.args.pipeline)).resolve().name
            print(table(self.results))
            print("\n".join(measure.name for measure in self.results[0]["measures"].values()))
            sweep = sweep_figure(self.results, folder / "sweep.png", f"{name}: {self.count:,} images a point")
            if sweep is not None:
                figures[sweep] = "Quality against what was varied in sampling"
        for result in self.model_results:
            for measure in result["measures"].values():
                error = "" if measure.error is None else f" ± {measure.error:.2g}"
                print(f"{measure.name}: {measure.value:.4g}{error}")
        if self.bound is not None:
            figures[bound_figure(self.bound, folder / "bits_per_dim.png")] = (
                "The bound in bits per dimension by timestep"
            )
        made += figures
        if self.args.update_card:
            results = card_results(self.results + self.model_results)
            update_card_results(self.args.pipeline, results, self.data.name, figures)
            made.append(Path(self.args.pipeline) / "README.md")
        print("written: " + ", ".join(map(str, made)))

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)


def _result(
    settings: dict[str, Any], measures: dict[str, Measure], protocol: dict[str, Any], seconds: float | None = None
) -> dict[str, Any]:
    return {"settings": settings, "measures": measures, "seconds_per_image": seconds, "protocol": protocol}
