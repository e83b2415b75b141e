"""The transformer on patches: places, conditioning, precision, files, and what it refuses."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from hf_diffusion.models.transformer_pixel import PixelTransformer2DModel, rotate, rotation
from tests.launching import run_claims


SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 16, "num_layers": 2, "num_head_channels": 8}


def small(**changes) -> PixelTransformer2DModel:
    """A small network in eval mode none of whose layers is zero."""
    torch.manual_seed(0)
    model = PixelTransformer2DModel(**{**SMALL, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(batch: int = 2, channels: int = 3, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def test_a_fresh_network_outputs_exactly_zero():
    assert not PixelTransformer2DModel(**SMALL)(images(), 5).sample.any()


CLASSES = {"num_class_embeds": 3, "null_class": True}
VARIANTS = [{}, {"patch_size": 4, "out_channels": 6}, {"in_channels": 1, "bottleneck": 3}, CLASSES]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_output_has_the_images_shape_depends_on_time_and_saves(changes, tmp_path):
    model = small(**changes)
    for size, batch in (((8, 8), 1), ((16, 8), 3)):
        x = images(batch, model.config.in_channels, size)
        with torch.no_grad():
            early, late = model(x, 1).sample, model(x, 900).sample
        assert early.shape == (batch, model.config.out_channels, *size)
        assert not torch.allclose(early, late, atol=1e-3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(PixelTransformer2DModel.from_pretrained(tmp_path)(x, 900).sample, late)


def test_products_of_rotated_vectors_depend_on_the_distance_of_their_places_alone():
    torch.manual_seed(0)
    cos, sin = rotation(6, 5, 8, torch.device("cpu"))
    q, k = torch.randn(2, 8).double()
    turned = [rotate(v.expand(1, 30, 1, 8).double(), cos.double(), sin.double())[0, :, 0] for v in (q, k)]
    products = (turned[0] @ turned[1].T).reshape(6, 5, 6, 5)
    assert products[3, 2, 1, 1] == pytest.approx(products[5, 4, 3, 3].item(), abs=1e-5)
    assert products[0, 0, 0, 0] == pytest.approx(float(q @ k), abs=1e-5)
    assert abs(products[3, 2, 1, 1] - products[3, 2, 1, 2]) > 1e-3


def test_a_patch_knows_its_place_and_sees_all_others():
    model = small(in_channels=1)
    flat = model(torch.ones(1, 1, 8, 8), 5).sample[0, 0]
    assert not torch.allclose(flat[:2, :2], flat[4:6, 4:6], atol=1e-3)
    x = images(1, 1).requires_grad_()
    model(x, 5).sample[0, 0, 0, 0].backward()
    assert x.grad.ne(0).all()


def test_images_of_a_batch_do_not_see_each_other():
    model, x = small(num_class_embeds=3), images(3)
    t, labels = torch.tensor([1, 500, 900]), torch.tensor([2, 0, 1])
    whole = model(x, t, labels).sample
    for row in range(3):
        alone = model(x[row : row + 1], t[row], labels[row : row + 1]).sample
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-5)


def test_no_label_is_the_null_label():
    model, x = small(num_class_embeds=3, null_class=True), images()
    assert model.null_class_id == 3
    assert torch.equal(model(x, 5).sample, model(x, 5, torch.full((2,), 3)).sample)
    assert not torch.allclose(model(x, 5).sample, model(x, 5, torch.tensor([0, 1])).sample)


def test_bfloat16_stays_near_float32_and_keeps_timesteps_apart():
    model, x = small(), images()
    exact = model(x, 999).sample
    model, half = model.to(torch.bfloat16), x.bfloat16()
    near, other = model(half, 999).sample, model(half, 998).sample
    assert near.dtype == torch.bfloat16 and not torch.equal(near, other)
    assert (near.float() - exact).norm() < 0.05 * exact.norm()


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = small()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(images(), 5).sample.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_attention_backend_is_diffusers_own_choice():
    model, x = small(), images()
    expected = model(x, 5).sample
    model.set_attention_backend("_native_math")
    assert {p._attention_backend.value for p in (b.attention.processor for b in model.blocks)} == {"_native_math"}
    torch.testing.assert_close(model(x, 5).sample, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("none such")


def test_stock_pipelines_sample_with_it():
    pipe = DDIMPipeline(small(), DDIMScheduler(num_train_timesteps=10))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)


def test_a_saved_model_loads_in_a_fresh_process(tmp_path):
    model, x = small(num_class_embeds=3, null_class=True), images()
    model.save_pretrained(tmp_path)
    torch.save({"x": x, "output": model(x, 5).sample.detach()}, tmp_path / "expected.pt")
    child = """
        import torch
        from hf_diffusion import PixelTransformer2DModel
        model, expected = PixelTransformer2DModel.from_pretrained("."), torch.load("expected.pt")
        claims["null class"] = model.null_class_id
        torch.testing.assert_close(model(expected["x"], 5).sample, expected["output"])
    """
    assert run_claims(child, tmp_path) == {"null class": 3}


WRONG_SETTINGS = [
    ({"sample_size": 9}, "sample_size 9 does not divide into patches of 2"),
    ({"sample_size": (8, 9)}, r"sample_size \(8, 9\) does not divide"),
    ({"patch_size": 0}, "patch_size is 0"),
    ({"num_head_channels": 6}, "num_head_channels 6 must be a multiple of 4 that divides hidden_size 16"),
    ({"num_head_channels": 12}, "num_head_channels 12 must be"),
    ({"out_channels": 4}, "out_channels 4 does not fit in_channels 3"),
    ({"null_class": True}, "set num_class_embeds"),
    ({"num_layers": 0}, "num_layers is 0"),
]
WRONG_INPUTS = [
    ({}, (images(size=(9, 8)), 5), "sides that divide by 2"),
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
            PixelTransformer2DModel(**{**SMALL, **changes})
    for changes, arguments, message in WRONG_INPUTS:
        with pytest.raises(ValueError, match=message):
            small(**changes)(*arguments)
