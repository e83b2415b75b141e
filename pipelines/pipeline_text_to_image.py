"""Sampling images of texts, with guidance by the model itself or by a CLIP of noisy images.

GLIDE, both kinds of guidance: Nichol et al. 2022, arXiv:2112.10741, sections 3 and 4. Dynamic
thresholding: Saharia et al. 2022, Imagen, arXiv:2205.11487, section 2.3. Guidance interval:
Kynkaanniemi et al. 2024, arXiv:2404.07724. Guidance rescale: Lin et al. 2023, arXiv:2305.08891.
Letters: B images, C channels, H x W pixels, L tokens, D features.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_diffusion.pipelines.sampling_parts import SHOWN_SAMPLES, SamplingMixin, in_micro_batches, sides
from hf_diffusion.pipelines.self_contained import SelfContainedMixin


logger = logging.getLogger(__name__)
# What begins with a vowel in writing only, as a unicorn does.
SPOKEN_CONSONANTS = ("uni", "use", "usu", "eu", "one")
# A gradient's weight in a DDIM step is about 1 or less, but hundreds where the schedule ends near
# pure noise, as at the start of the cosine schedule.
MAX_DDIM_WEIGHT = 10.0


class TextToImagePipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Images of texts, by a U-Net that attends to what a text model of transformers makes of them.

    Args:
        unet: called as `unet(sample, timestep, encoder_hidden_states=..., class_labels=...)`, with
            the last states of the text encoder (B, L, D), 0 at padding, and their mean over the
            tokens (B, D), which joins the embedding of the timestep (see `padding_id`).
            out_channels is C, or 2 C for a learned variance.
        text_encoder: any that gives `last_hidden_state`: CLIPTextModel, T5EncoderModel, BertModel.
        tokenizer: its own, which pads on the right.
        scheduler: any diffusers scheduler of the process that the U-Net was trained on.
        text_length: L, the tokens of a text; longer ones are cut, with a warning.
        id2label: names of classes by number, where the captions of the training were made of them.
        caption_template: the text for a class, with {} in the place of its name; of "a(n) {}" the
            article goes by the name.
        examples: texts such as those of the training, for cards and pictures.
        clip: a CLIP of noisy images, such as `NoisyCLIP`, whose gradient may guide; trained on the
            same schedule.
        clip_tokenizer: its own.
        vae: an autoencoder of diffusers, which decodes what the network draws; None draws samples.
        padding_id: of encoders that read padding as a text's part, as GLIDE's: the number of the
            token for padding at position 0, which those for the other positions follow. States at
            padding are kept then, and the last state stands in for the mean. None: the mean.
        empty_text: whether the model has learned the empty text, from which guidance leads away.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["clip", "clip_tokenizer", "vae"]
    sampling_options = (
        "num_inference_steps",
        "eta",
        "guidance_scale",
        "guidance_interval",
        "guidance_rescale",
        "dynamic_threshold",
        "clip_guidance_scale",
    )
    measures = {"clip_score": "hf_diffusion.evaluation.clip_score:measure_clip_score"}

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
        text_length: int = 77,
        id2label: dict | None = None,
        caption_template: str = "{}",
        examples: list[str] | None = None,
        clip: ModelMixin | None = None,
        clip_tokenizer: PreTrainedTokenizerBase | None = None,
        vae: ModelMixin | None = None,
        padding_id: int | None = None,
        empty_text: bool = True,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            clip=clip,
            clip_tokenizer=clip_tokenizer,
            vae=vae,
        )
        self.register_id2label(id2label)
        self.register_to_config(text_length=text_length, caption_template=caption_template, examples=examples)
        self.register_to_config(padding_id=padding_id, empty_text=empty_text)

    @property
    def num_classes(self) -> int | None:
        """The number of classes that have a caption by the template; None without classes."""
        return len(self.id2label) if self.id2label else None

    @property
    def null_class_id(self) -> int | None:
        """The number after those of the classes; the empty text has no class."""
        return self.num_classes

    @property
    def example_prompts(self) -> list[str]:
        """Texts such as those of the training: of each class, or some captions."""
        return self.prompts_of(range(self.num_classes or 0)) or list(self.config.examples or [])

    def prompts_of(self, labels: Sequence[int]) -> list[str]:
        """The captions of classes by number, by the template."""
        return [caption_of_class(self.config.caption_template, self.id2label[int(label)]) for label in labels]

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples."""
        prompts = self.example_prompts[:SHOWN_SAMPLES]
        what = {"prompt": prompts} if prompts else super().example_call()
        steps = min(50, self.scheduler.config.num_train_timesteps)
        return {**what, "num_inference_steps": steps, **self.default_options()}

    def default_options(self) -> dict[str, Any]:
        """The values of options of a call that follow from the model where they are not given."""
        return {"guidance_scale": 2.0 if self.config.empty_text else 1.0}

    # --- texts ----------------------------------------------------------------------------------

    def prepare_prompts(
        self,
        prompt: str | list[str] | None,
        class_labels: int | str | list[int | str] | Tensor | None,
        batch_size: int | None,
        num_images_per_prompt: int,
        num_images_per_label: int,
    ) -> list[str]:
        """The text of each image; "" where neither a text nor a class is given.

        ValueError for both, and for a `batch_size` that is not their number.
        """
        if prompt is None:
            labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
            return [""] * batch if labels is None else self.prompts_of(labels.tolist())
        if class_labels is not None:
            raise ValueError(f"prompt={prompt!r} and class_labels={class_labels!r} both say what to draw; give one")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompt must be a text or a list of texts, not {prompt!r}")
        texts = [text for text in texts for _ in range(num_images_per_prompt)]
        if batch_size not in (None, len(texts)):
            raise ValueError(f"batch_size={batch_size}, but the prompts make {len(texts)} images; leave it out")
        return texts

    def negative_prompts(self, negative_prompt: str | list[str] | None, count: int) -> list[str]:
        """The text that guidance leads each image away from; "" where none is given."""
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [negative_prompt or ""] * count
        negatives = list(negative_prompt)
        if not all(isinstance(text, str) for text in negatives) or count % max(1, len(negatives)) or not negatives:
            raise ValueError(
                f"negative_prompt {negative_prompt!r} does not go with {count} images; give one text, or one for each"
            )
        return [text for text in negatives for _ in range(count // len(negatives))]

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The encoder's last states (B, L, D), 0 at padding, and their mean over tokens (B, D).

        With a `padding_id` all states, and the last of them. Equal texts are encoded once. What is
        longer than `text_length` tokens is cut and told.
        """
        unique = list(dict.fromkeys(prompts))
        length = self.config.text_length
        for text, ids in zip(unique, self.tokenizer(unique, verbose=False)["input_ids"]):
            if len(ids) > length:
                logger.warning("the prompt %r has %s tokens; those after %s are cut", text, len(ids), length)
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = self.tokenizer(unique, **options).to(self._execution_device)
        ids, mask = tokens["input_ids"], tokens.get("attention_mask", torch.ones_like(tokens["input_ids"]))
        padding_id = self.config.padding_id
        if padding_id is not None:
            paddings = padding_id + torch.arange(length, device=ids.device)
            ids, mask = torch.where(mask == 1, ids, paddings), torch.ones_like(mask)
        # one at a time, so that a text's states depend on no other in their last digits
        states = [
            self.text_encoder(input_ids=row[None], attention_mask=own[None]).last_hidden_state
            for row, own in zip(ids, mask)
        ]
        states = torch.cat(states) * mask[..., None].to(states[0].dtype)
        means = states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(states.dtype)
        pooled = means if padding_id is None else states[:, -1]
        rows = torch.tensor([unique.index(text) for text in prompts], device=states.device)
        return states[rows], pooled[rows]

    # --- the run --------------------------------------------------------------------------------

    def check_guidance(
        self, guidance_scale: float, guidance_rescale: float, dynamic_threshold: float | None, negatives: list[str]
    ) -> None:
        """Raise ValueError, with what is allowed, for guidance that cannot be."""
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale!r}; 1 does not guide")
        if guidance_scale != 1 and not self.config.empty_text and "" in negatives:
            raise ValueError(
                f"guidance_scale={guidance_scale} leads away from the empty text, which this model has never seen "
                "(label_dropout 0 in its training); use guidance_scale=1, or give a negative_prompt"
            )
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be between 0 and 1, not {guidance_rescale!r}")
        if dynamic_threshold is None:
            return
        if not 0 < dynamic_threshold < 1:
            raise ValueError(f"dynamic_threshold must lie between 0 and 1, such as 0.995, not {dynamic_threshold!r}")
        if "thresholding" not in inspect.signature(type(self.scheduler).__init__).parameters:
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} has no dynamic thresholding; leave dynamic_threshold out")
        if self.vae is not None:
            raise ValueError("dynamic_threshold clips images, and latents have no bounds; leave it out")

    def check_clip(self, scale: float, prompts: list[str]) -> None:
        """Raise ValueError, with what is allowed, for guidance by a CLIP that cannot be."""
        if not 0 <= scale < math.inf:
            raise ValueError(f"clip_guidance_scale must be a number of at least 0, not {scale!r}; 0 does not guide")
        if scale == 0:
            return
        if self.clip is None or self.clip_tokenizer is None:
            raise ValueError(
                f"clip_guidance_scale={scale} needs a clip and a clip_tokenizer, which this pipeline lacks"
            )
        if "" in prompts:
            raise ValueError(f"clip_guidance_scale={scale} needs a prompt for each image; use 0 without")
        if "gradient" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(
                f"the step of {type(self.scheduler).__name__} takes no gradient, so a CLIP cannot guide it; use "
                "DDIMEtaScheduler.from_config(pipe.scheduler.config) or LinearDDPMScheduler"
            )
        theirs, unet = self.clip.config, self.unet.config
        pairs = [("channels", theirs.in_channels, unet.in_channels)]
        pairs += [("pixels", sides(theirs.sample_size), sides(unet.sample_size))]
        pairs += [
            (name, value, self.scheduler.config.get(name)) for name, value in (theirs.noise_schedule or {}).items()
        ]
        for what, clip, wanted in pairs:
            if clip != wanted:
                raise ValueError(
                    f"the clip was trained with {what} {clip} and this model with {wanted}; take a clip of the "
                    "model's data and schedule"
                )

    def clip_guided_timesteps(self, eta: float | None) -> list[bool]:
        """For each timestep of the run whether a gradient guides it: not where DDIM would multiply
        it by hundreds.
        """
        timesteps = self.scheduler.timesteps.tolist()
        if "eta" not in inspect.signature(self.scheduler.step).parameters:
            return [True] * len(timesteps)
        # The weight of a DDIM step depends on no tensor.
        nothing = torch.empty(0)
        has_signal = [self.scheduler.alpha_bar[t] > 0 for t in timesteps]
        weight = self.scheduler.guidance_weight
        return [
            bool(signal) and weight(nothing, t, nothing, eta) <= MAX_DDIM_WEIGHT
            for t, signal in zip(timesteps, has_signal)
        ]

    def clip_texts(self, prompts: list[str]) -> Tensor:
        """The clip's embeddings of the prompts (B, D)."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.clip_tokenizer(prompts, max_length=self.clip.config.text_length, **options)
        tokens = tokens.to(self._execution_device)
        return self.clip.text_embeddings(tokens["input_ids"], tokens["attention_mask"])

    def clip_gradient(self, latents: Tensor, t: Tensor, texts: Tensor, micro_batch_size: int | None) -> Tensor:
        """The gradient by x_t of scale * <image, text>, for embeddings of texts (B, D)."""
        size, gradients = micro_batch_size or len(latents), []
        for x, text in zip(latents.split(size), texts.split(size)):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                images = self.clip.image_embeddings(x.to(self.clip.dtype), t)
                fit = (self.clip.scale * images * text).sum()
            gradients.append(torch.autograd.grad(fit, x)[0])
        return torch.cat(gradients)

    @contextmanager
    def thresholded(self, dynamic_threshold: float | None) -> Iterator[None]:
        """For the time of a call, a scheduler that thresholds its predictions of x_0."""
        former = self.scheduler
        if dynamic_threshold is not None:
            # With the usual sample_max_value of 1 nothing would be divided.
            changes = {"dynamic_thresholding_ratio": dynamic_threshold, "sample_max_value": math.inf}
            changes |= {"thresholding": True}
            self.scheduler = type(former).from_config(former.config, **changes)
        try:
            yield
        finally:
            self.scheduler = former

    def step_options(
        self, generator: torch.Generator | list[torch.Generator] | None, eta: float | None
    ) -> dict[str, Any]:
        """What the scheduler's `step` takes of the call's arguments."""
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator, "eta": eta}
        return {name: value for name, value in options.items() if value is not None and name in accepted}

    def takes_variance(self) -> bool:
        """Whether the scheduler's `step` uses the channels of a learned variance.

        Multistep solvers have the argument only to throw the variance away.
        """
        accepted = inspect.signature(type(self.scheduler).__init__).parameters
        is_learned = str(self.scheduler.config.get("variance_type")).startswith("learned")
        return is_learned and "variance_type" in accepted and "solver_order" not in accepted

    def prepare_latents(
        self, batch: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """The first x_t (B, ...); schedulers of flow matching start from unit noise."""
        if not hasattr(self.scheduler, "init_noise_sigma"):
            self.scheduler.init_noise_sigma = 1.0
        return super().prepare_latents(batch, generator, latents)

    def predict(
        self, latents: Tensor, t: Tensor, texts: tuple[Tensor, Tensor], micro_batch_size: int | None
    ) -> Tensor:
        """The network's output for x_t (B, C, ...), `micro_batch_size` samples at a time."""
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, t)
        states, means = texts
        conditions = {"encoder_hidden_states": states, "class_labels": means}
        return in_micro_batches(self.unet, micro_batch_size, latents, t, **conditions)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_prompt: int = 1,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        timesteps: list[int] | str | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        dynamic_threshold: float | None = None,
        clip_guidance_scale: float = 0.0,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        micro_batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | Tensor]:
        """Sample images of texts.

        Args:
            prompt: a text, or one for each image. None with no class draws without any text.
            negative_prompt: what guidance leads away from instead of the empty text; one for all
                images, or one for each.
            class_labels: numbers or names of classes instead, whose captions the model's template
                makes; for models that were trained on such captions.
            batch_size: the number of images where there are no texts (1 if left out).
            num_images_per_prompt: images of each text, next to each other.
            num_images_per_label: images of each class, next to each other.
            num_inference_steps: the number of denoising steps.
            timesteps: the steps themselves instead, in the form that `set_timesteps` takes.
            guidance_scale: w in negative + w * (cond - negative); 1 is plain conditional sampling,
                without a second forward. None is 2, and 1 for a model without the empty text.
            guidance_interval: guide only where t / num_train_timesteps lies in [low, high]; 0 is
                clean, 1 is pure noise.
            guidance_rescale: phi of arXiv:2305.08891, Eq. 16, between 0 and 1: how far the guided
                output is brought back to the standard deviation of the conditional one.
            dynamic_threshold: percentile of |x_0| in (0, 1), such as 0.995, at which predictions of
                x_0 are clipped and by which they are divided where it is above 1, so that strong
                guidance saturates less. None leaves the scheduler's own clipping.
            clip_guidance_scale: multiplies the gradient of the clip's product of image and text,
                added to the score beside `guidance_scale`; 0 does not guide by it.
            eta: handed to the scheduler's `step`; None leaves the scheduler's own.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the scheduler left it, about [-1, 1].
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a
                dict of changed tensors. It may set `pipe._guidance_scale` for the steps that
                follow, 1 for none, and `pipe._interrupt`.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the
                images. None: chosen for the device.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the model, the scheduler or each other.
        """
        prompts = self.prepare_prompts(prompt, class_labels, batch_size, num_images_per_prompt, num_images_per_label)
        batch = len(prompts)
        self.check_steps(num_inference_steps, timesteps, eta, guidance_interval)
        if guidance_scale is None:
            guidance_scale = self.default_options()["guidance_scale"]
        negatives = self.negative_prompts(negative_prompt, batch)
        self.check_guidance(guidance_scale, guidance_rescale, dynamic_threshold, negatives)
        self.check_clip(clip_guidance_scale, prompts)
        self.check_common(
            batch,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            micro_batch_size=micro_batch_size,
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        micro_batch_size = micro_batch_size or self.default_micro_batch_size()
        states, means = self.encode_prompts([*negatives, *prompts])
        both, texts = (states, means), (states[batch:], means[batch:])
        clip_texts = self.clip_texts(prompts) if clip_guidance_scale > 0 else None
        with self.thresholded(dynamic_threshold):
            timesteps = self.prepare_timesteps(num_inference_steps, timesteps)
            is_inside = self.timesteps_within(guidance_interval)
            has_gradient = [False] * len(timesteps) if clip_texts is None else self.clip_guided_timesteps(eta)
            channels, takes_variance = self.unet.config.in_channels, self.takes_variance()
            step_options = self.step_options(generator, eta)
            latents = self.prepare_latents(batch, generator, latents)
            with self.progress_bar(total=len(timesteps)) as progress_bar:
                for i, t in enumerate(timesteps):
                    if self.interrupt:
                        continue
                    if self.guidance_scale is not guidance_scale:  # a callback has set it
                        guidance_scale = self.guidance_scale
                        self.check_guidance(guidance_scale, guidance_rescale, dynamic_threshold, negatives)
                    if is_inside[i] and guidance_scale != 1 and prompts != negatives:
                        doubled = self.predict(torch.cat([latents, latents]), t, both, micro_batch_size)
                        negative, output = doubled.chunk(2)  # each (B, C or 2 C, ...)
                        cond, variance = output[:, :channels], output[:, channels:]
                        mean = negative[:, :channels] + guidance_scale * (cond - negative[:, :channels])
                        if guidance_rescale > 0:
                            mean = rescale_guided(mean, cond, guidance_rescale)
                        output = torch.cat([mean, variance], dim=1)  # the variance is the conditional one
                    else:
                        output = self.predict(latents, t, texts, micro_batch_size)
                    if not takes_variance:
                        output = output[:, :channels]
                    guidance = {}
                    if has_gradient[i]:
                        gradient = self.clip_gradient(latents, t, clip_texts, micro_batch_size)
                        guidance = {"gradient": clip_guidance_scale * gradient}
                    latents = self.scheduler.step(output, t, latents, **step_options, **guidance, return_dict=False)[0]
                    (latents,) = self.after_step(
                        callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents=latents
                    )
                    progress_bar.update()
        return self.to_output(self.decode(latents, output_type), output_type, return_dict)


def caption_of_class(template: str, name: str) -> str:
    """The template with the name in its place, as captions of the training are made of classes."""
    has_vowel = name[:1].lower() in tuple("aeiou") and not name.lower().startswith(SPOKEN_CONSONANTS)
    return template.replace("(n) {}", f"{'n' if has_vowel else ''} {{}}").replace("{}", name)


def rescale_guided(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Bring each sample's deviation towards the conditional one, Eqs. 15-16 of arXiv:2305.08891."""
    dims = tuple(range(1, guided.ndim))
    rescaled = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return phi * rescaled + (1 - phi) * guided
