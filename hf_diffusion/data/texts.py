"""Opening texts: of the Hub, files or tables, read by index or streamed."""

import itertools
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_diffusion.data.document_stream import DocumentStream, Piece, stream_documents
from hf_diffusion.data.documents import open_documents
from hf_diffusion.data.text import TextData
from hf_diffusion.data.text_stream import StreamingTextData
from hf_diffusion.data.tokenizing import open_tokenizer, tokenize
from hf_diffusion.files import cache_folder


logger = logging.getLogger(__name__)
# Of a stream, what is read before training: documents, and characters of them.
FIRST_DOCUMENTS, FIRST_CHARACTERS = 10_000, 2**22


def load_text(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    text_column: str | None = None,
    label_column: str | None = "none",
    tokenizer: str | PreTrainedTokenizerBase = "chars",
    sequence_length: int = 256,
    random_offset: bool = True,
    max_train_samples: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    seed: int = 0,
    shuffle_buffer: int = 10_000,
) -> TextData | StreamingTextData:
    """Texts as sequences of tokens, from a .txt file, a folder of them, a table or a Hub id.

    tokenizer: `chars`, a folder, a Hub id, or one that is loaded. Tokens are kept in a cache and
    mapped from there.
    streaming: neither texts nor tokens are kept; `chars` are those of the first documents, and
        `max_train_samples` takes the first sequences.
    shuffle_buffer: sequences of a stream.

    ValueError in one sentence for texts that cannot be used.
    """
    where = (dataset_name, dataset_config_name, train_data_dir, split, text_column, label_column, cache_dir)
    cut = {"sequence_length": sequence_length, "random_offset": random_offset, "seed": seed}
    cut["max_samples"] = max_train_samples
    if streaming:
        return _stream(stream_documents(*where), tokenizer, {**cut, "shuffle_buffer": shuffle_buffer})
    documents = open_documents(*where)
    if isinstance(tokenizer, str):
        tokenizer = open_tokenizer(tokenizer, lambda: (text for _, text in documents.pieces()))
    tokens, facts = tokenize(documents, tokenizer, Path(cache_dir) if cache_dir else cache_folder("tokens"))
    data = TextData(documents, tokens, facts, tokenizer, **cut)
    if not data.num_samples:
        moved = f" and {sequence_length - 1} to move the cuts by" if random_offset else ""
        raise ValueError(
            f"split {split!r} of {data.name} has {sum(facts['streams']):,} tokens, and a sequence needs "
            f"{sequence_length}{moved}; give more text or a smaller sequence_length"
        )
    return data


def _stream(
    documents: DocumentStream, tokenizer: str | PreTrainedTokenizerBase, cut: dict[str, Any]
) -> StreamingTextData:
    first, asked = _first_documents(documents), tokenizer
    if isinstance(tokenizer, str):
        tokenizer = open_tokenizer(tokenizer, lambda: (piece.text or "" for piece in first))
    data = StreamingTextData(documents, first, tokenizer, **cut)
    if next(data.once(1), None) is None:
        raise data.too_short()
    if asked == "chars":
        read = f"{sum(len(piece.text or '') for piece in first):,} characters of {len(first):,} pieces of text"
        remark = f"the alphabet is that of the first {read}; what it lacks is unknown, and counted"
        data.remarks = [remark, *data.remarks]
        logger.warning("%s: %s", data.name, remark)
    return data


def _first_documents(documents: DocumentStream) -> list[Piece]:
    """Pieces in the order of the files, without what lies beyond the limits."""
    found, characters = [], 0
    for piece in itertools.islice(documents.pieces(None), FIRST_DOCUMENTS):
        found.append(piece)
        characters += len(piece.text or "")
        if characters >= FIRST_CHARACTERS:
            break
    return found
