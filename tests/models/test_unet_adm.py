import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from hf_diffusion.models.unet_adm import (
    ADMAttention,
    ADMGenerator,
    ADMGroupNorm,
    ADMResBlock,
    ADMUNet2DModel,
    qkv_attention,
    timestep_embedding,
)
from tests.launching import run_claims


SMALL = {
    "sample_size": 8,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_heads": 2,
    "norm_num_groups": 8,
}


def small(**changes) -> ADMUNet2DModel:
    """A small U-Net in eval mode whose output layers are not zero."""
    torch.manual_seed(0)
    model = ADMUNet2DModel(**{**SMALL, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images(batch: int = 2, channels: int = 3, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


VARIANTS = [
    {},
    {"use_scale_shift_norm": False},
    {"resblock_updown": True},
    {"conv_resample": False},
    {"use_new_attention_order": True, "num_head_channels": 4},
    {"num_heads_upsample": 4, "dropout": 0.1},
    {"channel_mult": (0.5, 1.5)},
    {"residual_rescale": True},
    {"patch_size": 2, "out_channels": 6},
    {"in_channels": 1, "out_channels": 1},
    {"in_channels": 2, "out_channels": 2 * 5},
    {"in_channels": 1, "out_channels": None},
    {"attention_resolutions": (1, 2), "num_res_blocks": 2},
    {"num_class_embeds": 3, "null_class": True},
]


def test_the_config_says_how_many_channels_come_out_where_nobody_said_so(tmp_path):
    model = small(in_channels=2)
    model.save_pretrained(tmp_path)
    assert model.config.out_channels == ADMUNet2DModel.load_config(tmp_path)["out_channels"] == 2


def test_fresh_network_outputs_exactly_zero():
    assert not ADMUNet2DModel(**SMALL)(images(), 5).sample.any()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_output_has_the_images_shape_depends_on_time_and_saves(changes, tmp_path):
    model = small(**changes)
    for size, batch in (((8, 8), 1), ((16, 8), 3)):
        x = images(batch, model.config.in_channels, size)
        with torch.no_grad():
            early, late = model(x, 1).sample, model(x, 900).sample
        assert early.shape == (batch, model.config.out_channels, *size)
        assert not torch.allclose(early, late)
    model.save_pretrained(tmp_path)
    loaded = ADMUNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x, 900).sample, late)


@pytest.mark.parametrize(
    "timestep", [7, 7.0, torch.tensor(7), torch.tensor([7, 7]), torch.tensor([7]), torch.tensor([7.0, 7.0])]
)
def test_every_form_of_a_timestep_means_the_same(timestep):
    model, x = small(), images()
    with torch.no_grad():
        assert torch.equal(model(x, timestep).sample, model(x, torch.full((2,), 7)).sample)


def test_fractional_timesteps_lie_between_their_neighbours():
    model, x = small(), images()
    with torch.no_grad():
        low, middle, high = (model(x, t).sample for t in (500, 500.5, 501))
    assert (middle - low).norm() < (high - low).norm()
    assert (middle - low).norm() > 0


def test_images_of_a_batch_do_not_see_each_other():
    model, x, t = small(num_class_embeds=3), images(4), torch.tensor([1, 50, 500, 999])
    labels = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        together = model(x, t, labels).sample
        alone = torch.cat([model(x[i : i + 1], t[i], labels[i : i + 1]).sample for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_patches_are_the_network_of_the_rearranged_image():
    whole, pixels = small(patch_size=2), small(sample_size=4, in_channels=12, out_channels=12)
    pixels.load_state_dict(whole.state_dict())
    x = images()
    with torch.no_grad():
        expected = F.pixel_shuffle(pixels(F.pixel_unshuffle(x, 2), 3).sample, 2)
        assert torch.equal(whole(x, 3).sample, expected)


def test_no_label_is_the_null_label():
    model, x = small(num_class_embeds=3, null_class=True), images()
    assert model.null_class_id == 3
    with torch.no_grad():
        assert torch.equal(model(x, 5).sample, model(x, 5, torch.tensor([3, 3])).sample)
        assert not torch.allclose(model(x, 5).sample, model(x, 5, torch.tensor([0, 1])).sample)


def test_scale_shift_block_computes_adaptive_group_norm():
    block = ADMResBlock(8, 8, emb_channels=4, groups=4, dropout=0.0, scale_shift=True, rescale=False)
    torch.nn.init.normal_(block.conv_2.weight)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    h = block.conv_1(F.silu(F.group_norm(x, 4)))
    scale, shift = block.time_proj(emb)[:, :, None, None].chunk(2, dim=1)
    expected = x + block.conv_2(F.silu(F.group_norm(h, 4) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, emb), expected)
    block.output_scale = 0.5**0.5
    torch.testing.assert_close(block(x, emb), expected / 2**0.5)


def test_attention_block_mixes_pixels_as_softmax_of_scaled_products():
    block = ADMAttention(8, 2, groups=4, new_order=False, rescale=False)
    torch.nn.init.normal_(block.proj.weight)
    x = torch.randn(1, 8, 3, 2)
    tokens = F.group_norm(x, 4).flatten(2)[0].T  # (L, C)
    heads = []
    for head in (tokens @ block.qkv.weight.T + block.qkv.bias).chunk(2, dim=1):
        q, k, v = head.chunk(3, dim=1)
        heads.append((q @ k.T / 2).softmax(dim=-1) @ v)
    out = torch.cat(heads, dim=1) @ block.proj.weight.T + block.proj.bias
    torch.testing.assert_close(block(x), x + out.T.reshape(x.shape))


def test_attention_orders_are_permutations_of_each_other():
    qkv = torch.randn(2, 3 * 2 * 4, 5)
    new = qkv.reshape(2, 2, 3, 4, 5).transpose(1, 2).reshape(2, -1, 5)
    torch.testing.assert_close(qkv_attention(qkv, 2), qkv_attention(new, 2, new_order=True))


def test_sinusoids_start_with_cosines_of_zero():
    embedding = timestep_embedding(torch.tensor([0]), 7)
    assert embedding.tolist() == [[1, 1, 1, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="openai"):
        timestep_embedding(torch.tensor([0]), 8, layout="ddim")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_is_computed_in_float32_in_half_precision(dtype):
    x = (torch.randn(2, 8, 16, 16) + 20).to(dtype)  # a mean that half-precision sums of 512 values would lose
    exact = F.group_norm(x.float(), 4)
    for norm in (ADMGroupNorm(4, 8), ADMGroupNorm(4, 8).to(dtype)):
        assert norm(x).dtype == dtype
        torch.testing.assert_close(norm(x).float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("mode", ["autocast", "to", "layerwise"])
def test_bfloat16_stays_near_float32(mode):
    model, x = small(num_class_embeds=3, attention_resolutions=(1, 2)), images()
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        exact = model(x, 999, labels).sample
        if mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x, 999, labels).sample
        elif mode == "to":
            output = model.to(torch.bfloat16)(x.bfloat16(), 999, labels).sample
        else:
            model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
            assert model.conv_in.weight.dtype == torch.bfloat16
            assert model.norm_out.weight.dtype == torch.float32
            output = model(x, 999, labels).sample
    assert (output.float() - exact).norm() < 0.03 * exact.norm()


def test_layerwise_casting_computes_in_half_precision_with_norms_kept_in_float32():
    model, x = small(num_class_embeds=3), images()
    with torch.no_grad():
        exact = model(x, 5, torch.tensor([0, 1])).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        output = model(x.bfloat16(), 5, torch.tensor([0, 1])).sample
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() < 0.3 * exact.norm()  # weights of three mantissa bits


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_no_gradient(frozen):
    gradients = []
    for checkpointing in (False, True):
        model = small(dropout=0.2).train().requires_grad_(not frozen)
        if checkpointing:
            model.enable_gradient_checkpointing()
        x = images().requires_grad_()
        torch.manual_seed(0)
        model(x, 5).sample.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain)


def test_gradient_checkpointing_keeps_fewer_activations():
    kept = []
    for checkpointing in (False, True):
        model = small()
        if checkpointing:
            model.enable_gradient_checkpointing()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            model(images(), 5)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_no_gradient_gives_the_same_output_as_with_gradient():
    model, x = small(), images()
    recorded = model(x, 5).sample
    with torch.no_grad():  # the activation works in place here
        torch.testing.assert_close(model(x, 5).sample, recorded.detach(), rtol=0, atol=0)


def test_forward_compiles_as_one_graph():
    model, x, labels = small(num_class_embeds=3, patch_size=2), images(), torch.tensor([0, 2])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for timestep in (3, 4, torch.tensor([5, 6])):
            torch.testing.assert_close(compiled(x, timestep, labels).sample, model(x, timestep, labels).sample)
    torch._dynamo.reset()


def test_repeated_blocks_compile():
    model, x = small(), images()
    with torch.no_grad():
        expected = model(x, 5).sample
        torch._dynamo.reset()
        # blocks of many widths share one cache, and pass the limit of 8 recompilations
        with torch._dynamo.config.patch(recompile_limit=64):
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
            torch.testing.assert_close(model(x, 5).sample, expected)
    compiled = [type(m).__name__ for m in model.modules() if m._compiled_call_impl is not None]
    assert set(compiled) == {"ADMResBlock", "ADMAttention"}
    torch._dynamo.reset()


def test_channels_last_computes_the_same():
    model, x = small(), images()
    with torch.no_grad():
        expected = model(x, 5).sample
        output = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), 5).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [8, (16, 8)])
