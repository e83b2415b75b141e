"""What a run would do, before it costs anything: settings, sizes, memory, time, and the data as
networks see them."""

from collections.abc import Callable
from pathlib import Path

from hf_diffusion.config.options import config_to_yaml, lasting_settings
from hf_diffusion.files import write_shown
from hf_diffusion.loop.output_folder import PREVIEW
from hf_diffusion.loop.rehearsal import TIMED_STEPS, in_bytes, in_time, measure, state_bytes
from hf_diffusion.loop.trainer import Trainer


# Above so many seconds a step on a CPU, the dry run looks for something faster.
SLOW = 1.0


def dry_run(trainer: Trainer, build_faster: Callable[[], Trainer] | None = None) -> None:
    """Print the resolved settings and measured costs of one micro step; write `data_preview.png`,
    .txt of texts, to the output folder.

    `build_faster` makes the trainer of the same run with preset fast, which is measured where the
    run is slow on a CPU.
    """
    config, data, device = trainer.config, trainer.data, trainer.accelerator.device
    trainer.accelerator.print(config_to_yaml(lasting_settings(config)))
    trainer.accelerator.print(f"measuring {1 + TIMED_STEPS} steps, of which no weight changes", flush=True)
    seconds, activations = measure(trainer)
    if not trainer.accelerator.is_main_process:
        return
    preview = write_shown(Path(config.output_dir) / PREVIEW, data.preview())
    facts = {
        **data.summary(),
        "parameters": f"{trainer.shared.parameters:,}",
        "steps": f"{trainer.total_steps} of {trainer.global_batch} {data.kind}{_passes(trainer)}",
        "memory a process": f"{in_bytes(state_bytes(trainer))} for weights, gradients, optimizer and averages + "
        f"{in_bytes(activations)} activations",
        "time": f"{in_time(seconds * trainer.total_steps)} at {seconds:.3f} s a step ({TIMED_STEPS} steps measured "
        f"on this {device.type}; sampling and checkpoints not counted)",
        "data as the network sees them": preview,
    }
    if device.type == "cpu" and seconds > SLOW and config.preset is None and build_faster is not None:
        fast, _ = measure(build_faster())
        facts["a better choice"] = (
            f"--preset fast takes {fast:.3f} s a step here, {in_time(fast * trainer.total_steps)} for as many steps"
        )
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


def _passes(trainer: Trainer) -> str:
    images, seen = trainer.data.num_samples, trainer.total_steps * trainer.global_batch
    return f", {seen / images:.1f} passes over the data" if images else ""
