"""What networks get of captions: numbers of tokens, or embeddings that are computed once.

Letters: B captions of L tokens, D features.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from hf_diffusion.data.reaching import hub_or_cache
from hf_diffusion.files import cache_folder, remove_partials, sha256, write_whole


logger = logging.getLogger(__name__)
# Of models with two towers, the one that reads texts.
TEXT_TOWERS = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
TEXT_TOWERS |= {"siglip_text_model": "SiglipTextModel", "siglip2_text_model": "Siglip2TextModel"}
# The end must not be number 2, at which CLIPTextModel looks for the end as old checkpoints need it.
PAD, END, START = "<|pad|>", "<|endoftext|>", "<|startoftext|>"
ENCODED_AT_ONCE = 128
# Of what a cache file holds.
VERSION = 1


def train_tokenizer(texts: Sequence[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of lower-case texts, in which any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END, model_max_length=length
    )


def tokenized(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Numbers of tokens and which of them are no padding, int64 (B, L); longer texts are cut."""
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    # Tokenizers of models that have learned to read the padding, as SigLIP, give no mask.
    return tokens["input_ids"], tokens.get("attention_mask", torch.ones_like(tokens["input_ids"]))


def fitting_length(tokenizer: Any, texts: Sequence[str], longest: int, whole: bool = True) -> int:
    """As many tokens as the longest text has, at most `longest`.

    A multiple of 8, and at least 16, so that there is room for a prompt of other words. `longest`
    itself where the texts are not the whole of those that will come.
    """
    counts = [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
    limit = min(longest, tokenizer.model_max_length)
    cut = [place for place, count in enumerate(counts) if count > limit]
    if cut:
        logger.warning(
            "%s of %s different captions have more than %s tokens and are cut, such as %r; --text_length allows more, "
            "as far as the encoder does",
            *(f"{number:,}" for number in (len(cut), len(texts), limit)),
            texts[cut[0]],
        )
    return min(limit, max(16, -(-max(counts) // 8) * 8)) if whole else limit


class TokenCoder:
    """Conditions of an encoder that is trained along: "input_ids" and "attention_mask" (B, L)."""

    def __init__(self, tokenizer: Any, length: int):
        self.tokenizer, self.length = tokenizer, length
        self.fingerprint = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]

    def rows_of(self, texts: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
        ids, mask = (part.int() for part in tokenized(self.tokenizer, texts, self.length))
        return lambda numbers: {"input_ids": ids[numbers].long(), "attention_mask": mask[numbers].long()}

    def conditions_of(self, texts: Sequence[str]) -> dict[str, Tensor]:
        ids, mask = tokenized(self.tokenizer, texts, self.length)
        return {"input_ids": ids, "attention_mask": mask}


class EmbeddingCoder:
    """Conditions by a frozen encoder: "encoder_hidden_states" (B, L, D) and their mean (B, D).

    Padding has zeros. The mean is called "class_labels", as UNet2DConditionModel calls what joins
    the embedding of the timestep. They are computed once and kept in a file, in float16, by the
    fingerprints of the encoder and the texts, but for those of a stream. `source` is a folder or a
    Hub id.
    """

    def __init__(self, source: str, length: int, device: torch.device | str = "cpu"):
        self.source, self.length, self.device = source, length, device
        with _one_sentence(source):
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.fingerprint = encoder_fingerprint(source)

    def rows_of(self, texts: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
        known = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        identity = json.dumps([VERSION, self.fingerprint, self.length, known])
        path = cache_folder("captions") / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"
        places = path.with_suffix(".places.npy")
        if not path.is_file():
            self._encode(texts, path, places)
        # By the system's pages, of which it keeps as many in memory as there is room for.
        values, (starts, counts) = np.load(path, mmap_mode="r"), np.load(places)

        def rows(numbers: Tensor) -> dict[str, Tensor]:
            hidden = torch.zeros(len(numbers), self.length, values.shape[1])
            for row, number in enumerate(numbers.tolist()):
                own = values[starts[number] : starts[number] + counts[number]]
                hidden[row, : len(own)] = torch.from_numpy(own.astype(np.float32))
            count = torch.from_numpy(counts[numbers.numpy()]).clamp(min=1)[:, None]
            return {"encoder_hidden_states": hidden, "class_labels": hidden.sum(1) / count}

        return rows

    @cached_property
    def encoder(self) -> transformers.PreTrainedModel:
        """The encoder, in memory from its first use on."""
        return load_text_encoder(self.source).to(self.device)

    @torch.no_grad()
    def conditions_of(self, texts: Sequence[str]) -> dict[str, Tensor]:
        unique = list(dict.fromkeys(texts))
        ids, mask = (part.to(self.device) for part in self._tokenized(unique))
        hidden, mean = masked(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float(), mask)
        rows = torch.tensor([unique.index(text) for text in texts])
        return {"encoder_hidden_states": hidden.cpu()[rows], "class_labels": mean.cpu()[rows]}

    def _tokenized(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = tokenized(self.tokenizer, texts, self.length)
        if (mask.diff(dim=1) > 0).any():
            raise ValueError(f"the tokenizer of {self.source} pads on the left; give one that pads on the right")
        return ids, mask

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], path: Path, places: Path) -> None:
        """Write the embeddings of the tokens that are no padding, the shortest texts first."""
        ids, mask = self._tokenized(texts)
        counts = mask.sum(1)
        order = counts.argsort(stable=True)
        starts = torch.zeros_like(counts)
        starts[order] = counts[order].cumsum(0) - counts[order]
        encoder = load_text_encoder(self.source).to(self.device)

        def write(file: Any) -> None:
            for rows in tqdm(order.split(ENCODED_AT_ONCE), "captions encoded", leave=False):
                inputs = ids[rows].to(self.device), mask[rows].to(self.device)
                hidden = encoder(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state
                if file.tell() == 0:
                    shape = (int(counts.sum()), hidden.shape[-1])
                    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(hidden[inputs[1] > 0].half().cpu().numpy().tobytes())

        remove_partials(path.parent)
        write_whole(places, lambda file: np.save(file, torch.stack([starts, counts]).numpy()))
        write_whole(path, write)


def masked(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, L, D) with 0 at padding, and their mean over the tokens (B, D)."""
    hidden = hidden * mask[..., None].to(hidden.dtype)
    return hidden, hidden.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@contextmanager
def _one_sentence(source: str) -> Iterator[None]:
    """Turn what transformers raises into one sentence that names the encoder."""
    try:
        with hub_or_cache(source):
            yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"text_encoder {source} cannot be opened: {reason[:300]}; give the folder or Hub id of a text model of "
            "transformers with weights as safetensors, or `scratch`"
        ) from error


def load_text_encoder(source: str) -> transformers.PreTrainedModel:
    """The part of a model of transformers that reads texts, frozen; of safetensors only.

    ValueError in one sentence where there is none.
    """
    with _one_sentence(source):
        config = AutoConfig.from_pretrained(source)
        if config.model_type in TEXT_TOWERS:
            cls: Any = getattr(transformers, TEXT_TOWERS[config.model_type])
        else:
            cls = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        encoder = cls.from_pretrained(source, use_safetensors=True)
    return encoder.eval().requires_grad_(False)


def encoder_fingerprint(source: str) -> str:
    """Tells encoders apart: the commit of a repository, or what the files of a folder hold."""
    digest, folder = hashlib.sha256(), Path(source)
    if folder.is_dir():
        for file in sorted(folder.glob("*")):
            if file.suffix in (".json", ".safetensors", ".txt", ".model"):
                digest.update(f"{file.name} {sha256(file)}".encode())
        return digest.hexdigest()[:16]
    config = AutoConfig.from_pretrained(source)
    return f"{source}@{config._commit_hash}"
