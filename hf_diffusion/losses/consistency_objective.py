"""Training a network to map any noise level to the data, as an objective.

The losses of one pair are in `losses.consistency`. B images.
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.losses import consistency as losses
from hf_diffusion.losses.noise_levels import stratified
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw


# What the papers use where an option is left open: scales at the start and the end, decay of the
# target, distance. training: arXiv:2303.01469, CIFAR-10; distillation: the same, with EDM's 18
# levels; improved: arXiv:2310.14189; tuning: arXiv:2406.14548.
PUBLISHED: dict[str, dict[str, Any]] = {
    "training": {"start_scales": 2, "end_scales": 150, "target_ema": 0.9, "distance": "l2"},
    "distillation": {"start_scales": 18, "end_scales": 18, "target_ema": 0.95, "distance": "l2"},
    "improved": {"start_scales": 10, "end_scales": 1280, "target_ema": 0.0, "distance": "pseudo_huber"},
    "tuning": {"start_scales": None, "end_scales": None, "target_ema": 0.0, "distance": "pseudo_huber"},
}


@dataclass(kw_only=True)
class ConsistencyOptions:
    """What a consistency model is trained by."""

    objective: Literal["training", "distillation", "improved", "tuning"] = option(
        "improved",
        "training and improved: consistency training, of 2023 and 2024; tuning: easy consistency tuning of the "
        "trained denoiser init_from; distillation: of init_from as the teacher",
        group="method",
    )
    distance: Literal["l1", "l2", "pseudo_huber"] | None = option(
        None, "between two estimates of x_0; none is the paper's: l2, and pseudo_huber for improved and tuning"
    )
    huber_c: float | None = option(
        None, "c of pseudo_huber; none is the paper's: 0.00054 sqrt(values of an image), and 0 for tuning", at_least=0
    )
    start_scales: int | None = option(
        None, "intervals between noise levels at the start; none is the paper's: 2, or 10 for improved", at_least=2
    )
    end_scales: int | None = option(
        None, "the same at the end: 150, or 1280 for improved; the number of levels, 18, for distillation", at_least=2
    )
    target_ema: float | None = option(
        None,
        "decay of the target network, for training that of the start; none is the paper's: 0.9, 0.95 for "
        "distillation, and 0 else, where the network is its own target",
        at_least=0,
        below=1,
    )
    level_mean: float = option(-1.1, "mean of the logarithm of the noise levels of improved and tuning")
    level_std: float = option(2.0, "its standard deviation", above=0)
    # As in the one-hour recipe of the authors a run may have one stage of a large q instead.
    tuning_stages: int = option(8, "stages of tuning, of equal length; each brings the two levels nearer", at_least=1)
    tuning_q: float = option(2.0, "factor by which they come nearer in a stage", above=1)
    tuning_k: float = option(8.0, "how much further apart they are at small levels", at_least=0)
    tuning_b: float = option(1.0, "how small these are", at_least=0)
    tuning_mapping: Literal["sigmoid", "const"] = option("sigmoid", "const: as far apart at small levels as elsewhere")
    teacher_solver: Literal["euler", "heun", "midpoint"] = option("heun", "the teacher's step between two levels")
    teacher_guidance_scale: float = option(
        1.0, "classifier-free guidance of the teacher, which the student learns; 1 is none", at_least=0
    )
    # Without dropped labels there is nothing to guide away from.
    label_dropout: float = option(
        0.1, "share of labels replaced by 'no class', for classifier-free guidance", at_least=0, below=1
    )
    level_sampling: Literal["uniform", "stratified"] = option("stratified", "how a batch's noise levels are drawn")
    sigma_min: float = option(0.002, "lowest noise level, at which the model is the identity", above=0)
    sigma_max: float | None = option(
        None, "highest noise level; none is 80, or the highest that init_from knows if that is lower", above=0
    )
    rho: float = option(7.0, "how the levels are spaced: evenly in sigma^(1/rho)", above=0)
    sigma_data: float = option(0.5, "standard deviation of the data, where init_from does not say it", above=0)
    optimizer: Literal["radam", "adamw", "muon"] = option(
        "radam", "radam, as in the papers, adamw, or muon for the matrices within blocks", tied="state"
    )

    def check(self) -> None:
        """ValueError for settings that contradict each other."""
        if self.objective in ("distillation", "tuning") and self.init_from is None:
            raise ValueError(f"objective {self.objective} starts from a trained model; name it by --init_from")
        if self.teacher_guidance_scale != 1 and not (self.objective == "distillation" and self.class_conditional):
            raise ValueError(
                f"teacher_guidance_scale {self.teacher_guidance_scale} needs a teacher of classes; give --objective "
                "distillation and --class_conditional, or 1"
            )
        if self.objective in ("training", "improved") and self.scales[0] > self.scales[1]:
            raise ValueError(f"start_scales {self.scales[0]} is more than end_scales {self.scales[1]}; give fewer")

    def published(self, name: str) -> Any:
        """An option's value, or that of the paper where it is left open."""
        given = getattr(self, name)
        return PUBLISHED[self.objective][name] if given is None else given

    @property
    def scales(self) -> tuple[int, int]:
        """`start_scales` and `end_scales`."""
        return self.published("start_scales"), self.published("end_scales")


