"""From encoded images to pixels: modes, ranges, sizes, and what a corrupt image becomes."""

import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_diffusion.data import images as data_module
from hf_diffusion.data import probing as data_probing
from hf_diffusion.data.decoding import native_format, to_pixels
from hf_diffusion.data.image_data import batches
from hf_diffusion.data.images import load_images
from hf_diffusion.data.pixels import from_network_range, to_network_range
from hf_diffusion.data.transforms import ImageTransform
from tests.data.making import folder_of, noise_image, truncate


def test_16_bits_keep_their_precision_and_cover_the_range(tmp_path):
    values = np.array([[0, 1, 257], [40000, 65534, 65535]], np.uint16)
    (tmp_path / "deep").mkdir()
    Image.fromarray(values).save(tmp_path / "deep" / "a.png")
    data = load_images(train_data_dir=str(tmp_path / "deep"))
    assert (data.channels, data.transform.bits) == (1, 16)
    for epoch in range(2):  # decoded, then from memory
        pixels = data.fetch([0], epoch)["x_0"][0, 0].double().numpy()
        np.testing.assert_allclose(pixels, values / 32767.5 - 1, atol=1e-7)
    assert np.abs(np.rint((pixels + 1) * 32767.5) - values).max() == 0


def test_8_bit_pixels_survive_the_network_range_exactly():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    images = to_network_range(pixels)
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(from_network_range(images), torch.from_numpy(pixels))


def test_white_of_every_mode_is_white_in_every_format():
    white = {"I": 65535, "I;16": 65535, "1": 1, "CMYK": (0, 0, 0, 0), "HSV": (0, 0, 255), "YCbCr": (255, 128, 128)}
    modes = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"]
    for mode, channels, bits in itertools.product(modes, (1, 3, 4), (8, 16)):
        image = Image.new(mode, (3, 2), white.get(mode, (255,) * len(Image.new(mode, (1, 1)).getbands())))
        if mode in ("P", "PA"):
            image = Image.new("RGBA" if mode == "PA" else "RGB", (3, 2), "white").convert(mode)
        pixels = to_pixels(image, ImageTransform(channels, (2, 3), bits, False, True), "it")
        assert pixels.shape == (channels, 2, 3) and pixels.dtype == (np.uint8 if bits == 8 else np.uint16), mode
        assert (pixels == np.iinfo(pixels.dtype).max).all(), (mode, channels, bits)


def test_alpha_is_kept_by_four_channels_and_made_opaque_where_absent():
    transform = ImageTransform(4, (6, 8), 8, False, True)
    image = noise_image(3, mode="RGBA")
    pixels, given = to_pixels(image, transform, "it"), np.asarray(image).transpose(2, 0, 1)
    shown = given[3] > 0
    assert (pixels[:, shown] == given[:, shown]).all() and (pixels[:, ~shown].T == (255, 255, 255, 0)).all()
    assert (to_pixels(noise_image(3), transform, "it")[3] == 255).all()
    assert native_format(image, "it") == (4, 8)


def saved(folder: Path, *images: Image.Image, **options) -> Path:
    """A folder with these images, 0.png and so on."""
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png", **options)
    return folder


def sprite() -> Image.Image:
    """A green square on transparent magenta, as editors leave it."""
    pixels = np.zeros((6, 8, 4), np.uint8)
    pixels[..., :3] = (255, 0, 255)
    pixels[2:4, 2:4] = (0, 200, 0, 255)
    return Image.fromarray(pixels)


