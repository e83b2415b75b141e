"""Replays of GLIDE: converted checkpoints, guidance of both kinds, CLIP, upsampling, spacing."""

import functools
import math
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedTokenizerFast

from hf_diffusion import DDIMEtaScheduler, NoisyCLIP, TextToImagePipeline
from hf_diffusion.convert.glide import blocks_of, networks_from_glide, scheduler_from_glide
from hf_diffusion.schedulers.scheduling_gaussian import space_timesteps
from tests.golden.manifests import read_arrays, read_weights
from tests.golden.replay import Case, toy
from tests.golden.replays_openai_guidance import record_steps


DTYPES = (torch.float64, torch.float32)


@functools.lru_cache(maxsize=8)
def networks(folder: Path, dtype: torch.dtype, variant: str | None = None):
    """U-Net and text model of the set's checkpoint; a variant has another first convolution."""
    state = read_weights(folder / "base.safetensors.gz")
    if variant is not None:
        first = "input_blocks.0.0.weight"
        state = state | {first: read_weights(folder / "variants.safetensors")[f"{variant}.{first}"]}
    unet, encoder = networks_from_glide(state, image_size=8, num_head_channels=16, xf_heads=2)
    return unet.to(dtype), encoder.to(dtype)


@torch.no_grad()
def read_texts(encoder, tokens: Tensor, mask: Tensor) -> Tensor:
    """All last states (B, L, D); padding has the tokens behind the vocabulary of 30."""
    return encoder(input_ids=torch.where(mask, tokens, 30 + torch.arange(tokens.shape[1]))).last_hidden_state


@torch.no_grad()
def call(unet, x: Tensor, t, states: Tensor) -> Tensor:
    return unet(x, t, encoder_hidden_states=states, class_labels=states[:, -1]).sample


# --- the converted networks ---------------------------------------------------------------------


def replay_text(case: Case) -> None:
    captions = read_arrays(case.record.folder / case.record.file)
    tokens, mask = (torch.from_numpy(captions[f"captions/{name}"]) for name in ("tokens", "mask"))
    unet, encoder = networks(case.record.folder, torch.float64)
    if case.record.name == "mask_all_true":
        states = read_texts(encoder, tokens, torch.ones_like(mask))
        case.check("xf_proj", unet.class_embedding(states[:, -1]))
        case.check("xf_out_mean", states.mean((1, 2)))
        return
    states = read_texts(encoder, case["tokens"], case["mask"])
    if case.record.name == "padding_ids_are_irrelevant":
        case.check("xf_out", states[:, -1])
        return
    seen = {}
    layer = encoder.get_submodule("text_model.encoder" if hasattr(encoder, "text_model") else "encoder").layers[0]
    hooks = [
        getattr(layer.self_attn, f"{name}_proj").register_forward_hook(
            lambda _, args, out, name=name: seen.update({"in": args[0], name: out})
        )
        for name in "qkv"
    ] + [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(x=(*args, *kwargs.values())[0]), with_kwargs=True
        )
    ]
    read_texts(encoder, tokens, mask)
    for hook in hooks:
        hook.remove()
    case.check("xf_in", seen["x"])
    heads = [seen[name].reshape(*tokens.shape, 2, 8) for name in "qkv"]
    case.check("qkv_block0", torch.stack(heads, dim=3).flatten(2))
    case.check("xf_out", states)
    case.check("xf_proj", unet.class_embedding(states[:, -1]))
    unet, encoder = networks(case.record.folder, torch.float32)
    states = read_texts(encoder, tokens, mask)
    case.check("xf_out_f32", states, torch.float32)
    case.check("xf_proj_f32", unet.class_embedding(states[:, -1]), torch.float32)


