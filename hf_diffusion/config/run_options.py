"""The settings of a run that all training scripts share; a script adds its own by a subclass.

`parse_config(DDPMConfig)` reads them from `--config recipe.yaml` and the command line,
`save_config` writes the file that gives the same run again. Flags have the names of diffusers'
train_unconditional.py where it has one.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hf_diffusion.config import preset
from hf_diffusion.config.options import HIGHEST_SEED, check_fields, option
from hf_diffusion.config.preset import Choice, Circumstances


# Each says how long to train; one of them is given.
LENGTHS = ("max_train_steps", "num_epochs", "max_train_minutes")
# The modes of torch.compile, and those that capture CUDA graphs.
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
CAPTURING = ("reduce-overhead", "max-autotune")
# Images up to this side are small.
SMALL_SIDE = 64


@dataclass(kw_only=True)
class TrainingConfig:
    """Optimizer, averaging, precision, logging and checkpoints of one training run, and what its
    family is.
    """

    # What a family says of itself, for its card and its checkpoints.
    method: ClassVar[str] = ""
    kind: ClassVar[str] = "diffusion model"
    tags: ClassVar[tuple[str, ...]] = ()
    # What the grids of a run show.
    grids: ClassVar[str] = "Samples"
    # What a step learns from, where it is not the data: a word for the card.
    learns_from: ClassVar[str | None] = None
    # The Hub's task, such as image-classification; None where it follows from the data that a
    # pipeline draws.
    task: ClassVar[str | None] = None
    # A template in model_cards/ that tells how to use a network that is saved alone; None for a
    # pipeline.
    usage_template: ClassVar[str | None] = None
    # The settings that a file or a flag gives, in place of defaults.
    given: ClassVar[frozenset[str]] = frozenset()
    # Set on a configuration whose `init_from` was followed; a script that knows none must not pass
    # over it.
    is_started: ClassVar[bool] = False
    # A checkpoint is tied to every setting of a class that does not say otherwise.
    settings_are_tied: ClassVar[bool] = False
    # Of the first setting of each alternative, one is given; a flag that chooses one takes back
    # what a file gives.
    alternatives: ClassVar[tuple] = ((("max_train_steps",), ("num_epochs",), ("max_train_minutes",)),)

    output_dir: str = option(
        "runs/model",
        "folder for checkpoints, samples, logs and the final model",
        group="run",
        is_path=True,
        often=True,
        also="output",
    )
    # Without it, a folder that holds another run is refused: nobody loses a finished model to a
    # repeated command.
    overwrite_output_dir: bool = option(
        False, "begin anew in an output_dir that already holds a run; resume_from_checkpoint wins over it", once=True
    )
    preset: Literal["auto", "fast", "standard"] | None = option(
        None,
        "settings of the network and its training by the size of the images: auto looks at the images, their number "
        "and the machine, and says what it chose; fast is for a CPU or a first try, standard for a GPU; settings "
        "that are given stand above it",
        often=True,
    )
    init_from: str | None = option(
        None,
        "start from the network of this pipeline, model or checkpoint, a folder or Hub id: its shape then replaces "
        "the "
        "options of the network",
        is_path=True,
        often=True,
    )
    # Never random: every draw of a run follows from the seed and the step, which is what makes a
    # resumed run the same run.
    seed: int = option(
        0,
        "seed of the initial weights, the order of the images, timesteps and noise",
        at_least=0,
        at_most=HIGHEST_SEED,
        often=True,
    )
    dry_run: bool = option(
        False,
        "show settings, sizes and a grid of training images, then stop before the first step",
        once=True,
        often=True,
    )
    traceback: bool = option(False, "on an error, show where in the code it arose", once=True)

    train_batch_size: int = option(
        16, "images for each process and micro step", at_least=1, group="optimization", often=True
    )
    gradient_accumulation_steps: int = option(1, "micro steps that make one optimizer step", at_least=1)
    # Exclusive: with both given, one of them would be ignored. Steps are what the schedule and the
    # logs count.
    max_train_steps: int | None = option(None, "length of the training in optimizer steps", at_least=1, often=True)
    num_epochs: int | None = option(
        None, "length of the training in passes over the data, instead of max_train_steps", at_least=1
    )
    # Once: what it came to is in max_train_steps, which repeats the run on any machine.
    max_train_minutes: float | None = option(
        None,
        "length of the training in minutes on this machine, instead of max_train_steps: the steps are fitted to the "
        "time, such that the learning rate has decayed when it ends",
        above=0,
        once=True,
        often=True,
    )
    # Networks for small images learn fastest at 1e-3, those of the published U-Nets for large ones
    # at 1e-4.
    learning_rate: float | None = option(
        None,
        f"highest learning rate; none takes 1e-3 up to {SMALL_SIDE} pixels a side and for points, else 1e-4",
        above=0,
        often=True,
    )
    # What it saves in steps it may cost in their time; measure before a long run.
    optimizer: Literal["adamw", "muon"] = option(
        "adamw",
        "muon moves the matrices within the network's blocks, convolutions included, by orthogonalised steps as long "
        "as those of AdamW, which keeps the rest",
        tied="state",
    )
    # Constant and then down to 0: the decay takes out the noise that a constant rate leaves in the
    # weights, and the length of the run need not be known until the decay begins.
    lr_scheduler: Literal["constant", "linear", "cosine", "trapezoid"] = option(
        "trapezoid", "shape of the learning rate after the warm-up; trapezoid is constant, then linear to 0"
    )
    lr_warmup_steps: int | None = option(
        None,
        "optimizer steps in which the learning rate rises from 0; none is 5 % of the run, at most 500",
        at_least=0,
    )
    lr_decay_steps: int | None = option(
        None, "last steps over which trapezoid decays; none is 30 % of the run", at_least=1
    )
    # So that the file of settings repeats the run.
    lr_decay_ends: tuple[int, ...] = option(
        (),
        "what max_train_minutes has planned during the decay of trapezoid, which must meet its time: steps, each with "
        "the step at which the rate would be 0",
        at_least=0,
    )
    adam_beta1: float = option(0.9, "decay of AdamW's mean of the gradients", at_least=0, below=1)
    adam_beta2: float = option(0.999, "decay of AdamW's mean of the squared gradients", at_least=0, below=1)
    # 0 as in the published recipes: the average over the weights already keeps the sampled network
    # smooth.
    adam_weight_decay: float = option(0.0, "weight decay of AdamW", at_least=0)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", above=0)
    max_grad_norm: float | None = option(1.0, "norm to which gradients are clipped; none does not clip", above=0)
    # One bad batch must not end a run of days, while a diverged run must not go on for days.
    max_nonfinite_steps: int = option(
        10, "stop after so many steps in a row whose loss is not finite; fewer are skipped", at_least=1
    )

    # Samples of the averaged weights are much better than those of the last ones, at the price of
    # one copy of the weights.
    use_ema: bool = option(
        True, "keep an exponential moving average of the weights, and sample and export from it", group="averaging"
    )
    ema_max_decay: float = option(
        0.9999, "highest decay of the average; a short run wants less, such as 0.999", at_least=0, below=1
    )
    # Each is one more copy of the weights, and which is best shows when all is learned.
    ema_max_decays: tuple[float, ...] = option(
        (),
        "keep averages of these highest decays, too, such as 0.99,0.999: at the end the one that is best by "
        "ema_metric becomes the model; until then ema_max_decay is drawn from",
        at_least=0,
        below=1,
        tied="state",
    )
    ema_metric: str = option(
        "fd", "measure that chooses among the averages of ema_max_decays, by its name in metrics.jsonl", tied=None
    )
    # The decay at step n is 1 - (1 + n / inv_gamma) ** -power, so that the first, random weights
    # are forgotten soon.
    ema_inv_gamma: float = option(1.0, "steps after which the warm-up of the average takes hold", above=0)
    ema_power: float = option(
        0.75, "exponent of that warm-up; 2/3 for a million steps and more, 3/4 for fewer", above=0, at_most=1
    )

    # bf16 needs no loss scaling and the accelerators of recent years have it; fp16 is for those
    # that do not.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None,
        "precision of the network's arithmetic; none takes that of accelerate launch, or else no",
        group="speed and memory",
        often=True,
    )
    allow_tf32: bool = option(False, "let float32 products use TF32 on NVIDIA GPUs: faster, with 10 bits of mantissa")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory for one more forward pass"
    )
    torch_compile: bool | None = option(
        None,
        "compile the network: a minute or more at the start, faster steps afterwards; none goes by the dynamo_backend "
        "of accelerate launch",
    )
    compile_mode: CompileMode | None = option(
        None,
        "mode of torch.compile; reduce-overhead and max-autotune capture CUDA graphs, which saves the launches of "
        "small networks; none goes by accelerate launch, or else default",
    )
    channels_last: bool = option(
        False, "store images channel by channel last: for GPUs with half precision; slower on CPUs"
    )
    # Decoded images are kept in memory where they fit, and then worker processes cost more than
    # they bring.
    dataloader_num_workers: int = option(0, "processes that read images ahead of the training", at_least=0)

    # Several at once are allowed. Metrics always go to output_dir/metrics.jsonl too, so none loses
    # nothing.
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), "experiment trackers, separated by commas", group="logging and checkpoints"
    )
    logging_steps: int = option(50, "write metrics after so many optimizer steps", at_least=1)
    sample_steps: int | None = option(
        1000,
        "draw a grid of samples after so many optimizer steps, and a first one after 50; none draws none",
        at_least=1,
        often=True,
    )
    num_sample_images: int = option(64, "images in such a grid", at_least=1)
    # What is measured is a setting of the script: a loss on held-out images, distances of samples
    # to real ones.
    eval_steps: int | None = option(
        1000,
        "measure after so many optimizer steps, where there is something to measure; none only at the end",
        at_least=1,
    )
    best_metric: str | None = option(
        None, "keep the model with the best value of this measure, by its name in metrics.jsonl, in output_dir/best"
    )
    checkpointing_steps: int = option(1000, "write a checkpoint after so many optimizer steps", at_least=1)
    # Two: a full disk ends a run, and the one before the newest is there when the newest proves
    # unusable.
    checkpoints_total_limit: int | None = option(
        2, "keep only so many of the newest checkpoints; none keeps all", at_least=1
    )
    resume_from_checkpoint: str | None = option(
        None,
        "`latest`, the folder of a checkpoint to go on from, or `hub` for the one that was pushed",
        once=True,
        is_path=True,
        often=True,
    )

    push_to_hub: bool = option(
        False,
        "share the model on the Hub; the token is that of `hf auth login` or HF_TOKEN",
        group="the Hub",
        often=True,
    )
    hub_model_id: str | None = option(None, "repository, user/name; none takes the name of output_dir")
    # Training waits for no push in any case: what does not get through stays in output_dir/outbox.
    hub_strategy: Literal["end", "every_save", "checkpoint"] = option(
        "end", "push at the end, or with every save, or with every save and the state to resume from"
    )
    # Private, since publishing cannot be undone, and samples may show more of the training data
    # than one thinks.
    hub_public: bool = option(False, "let everybody see a repository that this run creates")
    hub_license: str | None = option(
        None, "licence of the weights, for the card: an id of the Hub such as mit or cc-by-4.0; none states none"
    )

    def papers(self) -> tuple[str, ...]:
        """What a run with these settings rests on: keys of cards/papers.bib, or whole BibTeX
        entries.
        """
        return ()

    def sampling_options(self) -> dict[str, Any]:
        """The arguments of the pipeline's call with which the run draws its samples, beside labels
        and seeds.
        """
        return {}

    def settle(self, sample_shape: tuple[int, ...]) -> None:
        """Give the settings that go by the data their values: those of the preset that nobody has
        given, the rate.
        """
        if self.preset in ("fast", "standard"):
            for name, value in self.preset_settings(sample_shape).items():
                if name not in self.given:
                    setattr(self, name, value)
        if self.learning_rate is None:
            is_small = max(sample_shape[1:], default=1) <= SMALL_SIDE
            self.learning_rate = 1e-3 if is_small else 1e-4

    def auto_settings(self, circumstances: Circumstances) -> dict[str, Choice]:
        """What `preset auto` chooses, by what the choices are about.

        Groups of options and families with more to choose add theirs.
        """
        return {"training": preset.optimization(circumstances), "arithmetic": preset.arithmetic(circumstances)}

    def reduce(self, sample_shape: tuple[int, ...]) -> str | None:
        """Take a network of less work, where a run of `preset auto` would see few samples.

        Returns what was done; None where nothing can be.
        """
        return None

    def preset_settings(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        """What `preset` means for samples of a shape.

        Families with a network of their own say more.
        """
        return {"train_batch_size": 64, "ema_max_decay": 0.999 if self.preset == "standard" else 0.995}

    @property
    def overwrites(self) -> bool:
        """Whether a run that the folder holds is to be replaced.

        One that can be gone on with is not.
        """
        return self.overwrite_output_dir and self.resume_from_checkpoint is None

    def validate(self) -> None:
        """ValueError, in one sentence, at the first setting that is out of range or contradicts
        another.

        Each group of options has a `check` of its own.
        """
        check_fields(self)
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                group.check(self)

    def check(self) -> None:
        """ValueError for settings of a run that contradict each other."""
        # auto chooses a length where none is given
        if self.preset != "auto" or self.max_train_steps is not None or self.num_epochs is not None:
            check_exclusive(self, *LENGTHS, "how long to train")
        if self.max_train_minutes is not None and self.lr_scheduler not in ("trapezoid", "constant"):
            raise ValueError(
                f"max_train_minutes plans the length while it trains, and lr_scheduler {self.lr_scheduler} must know "
                "it from the first step on; give trapezoid or constant, or max_train_steps"
            )
        if self.ema_max_decays and not self.use_ema:
            raise ValueError(
                f"ema_max_decays {', '.join(map(str, self.ema_max_decays))} are averages, and use_ema is off; leave "
                "one of the two out"
            )
        if not self.output_dir:
            raise ValueError("output_dir is empty; give a folder")
        if self.resume_from_checkpoint == "hub" and not self.hub_model_id and not self.push_to_hub:
            raise ValueError("resume_from_checkpoint hub needs hub_model_id, the repository with the checkpoint")
        starts, ends = self.lr_decay_ends[::2], self.lr_decay_ends[1::2]
        is_line = all(one < other for one, other in zip(starts, starts[1:]))
        if len(starts) != len(ends) or not is_line or any(end <= start for start, end in zip(starts, ends)):
            raise ValueError(
                f"lr_decay_ends {', '.join(map(str, self.lr_decay_ends))} must be pairs of a step and a later end, in "
                "order; leave it out"
            )
        if self.max_train_steps and (self.lr_warmup_steps or 0) > self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps {self.lr_warmup_steps} is longer than the run of {self.max_train_steps} steps; "
                "give fewer"
            )

    def total_steps(self, images: int | None, processes: int) -> int:
        """Optimizer steps of the run.

        `num_epochs` passes over `images` are rounded up to whole steps.
        """
        if self.max_train_steps is not None:
            return self.max_train_steps
        return math.ceil(self.num_epochs * images / self.global_batch(processes))

    def global_batch(self, processes: int) -> int:
        """Images of one optimizer step over all processes and micro steps."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes


def check_exclusive(config: Any, *settings: str) -> None:
    """ValueError unless exactly one of some settings says what the last word names."""
    *names, what = settings
    given = [name for name in names if getattr(config, name) is not None]
    if not given:
        *first, last = (f"--{name}" for name in names)
        raise ValueError(f"give {', '.join(first)} or {last}: {what}")
    if len(given) > 1:
        one, other = given[:2]
        raise ValueError(
            f"{one} {getattr(config, one)!r} and {other} {getattr(config, other)!r} both say {what}; give one, and "
            "`none` for the other"
        )
