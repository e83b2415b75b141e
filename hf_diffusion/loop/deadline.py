"""A run whose minutes are given: its steps are planned anew until it ends.

Until the learning rate decays it does not depend on the length, so a plan changes nothing that is
done. In the decay a plan bends the rest of it. The last plan is kept: `max_train_steps`,
`lr_decay_steps` and `lr_decay_ends` of config.yaml repeat the run.
"""

from dataclasses import dataclass
from typing import Self

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.loop.learning_rate import DECAY_SHARE


# After so many steps a plan is first made by what was measured; a first step compiles or decodes.
FIRST_LOOK = 3
# What is left at the last look: steps, and a share of the run.
LEAST_LEFT, LEAST_SHARE = 4, 0.02


@dataclass(frozen=True)
class Plan:
    """The steps of a run, and how many of them the learning rate decays over.

    decay_ends: of a decay that was planned anew, see `lr_factor`.
    """

    total_steps: int
    decay_steps: int
    decay_ends: tuple[int, ...] = ()


class Deadline:
    """When to plan the length of a run of `seconds`, and the plan.

    `looks` depend on plans alone, so processes that make the same plans look together. bends: plan
    in the decay, too.
    """

    def __init__(self, seconds: float, step: int, bends: bool = True):
        self.seconds, self.bends = seconds, bends
        self.next_look = step + FIRST_LOOK
        # Step and time from which on the pace is measured.
        self.mark: tuple[int, float] | None = None
        self.decay_ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: TrainingConfig, step: int, total_steps: int) -> Self | None:
        """That of a run at a step; None where its length is given, or its decay has begun."""
        if config.max_train_minutes is None or step >= total_steps - (config.lr_decay_steps or 0):
            return None
        bends = config.lr_scheduler == "trapezoid" and "lr_decay_steps" not in config.given
        return cls(60 * config.max_train_minutes, step, bends)

    def is_due(self, step: int) -> bool:
        """Whether the steps done so far are to be looked at."""
        return self.next_look == step

    def plan(self, step: int, elapsed: float) -> Plan | None:
        """The length of the run, by the pace since the first look, where `step` steps took
        `elapsed` seconds; None at the first look.

        With it the next look is set: halfway to the decay, and halfway to its end. The pace in the
        decay is that since the look before.
        """
        if self.mark is None:
            self.mark, self.next_look = (step, elapsed), step + FIRST_LOOK
            return None
        since, then = self.mark
        pace = max(1e-9, elapsed - then) / (step - since)
        left = max(0.0, self.seconds - elapsed)
        total = step + max(1, round(left / pace))
        if self.decay_ends:
            return self._bend(step, elapsed, total)
        decay = round(DECAY_SHARE * self.seconds / pace)
        ahead = total - decay - step
        if ahead < 1 or left <= DECAY_SHARE * self.seconds:
            self._bend(step, elapsed, total)
            return Plan(total, total - step)
        self.next_look = step + max(1, ahead // 2)
        return Plan(total, max(1, decay))

    def _bend(self, step: int, elapsed: float, total: int) -> Plan:
        """Let the decay go on from here to another end."""
        self.mark, self.decay_ends = (step, elapsed), (*self.decay_ends, step, total)
        ahead = (total - step) // 2
        is_last = ahead < max(LEAST_LEFT, LEAST_SHARE * total)
        self.next_look = -1 if is_last or not self.bends else step + ahead
        return Plan(total, total - self.decay_ends[0], self.decay_ends)