def replay_unet(case: Case) -> None:
    if case.record.name == "forward":
        for dtype in DTYPES:
            _check_forward(case, dtype)
        return
    unet, _ = networks(case.record.folder, torch.float64)
    block = unet.get_submodule({there: here for here, there in blocks_of(unet.config)}[case.settings["block"]])
    if case.record.name != "attention_probe":
        case.check("output", block(case["input"], case["emb"]))
        return
    seen, texts = {}, case["encoder_out"].mT
    names = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj")
    for name in names:
        getattr(block, name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    case.check("output", block(case["input"], encoder_hidden_states=texts))
    own, added = (
        torch.stack([seen[name][0].T.reshape(2, 16, -1) for name in part], dim=1).flatten(0, 2)[None]
        for part in (names[:3], names[3:])
    )
    case.check("qkv", own)
    case.check("encoder_kv", added)


def _check_forward(case: Case, dtype: torch.dtype) -> None:
    unet, encoder = networks(case.record.folder, dtype)
    states = read_texts(encoder, case["tokens"], case["mask"])
    seen = {}
    # The last part of each of their blocks gives what the block gives.
    places = {there.rpartition(".")[0]: here for here, there in blocks_of(unet.config)}
    places |= {"input_blocks.0": "conv_in", "middle_block": places.pop("middle_block"), "out": "conv_out"}
    hooks = [
        unet.get_submodule(here).register_forward_hook(lambda _, args, out, there=there: seen.update({there: out}))
        for there, here in {**places, "temb": "time_proj", "emb": "down_blocks.0.resnets.0"}.items()
        if there != "emb"
    ]
    first = unet.down_blocks[0].resnets[0]
    hooks.append(first.register_forward_pre_hook(lambda _, args: seen.update(emb=args[1])))
    output = call(unet, case["x"].to(dtype), case["timesteps"], states)
    for hook in hooks:
        hook.remove()
    case.check("output" if dtype == torch.float64 else "output_f32", output, dtype)
    if dtype == torch.float32:
        return
    case.check("temb", seen["temb"])
    case.check("emb", seen["emb"])
    blocks = [seen[name] for name in case.words("block_names")]
    stats = [torch.cat([b.mean()[None], b.square().mean().sqrt()[None], b.flatten()[:4]]) for b in blocks]
    case.check("block_stats", torch.stack(stats))


# --- guidance -----------------------------------------------------------------------------------


def numbers_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """Reads "5 11 2" as the tokens 5, 11 and 2."""
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(count)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=str(count - 1))


def replay_guidance(case: Case) -> None:
    (_replay_loop if case.record.name == "loop" else _replay_step)(case)


def _replay_loop(case: Case) -> None:
    """Their sampling as a user does it: by prompts, through the pipeline."""
    tokens, mask, settings = case["tokens"], case["mask"], case.settings
    prompts = [" ".join(str(id) for id in row[own].tolist()) for row, own in zip(tokens, mask)]
    assert prompts[2:] == ["", ""]
    for dtype in DTYPES:
        unet, encoder = networks(case.record.folder, dtype)
        scheduler = scheduler_from_glide(settings["diffusion_steps"], settings["schedule"])
        texts = {"text_length": tokens.shape[1], "padding_id": 30}
        pipe = TextToImagePipeline(unet, encoder, numbers_tokenizer(30), scheduler, **texts)
        pipe.set_progress_bar_config(disable=True)
        record_steps(scheduler, case["noise"][:, :2].to(dtype))
        sample = pipe(
            prompts[:2],
            timesteps=settings["respacing"],
            guidance_scale=settings["guidance_scale"],
            latents=case["x_T"][:2].to(dtype),
            output_type="latent",
        ).images
        assert scheduler.timesteps.tolist() == settings["timesteps"]
        case.check("sample" if dtype == torch.float64 else "sample_f32", sample, dtype)


def _replay_step(case: Case) -> None:
    unet, encoder = networks(case.record.folder, torch.float64)
    states = read_texts(encoder, case["tokens"], case["mask"])
    scheduler = scheduler_from_glide(case.settings["diffusion_steps"], case.settings["schedule"])
    ddim = DDIMEtaScheduler.from_config(scheduler.config)
    for each in (scheduler, ddim):
        each.set_timesteps(timesteps=case.settings["respacing"])
    t, x, noise = case.settings["t_original"], case["x"][:2], case["noise"][:2]
    assert scheduler.previous_timestep(t) == case.settings["t_original_prev"]
    raw = call(unet, torch.cat([x, x]), t, states)
    (cond, variance), (uncond, other) = (part.split(3, dim=1) for part in raw.chunk(2))
    eps = uncond + case.settings["guidance_scale"] * (cond - uncond)
    output = torch.cat([eps, variance], dim=1)
    mean, _, log_variance, x_0 = scheduler.p_mean_variance(output, t, x)
    case.check("raw", raw)
    case.check("guided_eps", eps)
    case.check("pred_xstart", x_0)
    case.check("pred_xstart_unclipped", scheduler.predict_x_0(output, t, x, clip=False))
    case.check("mean", mean)
    case.check("log_variance", log_variance)
    case.check("log_variance_uncond", scheduler.p_mean_variance(torch.cat([eps, other], dim=1), t, x)[2])
    case.check("sample", scheduler.step(output, t, x, variance_noise=noise).prev_sample)
    case.check("ddim", ddim.step(output, t, x).prev_sample)
    case.check("ddim_eta0.6", ddim.step(output, t, x, eta=0.6, variance_noise=noise).prev_sample)


# --- CLIP ---------------------------------------------------------------------------------------