def test_stock_pipelines_sample_with_it(size):
    model = small(sample_size=size)
    scheduler = DDPMScheduler(num_train_timesteps=10)
    for pipeline in (DDPMPipeline(model, scheduler), DDIMPipeline(model, DDIMScheduler(num_train_timesteps=10))):
        pipeline.set_progress_bar_config(disable=True)
        sampled = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
        assert sampled.shape == (2, *((8, 8) if size == 8 else size), 3)


def test_saved_model_loads_in_a_fresh_process(tmp_path):
    model, x = small(num_class_embeds=3, null_class=True), images()
    model.save_pretrained(tmp_path)
    torch.save({"x": x, "output": model(x, 5).sample.detach()}, tmp_path / "expected.pt")
    child = """
        import torch
        from hf_diffusion.models.unet_adm import ADMUNet2DModel
        model, expected = ADMUNet2DModel.from_pretrained("."), torch.load("expected.pt")
        claims["null class"] = model.null_class_id
        torch.testing.assert_close(model(expected["x"], 5).sample, expected["output"])
        half = ADMUNet2DModel.from_pretrained(".", torch_dtype=torch.bfloat16)
        claims["half"] = str(half(expected["x"].bfloat16(), 5).sample.dtype)
    """
    assert run_claims(child, tmp_path) == {"null class": 3, "half": "torch.bfloat16"}


