"""`hf-diffusion space`: the Space of a model."""

from dataclasses import dataclass
from pathlib import Path

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import option


@dataclass(frozen=True, kw_only=True)
class SpaceCommand(Command):
    """Write the Space of a model, and push it on request.

    A Space is a page on the Hub on which anybody draws from the model. That of a folder carries
    the weights; that of a repository names it, at the commit that is there now. What you change in
    its files stays when they are written again.
    """

    pipeline: str = option(help="a folder, or user/repository on the Hub", group="space", positional=True)
    revision: str | None = option(None, "branch, tag or commit of the repository")
    output: Path | None = option(None, "folder to write; none is space in the folder, or NAME-space")
    title: str | None = option(None, "what the page is called; none is the name of the model")
    push: str | None = option(None, "user/name of a Space to push it to; created if there is none")
    # Publishing cannot be undone.
    public: bool = option(False, "let everybody see the Space, if this push creates it")

    def run(self) -> None:
        """Write the files; push them where that is asked for."""
        # diffusers takes seconds, and --help comes past here without running anything.
        from hf_diffusion.commands.push import say_where
        from hf_diffusion.hub.push import Push, check_write_access, push
        from hf_diffusion.space.folder import write_space

        folder = Path(self.pipeline) if Path(self.pipeline).is_dir() else None
        name = (folder.resolve() if folder else Path(self.pipeline)).name
        output = self.output or (folder / "space" if folder else Path(f"{name}-space"))
        title = self.title or name.replace("_", " ").replace("-", " ")
        space = write_space(self.pipeline, output, title, self.revision)
        print(f"written to {output}:", *(f"  {file}" for file in described(space.files)), sep="\n")
        print(*space.notes, f"try it by `python {output / 'app.py'}`", sep="\n")
        if self.push is not None:
            repo_id = check_write_access(self.push, not self.public, repo_type="space")
            what = Push(space.files, repo_id, "Space by hf-diffusion", private=not self.public, repo_type="space")
            say_where(push(what))


def described(files: dict[str, Path]) -> list[str]:
    """Each file with its size."""
    return [f"{name} ({path.stat().st_size / 1000:,.0f} kB)" for name, path in files.items()]
