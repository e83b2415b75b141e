"""OpenAI's checkpoints and flags to our networks and back, as functions and by the command."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from hf_diffusion import cli
from hf_diffusion.convert.openai import (
    classifier_flags,
    classifier_from_openai,
    classifier_to_openai,
    read_openai_checkpoint,
    unet_flags,
    unet_from_openai,
    unet_to_openai,
)
from hf_diffusion.models.unet_adm import ADMClassifier, ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, DDIMEtaScheduler, LinearDDPMScheduler


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


WRONG_FLAGS = {
    "num_classes to None": {"num_classes": 4},
    "out_channels to 3 .*learn_sigma": {"out_channels": 6},
    "in_channels to 3": {"in_channels": 1, "out_channels": 1},
    r"model_channels \(num_channels, classifier_width\) to 32": {"model_channels": 64},
    "use_scale_shift_norm to True": {"use_scale_shift_norm": False},
    "resblock_updown to False": {"resblock_updown": True},
    "missing keys .*attention_resolutions": {"attention_resolutions": [1, 2]},
    "num_res_blocks": {"num_res_blocks": 2},
    "channel_mult": {"channel_mult": [1, 1]},
    r"unknown \['width'\]": {"width": 3},
    "dims is 3": {"dims": 3},
}
WRONG_CLASSIFIER_FLAGS = {
    "out_channels to 5": {"out_channels": 10},
    "check pool": {"pool": "spatial"},
    "image_size": {"image_size": 32},
}


def test_weights_that_do_not_fit_their_flags_name_the_flag():
    weights, _ = unet_to_openai(unet())
    for message, changes in WRONG_FLAGS.items():
        with pytest.raises(ValueError, match=message):
            unet_from_openai(weights, {**UNET, **changes})
    weights, flags = classifier_to_openai(classifier(num_classes=5))
    for message, changes in WRONG_CLASSIFIER_FLAGS.items():
        with pytest.raises(ValueError, match=message):
            classifier_from_openai(weights, {**flags, **changes})
    weights, _ = unet_to_openai(unet(num_class_embeds=4))
    with pytest.raises(ValueError, match=r"1 unknown keys \['label_emb.weight'\], 0 missing .*set num_classes to 4"):
        unet_from_openai(weights, UNET)
    with pytest.raises(ValueError, match="set num_classes to 4"):
        unet_from_openai(weights, {**UNET, "num_classes": 10})


def test_what_guided_diffusion_lacks_cannot_be_exported():
    for changes in (
        {"null_class": True, "num_class_embeds": 3},
        {"patch_size": 2},
        {"norm_num_groups": 16},
        {"sample_size": (16, 32)},
    ):
        with pytest.raises(ValueError, match="guided-diffusion has no"):
            unet_to_openai(unet(**changes))
    with pytest.raises(ValueError, match="needs num_head_channels"):
        classifier_to_openai(classifier(num_head_channels=None))


def test_checkpoint_files_of_both_kinds_hold_the_same(tmp_path):
    weights, _ = unet_to_openai(unet())
    torch.save(weights, tmp_path / "model.pt")
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        loaded = read_openai_checkpoint(tmp_path / name)
        assert all(torch.equal(value, loaded[key]) for key, value in weights.items())


class Harm:
    def __reduce__(self):
        return (print, ("code of the checkpoint was run",))


def test_files_that_hold_no_weights_are_named_and_run_nothing(tmp_path, capsys):
    torch.save({"state": {}, "param_groups": []}, tmp_path / "opt.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": Harm()}, tmp_path / "harm.pt")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, message in {
        "opt.pt": "not the optimizer",
        "list.pt": "holds a list",
        "harm.pt": "without running code from it",
        "text.safetensors": "cannot be read",
        "none.pt": "there is no file",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_openai_checkpoint(tmp_path / name)
    assert "was run" not in capsys.readouterr().out


# --- hf-diffusion convert --to openai and back


def convert(*words) -> int:
    return cli.main(["convert", *map(str, words)])


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "scheduler",
    [
        LinearDDPMScheduler(50, rescale_betas_by_steps=True, variance_type="learned_range"),
        CosineDDPMScheduler(4000, prediction_type="sample", variance_type="fixed_large"),
        DDIMEtaScheduler(beta_schedule="squaredcos_cap_v2"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_pipeline_goes_to_openai_s_files_and_comes_back_with_its_weights_and_process(scheduler, tmp_path, capsys):
    channels = 6 if scheduler.config.variance_type == "learned_range" else 3
    model = unet(num_class_embeds=4, out_channels=channels)
    ClassifierFreeGuidancePipeline(model, scheduler).save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "theirs", "--to", "openai") == 0
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["flags.json", "model.pt"]
    weights, flags = unet_to_openai(model)
    written = torch.load(tmp_path / "theirs" / "model.pt", weights_only=True)
    assert written.keys() == weights.keys() and all(torch.equal(written[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "theirs" / "flags.json").read_text())["model"] == flags

    theirs = tmp_path / "theirs"
    assert convert(theirs / "model.pt", tmp_path / "again", "--from", "openai", "--flags", theirs / "flags.json") == 0
    again = ClassifierFreeGuidancePipeline.from_pretrained(tmp_path / "again")
    assert same_weights(again.unet, model)
    torch.testing.assert_close(again.scheduler.alpha_bar, scheduler.alpha_bar, rtol=1e-9, atol=0)
    for name in ("prediction_type", "variance_type", "num_train_timesteps"):
        assert again.scheduler.config[name] == scheduler.config[name]


def test_a_classifier_goes_to_openai_s_files_and_comes_back(tmp_path, capsys):
    model, theirs = classifier(num_classes=5), tmp_path / "theirs"
    model.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", theirs, "--to", "openai") == 0
    assert convert(theirs / "model.pt", tmp_path / "again", "--from", "openai", "--flags", theirs / "flags.json") == 0
    assert same_weights(ADMClassifier.from_pretrained(tmp_path / "again"), model)


def test_processes_and_flags_that_openai_s_code_lacks_are_refused_and_nothing_is_written(tmp_path, capsys):
    pipe = ClassifierFreeGuidancePipeline(unet(), LinearDDPMScheduler(prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path / "v")
    (tmp_path / "flags.json").write_text("{}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    out = tmp_path / "out"
    for words, message in (
        ((tmp_path / "v", out, "--to", "openai"), "no process with .* 'v_prediction'"),
        (
            (tmp_path / "model.pt", out, "--from", "openai", "--flags", tmp_path / "flags.json"),
            "must be the flags.json",
        ),
    ):
        assert convert(*words) == 1
        said = capsys.readouterr().err
        assert re.search(message, said.splitlines()[-1]) and "Traceback" not in said
    assert not out.exists()


ADM = {"class_cond": True, "learn_sigma": True, "resblock_updown": True, "attention_resolutions": "32,16,8"}
LSUN = {"num_heads": 1, "learn_sigma": True, "use_scale_shift_norm": False, "attention_resolutions": "16"}
# Flags of the READMEs, and millions of parameters counted in the reference code.
RELEASED = [
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
    """The network of the flags without memory for its weights."""
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
