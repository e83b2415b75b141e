"""`hf-diffusion skill`: what a coding assistant should know of this package, as a file for it."""

from dataclasses import dataclass
from pathlib import Path

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import option
from hf_diffusion.files import write_whole


SKILL = Path(__file__).with_name("SKILL.md")


@dataclass(frozen=True, kw_only=True)
class SkillCommand(Command):
    """Teach coding assistants this package: put SKILL.md where they look for skills.

    Projects keep skills in .agents/skills, which is the default, or in .claude/skills; those in
    ~/.agents/skills and ~/.claude/skills are for all projects.
    """

    folder: Path = option(Path(".agents/skills"), "folder of the skills", positional=True)
    overwrite: bool = option(False, "replace a skill of this name that was edited there", group="skill")

    def run(self) -> None:
        """Write the file, and print where it is."""
        target, text = self.folder / "hf-diffusion" / SKILL.name, SKILL.read_text(encoding="utf-8")
        if target.exists() and target.read_text(encoding="utf-8") != text and not self.overwrite:
            raise ValueError(f"{target} is there and differs; keep it, or replace it by --overwrite")
        write_whole(target, text)
        print(target)