def palette_sprite() -> Image.Image:
    image = Image.new("P", (8, 6), 0)
    image.putpalette([255, 0, 255, 0, 200, 0] + [0] * 762)
    image.paste(1, (2, 2, 4, 4))
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize("make", [sprite, palette_sprite])
@pytest.mark.parametrize(("background", "value"), [("white", 255), ("black", 0), ("#102030", (16, 32, 48))])
def test_the_colour_below_transparency_never_reaches_the_network(tmp_path, make, background, value):
    folder = saved(tmp_path / "set", make(), make())
    expected = np.full((6, 8, 3), value, np.uint8)
    expected[2:4, 2:4] = (0, 200, 0)
    data = load_images(train_data_dir=str(folder), channels=3, background=background)
    assert (data.to_samples(data.fetch([0], 0))[0] == expected).all()
    described = data.describe()
    assert described["background"] == background
    assert f"transparent places are laid on {background}" in described["remarks"]
    # Four channels keep the transparency, without what lies below it; resizing mixes nothing of it
    # in, either.
    whole = load_images(train_data_dir=str(folder), background=background)
    pixels = whole.to_samples(whole.fetch([0], 0))[0]
    assert (pixels[..., :3] == expected).all() and (pixels[..., 3] == np.where(expected[..., 1] == 200, 255, 0)).all()
    small = load_images(train_data_dir=str(folder), channels=4, resolution=3, background="black")
    seen = small.to_samples(small.fetch([0], 0))[0]
    assert (seen[..., 0] == 0).all() and (seen[..., 2] == 0).all() and seen[..., 1].max() > 150


def test_opaque_images_with_an_alpha_channel_are_colour_images(tmp_path):
    folder = saved(tmp_path / "set", noise_image(0).convert("RGBA"), noise_image(1).convert("RGBA"))
    data = load_images(train_data_dir=str(folder))
    assert data.channels == 3 and (data.to_samples(data.fetch([1], 0))[0] == np.asarray(noise_image(1))).all()
    assert native_format(noise_image(0, mode="L").convert("LA"), "it") == (1, 8)


def test_transparency_and_depth_that_the_first_images_do_not_have_are_counted_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(data_module, "PROBED_IMAGES", 1)
    monkeypatch.setattr(data_probing, "PROBED_IMAGES", 1)
    grey = Image.fromarray(np.full((6, 8), 65535, np.uint16))
    folder = saved(tmp_path / "set", noise_image(0), sprite(), grey, noise_image(3), sprite())
    data = load_images(train_data_dir=str(folder))
    samples = data.to_samples(data.fetch(range(5), 0))
    assert data.altered == 3 and data.describe()["altered_images"] == 3
    assert (samples[1, 0, 0] == 255).all() and (samples[2] == 255).all()
    assert "1.png (row 1): transparency is laid on white (further ones are counted)" in caplog.text
    assert caplog.text.count("further ones are counted") == 1


@pytest.mark.parametrize(
    ("top", "dtype", "name", "white"),
    [
        (4095, np.uint16, "0.png", 4095),
        (1000, np.uint16, "0.png", 1023),
        (255, np.int32, "0.tif", 255),
        (65535, np.uint16, "0.png", 65535),
    ],
)
def test_images_of_16_and_32_bits_have_the_range_that_the_set_has(tmp_path, top, dtype, name, white):
    values = np.arange(48).reshape(6, 8) * top // 47
    (tmp_path / "set").mkdir()
    Image.fromarray(values.astype(dtype)).save(tmp_path / "set" / name)
    data = load_images(train_data_dir=str(tmp_path / "set"))
    np.testing.assert_allclose(data.fetch([0], 0)["x_0"][0, 0], values / white * 2 - 1, atol=2e-5)
    said = "; ".join(data.describe()["remarks"])
    remark = f"the highest value of 1 images of 16 or 32 bits is {top:,}: 0..{white:,} is taken for black to white"
    assert (said == remark) if white < 65535 else not said
    assert data.describe()["white"] == white


@pytest.mark.parametrize(
    ("values", "name", "found"), [((0, 99_999), "0.tif", "0 to 99,999"), ((-3, 500), "1.tif", "-3 to 500")]
)
def test_values_beyond_16_bits_are_refused_when_the_set_is_opened(tmp_path, values, name, found):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.* has 32-bit pixels from {found}, outside 0\.\.65,535; store"):
        load_images(train_data_dir=str(tmp_path))


