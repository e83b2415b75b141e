"""A student that takes each part of a teacher's trajectories in one call, as an objective.

B samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.losses.consistency_objective import digest, process_digest
from hf_diffusion.losses.distribution_matching import check_levels
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.losses.trajectory import euler
from hf_diffusion.randomness import Draw, FixedDraw


class Trajectories(NamedTuple):
    """Of N noises: states (calls + 1, N, ...), at the student's levels and the end; labels (N,)."""

    states: Tensor
    labels: Tensor | None


@dataclass(kw_only=True)
class TrajectoryOptions:
    """What a student of trajectories is trained by."""

    distill_steps: int = option(
        2, "calls of the network that a sample is to cost", group="method", at_least=1, at_most=16, often=True
    )
    student_sigmas: tuple[float, ...] = option(
        (),
        "noise levels of these calls, falling; none is the highest that init_from knows, at most 80, and then even "
        "ones in the time of the cosine schedule",
        above=0,
    )
    student_targets: Literal["next", "end"] = option(
        "next",
        "where a call is to lead: next, the teacher's state at the level of the next call; end, its sample, so that "
        "the student draws in fewer calls than distill_steps, too",
    )
    trajectories: int = option(
        4000, "samples of the teacher that the student learns from; they are drawn first", at_least=1
    )
    teacher_steps: int = option(12, "calls of the teacher for each of them, spread over the student's", at_least=1)
    teacher_guidance_scale: float = option(
        1.0, "classifier-free guidance of the teacher, which the student learns; 1 is none", at_least=0
    )
    label_dropout: float = option(
        0.1, "share of trajectories without a label, where init_from knows such samples", at_least=0, below=1
    )
    own_inputs_from: float = option(
        0.5,
        "share of the run after which later calls begin with the student's own states, as they do in sampling, and "
        "not with the teacher's",
        at_least=0,
        at_most=1,
    )

    def check(self) -> None:
        """ValueError for settings that contradict each other."""
        if self.init_from is None:
            raise ValueError("distillation starts from a trained diffusion model; name it by --init_from")
        if self.teacher_steps < self.distill_steps:
            raise ValueError(
                f"teacher_steps {self.teacher_steps} must be at least distill_steps, {self.distill_steps}: the "
                "student cannot gain by it otherwise"
            )
        if self.teacher_guidance_scale != 1 and not self.class_conditional:
            raise ValueError(
                f"teacher_guidance_scale {self.teacher_guidance_scale} guides the teacher to classes; give "
                "--class_conditional, or 1"
            )
        if self.student_sigmas:
            check_levels(self.student_sigmas, self.distill_steps, None)


class TrajectoryObjective(Objective):
    """The student's error where one of its calls leads, in absolute values.

    `scheduler` is a ConsistencyScheduler with the student's `sampling_sigmas`; where it
    `predicts_end`, every call aims at the teacher's sample. `draw_trajectories` gives those of the
    teacher when they are first needed.
    """

    goes_by_length: ClassVar[bool] = True

    def __init__(
        self,
        scheduler: Any,
        student: nn.Module,
        draw_trajectories: Callable[[], Trajectories],
        options: TrajectoryOptions,
        learning_rate: float,
        total_steps: int,
    ):
        self.scheduler, self.student, self.options, self.total_steps = scheduler, student, options, total_steps
        self.sigmas = (*scheduler.config.sampling_sigmas, 0.0)
        self.draw_trajectories, self.drawn, self.step = draw_trajectories, None, 0
        self.teacher_digest = digest(student)
        super().__init__(Player(student, self.values, learning_rate))

    def turns(self, step: int) -> Iterator[Player]:
        self.step = step
        yield from self.players

    def trajectories(self) -> Trajectories:
        """Those of the teacher."""
        if self.drawn is None:
            self.drawn = self.draw_trajectories()
        return self.drawn

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss (B,) at random calls of random trajectories; the batch says how many."""
        states, labels = self.trajectories()
        count, calls = states.shape[1], len(self.sigmas) - 1
        row = (draw.uniform() * count).long().clamp(max=count - 1).to(states.device)
        call = (draw.uniform() * calls).long().clamp(max=calls - 1).to(states.device)
        labels = None if labels is None else labels[row]
        to_end = self.scheduler.config.predicts_end
        x, target = states[call, row].float(), states[-1 if to_end else call + 1, row].float()
        if network.training and self.step >= self.options.own_inputs_from * self.total_steps:
            x = self.own_states(states[0, row].float(), call, labels)
        reached = self.estimate(network, x, call, labels) if to_end else self.stepped(network, x, call, labels)
        loss = (reached - target).abs().flatten(1).mean(1)
        return {"loss": loss, "level": (calls - call.double() - 0.5) / calls}

    @torch.no_grad()
    def own_states(self, x: Tensor, call: Tensor, labels: Tensor | None) -> Tensor:
        """Where the student's own earlier calls take x (B, ...) before the calls `call` (B,).

        By the network without the wrapper of several processes, which need not ask for as many.
        """
        for k in range(len(self.sigmas) - 2):
            rows = (call > k).nonzero().squeeze(1)
            if len(rows):
                known = None if labels is None else labels[rows]
                x[rows] = self.stepped(self.student, x[rows], torch.full_like(rows, k), known)
        return x

    def stepped(self, network: nn.Module, x: Tensor, call: Tensor, labels: Tensor | None) -> Tensor:
        """The states (B, ...) to which the calls `call` (B,) of a network lead."""
        levels = torch.tensor(self.sigmas, dtype=torch.float64).to(call.device, non_blocking=True)
        x_0 = self.estimate(network, x, call, labels)
        kept = (levels[call + 1] / levels[call]).to(x_0).reshape(-1, *(1,) * (x.ndim - 1))
        return euler(x_0, x, kept)

    def estimate(self, network: nn.Module, x: Tensor, call: Tensor, labels: Tensor | None) -> Tensor:
        """What the calls `call` (B,) of a network take the samples of x (B, ...) for."""
        sigma = torch.tensor(self.sigmas, dtype=torch.float64).to(call.device, non_blocking=True)[call]
        return self.scheduler.denoise(network, x, sigma, **({} if labels is None else {"class_labels": labels}))

    def identity(self) -> dict[str, Any]:
        """The process, and the teacher that a checkpoint belongs to."""
        return {"process": process_digest(self.scheduler), "teacher": self.teacher_digest}
