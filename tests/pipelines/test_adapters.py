"""LoRA adapters of PEFT on our U-Net: load, save, switch and sample, as with diffusers' own."""

import pytest
import torch

from hf_diffusion import ADMUNet2DModel, ClassifierFreeGuidancePipeline
from tests.pipelines.tiny import make_classifier_free, sample


peft = pytest.importorskip("peft")
LORA = {"r": 2, "lora_alpha": 2, "target_modules": ["qkv", "proj", "conv_1"], "init_lora_weights": False}


@pytest.fixture
def adapted():
    """A pipeline, its samples, and those with a random adapter, which is switched on."""
    pipe = make_classifier_free()
    plain = sample(pipe, [0, 1])
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(**LORA), adapter_name="style")
    return pipe, plain, sample(pipe, [0, 1])


def test_an_adapter_changes_the_samples_and_can_be_switched_off(adapted):
    pipe, plain, styled = adapted
    assert not torch.allclose(plain, styled, atol=1e-3)
    pipe.unet.disable_adapters()
    assert torch.equal(sample(pipe, [0, 1]), plain)
    pipe.unet.enable_adapters()
    assert torch.equal(sample(pipe, [0, 1]), styled)


def test_an_adapter_saved_alone_gives_the_same_samples_on_another_copy(adapted, tmp_path):
    pipe, plain, styled = adapted
    pipe.unet.save_lora_adapter(tmp_path, adapter_name="style")
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    other = make_classifier_free()
    other.unet.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(sample(other, [0, 1]), styled)
    other.unet.delete_adapters(other.unet.active_adapters())
    torch.testing.assert_close(sample(other, [0, 1]), plain)


def test_a_pipeline_with_an_adapter_beside_its_weights_is_not_saved_without_them(adapted, tmp_path):
    pipe, *_ = adapted
    with pytest.raises(ValueError, match="the unet has the adapters style beside its weights; save them .* fuse"):
        pipe.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_fused_adapter_is_saved_with_the_pipeline(adapted, tmp_path):
    pipe, _, styled = adapted
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    pipe.save_pretrained(tmp_path)
    again = ClassifierFreeGuidancePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet) is ADMUNet2DModel
    torch.testing.assert_close(sample(again, [0, 1]), styled, rtol=1e-4, atol=1e-4)
