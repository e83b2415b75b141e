"""Options of data that are text."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import check_exclusive
from hf_diffusion.config.shared_options import check_length_of_stream, place_data


@dataclass(kw_only=True)
class TextDataOptions:
    """The texts to train on, and how they become tokens."""

    # The fingerprint of the tokens ties a checkpoint to them.
    settings_are_tied: ClassVar[bool] = False
    alternatives: ClassVar[tuple] = (
        (
            ("data", "text_column", "label_column"),
            ("dataset_name", "dataset_config_name", "text_column", "label_column"),
            ("train_data_dir", "text_column", "label_column"),
        ),
    )
    # Measures of images, which texts have none of.
    eval_metrics: ClassVar[tuple[str, ...]] = ()

    # What it names is put into one of the two below, which are what a run records.
    data: str | None = option(
        None,
        "the texts to train on: a .txt, .jsonl, .csv or .parquet file, a folder of such files, or a data set on the "
        "Hub as user/name",
        group="data",
        is_path=True,
        often=True,
    )
    dataset_name: str | None = option(None, "data set on the Hub", is_path=True)
    dataset_config_name: str | None = option(None, "configuration of the data set on the Hub, where it has several")
    train_data_dir: str | None = option(
        None, "a .txt, .jsonl, .csv or .parquet file, or a folder of such files", is_path=True
    )
    # Of one file a part can be held out: rows are lines of .txt files, and rows of tables.
    split: str = option(
        "train", "split to train on, or a part of it: train[:90%] leaves the last lines for eval_split"
    )
    cache_dir: str | None = option(None, "where data and tokens are kept instead of the caches", is_path=True)
    text_column: str | None = option(None, "column that holds the text; none finds it", often=True)
    label_column: str = option("auto", "column of the classes, where class_conditional; auto finds it by its type")
    tokenizer: str | None = option(
        None,
        "chars makes one of the characters of the data; else a folder or Hub id of transformers; none takes that of "
        "init_from, or else chars",
        is_path=True,
        often=True,
    )
    sequence_length: int = option(
        256, "tokens of a sample, cut from documents laid end to end", at_least=2, often=True
    )
    # A place that is always the first of a sequence is never learned from its left.
    random_offset: bool = option(True, "cut sequences elsewhere in each epoch")
    max_train_samples: int | None = option(None, "use only so many sequences", at_least=1)
    streaming: bool = option(False, "read and tokenise the texts while training instead of all of them first")

    eval_split: str | None = option(
        None, "split whose bound is measured at every eval_steps, such as train[90%:]", group="evaluation", often=True
    )
    eval_batch_size: int = option(64, "sequences that a process measures at a time", at_least=1)

    def check(self) -> None:
        """ValueError for settings of the data that contradict each other."""
        if self.data is not None:
            place_data(self)
        check_exclusive(self, "dataset_name", "train_data_dir", "the texts to train on")
        check_length_of_stream(self)
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError(
                f"dataset_config_name {self.dataset_config_name!r} needs dataset_name, the data set that it belongs to"
            )

    def data_arguments(self) -> dict[str, Any]:
        """The arguments of `load_data` for the data of this run."""
        names = [
            field.name
            for field in fields(TextDataOptions)
            if field.name != "data" and not field.name.startswith("eval_")
        ]
        label_column = "none" if not self.class_conditional else self.label_column
        return {
            **{name: getattr(self, name) for name in names},
            "label_column": None if label_column == "auto" else label_column,
            "seed": self.seed,
        }
