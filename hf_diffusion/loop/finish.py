"""Training to the end, with what is shared on the way, and the card of what came out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hf_diffusion.cards.data_set import data_set_facts
from hf_diffusion.cards.of_run import RunFacts, draw_run_pictures, launch_command, saved_pipeline, write_run_card
from hf_diffusion.config.closed_output import nobody_reads
from hf_diffusion.config.options import config_to_dict
from hf_diffusion.config.publishing import published, published_command
from hf_diffusion.data.errors import BadData
from hf_diffusion.loop.checkpoints import SaveFailed, list_checkpoints
from hf_diffusion.loop.nonfinite import TrainingDiverged
from hf_diffusion.loop.output_folder import set_card_aside
from hf_diffusion.loop.sharing import Sharing
from hf_diffusion.loop.trainer import Trainer


def train_and_share(trainer: Trainer, command: Sequence[str]) -> None:
    """Train to the end or to a signal, write the card, and push what the settings ask for."""
    sharing, finished, is_main = None, False, trainer.accelerator.is_main_process
    # now: later the network may be gone
    data_facts = data_set_facts(config_to_dict(trainer.config), trainer.data.describe()) if is_main else {}
    if trainer.config.push_to_hub and is_main:
        sharing = Sharing(trainer, partial(write_card, trainer, command, data_facts))
        trainer.after_save = sharing.after_save
    trainer.arguments = list(command[1:])
    try:
        with one_sentence_failures(command[0], trainer.output_dir):
            finished = trainer.train()
            if finished and is_main:
                folder = trainer.output_dir
                write_card(trainer, command, data_facts, folder, with_pictures=True)
                spent = f"trained {trainer.step} steps in {trainer.wall_time:.0f} s"
                print(f"{spent}; the result, its card and its curve are in {folder}")
    finally:
        if sharing is not None:
            sharing.close(finished)


@contextmanager
def one_sentence_failures(prog: str, output_dir: Path) -> Iterator[None]:
    """End the process with status 1 and one sentence that says what is left, for what goes wrong
    in a run.

    Any other exception is a mistake of ours.
    """
    try:
        yield
    except (SaveFailed, TrainingDiverged) as error:
        raise SystemExit(f"{prog}: {error}") from error
    except (OSError, BadData) as error:
        if nobody_reads(error):
            raise
        newest = [folder.name for folder in list_checkpoints(output_dir)[-1:]]
        left = "there is no checkpoint yet"
        if newest:
            left = f"{newest[0]} is untouched, go on with --resume_from_checkpoint latest"
        raise SystemExit(f"{prog}: {error}; {left}") from error


def write_card(
    trainer: Trainer, command: Sequence[str], data_facts: dict, folder: Path, with_pictures: bool = False
) -> None:
    """Write the card of the run, as far as it has come, into a folder with its pipeline or
    model."""
    if (aside := set_card_aside(folder)) is not None:
        print(f"README.md was edited into something that is no model card; it is {aside.name} now, beside a new one")
    facts, pipeline = facts_of(trainer, command, data_facts), saved_pipeline(folder)
    pictures = None
    if with_pictures and pipeline is not None:
        pictures = draw_run_pictures(facts, folder, trainer.data.as_drawn, pipeline.to(trainer.accelerator.device))
    write_run_card(facts, folder, pipeline, pictures)


def facts_of(trainer: Trainer, command: Sequence[str], data_facts: dict) -> RunFacts:
    """What the run tells about itself now; `data_facts` is what `data_set_facts` found."""
    accelerator = trainer.accelerator
    return RunFacts(
        config=trainer.config,
        data={**trainer.data.describe(), **data_facts},
        command=launch_command(
            published_command(type(trainer.config), command),
            accelerator.num_processes,
            accelerator.device.type == "cpu",
        ),
        steps=trainer.step,
        global_batch=trainer.global_batch,
        processes=accelerator.num_processes,
        wall_time_s=trainer.wall_time,
        parameters=trainer.shared.parameters,
        joules=trainer.joules,
        skipped=trainer.updater.skips.count,
        evaluations=trainer.evaluations.of(trainer.step),
        of_averages=trainer.evaluations.of_averages,
        decay=trainer.shared.decay if len(trainer.shared.averages) > 1 else None,
        started_from=published(getattr(trainer.config, "init_from", None)),
    )
