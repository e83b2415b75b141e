"""`hf-diffusion convert`: our pipelines in others' classes and files, and the other way round."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import option


@dataclass(frozen=True, kw_only=True)
class ConvertCommand(Command):
    """Change between our classes and those of others.

    --to diffusers: write a pipeline that needs no code of ours.
    --from openai: read a checkpoint of OpenAI's guided-diffusion or improved-diffusion with the
    flags of their scripts; --to openai: write model.pt and flags.json for it.
    --from nvlabs: read netG_<epoch>.pth or content.pth of NVlabs' denoising-diffusion-gan with the
    flags of its train_ddgan.py; --to nvlabs: write netG.pth and flags.json for it.
    --from glide: read base.pt of OpenAI's glide-text2im, with the folder of its tokenizer.
    """

    source: str = option(help="folder or repository of a pipeline; the file of a checkpoint", positional=True)
    output: Path = option(help="folder to write, which must not hold anything yet", positional=True)
    to: Literal["diffusers", "nvlabs", "openai"] | None = option(
        None, "whose classes or files to write", group="convert"
    )
    from_: Literal["glide", "openai", "nvlabs"] | None = option(None, "whose checkpoint to read")
    class_label: str = option(
        "auto",
        "with --to diffusers: number or name of the class that the stock pipeline samples, or none for the null "
        "class; auto does for a model without classes",
    )
    flags: str = option(
        "",
        "with --from: the flags of their script, as in '--image_size 64 --class_cond True'; with --from nvlabs also a "
        ".json or .yaml file of them, and nothing for content.pth, which carries its own; with --from openai also the "
        "flags.json of --to openai; with --from glide nothing for the released models",
    )
    tokenizer: Path | None = option(
        None,
        "with --from glide: the folder glide_text2im/tokenizer of its code, with encoder.json.gz and vocab.bpe.gz",
    )

    def validate(self) -> None:
        """ValueError unless one direction is given, and the tokenizer where it belongs to it."""
        if (self.to is None) == (self.from_ is None):
            raise ValueError("give either --to, to write for others, or --from, to read what others wrote")
        if self.from_ == "glide" and self.tokenizer is None:
            raise ValueError(
                "--from glide without --tokenizer has no way to read a prompt, since the checkpoint holds no "
                "tokenizer; give the folder glide_text2im/tokenizer of glide-text2im"
            )
        if self.from_ != "glide" and self.tokenizer is not None:
            raise ValueError(f"--tokenizer {self.tokenizer} goes with --from glide only; leave it out")

    def run(self) -> None:
        """Convert, and print what was made."""
        # torch takes seconds, and --help comes past here without running anything.
        from hf_diffusion.convert import folders

        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise ValueError(f"{self.output} holds something already; give another folder")
        if self.to == "diffusers":
            folders.write_stock(self.source, self.output, None if self.class_label == "auto" else self.class_label)
        elif self.to == "nvlabs":
            folders.write_for_nvlabs(self.source, self.output)
        elif self.to == "openai":
            folders.write_for_openai(self.source, self.output)
        elif self.from_ == "glide":
            folders.write_from_glide(Path(self.source), self.output, self.flags, self.tokenizer)
        elif self.from_ == "nvlabs":
            folders.write_from_nvlabs(Path(self.source), self.output, self.flags)
        else:
            folders.write_from_openai(Path(self.source), self.output, self.flags)
