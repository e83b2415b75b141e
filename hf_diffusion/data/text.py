"""Text as sequences of tokens: one kind of data, from texts of any kind."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_diffusion.data.documents import Documents
from hf_diffusion.data.protocol import Batch, TrainingData
from hf_diffusion.data.selection import evenly_spaced
from hf_diffusion.data.tokenizing import is_of_characters, separator_of, sequence_starts, tokenizer_in_words
from hf_diffusion.randomness import derive_seed


# Bytes of tokens in which copies are looked for.
SEARCHED = 2**26
# Of a vocabulary, in a summary.
MOST_SHOWN = 120


class TextData(TrainingData):
    """Sequences of L tokens, cut one after the other from documents that are laid end to end.

    random_offset: whether the cuts of each epoch are elsewhere, so that no place in a text is
        always the first of a sequence.
    """

    kind = "texts"

    def __init__(
        self,
        documents: Documents,
        tokens: np.ndarray,
        facts: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        random_offset: bool,
        max_samples: int | None,
        seed: int,
    ):
        self.name, self.tokenizer, self._tokens, self._facts = documents.name, tokenizer, tokens, facts
        self._seed, self._random_offset, self._documents = seed, random_offset, documents
        starts, classes = sequence_starts(facts["streams"], sequence_length, random_offset)
        chosen = evenly_spaced(len(starts), max_samples)
        self._starts = starts[chosen]
        self.num_samples, self.sample_shape = len(chosen), (sequence_length,)
        self.class_names = documents.class_names
        self.labels = None if documents.class_names is None else classes[chosen]
        self.split_rows = (documents.split, documents.rows)
        self.remarks = self._remarks(sequence_length)
        identity = (facts["fingerprint"], sequence_length, random_offset, max_samples, documents.class_names)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def _remarks(self, length: int) -> list[str]:
        facts, remarks = self._facts, []
        if facts["unknown"]:
            share = facts["unknown"] / max(1, sum(facts["streams"]))
            remarks.append(f"{facts['unknown']:,} tokens ({share:.2%}) are unknown to the tokenizer")
        if facts["documents"] > 1:
            ending = separator_of(self.tokenizer)
            word = "nothing" if ending is None else repr(self.tokenizer.convert_ids_to_tokens(ending))
            remarks.append(f"documents are laid end to end with {word} between them")
        left = sum(facts["streams"]) - self.num_samples * length
        if 0 < left < length * len(facts["streams"]) and not self._random_offset:
            remarks.append(f"the last {left:,} tokens fill no sequence and are left out")
        return remarks

    def fetch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> Batch:
        """Return "x_0" int64 (B, L), "indices", and "labels" where there are classes."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        for index in rows[(rows < 0) | (rows >= len(self))][:1].tolist():
            raise IndexError(f"index {index} is not in the data set {self.name!r}, which has 0..{len(self) - 1}")
        epochs = [epoch] * len(rows) if isinstance(epoch, int) else epoch
        length = self.sample_shape[0]
        starts = [int(self._starts[row]) + self._offset(number) for row, number in zip(rows.tolist(), epochs)]
        tokens = np.stack([self._tokens[start : start + length] for start in starts]).astype(np.int64)
        batch = {"x_0": torch.from_numpy(tokens), "indices": rows.clone()}
        return batch if self.labels is None else batch | {"labels": torch.from_numpy(self.labels)[rows]}

    def _offset(self, epoch: int) -> int:
        """By how many tokens the cuts of an epoch are moved."""
        if not self._random_offset or epoch == 0:
            return 0
        return derive_seed(self._seed, "offset", epoch) % self.sample_shape[0]

    def to_samples(self, batch: Batch) -> np.ndarray:
        """x_0 as sampling returns texts: tokens int64 (B, L)."""
        return batch["x_0"].cpu().numpy()

    def picture(self, samples: np.ndarray, columns: int | None = None, row_labels: Sequence[str] | None = None) -> str:
        """The texts of tokens (N, L) below each other, numbered, below the label of their row."""
        return numbered_texts(self.tokenizer.batch_decode(samples), columns, row_labels)

    def longest_copy(self, tokens: np.ndarray, but_once: bool = False) -> int:
        """The length of the longest stretch of tokens (L,) that the data have, too.

        but_once: found in two places, for tokens that are of the data themselves. Of large data the
        first 64 MiB are searched.
        """
        return longest_copy(self._tokens[: SEARCHED // self._tokens.dtype.itemsize], tokens, but_once)

    @property
    def searched_for_copies(self) -> str:
        """In words."""
        most, there = SEARCHED // self._tokens.dtype.itemsize, len(self._tokens)
        return "the training data" if there <= most else f"the first {most:,} of {there:,} tokens of the training data"

    def form(self) -> dict[str, Any]:
        """The tokenizer and the length, for another split without moving cuts."""
        return {
            "tokenizer": self.tokenizer,
            "sequence_length": self.sample_shape[0],
            "random_offset": False,
        }

    @property
    def characters_per_token(self) -> float:
        """Of all the text; 1 for a tokenizer of characters."""
        return self._facts["characters"] / max(1, sum(self._facts["streams"]))

    def summary(self) -> dict[str, str]:
        """Counts, splits, vocabulary and an excerpt as the network sees it."""
        facts = self._facts
        unit = "lines" if "text_column" not in self._documents.facts else "rows"
        splits = ", ".join(f"{name} {count:,} {unit}" for name, count in self._documents.sizes.items())
        ids = self.to_samples(self.fetch([len(self) // 2], 0))[0]
        return {
            "data": f"{self.num_samples:,} sequences of {self.sample_shape[0]} tokens, {self.num_classes or 'no'} "
            f"classes, from {facts['documents']:,} documents of {facts['characters']:,} characters",
            "splits": f"{splits}; here {len(self._documents.rows):,} {unit} of {self._documents.split}",
            "vocabulary": vocabulary_in_words(self.tokenizer, self.characters_per_token),
            "an excerpt": repr(self.tokenizer.decode(ids)),
            **({"remarks": "; ".join(self.remarks)} if self.remarks else {}),
        }

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "values": "tokens",
            "split": self._documents.split,
            "splits": dict(self._documents.sizes),
            "tokens": sum(self._facts["streams"]),
            "characters": self._facts["characters"],
            "vocabulary": len(self.tokenizer),
            "tokenizer": tokenizer_in_words(self.tokenizer),
            **self._documents.facts,
        }


def numbered_texts(texts: Sequence[str], columns: int | None = None, row_labels: Sequence[str] | None = None) -> str:
    """Texts below each other, each below its number and the label of its row."""
    shown = []
    for number, text in enumerate(texts):
        label = row_labels[number // columns] if row_labels and columns else ""
        shown.append(f"--- {number + 1}{', ' + label if label else ''} ---\n{text}\n")
    return "\n".join(shown)


def longest_copy(there: np.ndarray, tokens: np.ndarray, but_once: bool) -> int:
    """The length of the longest stretch of tokens (L,) that is among those `there` (N,).

    but_once: in two places of them.
    """
    size, text = there.dtype.itemsize, there.tobytes()
    wanted = np.asarray(tokens).astype(there.dtype).tobytes()

    def is_there(first: int, last: int) -> bool:
        part, place, places = wanted[first * size : last * size], -1, 0
        while (place := text.find(part, place + 1)) >= 0:
            # between two tokens nothing begins
            places += place % size == 0
            if places > but_once:
                return True
        return False

    longest, first = 0, 0
    for last in range(1, len(tokens) + 1):
        while last - first > longest and not is_there(first, last):
            first += 1
        longest = max(longest, last - first)
    return longest


def vocabulary_in_words(tokenizer: PreTrainedTokenizerBase, characters_per_token: float) -> str:
    """How many tokens there are, which characters, and how long a token is."""
    words = tokenizer.get_vocab()
    kind = "characters" if is_of_characters(tokenizer) else "tokens"
    shown = "".join(word for word in sorted(words, key=words.get) if len(word) == 1)[:MOST_SHOWN]
    listed = f": {shown!r}" if kind == "characters" else ""
    return f"{len(words):,} {kind}{listed}, {characters_per_token:.3g} characters a token"
