import pytest
import torch
from safetensors.torch import save_file

from hf_diffusion.convert.openai import (
    classifier_flags,
    classifier_from_openai,
    classifier_to_openai,
    load_openai_checkpoint,
    unet_flags,
    unet_from_openai,
    unet_to_openai,
)
from hf_diffusion.models.unet_adm import ADMClassifier, ADMUNet2DModel


UNET = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_scale_shift_norm": True,
}
CLASSIFIER = {**UNET, "out_channels": 5, "pool": "attention", "num_head_channels": 16}


def unet(**changes) -> ADMUNet2DModel:
    settings = {"sample_size": 16, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    return randomised(ADMUNet2DModel(**{**settings, "attention_resolutions": (2,), **changes}))


def classifier(**changes) -> ADMClassifier:
    settings = {"sample_size": 16, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    settings |= {"attention_resolutions": (2,), "num_head_channels": 16}
    return randomised(ADMClassifier(**{**settings, **changes}))


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"resblock_updown": True, "num_class_embeds": 4, "out_channels": 6},
        {"conv_resample": False, "num_heads_upsample": 2},
        {
            "channel_mult": (1, 1, 2),
            "attention_resolutions": (1, 4),
            "num_res_blocks": 2,
            "use_scale_shift_norm": False,
        },
        {"in_channels": 1, "out_channels": 1, "use_new_attention_order": True, "num_head_channels": 8, "dropout": 0.1},
        {"model_channels": 64, "channel_mult": (0.5, 1), "num_heads": 1},
    ],
    ids=str,
)
def test_unet_there_and_back_computes_the_same_bits(changes):
    model = unet(**changes)
    weights, flags = unet_to_openai(model)
    again = unet_from_openai(weights, flags)
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    assert {k: again.config[k] for k in config} == config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    second_weights, second_flags = unet_to_openai(again)
    assert second_flags == flags
    assert all(torch.equal(value, second_weights[name]) for name, value in weights.items())


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_classifier_there_and_back_computes_the_same_bits(pool, resblock_updown):
    model = classifier(pool=pool, resblock_updown=resblock_updown)
    weights, flags = classifier_to_openai(model)
    again = classifier_from_openai(weights, flags)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x, 5).logits, model(x, 5).logits)


def test_exported_weights_do_not_share_memory_with_the_model():
    model = unet()
    weights, _ = unet_to_openai(model)
    before = {name: value.clone() for name, value in weights.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in weights.items())


def test_flags_of_improved_diffusion_need_the_image_size_only():
    weights, _ = unet_to_openai(unet(num_heads=2))
    flags = {**UNET, "num_heads_upsample": -1, "use_checkpoint": False}  # no head width, no attention order there
    assert unet_from_openai(weights, flags).config.num_head_channels is None
    del flags["image_size"]
    with pytest.raises(ValueError, match=r"missing \['image_size'\]"):
        unet_from_openai(weights, flags)


def test_a_factor_of_no_level_is_dropped_as_in_the_reference():
    weights, _ = unet_to_openai(unet())
    assert tuple(
        unet_from_openai(weights, {**UNET, "attention_resolutions": [2, 8]}).config.attention_resolutions
    ) == (2,)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_classes": 4}, "num_classes to None"),
        ({"out_channels": 6}, "out_channels to 3 .*learn_sigma"),
        ({"in_channels": 1, "out_channels": 1}, "in_channels to 3"),
        ({"model_channels": 64}, r"model_channels \(num_channels, classifier_width\) to 32"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm to True"),
        ({"resblock_updown": True}, "resblock_updown to False"),
        ({"attention_resolutions": [1, 2]}, "missing keys .*attention_resolutions"),
        ({"num_res_blocks": 2}, "num_res_blocks"),
        ({"channel_mult": [1, 1]}, "channel_mult"),
        ({"width": 3}, r"unknown \['width'\]"),
        ({"dims": 3}, "dims is 3"),
    ],
)
def test_unet_that_does_not_fit_its_flags_names_the_flag(changes, message):
    weights, _ = unet_to_openai(unet())
    with pytest.raises(ValueError, match=message):
        unet_from_openai(weights, {**UNET, **changes})