class Curriculum:
    """Noise levels and the target's decay as functions of the step, which joins the checkpoints."""

    def __init__(self, options: ConsistencyOptions, scheduler: Any, total_steps: int):
        self.options, self.scheduler, self.total_steps = options, scheduler, total_steps
        self.step = 0

    def intervals(self) -> int:
        """How many there are between neighbouring noise levels now."""
        first, last = self.options.scales
        if self.options.objective == "distillation":
            return last - 1
        grow = losses.growing_levels if self.options.objective == "training" else losses.doubling_levels
        return grow(self.step, self.total_steps, first, last)

    def stage(self) -> int:
        """The stage of tuning, from 0."""
        stages = self.options.tuning_stages
        return min(self.step * stages // self.total_steps, stages - 1)

    def target_ema(self) -> float:
        """The decay of the target network."""
        ema = self.options.published("target_ema")
        if self.options.objective != "training" or ema == 0:
            return ema
        return losses.growing_target_ema(self.intervals(), self.options.scales[0], ema)

    def levels(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of levels t > r (B,) for u (B,) in [0, 1), the least noise at 0."""
        options, lowest = self.options, self.scheduler.config.sigma_min
        mean, std = options.level_mean, options.level_std
        if options.objective == "tuning":
            t = losses.lognormal_levels(u, mean, std).clamp(lowest, self.scheduler.config.sigma_max)
            numbers = options.tuning_q, options.tuning_k, options.tuning_b, options.tuning_mapping
            r = losses.tuning_partner(t, self.stage(), *numbers)
            # below the lowest level there are only data
            return t, torch.where(r > lowest, r, 0.0)
        grid = self.scheduler.grid(self.intervals() + 1)
        if options.objective == "improved":
            return losses.lognormal_neighbours(u, grid, mean, std)
        return losses.neighbours(u, grid)

    def state_dict(self) -> dict[str, int]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a step."""
        self.step = state["step"]


class ConsistencyObjective(Objective):
    """One network, whose estimates at two noise levels of one trajectory are to agree.

    `scheduler` is a ConsistencyScheduler. `teacher` is a denoiser in the scheduler's
    parametrisation, for distillation. `distance` (a, b) -> (B,) takes the place of the options'
    one, such as one of features. The target network, where it is not the network itself, joins the
    checkpoints.
    """

    # The curriculum ends with the run.
    goes_by_length = True

    def __init__(
        self,
        scheduler: Any,
        network: nn.Module,
        options: ConsistencyOptions,
        learning_rate: float,
        total_steps: int,
        accelerator: Accelerator,
        teacher: nn.Module | None = None,
        distance: losses.Distance | None = None,
    ):
        self.scheduler, self.options = scheduler, options
        self.curriculum = Curriculum(options, scheduler, total_steps)
        self.class_conditional = network.config.num_class_embeds is not None
        self.null_class_id = network.config.num_class_embeds if network.config.get("null_class") else None
        self.spread = stratified if options.level_sampling == "stratified" else None
        self.distance = self.chosen_distance() if distance is None else distance
        device = accelerator.device
        self.teacher = None if teacher is None else teacher.to(device).eval().requires_grad_(False)
        self.target = None
        if options.published("target_ema") > 0:
            self.target = copy.deepcopy(network).to(device).requires_grad_(False)
        self.player = Player(network, self.values, learning_rate)
        super().__init__(self.player, state=(self.curriculum, *([self.target] if self.target is not None else [])))

    def chosen_distance(self) -> losses.Distance:
        """The distance of the options."""
        name, c = self.options.published("distance"), self.options.huber_c
        if name != "pseudo_huber":
            return {"l1": losses.l1, "l2": losses.l2}[name]
        tuned = self.options.objective == "tuning"

        def huber(a: Tensor, b: Tensor) -> Tensor:
            by_size = 0.0 if tuned else 0.00054 * a[0].numel() ** 0.5
            return losses.pseudo_huber(a, b, by_size if c is None else c)

        return huber

    def turns(self, step: int) -> Iterator[Player]:
        self.curriculum.step = step
        yield self.player

    def after_update(self, player: Player, step: int) -> None:
        """Move the target towards the network."""
        if self.target is not None:
            weights = [parameter.detach() for parameter in player.network.parameters()]
            torch._foreach_lerp_(list(self.target.parameters()), weights, 1 - self.curriculum.target_ema())

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss (B,) of a micro-batch; without dropped labels in evaluation mode."""
        x_0, labels = batch["x_0"], batch["labels"] if self.class_conditional else None
        u = draw.level(self.spread)
        t, r = self.curriculum.levels(u)
        noise = draw.normal(*x_0.shape[1:])
        if self.null_class_id is not None and network.training:
            labels = torch.where(draw.uniform() < self.options.label_dropout, self.null_class_id, labels)
        student = self.function(network, labels)
        # the target drops the same units as the network
        target = student if self.target is None else self.function(self.target.train(network.training), labels)
        if self.options.objective == "tuning":
            loss = losses.tuning_loss(student, target, x_0, noise, t, r, self.distance)
        else:
            teacher = None if self.teacher is None else self.guided_teacher(labels)
            solver = self.options.teacher_solver
            loss = losses.consistency_loss(student, target, x_0, noise, t, r, self.distance, teacher, solver)
            if self.options.objective == "improved":
                loss = loss / (t - r)
        return {"loss": loss.float(), "level": u}

    def function(self, network: nn.Module, labels: Tensor | None, shift: float | None = None) -> losses.Denoise:
        """f(x, sigma) of a network and labels."""
        conditions = {} if labels is None else {"class_labels": labels}
        return lambda x, sigma: self.scheduler.denoise(network, x, sigma, shift, **conditions)

    def guided_teacher(self, labels: Tensor | None) -> losses.Denoise:
        """The teacher's denoiser, which is not shifted, with the guidance of the options."""
        cond, scale = self.function(self.teacher, labels, 0.0), self.options.teacher_guidance_scale
        if scale == 1:
            return cond
        uncond = self.function(self.teacher, torch.full_like(labels, self.null_class_id), 0.0)

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            free = uncond(x, sigma)
            return free + scale * (cond(x, sigma) - free)

        return guided

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Where the curriculum is."""
        if self.options.objective == "tuning":
            return {"stage": self.curriculum.stage()}
        return {"scales": self.curriculum.intervals(), "target_ema": self.curriculum.target_ema()}

    def identity(self) -> dict[str, Any]:
        """The process, and the teacher that a checkpoint belongs to."""
        # of sampling alone, and not in checkpoints of versions that did not have them
        known = {"process": process_digest(self.scheduler, ("sampling_sigmas", "renoise"))}
        return known if self.teacher is None else known | {"teacher": digest(self.teacher)}


def process_digest(scheduler: SchedulerMixin, left_out: tuple[str, ...] = ()) -> str:
    """SHA-256 of a scheduler's settings but those that are `left_out`."""
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    # checkpoints of former versions do not have it
    left_out = left_out if config["predicts_end"] else (*left_out, "predicts_end")
    settings = sorted((name, value) for name, value in config.items() if name not in left_out)
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def digest(network: nn.Module) -> str:
    """SHA-256 of a network's weights."""
    weights = (value.detach().cpu().contiguous().view(torch.uint8).numpy() for value in network.state_dict().values())
    found = hashlib.sha256()
    for value in weights:
        found.update(value.tobytes())
    return found.hexdigest()
