"""How a run goes on from a checkpoint, and what it leaves for the next start."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_diffusion.config.resuming import changeable_settings, differences
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.loop.checkpoints import check_same_run, find_together, save_checkpoint
from hf_diffusion.loop.learning_rate import lr_factor, rate_settings
from hf_diffusion.loop.output_folder import drop_former_run
from hf_diffusion.loop.states import Stateful, load_the_rest, read_states


class Continuation:
    """The checkpoints of a run.

    `identity` must agree for a checkpoint to continue this run exactly. `states` are what it holds
    beside networks and optimizers, in the order of older checkpoints.
    """

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, identity: dict[str, Any], states: dict[str, Stateful]
    ):
        self.config, self.accelerator, self.identity, self.states = config, accelerator, identity, states
        self.output_dir = Path(config.output_dir)
        self.saved_step: int | None = None

    def resume(self) -> dict[str, Any] | None:
        """Load the checkpoint that the settings name.

        Its manifest, or None where the run begins at step 0.
        """
        asked, accelerator, total = self.config.resume_from_checkpoint, self.accelerator, self.identity["total_steps"]
        if not asked or self.config.dry_run:
            return None
        checkpoint = find_together(accelerator, self.output_dir, asked)
        if checkpoint is None:
            accelerator.print(f"there is no checkpoint in {self.output_dir} yet: starting at step 0")
            return None
        manifest = check_same_run(checkpoint, self.identity)
        load_the_rest(accelerator, checkpoint)
        read_states(checkpoint, self.states)
        self.saved_step = manifest["step"]
        accelerator.print(f"going on from {checkpoint}, step {manifest['step']} of {total}")
        if manifest["total_steps"] != total:
            self._say_new_length(manifest["step"], manifest["total_steps"], total)
        if changed := differences(manifest.get("changeable", {}), changeable_settings(self.config)):
            accelerator.print(f"from here on with other settings than before: {'; '.join(changed)}")
        return manifest

    def save(self, step: int, facts: dict[str, Any]) -> bool:
        """Write the checkpoint of a step, with `facts` in its manifest.

        False where it is there already.
        """
        if self.saved_step == step:
            return False
        run = {**self.identity, **facts, "changeable": changeable_settings(self.config)}
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, step, run, limit, self.states)
        self.saved_step = step
        if self.accelerator.is_main_process:
            drop_former_run(self.output_dir)
        return True

    def _say_new_length(self, step: int, before: int, now: int) -> None:
        config = self.config
        was, is_now = (
            config.learning_rate * lr_factor(step, total, *rate_settings(config)) for total in (before, now)
        )
        self.accelerator.print(
            f"the run has {now} steps now, and had {before}: the learning rate is planned anew over all of them, from "
            f"{was:.3g} to {is_now:.3g} at this step"
        )