def test_class_embedding_without_classes_names_their_number():
    weights, _ = unet_to_openai(unet(num_class_embeds=4))
    with pytest.raises(
        ValueError, match=r"1 unknown keys \['label_emb.weight'\], 0 missing keys .*set num_classes to 4"
    ):
        unet_from_openai(weights, UNET)
    with pytest.raises(ValueError, match="set num_classes to 4"):
        unet_from_openai(weights, {**UNET, "num_classes": 10})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out_channels": 10}, "out_channels to 5"),
        ({"pool": "spatial"}, "check pool"),
        ({"image_size": 32}, "image_size"),
    ],
)
def test_classifier_that_does_not_fit_its_flags_names_the_flag(changes, message):
    weights, flags = classifier_to_openai(classifier(num_classes=5))
    with pytest.raises(ValueError, match=message):
        classifier_from_openai(weights, {**flags, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"null_class": True, "num_class_embeds": 3},
        {"patch_size": 2},
        {"norm_num_groups": 16},
        {"sample_size": (16, 32)},
    ],
    ids=str,
)
def test_what_guided_diffusion_lacks_cannot_be_exported(changes):
    with pytest.raises(ValueError, match="guided-diffusion has no"):
        unet_to_openai(unet(**changes))


def test_attention_pool_without_head_width_cannot_be_exported():
    with pytest.raises(ValueError, match="needs num_head_channels"):
        classifier_to_openai(classifier(num_head_channels=None))


def test_checkpoint_files_of_both_kinds_hold_the_same(tmp_path):
    weights, _ = unet_to_openai(unet())
    torch.save(weights, tmp_path / "model.pt")
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        loaded = load_openai_checkpoint(tmp_path / name)
        assert all(torch.equal(value, loaded[key]) for key, value in weights.items())


def test_files_that_hold_no_weights_are_named(tmp_path):
    torch.save({"state": {}, "param_groups": []}, tmp_path / "opt.pt")
    (tmp_path / "model.npz").touch()
    for name, message in (
        ("opt.pt", "not the optimizer"),
        ("model.npz", "unknown kind"),
        ("none.pt", "no checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            load_openai_checkpoint(tmp_path / name)


ADM = {"class_cond": True, "learn_sigma": True, "resblock_updown": True, "attention_resolutions": "32,16,8"}
LSUN = {"num_heads": 1, "learn_sigma": True, "use_scale_shift_norm": False, "attention_resolutions": "16"}
RELEASED = [  # flags of the READMEs and millions of parameters counted in the reference code
    ({**ADM, "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64}, 295.9),
    ({**ADM, "image_size": 128, "num_channels": 256, "num_heads": 4}, 421.5),
    ({**ADM, "image_size": 256, "num_channels": 256, "num_head_channels": 64}, 553.8),
    ({**ADM, "image_size": 256, "num_channels": 256, "num_head_channels": 64, "class_cond": False}, 552.8),
    ({**ADM, "image_size": 512, "num_channels": 256, "num_head_channels": 64}, 559.0),
    ({"image_size": 32, "num_channels": 128, "num_res_blocks": 3, "learn_sigma": True, "dropout": 0.3}, 52.5),
    ({"image_size": 64, "num_channels": 128, "num_res_blocks": 3, "learn_sigma": True}, 121.1),
    ({"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "learn_sigma": True, "class_cond": True}, 273.0),
    ({**LSUN, "image_size": 256}, 113.7),
]


def on_meta(build, flags):
    """The network of the flags without memory for its weights, built from a state dict that it makes itself."""
    with torch.device("meta"):
        return build({}, flags)


@pytest.mark.parametrize("flags, millions", RELEASED, ids=str)
def test_script_flags_of_the_released_models_give_their_parameter_count(flags, millions, monkeypatch):
    monkeypatch.setattr("hf_diffusion.convert.openai._load", lambda model, state_dict: model)
    model = on_meta(unet_from_openai, unet_flags(**flags))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("size, depth, millions", [(64, 4, 65.4), (128, 2, 42.6), (256, 2, 54.1), (512, 2, 54.4)])
def test_script_flags_of_the_released_classifiers_give_their_parameter_count(size, depth, millions, monkeypatch):
    monkeypatch.setattr("hf_diffusion.convert.openai._load", lambda model, state_dict: model)
    model = on_meta(classifier_from_openai, classifier_flags(image_size=size, classifier_depth=depth))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_an_image_size_without_default_multipliers_asks_for_them():
    with pytest.raises(ValueError, match="give channel_mult"):
        unet_flags(image_size=48)
    assert unet_flags(image_size=48, channel_mult="1,1.5,2")["channel_mult"] == [1, 1.5, 2]