@pytest.mark.parametrize(("highest", "mode", "dark"), [(1, "L", True), (63, "RGB", True), (64, "RGB", False)])
def test_masks_and_indices_in_8_bits_are_told_to_be_nearly_black(tmp_path, highest, mode, dark):
    Image.new(mode, (2, 2), highest if mode == "L" else (0, 0, highest)).save(tmp_path / "0.png")
    remarks = load_images(train_data_dir=str(tmp_path)).describe()["remarks"]
    assert (f"the highest value of 1 images is {highest} of 255" in "".join(remarks)) == dark


def test_an_image_beyond_the_range_of_the_set_is_left_out_and_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(data_module, "PROBED_IMAGES", 1)
    monkeypatch.setattr(data_probing, "PROBED_IMAGES", 1)
    images = [Image.fromarray(np.full((6, 8), value, np.uint16)) for value in (4000, 5000, 3000)]
    data = load_images(train_data_dir=str(saved(tmp_path / "set", *images)))
    assert data.fetch(range(3), 0)["indices"].tolist() == [0, 2, 2] and data.skipped == 1
    assert "1.png (row 1): has the value 5000, and 0..4095 is the range of the first images of the set" in caplog.text


def png_of_48_bits(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, (H, W, 3), which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_are_read_with_8_and_that_is_said(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (6, 8, 3))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.png").write_bytes(png_of_48_bits(values))
    data = load_images(train_data_dir=str(tmp_path / "set"))
    assert (data.to_samples(data.fetch([0], 0))[0] == values >> 8).all()
    assert "of images with 16 bits a channel, such as" in data.describe()["remarks"][0]


def test_mixed_modes_become_the_most_general_and_that_is_recorded(tmp_path):
    (tmp_path / "mix").mkdir()
    for name, mode in (("a", "L"), ("b", "RGB"), ("c", "L")):
        noise_image(1, mode=mode).save(tmp_path / "mix" / f"{name}.png")
    data = load_images(train_data_dir=str(tmp_path / "mix"))
    assert data.channels == 3
    assert data.describe()["remarks"] == ["images of modes ['L', 'RGB'] are brought to 3 channels of 8 bits"]
    grey = data.fetch([0], 0)["x_0"][0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    assert load_images(train_data_dir=str(tmp_path / "mix"), channels=1).fetch([1], 0)["x_0"].shape[1] == 1


def test_the_first_frame_of_an_animation_and_the_exif_orientation_count(tmp_path):
    (tmp_path / "odd").mkdir()
    black, white = Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 255)
    black.save(tmp_path / "odd" / "a.gif", save_all=True, append_images=[white])
    turned = Image.fromarray(np.repeat([[255, 0, 0, 0]], 4, axis=0).astype(np.uint8))  # bright left column
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show: the left column becomes the top row
    turned.save(tmp_path / "odd" / "b.png", exif=exif)
    pixels = load_images(train_data_dir=str(tmp_path / "odd"), channels=1).fetch([0, 1], 0)["x_0"][:, 0]
    assert (pixels[0] == -1).all()
    assert (pixels[1, 0] == 1).all() and (pixels[1, 1:] == -1).all()


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (64, 64), (9, 11)])
@pytest.mark.parametrize("target", [(8, 8), (8, 16), (12, 8)])
def test_resizing_keeps_the_aspect_and_crops_the_middle(size, target):
    y, x = np.mgrid[: size[0], : size[1]]
    ramp = np.stack([x + 0.5, y + 0.5], -1)  # every pixel holds its own place
    # Source pixels for one of the target, the same along both axes.
    scale = min(size[0] / target[0], size[1] / target[1])
    for axis, (length, wanted) in enumerate(((size[1], target[1]), (size[0], target[0]))):
        channel = Image.fromarray((ramp[..., axis] * 1000).astype(np.int32))  # mode I: 32 bits, so no rounding to 8
        out = to_pixels(channel, ImageTransform(1, target, 16, True, True), "it")[0] / 1000
        expected = length / 2 + scale * (np.arange(wanted) + 0.5 - wanted / 2)
        line = out.mean(axis)
        inner = slice(2, -2)  # at the border of the image the filter is cut off
        np.testing.assert_allclose(line[inner], expected[inner], atol=0.15 * max(1, scale))


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    out = to_pixels(stripes, ImageTransform(1, (8, 8), 8, True, True), "it")
    assert np.abs(out.astype(int) - 127).max() <= 16  # plain subsampling would give 0 or 255


