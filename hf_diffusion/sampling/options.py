"""What a user says about sampling: where the pipeline comes from, and how it draws."""

from dataclasses import dataclass
from typing import Any, Literal

from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import CompileMode


# The names of `loading.SCHEDULERS`, which needs torch.
SchedulerName = Literal[
    "ddim", "ddpm", "dpm++", "unipc", "deis", "ipndm", "euler", "edm-heun", "edm-euler", "edm-dpm++"
]
# Options that are arguments of a pipeline's call, under the same names.
CALL_OPTIONS = ("num_inference_steps", "eta", "guidance_scale", "guidance_interval", "guidance_rescale", "timesteps")


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """Where a pipeline comes from."""

    pipeline: str = option(help="a folder, or user/repository on the Hub", group="pipeline", positional=True)
    revision: str | None = option(None, "branch, tag or commit of the repository")
    subfolder: str | None = option(None, "folder of the pipeline within the repository")
    verify: bool = option(False, "compare every downloaded file with the Hub's checksums first")

    def where(self) -> dict[str, str]:
        """The keyword arguments of a `from_pretrained` that say where to look."""
        given = {"revision": self.revision, "subfolder": self.subfolder}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(PipelineOptions):
    """Where a pipeline comes from, and how it draws."""

    # Code of a repository can do whatever its user can; the package's own classes need none.
    trust_remote_code: bool = option(False, "run the code of a repository that hf_diffusion does not know")

    # None leaves each of these to the pipeline, whose model knows best how many steps it wants.
    num_inference_steps: int | None = option(
        None, "steps of the sampler; none is the pipeline's own", at_least=1, group="sampling"
    )
    eta: float | None = option(None, "noise of DDIM sampling, 0 to 1; none is the scheduler's own")
    guidance_scale: float | None = option(None, "w in uncond + w * (cond - uncond); none is the pipeline's own")
    guidance_interval: tuple[float, float] | None = option(
        None,
        "guide only between these noise levels, such as 0.2,0.8, where 0 is clean and 1 noise; of an EDM in sigma, "
        "such as 0.3,5; none is the pipeline's own",
    )
    guidance_rescale: float | None = option(
        None, "how far guided outputs are brought back to their standard deviation, 0 to 1; none is the pipeline's own"
    )
    timesteps: tuple[int, ...] | None = option(
        None, "the steps themselves, falling, such as 999,750,480,200; `tune-steps` searches for them"
    )
    # What the next family's pipeline takes is not known here; its signature tells the type.
    set_: tuple[str, ...] = option(
        (), "NAME=VALUE: any other option that the pipeline says it samples by", repeatable=True
    )
    guide_by: str | None = option(
        None,
        "folder or repository of a classifier of noisy images, whose gradient guides instead, or of a weaker network "
        "of the same kind, such as RUN/checkpoint-00001000, that guidance leads away from; guidance_scale is the "
        "scale. Of a CLIP of noisy images for a text-to-image model, beside --set clip_guidance_scale=2",
    )
    scheduler: SchedulerName | None = option(
        None,
        "sample with another scheduler of the same process; measured on the shipped Fashion-MNIST DDPM: unipc is best "
        "from 3 to 20 steps, dpm++ next and level with it at 20, and ddim needs 20",
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = option(
        None, "how the steps are spread over those of the training; none is the scheduler's own"
    )
    # bf16 halves the memory; whether it is faster depends on the device, and its images differ
    # visibly.
    dtype: Literal["float32", "bf16", "fp16"] = option("float32", "precision of the network's arithmetic")
    fast: bool = option(
        False, "bfloat16 where the device multiplies it; on a GPU channels_last and compiled, too; says what it did"
    )
    compile_mode: CompileMode | None = option(
        None, "mode of the compilation of --fast on a GPU; reduce-overhead and max-autotune capture CUDA graphs"
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; none is cuda where there is one")
    batch_size: int = option(256, "samples that are in memory at a time", at_least=1)

    def of_call(self) -> dict[str, Any]:
        """The options that are given and are arguments of a pipeline's call."""
        given = {name: getattr(self, name) for name in CALL_OPTIONS}
        return {name: value for name, value in given.items() if value is not None}
