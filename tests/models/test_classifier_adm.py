import pytest
import torch

from hf_diffusion.models.unet_adm import ADMClassifier
from tests.launching import run_claims


POOLS = ["adaptive", "attention", "spatial", "spatial_v2"]
SMALL = {
    "sample_size": 8,
    "in_channels": 3,
    "num_classes": 5,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_heads": 2,
    "norm_num_groups": 8,
}


def small(**changes) -> ADMClassifier:
    torch.manual_seed(0)
    model = ADMClassifier(**{**SMALL, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images(batch: int = 2, channels: int = 3, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"resblock_updown": False}, {"patch_size": 2}, {"sample_size": (8, 16), "in_channels": 1}],
    ids=str,
)
def test_logits_depend_on_image_and_time_and_save(pool, changes, tmp_path):
    model = small(pool=pool, **changes)
    x = images(3, model.config.in_channels, model.input_size)
    with torch.no_grad():
        logits = model(x, torch.tensor([0, 500.5, 999])).logits
        assert logits.shape == (3, 5)
        assert not torch.allclose(logits, model(x, 3).logits)
        alone = torch.cat([model(x[i : i + 1], t).logits for i, t in enumerate((0, 500.5, 999))])
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        assert torch.equal(ADMClassifier.from_pretrained(tmp_path)(x, 3)[0], model(x, 3, return_dict=False)[0])


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_pools_by_averages_take_other_sizes(pool):
    assert small(pool=pool)(images(size=(16, 8)), 5).logits.shape == (2, 5)


def test_attention_pool_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"takes \(8, 8\) pixels only"):
        small(pool="attention")(images(size=(16, 8)), 5)


@pytest.mark.parametrize("pool", POOLS)
def test_frozen_classifier_gives_the_same_input_gradient_with_and_without_checkpointing(pool):
    gradients = []
    for frozen, checkpointing in ((False, False), (True, False), (True, True)):
        model = small(pool=pool).requires_grad_(not frozen)
        if checkpointing:
            model.enable_gradient_checkpointing()
        x = images().requires_grad_()
        log_probability = model(x, 5).logits.log_softmax(dim=-1)[:, 1].sum()
        gradients.append(torch.autograd.grad(log_probability, x)[0])
    assert gradients[0].any()
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.parametrize("pool", POOLS)
def test_half_precision_stays_near_float32(pool):
    model, x = small(pool=pool), images()
    with torch.no_grad():
        exact = model(x, 999).logits
        with torch.autocast("cpu", torch.bfloat16):
            automatic = model(x, 999).logits
        half = model.to(torch.bfloat16)(x.bfloat16(), 999).logits
    for output in (automatic, half):
        assert (output.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("pool", POOLS)
def test_forward_compiles_as_one_graph(pool):
    model, x = small(pool=pool), images()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, 5).logits, model(x, 5).logits)
    torch._dynamo.reset()


def test_fresh_adaptive_classifier_is_undecided():
    assert not ADMClassifier(**SMALL, pool="adaptive")(images(), 5).logits.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pool": "mean"}, "unknown pool 'mean'"),
        ({"sample_size": 7}, "multiples of 2"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"norm_num_groups": 5}, "set norm_num_groups to 4"),
        ({"attention_resolutions": (8,)}, "downsampling factors"),
        ({"num_heads": 3}, "3 heads"),
    ],
)
def test_settings_that_do_not_fit_name_one_that_does(changes, message):
    with pytest.raises(ValueError, match=message):
        ADMClassifier(**{**SMALL, **changes})


def test_saved_classifier_loads_in_a_fresh_process(tmp_path):
    model, x = small(), images()
    model.save_pretrained(tmp_path)
    torch.save({"x": x, "logits": model(x, 5).logits.detach()}, tmp_path / "expected.pt")
    child = """
        import torch
        from hf_diffusion.models.unet_adm import ADMClassifier
        expected = torch.load("expected.pt")
        logits = ADMClassifier.from_pretrained(".")(expected["x"], 5).logits
        torch.testing.assert_close(logits, expected["logits"])
    """
    run_claims(child, tmp_path)
