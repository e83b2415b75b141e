"""Latents as training data: their scale, the files they are kept in, flips and draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel

from hf_diffusion.data import latents
from hf_diffusion.data.autoencoders import decode, encode, load_autoencoder
from hf_diffusion.data.loading import load_data
from tests.data.autoencoders import make_autoencoder


COUNT = 40
SCALES = [
    {"scaling_factor": 0.5},
    {"scaling_factor": 0.5, "shift_factor": 0.3},
    {"scaling_factor": 2.0, "latents_mean": [0.1, -0.2], "latents_std": [0.5, 3.0]},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latents"


@pytest.fixture
def vae(tmp_path) -> str:
    make_autoencoder(scaling_factor=0.5, shift_factor=0.3).save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


def load(vae: str, **options) -> latents.LatentData:
    return load_data("digits", vae=vae, max_train_samples=COUNT, **options)


def digits(**options) -> torch.Tensor:
    return load_data("digits", max_train_samples=COUNT, **options).fetch(range(COUNT), 0)["x_0"]


@pytest.mark.parametrize("scale", SCALES)
def test_scaled_latents_are_those_of_both_conventions_and_decode_back(scale):
    vae, images = make_autoencoder(**scale), digits()
    posterior = vae.encode(images).latent_dist
    mean, std = encode(vae, images)
    if "latents_std" in scale:
        centre, spread = (torch.tensor(scale[f"latents_{name}"]).reshape(1, 2, 1, 1) for name in ("mean", "std"))
        wanted, factor = (posterior.mean - centre) / spread * 2, 2 / spread
    else:
        wanted, factor = (posterior.mean - scale.get("shift_factor", 0)) * 0.5, 0.5
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(std, posterior.std * factor)
    torch.testing.assert_close(decode(vae, mean), vae.decode(posterior.mean).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel])
def test_every_kind_of_autoencoder_gives_latents_that_it_decodes(tmp_path, cls):
    channels = 3 if cls is AutoencoderDC else 1
    make_autoencoder(cls, channels).save_pretrained(tmp_path)
    data = load(str(tmp_path), channels=channels)
    batch = data.fetch([3, 1], 0)
    assert data.sample_shape == (2, 4, 4) == batch["x_0"].shape[1:] and data.kind == "latents"
    assert type(data.autoencoder) is cls and batch["indices"].tolist() == [3, 1]
    assert data.to_samples(batch).shape == (2, 8, 8, channels) and data.to_samples(batch).dtype == np.uint8


def test_means_are_kept_to_half_precision_and_samples_have_the_posteriors_deviation(vae):
    mean, std = encode(load_autoencoder(vae), digits())
    assert (load(vae, vae_posterior="mean").fetch(range(COUNT), 5)["x_0"] - mean).abs().max() < 2e-3
    data = load(vae)
    draws = torch.stack([data.fetch(range(COUNT), epoch)["x_0"] for epoch in range(60)])
    units = (draws - mean) / std
    assert abs(float(units.mean())) < 0.01 and float(units.std()) == pytest.approx(1, abs=0.01)


def test_what_is_drawn_belongs_to_seed_epoch_and_index_however_it_is_asked_for(vae):
    data = load(vae)
    whole = data.fetch([4, 7, 9], [2, 3, 2])["x_0"]
    for place, (index, epoch) in enumerate(((4, 2), (7, 3), (9, 2))):
        assert torch.equal(data.fetch([index], epoch)["x_0"][0], whole[place])
    assert not torch.equal(data.fetch([4], 3)["x_0"][0], whole[0])
    assert not torch.equal(load(vae, seed=1).fetch([4], 2)["x_0"][0], whole[0])


def test_the_latents_of_mirrored_images_take_the_places_that_mirrored_images_have(vae):
    data = load(vae, random_flip=True, vae_posterior="mean")
    shown = load_data("digits", max_train_samples=COUNT, random_flip=True).fetch(range(COUNT), 3)["x_0"]
    wanted, _ = encode(load_autoencoder(vae), shown)
    assert (data.fetch(range(COUNT), 3)["x_0"] - wanted).abs().max() < 2e-3
    assert data.describe()["random_flip"] and not data.as_drawn.describe()["random_flip"]


def test_latents_are_computed_once_for_images_and_weights(vae, cache, monkeypatch, capsys):
    first = load(vae, random_flip=True)
    assert "the latents of digits" in capsys.readouterr().out and len(list(cache.iterdir())) == 2
    files = {path: path.stat().st_mtime_ns for path in cache.glob("*/*")}
    with monkeypatch.context() as patch:
        patch.setattr(latents, "encode", lambda *_: pytest.fail("encoded again"))
        again, plain = load(vae, random_flip=True), load(vae)
    assert again.fingerprint == first.fingerprint != plain.fingerprint
    assert files == {path: path.stat().st_mtime_ns for path in cache.glob("*/*")}
    assert torch.equal(again.fetch([1], 0)["x_0"], first.fetch([1], 0)["x_0"])
    assert isinstance(first._stores[0].parts[0], np.memmap)


def test_other_weights_scales_and_images_have_files_of_their_own(vae, cache, tmp_path):
    prints = [load(vae).fingerprint]
    make_autoencoder(seed=1, scaling_factor=0.5, shift_factor=0.3).save_pretrained(tmp_path / "other")
    make_autoencoder(scaling_factor=0.25, shift_factor=0.3).save_pretrained(tmp_path / "scaled")
    prints += [load(str(tmp_path / name)).fingerprint for name in ("other", "scaled")]
    prints.append(load_data("digits", vae=vae, max_train_samples=30).fingerprint)
    assert len(set(prints)) == 4 == len(list(cache.iterdir()))


def test_an_interrupted_computation_goes_on_where_it_was(vae, cache, monkeypatch):
    monkeypatch.setattr(latents, "PART", 16)
    monkeypatch.setattr(latents, "ENCODED", 8)
    real, calls = latents.encode, []

    def dies(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "encode", dies)
        with pytest.raises(KeyboardInterrupt):
            load(vae)
    (folder,) = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["00000.indices.npy", "00000.latents.npy", "about.json"]
    calls.clear()
    monkeypatch.setattr(latents, "encode", lambda *given: (calls.append(given), real(*given))[1])
    data = load(vae, vae_posterior="mean")
    assert len(calls) == 3 and len(data._stores[0].parts) == 3
    mean, _ = real(load_autoencoder(vae), digits())
    assert (data.fetch(range(COUNT), 0)["x_0"] - mean).abs().max() < 2e-3


def test_labels_names_and_previews_are_those_of_the_images(vae):
    data, images = load(vae), load_data("digits", max_train_samples=COUNT)
    assert torch.equal(data.fetch([5, 6], 0)["labels"], images.fetch([5, 6], 0)["labels"])
    assert data.class_counts == images.class_counts and data.preview().size == images.preview().size
    names = [*reversed(images.class_names)]
    data.use_classes(names)
    images.use_classes(names)
    assert torch.equal(data.fetch([5, 6], 0)["labels"], images.fetch([5, 6], 0)["labels"])
    assert data.as_drawn.class_names == names
    facts = data.describe()
    assert facts["kind"] == "images" and facts["latents"] == "2x4x4, sampled, of AutoencoderKL"
    with pytest.raises(IndexError, match="index 40 is not in the data set"):
        data.fetch([40], 0)


def test_a_pipelines_vae_folder_will_do(tmp_path):
    make_autoencoder().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert type(load_autoencoder(str(tmp_path))) is AutoencoderKL


def test_what_cannot_be_encoded_is_refused_in_one_sentence(vae, tmp_path):
    UNet2DModel(8, 1, 1, block_out_channels=(4, 4), norm_num_groups=2, down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2).save_pretrained(tmp_path / "unet")  # fmt: skip
    (tmp_path / "empty").mkdir()
    kinds = "give the folder or Hub id of one of AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel"
    for options, sentence in (
        ({"vae": str(tmp_path / "unet")}, f"holds a UNet2DModel; {kinds}"),
        ({"vae": str(tmp_path / "empty")}, f"holds no autoencoder; {kinds}"),
        ({"vae": str(tmp_path / "nowhere")}, "is neither a folder here nor a name of the form user/repository"),
        ({"channels": 3}, "takes images of 1 channels, not 3; give --channels 1"),
        ({"resolution": 9}, "halves images 1 times, which 9x9 pixels do not allow; give a --resolution whose sides"),
        (
            {"center_crop": False},
            "center_crop=False changes images from epoch to epoch, and latents are computed once",
        ),
        ({"streaming": True}, "streaming=True changes images from epoch to epoch"),
    ):
        with pytest.raises(ValueError) as error:
            load_data("digits", **{"vae": vae, **options})
        assert sentence in str(error.value)
    with pytest.raises(ValueError, match="encodes a set of images once, and swiss_roll is points; leave one"):
        load_data("swiss_roll", vae=vae)


def test_latents_that_are_not_finite_are_refused_before_anything_is_kept(tmp_path, cache):
    broken = make_autoencoder()
    torch.nn.init.constant_(broken.quant_conv.weight, torch.inf)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="the vae gives NaN or infinity for one of the 32 images of digits from 0 on"):
        load(str(tmp_path / "broken"))
    assert not list(cache.glob("*/*.npy"))


def test_about_says_what_the_files_hold(vae, cache):
    load(vae)
    (about,) = (json.loads(path.read_text()) for path in cache.glob("*/about.json"))
    assert about == {"data": "digits", "vae": "AutoencoderKL", "has_spread": True}