WRONG_SETTINGS = [
    ({"sample_size": 9}, r"multiples of 2 .*use 10 or"),
    ({"sample_size": (8, 12), "patch_size": 4}, r"multiples of 8 .*use \(8, 16\) or"),
    ({"patch_size": 0}, "patch_size is 0"),
    ({"norm_num_groups": 32}, "16 channels .* 32; set norm_num_groups to 16 or model_channels to 32"),
    ({"channel_mult": (1, 1.25)}, "20 channels .* 8; set norm_num_groups to 4 or model_channels to 32"),
    ({"norm_num_groups": 0}, "norm_num_groups is 0"),
    ({"channel_mult": ()}, "channel_mult is empty"),
    ({"num_heads": 3}, "32 channels .* 3 heads"),
    ({"num_head_channels": 5}, "num_head_channels 5"),
    ({"num_heads_upsample": 5}, "5 heads"),
    ({"attention_resolutions": (3,)}, r"\[3\] are downsampling factors.*\[1, 2\]"),
    ({"attention_resolutions": (16,)}, r"choose from \[1, 2\]"),
    ({"out_channels": 5}, r"use 3, or 6 for a learned variance, or K \* 3 for K logits"),
    ({"out_channels": 0}, "out_channels is 0"),
    ({"in_channels": 0}, "in_channels is 0"),
    ({"null_class": True}, "set num_class_embeds"),
    ({"num_class_embeds": 0}, "num_class_embeds is 0"),
    ({"num_res_blocks": 0}, "num_res_blocks is 0"),
]
WRONG_INPUTS = [
    ({}, (images(size=(9, 8)), 5), "multiples of 2"),
    ({"patch_size": 2}, (images(size=(10, 8)), 5), "multiples of 4"),
    ({}, (images(channels=1), 5), r"\(batch, 3, height, width\)"),
    ({}, (images(), torch.tensor([1, 2, 3])), "timestep has shape"),
    ({}, (images(), 5, torch.tensor([0, 1])), "without classes"),
    ({"num_class_embeds": 3}, (images(), 5), "class_labels are missing"),
    ({"num_class_embeds": 3}, (images(), 5, torch.tensor([0, 3])), "from 0 to 3; this model knows 0 to 2"),
    ({"num_class_embeds": 3}, (images(), 5, torch.tensor([0])), "class_labels have shape"),
]


