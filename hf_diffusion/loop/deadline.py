"""A run whose minutes are given: its steps are planned anew until the learning rate decays.

Until then the rate does not depend on the length, so a plan changes nothing that is done. The last
plan, at the beginning of the decay, is kept: `max_train_steps` and `lr_decay_steps` of config.yaml
repeat the run.
"""

from dataclasses import dataclass
from typing import Self

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.loop.learning_rate import DECAY_SHARE


# After so many steps a plan is first made by what was measured; a first step compiles or decodes.
FIRST_LOOK = 3


@dataclass(frozen=True)
class Plan:
    """The steps of a run, and how many of them the learning rate decays over."""

    total_steps: int
    decay_steps: int


class Deadline:
    """When to plan the length of a run of `seconds`, and the plan.

    `looks` depend on plans alone, so processes that make the same plans look together.
    """

    def __init__(self, seconds: float, step: int):
        self.seconds = seconds
        self.next_look = step + FIRST_LOOK
        # Step and time from which on the pace is measured.
        self.mark: tuple[int, float] | None = None

    @classmethod
    def of(cls, config: TrainingConfig, step: int, total_steps: int) -> Self | None:
        """That of a run at a step; None where its length is given, or its last plan was made."""
        if config.max_train_minutes is None or step >= total_steps - (config.lr_decay_steps or 0):
            return None
        return cls(60 * config.max_train_minutes, step)

    def is_due(self, step: int) -> bool:
        """Whether the steps done so far are to be looked at."""
        return self.next_look == step

    def plan(self, step: int, elapsed: float) -> Plan | None:
        """The length of the run, by the pace since the first look, where `step` steps took
        `elapsed` seconds; None at the first look.

        With it the next look is set: halfway to the decay, until that begins.
        """
        if self.mark is None:
            self.mark, self.next_look = (step, elapsed), step + FIRST_LOOK
            return None
        since, then = self.mark
        pace = max(1e-9, elapsed - then) / (step - since)
        left = max(0.0, self.seconds - elapsed)
        total = step + max(1, round(left / pace))
        decay = round(DECAY_SHARE * self.seconds / pace)
        ahead = total - decay - step
        if ahead < 1 or left <= DECAY_SHARE * self.seconds:
            # The decay begins: no later plan.
            self.next_look = -1
            return Plan(total, total - step)
        self.next_look = step + max(1, ahead // 2)
        return Plan(total, max(1, decay))
