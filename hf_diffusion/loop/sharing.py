"""What a training run has to do with the Hub: access checked first, saves put into the outbox, a
checkpoint fetched to go on from.
"""

import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from accelerate.utils.other import load
from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.files import write_whole
from hf_diffusion.hub.errors import PushError, bounded_requests, in_one_sentence, is_transient
from hf_diffusion.hub.files import (
    CHECKPOINT,
    checkpoint_files,
    newest_grid,
    pushable_files,
    refuse_tokens,
    step_tag,
    write_published,
)
from hf_diffusion.hub.outbox import drop_oldest, link_or_copy, new_entry, pending, start_sending
from hf_diffusion.hub.push import check_license, check_write_access
from hf_diffusion.loop.checkpoints import BadCheckpoint, list_checkpoints, read_manifest
from hf_diffusion.loop.output_folder import CONFIG
from hf_diffusion.loop.trainer import Trainer


logger = logging.getLogger(__name__)
# seconds; the first outlasts the push's own deadline
WAIT_AT_THE_END, WAIT_AFTER_A_SIGNAL = 1000, 15


def prepare_sharing(config: TrainingConfig) -> None:
    """Before training: write access, so that a wrong token ends the run in its first second, and
    the checkpoint of `hub`.

    Completes `hub_model_id` by the user's name. ValueError says what is missing; a Hub that is only
    out of reach is no reason not to train.
    """
    if config.push_to_hub:
        name = config.hub_model_id or Path(config.output_dir).resolve().name
        try:
            config.hub_model_id = check_write_access(name, private=not config.hub_public)
            check_license(config.hub_license)
        except PushError as error:
            if error.final or "/" not in name:
                raise ValueError(f"--push_to_hub: {error}") from error
            config.hub_model_id = name
            print(
                f"{error}; training starts all the same, and what is to be pushed waits in {config.output_dir}/outbox"
            )
    if config.resume_from_checkpoint == "hub":
        fetch_checkpoint(config.hub_model_id, Path(config.output_dir))