CLIP = {"num_timesteps": 50, "sample_size": 8, "patch_size": 4, "width": 16, "num_layers": 2, "num_heads": 2}
CLIP |= {"embed_dim": 12, "vocab_size": 40, "text_length": 10, "text_width": 16, "text_layers": 2, "text_heads": 2}
# Of their pixels, 0 to 255.
PIXELS = (122.77093945, 116.74601272, 104.09373519), (68.50053285, 66.63215831, 70.32316309)
LINEAR = {"f_attn.f_q": "query", "f_attn.f_k": "key", "f_attn.f_v": "value", "f_attn.f_c": "out"}
LINEAR |= {"f_mlp.f_1": "widen", "f_mlp.f_2": "narrow"}
OUTSIDE = {
    "image_encoder.blocks.input.patch_proj": "patches.weight",
    "image_encoder.blocks.input.w_t": "timesteps.weight",
    "image_encoder.blocks.input.w_pos": "image_positions",
    "image_encoder.blocks.input.ln.g": "image_norm.weight",
    "image_encoder.blocks.input.ln.b": "image_norm.bias",
    "text_encoder.blocks.input.w_voc": "tokens.weight",
    "text_encoder.blocks.input.w_pos": "text_positions",
}


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GLIDE's weights of the CLIP by our names."""
    names = dict(OUTSIDE)
    for side in ("image", "text"):
        for block in range(2):
            there, here = f"{side}_encoder.blocks.block_{block}.", f"{side}_tower.blocks.{block}."
            names |= {
                f"{there}{a}.{x}": f"{here}{b}.{y}"
                for a, b in LINEAR.items()
                for x, y in (("w", "weight"), ("b", "bias"))
            }
            for a, b in (("f_attn.ln", "norm_1"), ("f_mlp.ln", "norm_2")):
                names |= {f"{there}{a}.g": f"{here}{b}.weight", f"{there}{a}.b": f"{here}{b}.bias"}
        there, here = f"{side}_encoder.blocks.output.", f"{side}_tower."
        names |= {f"{there}f.w": f"{here}project.weight", f"{there}ln.g": f"{here}norm_out.weight"}
        names |= {f"{there}ln.b": f"{here}norm_out.bias"}
    scale = {"logit_scale": torch.tensor(math.log(100))}
    return {names[name]: value.double() for name, value in theirs.items()} | scale


def replay_clip(case: Case) -> None:
    mean, std = ([value / 127.5 for value in values] for values in PIXELS)
    clip = NoisyCLIP(**CLIP, image_mean=[value - 1 for value in mean], image_std=std).double()
    clip.load_state_dict(ours(read_weights(case.record.folder / "clip.safetensors")))
    (_replay_embeddings if case.record.name == "embeddings" else _replay_guided_step)(case, clip)


def _gradient(clip: NoisyCLIP, x: Tensor, t: Tensor | int, texts: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    fit = (clip.image_embeddings(x, t) * texts).sum()
    return torch.autograd.grad(2.5 * clip.scale * fit, x)[0]


def _replay_embeddings(case: Case, clip: NoisyCLIP) -> None:
    # The reference keeps the pixels' means in float32.
    close = {"rtol": 1e-6, "atol": 1e-7}
    mask = (torch.arange(10) < case["lens"][:, None]).long()
    images, texts, scale = clip(case["x"], case["t"], case["tokens"], mask)
    case.check("image", images, **close)
    case.check("text", texts, **close)
    for name, found in (("image_raw", images), ("text_raw", texts)):
        raw = case[name]
        torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), found, **close)
    case.check("logits", scale * texts @ images.T, **close)
    gradient = _gradient(clip, case["x"], case["t"], texts)
    case.check("gradient", gradient, rtol=1e-5, atol=1e-6)
    for name, found in (("image_f32", images), ("text_f32", texts), ("gradient_f32", gradient)):
        case.check(name, found, torch.float32)


