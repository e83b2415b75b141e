"""`hf-diffusion tune-steps`: the best few timesteps of a trained model."""

import dataclasses
import inspect
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import HIGHEST_SEED, UsageError, option
from hf_diffusion.sampling.options import SamplingOptions


# diffusers', whose import takes seconds.
SCHEDULER_CONFIG_NAME = "scheduler_config.json"

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from hf_diffusion.evaluation.step_search import Trajectories


@dataclass(frozen=True, kw_only=True)
class TuneStepsCommand(SamplingOptions, Command):
    """Search where the few timesteps of a trained model should lie.

    They are moved as long as that brings samples nearer to those of many steps from the same
    noises. Other noises then tell whether they beat the scheduler's own spacing; only then are they
    written. The scheduler is unipc unless another is named.
    """

    num_samples: int = option(48, "noises to search on", at_least=2, group="search")
    held_out: int = option(96, "other noises, which decide whether what was found is better", at_least=8)
    reference_steps: int = option(50, "steps of the run that is taken for right", at_least=10)
    class_labels: str = option("auto", "numbers or names of classes, taken in turn; auto is all, none the null class")
    seed: int = option(0, "seed of the first noise", at_least=0, at_most=HIGHEST_SEED - 10**6)
    features: str = option(
        "pixels", "what is compared: pixels, which favour blur, or a network's file or folder, as in evaluate"
    )
    output: Path | None = option(None, "JSON file for what was found, if it is better", group="files")
    save: bool = option(
        False, "write it, if it is better, into the scheduler's config of the pipeline, whose unipc then takes it"
    )

    def validate(self) -> None:
        """UsageError for what is wrong without looking at the pipeline."""
        if self.num_inference_steps is None or self.timesteps is not None:
            raise UsageError("give the number of steps by --num_inference_steps, such as 4, and no --timesteps")
        if self.num_inference_steps >= self.reference_steps:
            raise UsageError(
                f"--num_inference_steps {self.num_inference_steps} must be fewer than the --reference_steps "
                f"{self.reference_steps}"
            )
        if self.save and self.solver != "unipc":
            raise UsageError(
                f"--save is for the scheduler unipc, not for {self.solver}; leave it out, or give --output"
            )

    def run(self) -> None:
        """Search, measure on other noises, and tell or write what was found."""
        # torch takes seconds, and --help comes past here without running anything.
        from hf_diffusion.evaluation.step_search import search
        from hf_diffusion.sampling import drawing
        from hf_diffusion.sampling.loading import load_for_sampling

        if self.save and not self.config_file.is_file():
            raise UsageError(
                f"--save writes {self.config_file}, which is not there; leave it out, or give a local folder"
            )
        pipeline = load_for_sampling(dataclasses.replace(self, scheduler=self.solver))
        options, scheduler = drawing.call_options(pipeline, self), pipeline.scheduler
        self.check(pipeline, options)
        steps = options.pop("num_inference_steps")
        # what an earlier search has found is not the solver's own
        scheduler.register_to_config(_tuned_timesteps=None)
        seen = self.trajectories(pipeline, options, self.seed, self.num_samples)
        others = self.trajectories(pipeline, options, self.seed + self.num_samples, self.held_out)
        scheduler.set_timesteps(steps)
        own = tuple(scheduler.timesteps.tolist())
        found = search(seen.distance, own, scheduler.config.num_train_timesteps)
        before, after = others.distances(timesteps=list(own)), others.distances(timesteps=list(found))
        error = float((before - after).std(ddof=1) / len(before) ** 0.5)
        self.report(
            {
                "scheduler": self.solver,
                "timesteps": list(found),
                "own_timesteps": list(own),
                "distance": float(after.mean()),
                "own_distance": float(before.mean()),
                "gain_error": error,
                "noises": self.held_out,
                "features": seen.network.name,
                "reference_steps": self.reference_steps,
            }
        )

    @property
    def config_file(self) -> Path:
        """The scheduler's config in a local folder."""
        return Path(self.pipeline) / "scheduler" / SCHEDULER_CONFIG_NAME

    @property
    def solver(self) -> str:
        """The name of the scheduler."""
        return self.scheduler or "unipc"

    def check(self, pipeline: "DiffusionPipeline", options: dict) -> None:
        """UsageError for a pipeline or a solver that takes no timesteps, or draws noise."""
        from hf_diffusion.sampling import drawing

        accepted = inspect.signature(pipeline.scheduler.set_timesteps).parameters
        if "timesteps" not in accepted or self.eta or self.solver == "ddpm":
            raise UsageError(
                f"--scheduler {self.solver}: the search needs a solver that takes timesteps and draws nothing; take "
                "unipc, dpm++, ddim, ipndm, euler, without --eta"
            )
        labelled = getattr(pipeline, "num_classes", None) is not None and self.class_labels != "none"
        drawing.check_call(pipeline, labelled, {"timesteps": None, **options})

    def trajectories(self, pipeline: "DiffusionPipeline", options: dict, first: int, count: int) -> "Trajectories":
        """Those of `count` noises from the seed `first` on, with the classes in turn."""
        from hf_diffusion.evaluation.feature_networks import load_feature_network, raw_values
        from hf_diffusion.evaluation.inputs import sample_shape
        from hf_diffusion.evaluation.step_search import Trajectories
        from hf_diffusion.sampling.drawing import choose_labels

        # Squared distances need no covariance, so samples may be large.
        load = raw_values if self.features == "pixels" else partial(load_feature_network, self.features)
        network = load(sample_shape(pipeline), pipeline.device)
        classes = choose_labels(pipeline, self.class_labels)
        labels = None if classes is None else [classes[i % len(classes)] for i in range(count)]
        print(f"{count} samples in {self.reference_steps} steps of {self.solver}", flush=True)
        seeds = range(first, first + count)
        return Trajectories.follow(pipeline, network, seeds, labels, self.batch_size, options, self.reference_steps)

    def report(self, result: dict) -> None:
        """Say what was found; write it if it is better beyond chance."""
        from hf_diffusion.files import write_whole

        gain, error = result["own_distance"] - result["distance"], result["gain_error"]
        print(
            f"mean squared distance to {self.reference_steps} steps in {result['features']}, of {self.held_out} other "
            f"noises: {result['own_distance']:.4g} at {result['own_timesteps']}, {result['distance']:.4g} at "
            f"{result['timesteps']}; gain {gain:.2g} +- {error:.2g}"
        )
        if gain <= 2 * error:
            print("that is no gain beyond chance: keep the scheduler's own spacing; nothing is written")
            return
        words = ",".join(map(str, result["timesteps"]))
        print(f"draw by: hf-diffusion sample {self.pipeline} --scheduler {self.solver} --timesteps {words}")
        if self.output is not None:
            write_whole(self.output, json.dumps(result, indent=1) + "\n")
            print(f"written: {self.output}")
        if self.save:
            config = json.loads(self.config_file.read_text(encoding="utf-8"))
            tuned = (config.get("_tuned_timesteps") or {}) | {str(len(result["timesteps"])): result["timesteps"]}
            config["_tuned_timesteps"] = tuned
            write_whole(self.config_file, json.dumps(config, indent=2, sort_keys=True) + "\n")
            print(f"saved in {self.config_file}: unipc in {len(result['timesteps'])} steps takes them")
