"""Tokenizers: one of characters, or any of transformers; and texts as one file of tokens.

A tokenizer of characters is a `PreTrainedTokenizerFast` with a word for each character, so that
transformers alone loads what a pipeline saves.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_diffusion.data.documents import Documents
from hf_diffusion.data.errors import BadData
from hf_diffusion.data.reaching import hub_or_cache
from hf_diffusion.files import write_folder


UNKNOWN, MASK = "[UNK]", "[MASK]"
# What a cache of earlier versions is not taken for.
VERSION = 1
TOKENS, FACTS = "tokens.bin", "facts.json"
# Code points of Unicode.
CODE_POINTS = 0x110000


def character_tokenizer(characters: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each character, in the order of their code points, then [UNK] and [MASK]."""
    vocabulary = {character: number for number, character in enumerate(sorted(set(characters)))}
    vocabulary |= {UNKNOWN: len(vocabulary), MASK: len(vocabulary) + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # a dot of a regular expression is no newline
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, mask_token=MASK, clean_up_tokenization_spaces=False
    )


def open_tokenizer(name: str, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerBase:
    """`chars`, made of the characters of texts, or the tokenizer of a folder or Hub id; ValueError
    where that cannot be loaded."""
    if name == "chars":
        return character_tokenizer({character for text in texts() for character in set(text)})
    try:
        with hub_or_cache(name):
            return AutoTokenizer.from_pretrained(name)
    # transformers raises many kinds for a folder without a tokenizer
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"tokenizer {name} cannot be loaded ({reason[:200]}); give `chars`, a folder with a tokenizer, or a Hub id"
        ) from error


def is_of_characters(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every token but the special ones is one character."""
    special = set(tokenizer.all_special_tokens)
    return all(len(word) == 1 for word in tokenizer.get_vocab() if word not in special)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells other tokenizers apart, the same on any machine."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((known, tokenizer.special_tokens_map)).encode()).hexdigest()[:24]


def tokenizer_in_words(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a record of the data says of it."""
    return "characters" if is_of_characters(tokenizer) else tokenizer_key(tokenizer)


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a document: that of a text's end, of a sentence's end, or a newline."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.get_vocab().get("\n")):
        if token is not None:
            return token
    return None


class Encoder:
    """Texts as arrays of tokens; of characters by a table, which is a hundred times as fast."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.table = tokenizer, None
        self.dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        if is_of_characters(tokenizer):
            unknown = len(tokenizer) if tokenizer.unk_token_id is None else tokenizer.unk_token_id
            self.table = np.full(CODE_POINTS, unknown, np.uint32)
            for word, number in tokenizer.get_vocab().items():
                if len(word) == 1:
                    self.table[ord(word)] = number

    def __call__(self, text: str) -> np.ndarray:
        """(N,) tokens, without those that a model wants at the two ends."""
        if self.table is not None:
            return self.table[np.frombuffer(text.encode("utf-32-le"), np.uint32)].astype(self.dtype)
        return self.many([text])[0]

    def many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same of several texts, which a tokenizer of transformers shares among threads."""
        if self.table is not None or not texts:
            return [self(text) for text in texts]
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(ids, self.dtype) for ids in found]


def tokenize(documents: Documents, tokenizer: PreTrainedTokenizerBase, cache: Path) -> tuple[np.ndarray, dict]:
    """All tokens (N,) of the documents, mapped from a file in `cache`, and what is known of them.

    Documents of one class stand together, in the order of the classes. Facts: `streams`, the tokens
    of each class; `documents`, `characters`, `unknown` (tokens that stand for nothing that the
    tokenizer knows), and the `fingerprint` of the tokens.
    """
    key = hashlib.sha256(repr((VERSION, documents.key, tokenizer_key(tokenizer))).encode()).hexdigest()[:32]
    folder = cache / key
    if not (folder / FACTS).is_file():
        write_folder(folder, lambda staging: _write_tokens(documents, tokenizer, staging), last=FACTS)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if not sum(facts["streams"]):
        return np.zeros(0, Encoder(tokenizer).dtype), facts
    return np.memmap(folder / TOKENS, facts["dtype"], mode="r"), facts


def _write_tokens(documents: Documents, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    encode, separator = Encoder(tokenizer), separator_of(tokenizer)
    classes = len(documents.class_names or ()) or 1
    files = [(folder / f"{number}.bin").open("wb") for number in range(classes)]
    facts = {"documents": 0, "characters": 0, "unknown": 0, "dtype": np.dtype(encode.dtype).name}
    streams, former = [0] * classes, None

    def write(document: int, tokens: np.ndarray) -> None:
        number = 0 if documents.labels is None else int(documents.labels[document])
        files[number].write(tokens.tobytes())
        streams[number] += len(tokens)

    for document, text in _shown(documents):
        if former not in (None, document) and separator is not None:
            write(former, np.array([separator], encode.dtype))
            facts["characters"] += 1
        tokens = encode(text)
        write(document, tokens)
        facts["documents"] += document != former
        facts["characters"] += len(text)
        check_no_mask(tokens, tokenizer, documents.name)
        if tokenizer.unk_token_id is not None:
            facts["unknown"] += int((tokens == tokenizer.unk_token_id).sum())
        former = document
    for file in files:
        file.close()
    digest = hashlib.sha256(tokenizer_key(tokenizer).encode())
    with (folder / TOKENS).open("wb") as whole:
        for file, count in zip(files, streams):
            part = Path(file.name)
            digest.update(f"/{count}/".encode() + part.read_bytes())
            whole.write(part.read_bytes())
            part.unlink()
    facts |= {"streams": streams, "fingerprint": digest.hexdigest()[:16]}
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _shown(documents: Documents) -> Iterator[tuple[int, str]]:
    """The pieces, with a bar on the first process, of what takes longer than a moment."""
    is_quiet = not PartialState().is_main_process
    with tqdm(desc=f"tokens of {documents.name}", unit="character", unit_scale=True, delay=5, disable=is_quiet) as bar:
        for document, text in documents.pieces():
            yield document, text
            bar.update(len(text))


def check_no_mask(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """BadData for texts that hold the mask itself."""
    if tokenizer.mask_token_id is not None and (tokens == tokenizer.mask_token_id).any():
        raise BadData(
            f"the texts of {name} hold the mask {tokenizer.mask_token} itself, which stands for noise; take it out, "
            "or choose another tokenizer"
        )


def sequence_starts(streams: Sequence[int], length: int, spare: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where sequences of `length` tokens start (N,), and the class of each, for streams of so many
    tokens.

    spare: leaves `length` - 1 tokens at the end of each stream, for starts that move.
    """
    starts, classes, first = [], [], 0
    for number, count in enumerate(streams):
        found = max(0, (count - (length - 1) * spare)) // length
        starts.append(first + length * np.arange(found, dtype=np.int64))
        classes.append(np.full(found, number, np.int64))
        first += count
    return np.concatenate(starts), np.concatenate(classes)