def fetch_checkpoint(repo_id: str, output_dir: Path, api: HfApi | None = None) -> Path | None:
    """Put the repository's checkpoint into `output_dir` beside those of the run; None where none
    was pushed yet.

    Where there is no config.yaml yet, that of the repository comes along: it tells what the run has
    chosen itself.

    BadCheckpoint for one that is damaged, or whose files would run code when they are loaded.
    OSError where the Hub cannot be asked or has no such repository.
    """
    api, staging = api or HfApi(), output_dir / ".from-hub"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with bounded_requests():
            commit = api.model_info(repo_id).sha
            api.hf_hub_download(repo_id, f"{CHECKPOINT}/manifest.json", revision=commit, local_dir=staging)
            api.snapshot_download(repo_id, revision=commit, local_dir=staging, allow_patterns=[f"{CHECKPOINT}/*"])
        step = read_manifest(staging / CHECKPOINT)["step"]
        _refuse_code(staging / CHECKPOINT)
        if not (output_dir / CONFIG).exists() and (settings := _settings(api, repo_id, commit, staging)) is not None:
            write_whole(output_dir / CONFIG, settings.read_bytes())
        target = output_dir / f"checkpoint-{int(step):08d}"
        if not target.exists():
            (staging / CHECKPOINT).rename(target)
        return target
    except RemoteEntryNotFoundError:
        return None
    # not "none yet": a mistyped name must not begin the run anew
    except RepositoryNotFoundError as error:
        raise OSError(
            f"there is no repository {repo_id} on the Hub that you may read, so no checkpoint to go on from"
        ) from error
    except Exception as error:
        if not is_transient(error):
            raise
        raise OSError(
            f"{in_one_sentence(error, repo_id)}; go on from a checkpoint that is here by `latest`"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _settings(api: HfApi, repo_id: str, commit: str, staging: Path) -> Path | None:
    try:
        with bounded_requests():
            return Path(api.hf_hub_download(repo_id, CONFIG, revision=commit, local_dir=staging))
    # of a run that was shared in another way
    except RemoteEntryNotFoundError:
        return None


def _refuse_code(checkpoint: Path) -> None:
    """BadCheckpoint for a file that is more than tensors and numbers: accelerate unpickles some of
    them without a look.
    """
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.suffix not in (".safetensors", ".json"):
            try:
                load(str(path), map_location="cpu", weights_only=True)
            except Exception as error:
                raise BadCheckpoint(
                    f"{path.name} of the checkpoint on the Hub is refused, it could run code: {error}"
                ) from error


def stage(source: Path, target: Path) -> None:
    """Put a file where it is pushed from, without the paths of this machine."""
    if not write_published(source, target):
        link_or_copy(source, target)


class Sharing:
    """The pushes of a run.

    Lives on the main process. `write_card(folder)` writes the card of what is in the folder.
    """

    def __init__(self, trainer: Trainer, write_card: Callable[[Path], None]):
        self.trainer, self.write_card, self.config = trainer, write_card, trainer.config
        self.sender: subprocess.Popen | None = None
        self.not_queued: list[str] = []

    def after_save(self) -> None:
        """Queue what the run has so far.

        The last save is left to `close`, which has the finished model.
        """
        if self.config.hub_strategy != "end" and self.trainer.step < self.trainer.total_steps:
            self._queue(self._stage_current)
        else:
            self._send()  # what an outage left over

    def close(self, finished: bool) -> None:
        """Queue the finished model, wait for what is under way, and say what is still unpushed."""
        if finished:
            self._queue(self._stage_finished)
        waiting, limit = pending(self.trainer.output_dir), WAIT_AT_THE_END if finished else WAIT_AFTER_A_SIGNAL
        if waiting:
            print(
                f"pushing {len(waiting)} of {self.trainer.output_dir}/outbox to {self.config.hub_model_id}", flush=True
            )
        # twice, since a sender that is about to end may have missed the newest entry
        for _ in range(2):
            self._send()
            try:
                status = self.sender.wait(limit) if self.sender is not None else 0
            except subprocess.TimeoutExpired:
                break
            if status != 0:
                break
        self._report(finished)

    def _report(self, finished: bool) -> None:
        folder, left = self.trainer.output_dir, pending(self.trainer.output_dir)
        if left:
            log = folder / "outbox" / "push.log"
            said = log.read_text().splitlines()[-1:] if log.is_file() else []
            names = ", ".join(entry.name for entry in left)
            print(
                f"not pushed yet: {names} ({' '.join(said) or 'no message'}); send by: hf-diffusion push --pending "
                f"{folder}"
            )
        elif self.not_queued:
            names = ", ".join(self.not_queued)
            print(f"never queued: {names}; push the model by: hf-diffusion push {folder} {self.config.hub_model_id}")
        elif finished or self.config.hub_strategy != "end":
            print(f"everything is pushed to {self.config.hub_model_id}")
        else:
            print("nothing is pushed of a run that is not finished; --hub_strategy every_save does that")

    def _queue(self, fill: Callable[[Path], None]) -> None:
        """A save that cannot be queued, say on a full disk, is a warning: training goes on."""
        config, step, tag = self.config, self.trainer.step, step_tag(self.trainer.step)
        try:
            with new_entry(
                self.trainer.output_dir,
                name=tag,
                repo_id=config.hub_model_id,
                message=f"Step {step:,} of {self.trainer.total_steps:,}",
                tag=tag,
                private=not config.hub_public,
            ) as folder:
                fill(folder)
                refuse_tokens(path for path in folder.rglob("*") if path.is_file())
            if dropped := drop_oldest(self.trainer.output_dir):
                logger.warning("%s waited too long in the outbox and will not be pushed", ", ".join(dropped))
            self._send()
        except Exception as error:
            self.not_queued.append(tag)
            logger.warning("the model of step %d could not be put into the outbox: %s", step, error)

    def _stage_current(self, folder: Path) -> None:
        """Export the averaged weights of now with the newest grid, settings and card."""
        trainer = self.trainer
        trainer.export(trainer.shared.copy(), folder)
        curve = [path for path in [trainer.output_dir / "loss_curve.png"] if path.is_file()]
        for path in [trainer.output_dir / "config.yaml", *curve, *newest_grid(trainer.output_dir)]:
            stage(path, folder / path.relative_to(trainer.output_dir))
        self.write_card(folder)
        self._stage_checkpoint(folder)

    def _stage_finished(self, folder: Path) -> None:
        for name, path in pushable_files(self.trainer.output_dir).items():
            stage(path, folder / name)
        self._stage_checkpoint(folder)

    def _stage_checkpoint(self, folder: Path) -> None:
        if self.config.hub_strategy == "checkpoint":
            for name, path in checkpoint_files(list_checkpoints(self.trainer.output_dir)[-1]).items():
                link_or_copy(path, folder / name)

    def _send(self) -> None:
        if pending(self.trainer.output_dir) and (self.sender is None or self.sender.poll() is not None):
            try:
                self.sender = start_sending(self.trainer.output_dir)
            except OSError as error:  # no memory or no room for another process; the outbox keeps
                logger.warning("the outbox cannot be sent now: %s", error)