def _replay_guided_step(case: Case, clip: NoisyCLIP) -> None:
    settings, x, noise = case.settings, case["x"], case["noise"]
    of_clip = read_arrays(case.record.folder / case.record.file)
    tokens, lens = (torch.from_numpy(of_clip[f"embeddings/{name}"]) for name in ("tokens", "lens"))
    texts = clip.text_embeddings(tokens, (torch.arange(10) < lens[:, None]).long())
    scheduler = scheduler_from_glide(settings["diffusion_steps"], settings["schedule"])
    ddim = DDIMEtaScheduler.from_config(scheduler.config)
    for each in (scheduler, ddim):
        each.set_timesteps(timesteps=settings["respacing"])
    t = settings["timesteps"][settings["t_index"]]
    eps, variance = re.fullmatch("eps=(.*), variance channels=(.*), t = .*", settings["network"]).groups()
    output = torch.cat([toy(formula)(x=x, t=torch.tensor(float(t)).double()) for formula in (eps, variance)], dim=1)
    mean, variance, _, x_0 = scheduler.p_mean_variance(output, t, x)
    close = {"rtol": 1e-5, "atol": 1e-6}
    case.check("mean", mean)
    case.check("variance", variance)
    case.check("pred_xstart", x_0)
    case.check("gradient", _gradient(clip, x, t, texts), **close)
    gradient = case["gradient"]
    case.check("guided_mean", mean + variance * gradient)
    case.check("ancestral", scheduler.step(output, t, x, variance_noise=noise, gradient=gradient).prev_sample)
    guided = ddim.step(output, t, x, gradient=gradient)
    s = ddim.previous_timestep(t)
    case.check("ddim", guided.prev_sample)
    case.check("score_pred_xstart", guided.pred_original_sample)
    case.check("score_mean", ddim.posterior(guided.pred_original_sample, x, t, s)[0])


# --- upsampling, inpainting, spacing ------------------------------------------------------------


def replay_upsampler(case: Case) -> None:
    folder, name = case.record.folder, case.record.name
    arrays = read_arrays(folder / case.record.file)
    common = {key: torch.from_numpy(arrays[f"forward/{key}"]) for key in ("x", "timesteps", "tokens", "mask")}
    low_res = torch.from_numpy(arrays["forward/low_res_quantised"])
    for dtype in DTYPES if name != "inpaint" else DTYPES[:1]:
        unet, encoder = networks(folder, dtype, "inpaint" if name == "inpaint" else "upsampler")
        states = read_texts(encoder, common["tokens"], common["mask"])
        upsampled = interpolate(low_res.to(dtype), scale_factor=2, mode="bilinear", align_corners=False)
        suffix, x = "" if dtype == torch.float64 else "_f32", common["x"].to(dtype)
        if name == "ddim_loop":
            sample = _upsample(case, unet, states, upsampled)
            case.check(f"sample{suffix}", sample, dtype)
            continue
        extra = [upsampled]
        if name == "inpaint":
            extra = [case["image"] * case["mask_pixels"], case["mask_pixels"]]
        whole = torch.cat([x, *extra], dim=1)
        if dtype == torch.float64:
            case.check("network_input", whole)
        case.check(f"output{suffix}", call(unet, whole, common["timesteps"], states), dtype)
    if name == "forward":
        for key, value in common.items():
            torch.testing.assert_close(case[key], value)
        # half to even, as theirs
        case.check("low_res_quantised", (case["low_res"].add(1) * 127.5).round() / 127.5 - 1)


def _upsample(case: Case, unet, states: Tensor, upsampled: Tensor) -> Tensor:
    settings = case.settings
    scheduler = scheduler_from_glide(settings["diffusion_steps"], settings["schedule"])
    scheduler = DDIMEtaScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(timesteps=settings["respacing"])
    assert scheduler.timesteps.tolist() == settings["timesteps"]
    x = settings["upsample_temp"] * case["latents"].to(states.dtype)
    for t in scheduler.timesteps:
        output = call(unet, torch.cat([x, upsampled], dim=1), t, states)
        x = scheduler.step(output, t, x, eta=settings["eta"]).prev_sample
    return x


def replay_spacing(case: Case) -> None:
    settings, total = case.settings, case.settings["num_timesteps"]
    scheduler = scheduler_from_glide(total, settings["schedule"])
    spacing = settings["respacing"]
    if spacing == "fast27":
        # Theirs for upsampling, which leaves out the noisiest timestep.
        spacing = sorted({*space_timesteps(total, "10,10,3,2,2")} - {total - 1} | {total - 3})[::-1]
    scheduler.set_timesteps(timesteps=spacing)
    t = scheduler.timesteps.flip(0)
    one, zero = torch.ones(len(t), 1).double(), torch.zeros(len(t), 1).double()
    # Ends of the learned range: variance channels of -1 and 1.
    low, high = (
        scheduler.p_mean_variance(torch.cat([zero, value * one], dim=1), t, zero)[2][:, 0] for value in (-1, 1)
    )
    case.check("timesteps", np.array(t), None)
    case.check("alphas_cumprod", scheduler.alpha_bar[t])
    case.check("betas", high.exp())
    case.check("log_betas", high)
    case.check("posterior_log_variance_clipped", low)


REPLAYS = {
    "text": replay_text,
    "unet": replay_unet,
    "guidance": replay_guidance,
    "clip": replay_clip,
    "upsampler": replay_upsampler,
    "spacing": replay_spacing,
}
