"""`make docs`: the reference of all classes and functions from their docstrings, by pdoc.

pdoc, since it needs no site, no theme and no second list of the modules, and is kept up; mkdocs has
had no release since 2024. The pages of docs/ are read where they lie.
"""

import pkgutil
import sys
from pathlib import Path

import pdoc
from pdoc import render

import hf_diffusion


# What is started, not imported: `--help` tells its options; and folders of files for cards.
NOT_IMPORTED = {"cli", "commands", "training", "space", "model_cards"}


def main(folder: str) -> None:
    """Write the pages of all modules into a folder."""
    # pdoc looks for the public classes where they would be without lazy modules.
    vars(hf_diffusion).update({name: getattr(hf_diffusion, name) for name in hf_diffusion.__all__})
    rooms = sorted({module.name for module in pkgutil.iter_modules(hf_diffusion.__path__)} - NOT_IMPORTED)
    render.configure(docformat="google", show_source=False, footer_text=f"hf_diffusion {hf_diffusion.__version__}")
    pdoc.pdoc("hf_diffusion", *(f"hf_diffusion.{room}" for room in rooms), output_directory=Path(folder))
    print(f"{folder}/index.html")


if __name__ == "__main__":
    main(*sys.argv[1:])