def test_a_random_crop_is_a_function_of_seed_epoch_and_index(tmp_path):
    (tmp_path / "wide").mkdir()
    noise_image(0, height=8, width=40).save(tmp_path / "wide" / "a.png")
    options = {"train_data_dir": str(tmp_path / "wide"), "resolution": 8, "center_crop": False}
    first, second = load_images(**options), load_images(**options)
    crops = [first.fetch([0], epoch)["x_0"] for epoch in range(4)]
    assert torch.equal(crops[2], second.fetch([0], 2)["x_0"])
    assert len({crop.sum().item() for crop in crops}) > 1
    assert not first.complete and "random crop" in first.describe()["resize"]


def test_images_of_mixed_size_ask_for_a_resolution_and_name_the_odd_one(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 3})
    noise_image(9, height=5, width=9).save(folder / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png .* is 5x9; pass --resolution"):
        load_images(train_data_dir=str(folder))
    data = load_images(train_data_dir=str(folder), resolution=(4, 6))
    assert data.fetch(range(4), 0)["x_0"].shape == (4, 3, 4, 6)
    assert "bicubic" in data.describe()["resize"]


def test_an_odd_size_that_the_first_look_missed_stops_in_one_sentence(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "set", {"": 4})
    noise_image(9, height=5, width=9).save(folder / "odd.png")
    monkeypatch.setattr(data_module, "PROBED_IMAGES", 1)
    monkeypatch.setattr(data_probing, "PROBED_IMAGES", 1)
    data = load_images(train_data_dir=str(folder))
    for workers in (0, 1):
        with pytest.raises(
            ValueError, match=r"^\S+odd\.png \(row 4\) is 5x9 \(HxW\) while the set began with 6x8; pass"
        ):
            list(batches(data, [[(0, 0), (0, 4)]], num_workers=workers))


def test_a_corrupt_image_is_named_counted_and_replaced_by_the_next_good_one(tmp_path, caplog):
    folder = folder_of(tmp_path / "set", {"a": 3, "b": 3})
    truncate(folder / "a" / "02.png")
    (folder / "b" / "00.png").write_bytes(b"")
    truncate(folder / "b" / "02.png")
    data = load_images(train_data_dir=str(folder))
    assert data.skipped == 3
    assert "a/02.png (row 2)" in caplog.text and "b/00.png (row 3): the file is empty" in caplog.text
    for epoch in range(2):
        batch = data.fetch([2, 3, 4, 5, 0], epoch)
        assert batch["indices"].tolist() == [4, 4, 4, 0, 0]  # forward past both, and round the end
        assert batch["labels"].tolist() == [1, 1, 1, 0, 0]
        assert torch.equal(batch["x_0"][0], batch["x_0"][2])
    assert data.skipped == 3 and data.describe()["skipped_images"] == 3


def test_corrupt_images_beyond_the_limit_stop_the_run_and_are_named(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "set", {"": 6})
    truncate(folder / "01.png")
    truncate(folder / "03.png")
    with pytest.raises(ValueError, match=r"more than max_bad_images=1 images .*01\.png.*03\.png.*; repair or remove"):
        load_images(train_data_dir=str(folder), max_bad_images=1)
    monkeypatch.setattr(data_module, "PROBED_IMAGES", 1)
    monkeypatch.setattr(data_probing, "PROBED_IMAGES", 1)
    for workers in (0, 1):
        data = load_images(train_data_dir=str(folder), max_bad_images=1)
        with pytest.raises(ValueError, match="^more than max_bad_images=1 images"):
            list(batches(data, [[(0, index)] for index in range(6)], num_workers=workers))


def test_a_set_of_nothing_but_corrupt_images_stops_at_once(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 3})
    for file in folder.glob("*.png"):
        truncate(file)
    with pytest.raises(ValueError, match=r"no image can be decoded: .*00\.png"):
        load_images(train_data_dir=str(folder))
