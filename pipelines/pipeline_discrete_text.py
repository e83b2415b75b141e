"""Sampling of text from a network that was trained to undo noise on tokens (D3PM, MDLM, UDLM).

Austin et al. 2021, arXiv:2107.03006; Sahoo et al. 2024, arXiv:2406.07524; Schiff et al. 2024,
arXiv:2412.10193. Tokens that are masked again: Wang et al. 2025, arXiv:2503.00307. The surest
tokens first: Chang et al. 2022, arXiv:2202.04200. Shapes: B texts of L tokens out of V.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from hf_diffusion.pipelines.sampling_parts import SamplingMixin
from hf_diffusion.pipelines.self_contained import SelfContainedMixin


TEXT_OUTPUT_TYPES = ("text", "np", "pt")
SAMPLERS = ("ancestral", "confidence")
# How a mask is shown in a text that is not finished.
HIDDEN = "░"
SHOWN_TEXTS = 2


@dataclass
class TextPipelineOutput(BaseOutput):
    """`texts`: B texts, or tokens int64 (B, L) as an array or a tensor."""

    texts: list[str] | np.ndarray | Tensor


def uniform_rows(shape: Sequence[int], generator: Any, device: torch.device) -> Tensor:
    """Numbers float64 in [0, 1) on a device; with a list, each generator draws one row."""
    if isinstance(generator, list):
        rows = [torch.rand(tuple(shape[1:]), generator=g, dtype=torch.float64, device=g.device) for g in generator]
        return torch.stack(rows).to(device)
    source = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=source).to(device)


def nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Log probabilities (..., V) without the rarest tokens, of which the others make `top_p`."""
    ordered, order = log_p.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    kept = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, order, before < top_p)
    return log_p.masked_fill(~kept, -torch.inf).log_softmax(dim=-1)


class DiscreteTextPipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples texts, around what a prompt says of them.

    Args:
        transformer: called as `transformer(tokens, level, class_labels)`, with a level in [0, 1],
            and its first output are logits (B, L, V); or a masked language model of transformers.
            `config.num_class_embeds` is the number of classes (None: unconditional); with
            `config.null_class` the label `num_class_embeds` means "no class", which guidance needs.
        scheduler: the MDLMScheduler, UDLMScheduler or D3PMScheduler of the training.
        tokenizer: one of transformers.
        id2label: the names of the classes by number; kept in model_index.json.
        sequence_length: L of the training.
    """

    network_name = "transformer"
    model_cpu_offload_seq = "transformer"
    output_name = "texts"
    sampling_options = (
        "num_inference_steps",
        "guidance_scale",
        "sampler",
        "temperature",
        "top_p",
        "remasking",
        "eta",
        "prompt",
        "suffix",
    )
    measures = {"bits_per_token": "hf_diffusion.evaluation.token_measures:measure_token_bound"}
    _callback_tensor_inputs = ["tokens"]

    def __init__(
        self,
        transformer: nn.Module,
        scheduler: SchedulerMixin,
        tokenizer: Any,
        id2label: dict | None = None,
        sequence_length: int = 256,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer)
        self.register_id2label(id2label)
        self.register_to_config(sequence_length=sequence_length)

    # --- what it says of itself -------------------------------------------------------------------

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(L,)."""
        return (self.config.sequence_length,)

    @property
    def image_size(self) -> tuple[int, ...]:
        """()."""
        return ()

    @property
    def num_classes(self) -> int | None:
        """The number of real classes, None for an unconditional model."""
        return getattr(self.transformer.config, "num_class_embeds", None)

    @property
    def null_class_id(self) -> int | None:
        """The label that means "no class" to the network, None if it has none."""
        return self.num_classes if getattr(self.transformer.config, "null_class", False) else None

    @property
    def mask_token_id(self) -> int | None:
        """The token of the noise, None where noise is any token."""
        is_uniform = type(self.scheduler).__name__ == "UDLMScheduler"
        return None if is_uniform else getattr(self.scheduler, "mask_token_id", None)

    def data_form(self) -> dict[str, Any]:
        """The arguments of `load_data` that give texts the form of this model's."""
        form = {"tokenizer": self.tokenizer, "sequence_length": self.config.sequence_length, "random_offset": False}
        return form if self.num_classes else {**form, "label_column": "none"}

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples."""
        steps = min(64, self.scheduler.config.get("num_train_timesteps") or 64)
        if not self.num_classes:
            return {"batch_size": SHOWN_TEXTS, "num_inference_steps": steps}
        return {**super().example_call(), "output_type": "text", "num_inference_steps": steps}

    def default_micro_batch_size(self, network: ModelMixin | None = None) -> int | None:
        """Texts that one forward should take: None, all of them, unless it runs on the CPU."""
        if self._execution_device.type != "cpu":
            return None
        config = self.transformer.config
        return max(1, 2**22 // (4 * self.config.sequence_length * config.hidden_size))

    # --- prompts ----------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, in which "[MASK:12]" stands for twelve masks, by the tokenizer's own
        mask."""
        mask = self.tokenizer.mask_token
        if mask is not None:
            several = re.escape(mask[:-1]) + r":(\d+)" + re.escape(mask[-1])
            text = re.sub(several, lambda found: mask * int(found[1]), text)
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in tokens:
            raise ValueError(f"the prompt {text!r} holds what the tokenizer does not know; leave it out")
        return tokens

    def decode(self, tokens: Tensor | np.ndarray) -> list[str]:
        """Texts of tokens (B, L); a mask that is left is shown as ░."""
        texts = self.tokenizer.batch_decode(torch.as_tensor(tokens).tolist())
        mask = self.tokenizer.mask_token
        return texts if mask is None else [text.replace(mask, HIDDEN) for text in texts]

    def prepare_prompts(
        self, prompt: str | list[str] | None, suffix: str | list[str] | None, batch: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens int64 (B, L), and by True (B, L) which of them are given; ValueError for prompts
        that do not fit."""
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        fixed = torch.zeros(batch, length, dtype=torch.bool)
        for name, given in (("prompt", prompt), ("suffix", suffix)):
            if isinstance(given, list) and len(given) != batch:
                raise ValueError(f"{len(given)} entries of {name} were given for {batch} texts; give one, or {batch}")
        for row in range(batch):
            starts, ends = (
                self.encode(given[row] if isinstance(given, list) else given or "") for given in (prompt, suffix)
            )
            if len(starts) + len(ends) > length:
                raise ValueError(
                    f"prompt and suffix are {len(starts) + len(ends)} tokens long, and a text has {length}; give fewer"
                )
            tokens[row, : len(starts)] = torch.tensor(starts, dtype=torch.int64)
            tokens[row, length - len(ends) :] = torch.tensor(ends, dtype=torch.int64)
            fixed[row, : len(starts)] = True
            fixed[row, length - len(ends) :] = True
        if self.tokenizer.mask_token_id is not None:
            fixed &= tokens != self.tokenizer.mask_token_id
        return tokens.to(self._execution_device), fixed.to(self._execution_device)

    def check_call(
        self,
        batch: int,
        labels: Tensor | None,
        num_inference_steps: int,
        guidance_scale: float,
        sampler: str,
        temperature: float,
        top_p: float,
        remasking: str | None,
        eta: float | None,
        length: int,
        generator: Any,
        output_type: str,
        names: Sequence[str],
    ) -> None:
        """Raise ValueError, with what is allowed, for arguments that do not fit the model."""
        if batch < 1 or not isinstance(length, Integral) or length < 1:
            raise ValueError(f"the call asks for {batch} texts of {length!r} tokens; ask for at least 1 of each")
        self.check_steps(num_inference_steps)
        for name, value, allowed in (
            ("sampler", sampler, SAMPLERS),
            ("output_type", output_type, TEXT_OUTPUT_TYPES),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r}; choose from {list(allowed)}")
        if not temperature > 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature={temperature} must be above 0, and top_p={top_p} above 0 and at most 1")
        name = type(self.scheduler).__name__
        if sampler == "confidence" and self.mask_token_id is None:
            raise ValueError(f"sampler='confidence' needs masks, and {name} has none; use 'ancestral'")
        if remasking is not None and (name != "MDLMScheduler" or sampler != "ancestral"):
            raise ValueError(
                f"remasking={remasking!r} needs an MDLMScheduler and sampler='ancestral', not {name} and {sampler!r}"
            )
        if eta is not None and (remasking or self.scheduler.config.get("remasking") or "none") == "none":
            raise ValueError(f"eta={eta} says how much is masked again; give remasking, too, such as 'cap'")
        if guidance_scale != 1 and (labels is None or self.null_class_id is None):
            raise ValueError(
                f"guidance_scale={guidance_scale} needs class_labels, and a model that was trained with a null class; "
                "use 1 without them"
            )
        sources = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(source, torch.Generator) for source in sources):
            raise ValueError(f"generator={generator!r} is neither a torch.Generator nor a list of them")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators were given for {batch} texts; give one, or one for each")
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs knows {self._callback_tensor_inputs}, not {unknown}")

    # --- sampling ---------------------------------------------------------------------------------

    def predict(self, tokens: Tensor, t: Tensor, labels: Tensor | None, micro_batch_size: int | None) -> Tensor:
        """Logits of x_0 (B, L, V), `micro_batch_size` texts at a time."""
        total, outputs = self.scheduler.config.get("num_train_timesteps"), []
        level = (t + 1) / total if total else t
        for start in range(0, len(tokens), micro_batch_size or len(tokens)):
            rows = slice(start, start + (micro_batch_size or len(tokens)))
            if isinstance(self.transformer, ModelMixin):
                some = None if labels is None else labels[rows]
                outputs.append(self.transformer(tokens[rows], level, some, return_dict=False)[0])
            else:
                outputs.append(self.transformer(input_ids=tokens[rows]).logits)
        return torch.cat(outputs).float()

    def sharpened(self, logits: Tensor, temperature: float, top_p: float) -> Tensor:
        """Log probabilities of x_0 (B, L, V) float64, never of the mask where noise has one."""
        if self.mask_token_id is not None:
            mask = torch.arange(logits.shape[-1], device=logits.device) == self.mask_token_id
            logits = logits.masked_fill(mask, -torch.inf)
        log_p = (logits.double() / temperature).log_softmax(dim=-1)
        return log_p if top_p == 1 else nucleus(log_p, top_p)

    def most_confident(self, log_p: Tensor, x_t: Tensor, steps_left: int, generator: Any) -> Tensor:
        """x_t (B, L) with an equal share of its masks set: those tokens that were drawn with the
        highest probability."""
        uniform = uniform_rows(log_p.shape, generator, log_p.device)
        # float64, since float32 hardly draws tokens rarer than exp(-16.6)
        drawn = (log_p - (-(uniform + 1e-30).log()).clamp(min=1e-30).log()).argmax(dim=-1)
        is_masked = x_t == self.mask_token_id
        confidence = log_p.gather(-1, drawn[..., None])[..., 0].masked_fill(~is_masked, -torch.inf)
        count = (is_masked.sum(dim=1, keepdim=True) + steps_left - 1) // steps_left
        rank = confidence.argsort(dim=1, descending=True).argsort(dim=1)
        return torch.where(is_masked & (rank < count), drawn, x_t)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        suffix: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        sampler: str = "ancestral",
        temperature: float = 1.0,
        top_p: float = 1.0,
        remasking: str | None = None,
        eta: float | None = None,
        guidance_scale: float = 1.0,
        sequence_length: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        micro_batch_size: int | None = None,
    ) -> TextPipelineOutput | tuple[list[str] | np.ndarray | Tensor]:
        """Sample texts.

        Args:
            prompt: how each text begins, one for all or one for each. Masks in it, such as
                "[MASK]", or "[MASK:12]" for twelve, are filled in.
            suffix: how each text ends.
            class_labels: numbers or names of classes, one for each text. None on a model with a
                null class samples from all classes.
            batch_size: the number of texts where nothing else says it (1 if left out).
            num_inference_steps: None is as many as a text has tokens, or all timesteps of D3PM if
                these are fewer.
            sampler: "ancestral", or "confidence": an equal share of the masks in each step, those
                first whose tokens are the surest. That makes frequent tokens more frequent.
            temperature: of p(x_0); 1 is the model's.
            top_p: share of p(x_0) that is drawn from, the rarest tokens left out.
            remasking: which tokens are masked again (ReMDM), see `MDLMScheduler`; with `eta`.
            guidance_scale: w in p(x | class)^w p(x)^(1 - w), of x_0, for UDLM of the posterior.
            sequence_length: L; None is that of the training.
            generator: one, or a list with one for each text: then a text does not depend on the
                rest of its batch. All is drawn in float64.
            output_type: "text", or tokens: "np", "pt", int64 (B, L).
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a
                dict of changed tensors.
            micro_batch_size: texts that one forward of the network takes. None: chosen for the
                device.

        Returns:
            `TextPipelineOutput` or a tuple. Raises ValueError for unknown classes, prompts that do
            not fit, and arguments that do not fit the model, the scheduler or each other.
        """
        length = self.config.sequence_length if sequence_length is None else sequence_length
        if num_inference_steps is None:
            num_inference_steps = min(length, self.scheduler.config.get("num_train_timesteps") or length)
        counts = [len(given) for given in (prompt, suffix) if isinstance(given, list)]
        batch_size = counts[0] if counts and batch_size is None and class_labels is None else batch_size
        labels, batch = self.prepare_labels(class_labels, batch_size, 1)
        self.check_call(
            batch,
            labels,
            num_inference_steps,
            guidance_scale,
            sampler,
            temperature,
            top_p,
            remasking,
            eta,
            length,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        micro_batch_size = micro_batch_size or self.default_micro_batch_size()
        null = None
        if self.null_class_id is not None:
            null = torch.full((batch,), self.null_class_id, device=self._execution_device)
        labels = null if labels is None else labels
        scheduler = self.scheduler
        if remasking is not None or eta is not None:
            changes = {"remasking": remasking, "eta": eta}
            scheduler = type(scheduler).from_config(
                scheduler.config, **{name: value for name, value in changes.items() if value is not None}
            )
        scheduler.set_timesteps(int(num_inference_steps), device=self._execution_device)
        self._num_timesteps = len(scheduler.timesteps)

        given, fixed = self.prepare_prompts(prompt, suffix, batch, length)
        if self.mask_token_id is not None:
            start = torch.full_like(given, self.mask_token_id)
        else:
            start = scheduler.sample_prior(uniform_rows(given.shape, generator, given.device))
        x_t, doubt = torch.where(fixed, given, start), None
        with self.progress_bar(total=len(scheduler.timesteps)) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    continue
                log_p = self.sharpened(self.predict(x_t, t, labels, micro_batch_size), temperature, top_p)
                more = {}
                if guidance_scale != 1:
                    without = self.sharpened(self.predict(x_t, t, null, micro_batch_size), temperature, top_p)
                    if hasattr(scheduler, "remasking") and self.mask_token_id is None:
                        more = {"unconditional": without, "guidance_scale": guidance_scale}
                    else:
                        mixed = guidance_scale * log_p + (1 - guidance_scale) * without
                        log_p = torch.where(log_p > -torch.inf, mixed, log_p).log_softmax(dim=-1)
                if sampler == "confidence":
                    x_t = self.most_confident(log_p, x_t, len(scheduler.timesteps) - i, generator)
                elif hasattr(scheduler, "finish"):
                    if self.mask_token_id is not None:
                        more |= {"doubt": doubt}
                    x_t, doubt = scheduler.step(
                        log_p, t, x_t, generator=generator, fixed=fixed, return_dict=False, **more
                    )
                else:
                    x_t = scheduler.step(log_p, t, x_t, generator=generator, return_dict=False)[0]
                x_t = torch.where(fixed, given, x_t)
                (x_t,) = self.after_step(callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, tokens=x_t)
                progress_bar.update()
        is_left = self.mask_token_id is not None and (x_t == self.mask_token_id).any()
        if is_left and hasattr(scheduler, "finish") and not self.interrupt:
            last = torch.full_like(scheduler.timesteps[-1], scheduler.config.last_time)
            x_t = scheduler.finish(self.predict(x_t, last, labels, micro_batch_size), x_t)
        self.maybe_free_model_hooks()
        texts = {"text": self.decode, "np": lambda x: x.cpu().numpy(), "pt": lambda x: x}[output_type](x_t)
        return TextPipelineOutput(texts) if return_dict else (texts,)
