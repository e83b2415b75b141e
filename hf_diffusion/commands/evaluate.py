"""`hf-diffusion evaluate`: measure a pipeline, or images in a file, once or over a sweep."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import UsageError, option
from hf_diffusion.evaluation.options import EvaluationOptions


if TYPE_CHECKING:
    from hf_diffusion.evaluation.evaluate import Report


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(EvaluationOptions, Command):
    """Draw samples and measure them against real data, or measure the model itself.

    Sample i has the seed --seed + i. The pipeline may also be a folder of image files, an .npz file
    with images (N, H, W[, C]) uint8 and labels (N,), or an .npy file of images. Run by `accelerate
    launch -m hf_diffusion.cli evaluate` the work is shared by processes.
    """

    update_card: bool = option(False, "write the results into the README.md of the pipeline's folder")

    def validate(self) -> None:
        """UsageError for what is wrong without looking at the pipeline."""
        super().validate()
        if self.update_card and not (Path(self.pipeline) / "README.md").is_file():
            raise UsageError(
                f"--update_card: {self.pipeline} is no folder with a README.md; evaluate the folder of the run"
            )

    def run(self) -> None:
        """Check everything, then sample and measure; metrics.json grows with every setting."""
        # torch takes seconds, and --help comes past here without running anything.
        from accelerate import PartialState

        from hf_diffusion.evaluation.evaluate import evaluate

        report = evaluate(self)
        if PartialState().is_main_process:
            self.show(report)

    def show(self, report: "Report") -> None:
        """Print the table, draw the figures, renew the card."""
        # As in `run`; matplotlib takes a second more.
        from hf_diffusion.cards.model_card import update_card_results
        from hf_diffusion.evaluation.report import card_results, named, table, with_error
        from hf_diffusion.evaluation.sweep_figures import breakdown_figure, sweep_figure

        # With their captions.
        figures: dict[Path, str] = {}
        if report.of_samples:
            name = Path(self.pipeline).resolve().name
            print(table(report.of_samples))
            print("\n".join(named(report.of_samples[0])))
            title = f"{name}: {report.count:,} samples a point"
            sweep = sweep_figure(report.of_samples, self.output_dir / "sweep.png", title)
            if sweep is not None:
                figures[sweep] = "Quality against what was varied in sampling"
        for result in report.of_model:
            for key, measure in result["measures"].items():
                print(f"{measure.name}: {with_error(measure)}")
                if measure.breakdown is not None:
                    figures[breakdown_figure(measure, self.output_dir / f"{key}.png")] = measure.breakdown.caption
        made = [self.output_dir / "metrics.json", *figures]
        if self.update_card:
            results = card_results(report.of_samples + report.of_model)
            update_card_results(self.pipeline, results, report.data_name, figures)
            made.append(Path(self.pipeline) / "README.md")
        print("written: " + ", ".join(map(str, made)))
