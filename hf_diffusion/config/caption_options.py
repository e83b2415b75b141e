"""Captions of the data, and the encoder of texts that learns to read them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_diffusion.config.options import option


@dataclass(kw_only=True)
class CaptionOptions:
    """Where captions come from, and what reads them; it stands before DataOptions."""

    # A flag that names a column takes back the templates of a recipe.
    alternatives: ClassVar[tuple] = ((("caption_column",), ("caption_template",)),)

    # The fingerprint of the data ties a checkpoint to them.
    caption_column: str | None = option(
        None, "column of captions, texts or lists of texts; none finds it by its name", group="captions", tied=None
    )
    caption_template: tuple[str, ...] = option(
        (),
        "make captions of the classes instead, such as 'a photo of a {}', which is 'an' before a vowel; each use adds "
        "one, and an image has each of them in turn, at random; none takes back those of a file",
        repeatable=True,
        tied=None,
    )
    # They are read before the first step, with their images, where these lie in the same file.
    caption_rows: int = option(
        5000,
        "first rows of a stream whose captions train the tokenizer of an encoder from scratch, and are counted and "
        "shown",
        at_least=1,
        tied=None,
    )
    text_length: int = option(
        64, "tokens that a text has at most; longer ones are cut, and counted", at_least=4, group="text encoder"
    )
    text_width: int = option(128, "width of an encoder from scratch", at_least=8)
    text_layers: int = option(2, "layers of an encoder from scratch", at_least=1)
    text_heads: int = option(4, "attention heads of an encoder from scratch", at_least=1)
    text_vocabulary: int = option(8192, "most tokens that an encoder from scratch learns", at_least=259)

    def check(self) -> None:
        """ValueError for settings that contradict each other."""
        if self.caption_template and self.caption_column:
            raise ValueError(
                f"caption_template and caption_column {self.caption_column!r} both say what the captions are; give one"
            )
        if self.text_width % self.text_heads:
            raise ValueError(
                f"text_heads {self.text_heads} does not divide text_width {self.text_width}; give a divisor"
            )

    def data_arguments(self) -> dict[str, Any]:
        """The arguments of `load_data` for the data of this run, with captions."""
        captions = {"caption_column": self.caption_column, "caption_templates": self.caption_template}
        captions["caption_rows"] = self.caption_rows
        return {**super().data_arguments(), "captioned": True, **captions}
