"""Processes that kill themselves in the middle of writing, for `tests/test_files.py`.

Nothing of them is undone: SIGKILL leaves no time for it.
"""

import os
import signal
from pathlib import Path

from hf_diffusion.data import tokenizing
from hf_diffusion.data.loading import load_data
from hf_diffusion.files import write_folder, write_whole
from hf_diffusion.models.unet_adm import ADMClassifier
from hf_diffusion.training import train_classifier


def kill() -> None:
    """End this process without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(flags: list[str]) -> int:
    """Write the first half of a file."""
    return write_whole(Path(flags[0]), lambda file: (file.write(b"half"), file.flush(), kill())) and 0


def half_a_folder(flags: list[str]) -> int:
    """Write one of two files of a folder."""
    return write_folder(flags[0], lambda folder: ((folder / "one").write_text("new"), kill()), last="two") and 0


def half_the_tokens(flags: list[str]) -> int:
    """Tokenise the first of several documents."""
    tokenizing.check_no_mask = lambda *_: kill()
    load_data(train_data_dir=flags[0], cache_dir=flags[1], tokenizer="chars", sequence_length=16)
    return 0


def half_a_model(flags: list[str]) -> int:
    """Train a classifier, and save the first bytes of its weights."""
    save = ADMClassifier.save_pretrained

    def save_and_cut(network: ADMClassifier, folder: Path, **options) -> None:
        save(network, folder, **options)
        (weights,) = Path(folder).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:100])
        kill()

    ADMClassifier.save_pretrained = save_and_cut
    return train_classifier.main(flags)
