"""Text read, tokenised and cut while training, from a set that is neither kept nor counted."""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_diffusion.data.document_stream import DocumentStream, Piece
from hf_diffusion.data.errors import BadData
from hf_diffusion.data.protocol import Batch, TrainingData
from hf_diffusion.data.selection import ENDLESS
from hf_diffusion.data.streaming import read_ahead
from hf_diffusion.data.text import longest_copy, numbered_texts, vocabulary_in_words
from hf_diffusion.data.tokenizing import (
    Encoder,
    check_no_mask,
    separator_of,
    tokenizer_in_words,
    tokenizer_key,
)
from hf_diffusion.randomness import BatchOrder, derive_seed


logger = logging.getLogger(__name__)
# Pieces that are tokenised together, and characters of them.
TOGETHER, CHARACTERS_TOGETHER = 64, 2**20
# Tokens of one sequence (L,), and its class.
Cut = tuple[np.ndarray, int]


class StreamingTextData(TrainingData):
    """An endless stream of sequences of L tokens, the same for any number of processes.

    As in `TextData` documents are laid end to end and cut, in each epoch elsewhere with
    `random_offset`. The order of the files follows from (seed, epoch), and so do the places in a
    buffer of `shuffle_buffer` sequences, out of which they are drawn. Every process reads and
    tokenises the whole stream and takes its own sequences. Resuming reads the current epoch from
    its beginning.

    first: the documents that the stream begins with. `fingerprint`, `characters_per_token` and
    `longest_copy` are of them.
    """

    kind = "texts"
    num_samples = None

    def __init__(
        self,
        documents: DocumentStream,
        first: Sequence[Piece],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        random_offset: bool,
        max_samples: int | None,
        shuffle_buffer: int,
        seed: int,
    ):
        self.name, self.class_names, self.tokenizer = documents.name, documents.class_names, tokenizer
        self.sample_shape, self.split_rows = (sequence_length,), (documents.split, documents.rows)
        self._documents, self._random_offset, self._limit = documents, random_offset, max_samples
        self._shuffle_buffer, self._seed, self._encode = shuffle_buffer, seed, Encoder(tokenizer)
        # What this process read, and at how many unknown tokens it says so the next time.
        self.tokens_read, self.unknown, self.without_text, self._told = 0, 0, 0, 1
        # Tokens of each class in an epoch, once one was read to its end.
        self._totals: dict[int, int] | None = None
        texts = [piece.text for piece in first if piece.text]
        self._first = np.concatenate([np.zeros(0, self._encode.dtype), *self._encode.many(texts)])
        self.characters_per_token = sum(map(len, texts)) / max(1, len(self._first))
        if separator_of(tokenizer) is None:
            self.remarks = ["documents are laid end to end with nothing between them"]
        identity = (sequence_length, random_offset, max_samples, shuffle_buffer, documents.class_names)
        identity = (tokenizer_key(tokenizer), identity, documents.rows, self._first.tobytes())
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def fetch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> Batch:
        """TypeError: the texts of a stream have no numbers to ask for them by."""
        raise TypeError(f"{self.name} is streamed and cannot be read by index; load it with streaming=False")

    def batches(self, order: BatchOrder, start_step: int, total_steps: int, num_workers: int = 0) -> Iterator[Batch]:
        """Yield this process's micro-batches; with workers one thread reads ahead."""
        batches = self._own_batches(order, start_step, total_steps)
        yield from read_ahead(batches) if num_workers else batches

    def once(self, batch_size: int, limit: int | None = None, num_workers: int = 0) -> Iterator[Batch]:
        cuts, first = itertools.islice(self._cuts(None, 0), limit), 0
        while found := list(itertools.islice(cuts, batch_size)):
            yield self._collate(found, first)
            first += len(found)

    def _own_batches(self, order: BatchOrder, start_step: int, total_steps: int) -> Iterator[Batch]:
        position, own = start_step * order.total, slice(order.rows(0).start, order.rows(0).stop)
        cuts = self._endless(position)
        for _ in range((total_steps - start_step) * order.accumulation):
            # of all processes, which follow each other in a micro-batch
            found = list(itertools.islice(cuts, order.batch_size * order.processes))
            yield self._collate(found[own], position + own.start)
            position += len(found)

    def _collate(self, cuts: Sequence[Cut], first: int) -> Batch:
        tokens = torch.from_numpy(np.stack([cut for cut, _ in cuts]).astype(np.int64))
        batch = {"x_0": tokens, "indices": torch.arange(first, first + len(cuts))}
        if self.class_names is None:
            return batch
        labels = [label for _, label in cuts]
        numbers = labels if self.renumbered is None else self.renumbered[labels]
        return batch | {"labels": torch.as_tensor(numbers, dtype=torch.int64)}

    def _endless(self, position: int) -> Iterator[Cut]:
        """Epoch after epoch, from a place in the whole on."""
        for epoch in itertools.count():
            length = self._epoch_length(epoch)
            if length is not None and length <= position:
                position -= length
                continue
            count = 0
            for count, cut in enumerate(self._shuffled(epoch), 1):
                if count > position:
                    yield cut
            if not (count or epoch):
                raise self.too_short()
            position = max(0, position - count)

    def _shuffled(self, epoch: int) -> Iterator[Cut]:
        """One epoch, each sequence drawn out of a buffer."""
        cuts, rng, held = self._epoch(epoch), np.random.default_rng(derive_seed(self._seed, "buffer", epoch)), []
        for cut in cuts:
            if len(held) < self._shuffle_buffer:
                held.append(cut)
                continue
            place = int(rng.integers(len(held)))
            held[place], cut = cut, held[place]
            yield cut
        yield from (held[place] for place in rng.permutation(len(held)))

    def _epoch(self, epoch: int) -> Iterator[Cut]:
        # The first sequences of files in another order would be others.
        order = derive_seed(self._seed, "files", epoch) if self._limit is None else None
        return itertools.islice(self._cuts(order, self._offset(epoch), counts=True), self._limit)

    def _offset(self, epoch: int) -> int:
        if not self._random_offset or epoch == 0:
            return 0
        return derive_seed(self._seed, "offset", epoch) % self.sample_shape[0]

    def _epoch_length(self, epoch: int) -> int | None:
        """Sequences of an epoch; None until one was read to its end."""
        if self._totals is None:
            return None
        length, offset = self.sample_shape[0], self._offset(epoch)
        count = sum(max(0, total - offset) // length for total in self._totals.values())
        return count if self._limit is None else min(count, self._limit)

    def _cuts(self, order: int | None, offset: int, counts: bool = False) -> Iterator[Cut]:
        """The sequences of one pass, the first of each class `offset` tokens from its beginning.

        counts: what is missing or unknown is counted, as it is when training.
        """
        length, held, totals = self.sample_shape[0], {}, {}
        for label, tokens in self._tokens(order, counts):
            former = totals.get(label, 0)
            totals[label] = former + len(tokens)
            rest = np.concatenate([held.get(label, tokens[:0]), tokens[max(0, offset - former) :]])
            whole = len(rest) - len(rest) % length
            yield from ((cut.copy(), label) for cut in rest[:whole].reshape(-1, length))
            held[label] = rest[whole:]
        self._totals = totals

    def _tokens(self, order: int | None, counts: bool) -> Iterator[tuple[int, np.ndarray]]:
        """The class and the tokens of each piece, and what ends each document but the last."""
        separator, former = separator_of(self.tokenizer), None
        ending = np.array([] if separator is None else [separator], self._encode.dtype)
        for pieces in _together(self._documents.pieces(order)):
            written = [piece for piece in pieces if piece.text is not None]
            if counts:
                self._count_missing(len(pieces) - len(written))
            for piece, tokens in zip(written, self._encode.many([piece.text for piece in written])):
                if former is not None and former.document != piece.document:
                    yield former.label, ending
                check_no_mask(tokens, self.tokenizer, self.name)
                if counts:
                    self._count_unknown(tokens)
                yield piece.label, tokens
                former = piece

    def _count_unknown(self, tokens: np.ndarray) -> None:
        """Count them, and say so whenever they have grown tenfold."""
        self.tokens_read += len(tokens)
        if self.tokenizer.unk_token_id is None:
            return
        self.unknown += int((tokens == self.tokenizer.unk_token_id).sum())
        if self.unknown >= self._told:
            self._told = 10 * self.unknown
            said = f"{self.unknown:,} of {self.tokens_read:,} tokens ({self.unknown / self.tokens_read:.2%})"
            logger.warning("%s: %s that were read are unknown to the tokenizer", self.name, said)

    def _count_missing(self, count: int) -> None:
        if count and not self.without_text:
            logger.warning("%s: rows without a text are left out and counted", self.name)
        self.without_text += count

    def too_short(self) -> BadData:
        """The error for texts that fill no sequence."""
        return BadData(
            f"{self.name} has fewer tokens than a sequence of {self.sample_shape[0]}; give more text or a smaller "
            "sequence_length"
        )

    def to_samples(self, batch: Batch) -> np.ndarray:
        """x_0 as sampling returns texts: tokens int64 (B, L)."""
        return batch["x_0"].cpu().numpy()

    def picture(self, samples: np.ndarray, columns: int | None = None, row_labels: Sequence[str] | None = None) -> str:
        """The texts of tokens (N, L) below each other, numbered, below the label of their row."""
        return numbered_texts(self.tokenizer.batch_decode(samples), columns, row_labels)

    def longest_copy(self, tokens: np.ndarray, but_once: bool = False) -> int:
        """The length of the longest stretch of tokens (L,) that the first documents have, too."""
        return longest_copy(self._first, tokens, but_once)

    @property
    def searched_for_copies(self) -> str:
        """In words."""
        return f"the first {len(self._first):,} tokens of the stream"

    def form(self) -> dict[str, Any]:
        """The tokenizer and the length, for another split without moving cuts."""
        return {"tokenizer": self.tokenizer, "sequence_length": self.sample_shape[0], "random_offset": False}

    def summary(self) -> dict[str, str]:
        """What is known before it is read: vocabulary, columns and an excerpt."""
        rows = self._documents.rows
        part = "" if rows is None else f", rows {rows.start:,} to {'the end' if rows.stop >= ENDLESS else rows.stop}"
        excerpt = self.to_samples(next(self.once(1)))[0]
        return {
            "data": f"a stream of sequences of {self.sample_shape[0]} tokens, {self.num_classes or 'no'} classes, "
            f"drawn out of a buffer of {self._shuffle_buffer:,}",
            "splits": f"{self._documents.split}{part}",
            "vocabulary": vocabulary_in_words(self.tokenizer, self.characters_per_token),
            "an excerpt": repr(self.tokenizer.decode(excerpt)),
            **({"remarks": "; ".join(self.remarks)} if self.remarks else {}),
        }

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "values": "tokens",
            "streaming": True,
            "shuffle_buffer": self._shuffle_buffer,
            "split": self._documents.split,
            "vocabulary": len(self.tokenizer),
            "tokenizer": tokenizer_in_words(self.tokenizer),
            "unknown_tokens": self.unknown,
            "rows_without_text": self.without_text,
            **self._documents.facts,
        }


def _together(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    held, size = [], 0
    for piece in pieces:
        held.append(piece)
        size += len(piece.text or "")
        if len(held) == TOGETHER or size > CHARACTERS_TOGETHER:
            yield held
            held, size = [], 0
    if held:
        yield held