def test_settings_and_inputs_that_do_not_fit_are_refused_and_name_what_does():
    for changes, message in WRONG_SETTINGS:
        with pytest.raises(ValueError, match=message):
            ADMUNet2DModel(**{**SMALL, **changes})
    for changes, arguments, message in WRONG_INPUTS:
        with pytest.raises(ValueError, match=message):
            small(**changes)(*arguments)


@pytest.mark.parametrize("changes", [{"norm_num_groups": 16}, {"model_channels": 32, "norm_num_groups": 32}])
def test_the_advice_for_groups_works(changes):
    assert ADMUNet2DModel(**{**SMALL, **changes})(images(), 5).sample.shape == (2, 3, 8, 8)


ALPHAS_CUMPROD = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
LEVELS = torch.tensor([0.6, 0.2, 0.01])  # alpha_bar of x_1 to x_3


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_generator_from_a_denoiser_predicts_the_denoisers_x_0_whatever_the_latent(prediction_type):
    # one that was told of augmentation, too, which is never done to what a generator sees
    denoiser = small(num_class_embeds=3, null_class=True, patch_size=2, augment_dim=9)
    generator = ADMGenerator.from_denoiser(
        denoiser, ALPHAS_CUMPROD, prediction_type, ALPHAS_CUMPROD[[99, 499, 899]], 4
    )
    assert generator.config.timesteps == pytest.approx([99, 499, 899], abs=1e-3)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    x, labels = images(3), torch.tensor([0, 2, 1])
    with torch.no_grad():
        x_0 = generator(x, torch.tensor([0, 1, 2]), torch.randn(3, 4), labels).sample
        for i, timestep in enumerate((99, 499, 899)):
            output = denoiser(x[i : i + 1], timestep, labels[i : i + 1]).sample
            stock = scheduler.step(output, timestep, x[i : i + 1]).pred_original_sample
            torch.testing.assert_close(x_0[i : i + 1], stock, rtol=1e-3, atol=1e-3)


def test_a_generator_between_two_timesteps_has_the_noise_of_its_level():
    generator = ADMGenerator.from_denoiser(small(), ALPHAS_CUMPROD, "epsilon", LEVELS)
    assert [signal**2 for signal in generator.config.signals] == pytest.approx(LEVELS.tolist())
    for timestep, level in zip(generator.config.timesteps, LEVELS):
        assert ALPHAS_CUMPROD[int(timestep)] > level > ALPHAS_CUMPROD[int(timestep) + 1]


def test_a_generator_leaves_out_the_variance_that_a_denoiser_predicts():
    denoiser = small(out_channels=6)
    generator = ADMGenerator.from_denoiser(denoiser, ALPHAS_CUMPROD, "sample", LEVELS, 4)
    with torch.no_grad():
        expected = denoiser(images(), generator.config.timesteps[1]).sample[:, :3]
        torch.testing.assert_close(generator(images(), 1, torch.randn(2, 4)).sample, expected)


def test_a_generator_learns_from_its_latent_and_saves(tmp_path):
    generator = ADMGenerator.from_denoiser(small(), ALPHAS_CUMPROD, "v_prediction", LEVELS, 4)
    generator(images(), 2, torch.randn(2, 4)).sample.square().sum().backward()
    assert generator.latent_embedding[-1].weight.grad.any()
    torch.nn.init.normal_(generator.latent_embedding[-1].weight)
    with torch.no_grad():
        one, other = (generator(images(), 1, torch.full((2, 4), value)).sample for value in (1.0, -1.0))
        assert not torch.allclose(one, other)
        generator.save_pretrained(tmp_path)
        assert torch.equal(ADMGenerator.from_pretrained(tmp_path)(images(), 1, torch.ones(2, 4)).sample, one)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prediction_type": "x0"}, "prediction_type 'x0' is unknown; choose 'epsilon'"),
        ({"signals": (0.5,)}, "equally many"),
        ({"signals": (1.0,), "timesteps": (0,)}, "between 0 and 1"),
        ({"latent_dim": 0}, "latent_dim is 0"),
    ],
)
def test_settings_of_a_generator_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ADMGenerator(**{**SMALL, **changes})


def test_a_generator_names_a_latent_of_another_width():
    with pytest.raises(ValueError, match=r"latent has shape \(2, 3\); \(2, 64\) is expected"):
        ADMGenerator(**SMALL)(images(), 0, torch.randn(2, 3))
