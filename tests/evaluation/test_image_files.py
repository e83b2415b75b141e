"""Images of somebody else: what a file or folder of them means, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from hf_diffusion.evaluation.image_files import is_image_source, load_image_files
from hf_diffusion.sampling.writing import write_arrays, write_images


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def write(folder, images=PIXELS, name="{:05d}.png"):
    for i, image in enumerate(images):
        path = folder / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_an_npy_and_an_npz_hold_the_same_images(tmp_path, channels):
    images = PIXELS[..., :channels]
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", images=images / np.float32(255))
    for source in (write(tmp_path / "folder", images), tmp_path / "a.npy", tmp_path / "a.npz"):
        assert is_image_source(str(source))
        file = load_image_files(source)
        assert file.sample_shape == (channels, 8, 8) and file.labels is None and len(file) == 6
        np.testing.assert_array_equal(file.all_images, images)


def test_labels_come_from_sub_folders_a_table_or_an_array_by_number_or_name(tmp_path):
    for i, name in enumerate(["cat", "dog", "cat"]):
        write(tmp_path / "classes" / name, PIXELS[i : i + 1], f"{i}.png")
    write(tmp_path / "table", PIXELS[:3])
    (tmp_path / "table/metadata.csv").write_text("file_name,label\n00002.png,dog\n00000.png,cat\n00001.png,cat\n")
    write(tmp_path / "numbers", PIXELS[:2])
    (tmp_path / "numbers/metadata.csv").write_text("file_name,label\n00000.png,1\n00001.png,0\n")
    np.savez(tmp_path / "names.npz", images=PIXELS[:2], labels=np.array(["dog", "cat"]))
    found = {}
    for name in ("classes", "table", "numbers", "names.npz"):
        file = load_image_files(tmp_path / name)
        found[name] = file.label_numbers(["dog", "cat"], 2).tolist()
    assert found == {"classes": [1, 1, 0], "table": [1, 1, 0], "numbers": [1, 0], "names.npz": [0, 1]}


def test_what_sample_writes_is_matched_by_the_names_of_its_classes(tmp_path):
    # of a pipeline whose classes have another order
    names = {0: "cat", 1: "dog, or wolf"}
    write_images(PIXELS[:2], [0, 1], tmp_path / "folder", names)
    write_arrays(PIXELS[:2], [0, 1], tmp_path / "a.npz", names)
    for source in ("folder", "a.npz"):
        assert load_image_files(tmp_path / source).label_numbers(["dog, or wolf", "cat"], 2).tolist() == [1, 0]
        with pytest.raises(ValueError, match="the label 'cat' is no class of the real data, which has ant, dog"):
            load_image_files(tmp_path / source).label_numbers(["ant", "dog, or wolf"], 2)
    np.savez(tmp_path / "b.npz", images=PIXELS[:2], labels=[0, 2], class_names=["x", "y"])
    with pytest.raises(ValueError, match="b.npz has labels 0 to 2 and 2 class_names"):
        load_image_files(tmp_path / "b.npz")


def test_arrays_of_guided_diffusion_and_objects_that_could_run_code(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS, np.arange(6))
    file = load_image_files(tmp_path / "a.npz")
    np.testing.assert_array_equal(file.all_images, PIXELS)
    assert file.labels.tolist() == [0, 1, 2, 3, 4, 5]
    np.savez(tmp_path / "b.npz", images=np.array([{"run": print}], dtype=object))
    with pytest.raises(ValueError, match=r"b.npz is damaged, no .npz file, or holds Python objects, which could run"):
        load_image_files(tmp_path / "b.npz")


def test_hidden_files_beside_the_images_are_left_alone(tmp_path):
    write(tmp_path / "set", PIXELS[:2])
    (tmp_path / "set/._00000.png").write_bytes(b"Mac OS X")
    assert len(load_image_files(tmp_path / "set")) == 2


def test_labels_that_are_no_class_of_the_data_are_refused(tmp_path):
    for labels, message in (
        (np.array([0, -1]), "1 labels are no class of the real data, such as -1; they must be 0 to 1"),
        (np.array([0, 2]), "such as 2; they must be 0 to 1"),
        (np.array(["cat", "cow"]), "the label 'cow' is no class of the real data, which has cat, dog"),
    ):
        np.savez(tmp_path / "a.npz", images=PIXELS[:2], labels=labels)
        with pytest.raises(ValueError, match=message):
            load_image_files(tmp_path / "a.npz").label_numbers(["cat", "dog"], 2)
    np.savez(tmp_path / "a.npz", images=PIXELS[:2], labels=np.array([0.5, 1]))
    with pytest.raises(ValueError, match="labels of .* are float64; they must be whole numbers or names"):
        load_image_files(tmp_path / "a.npz")


def test_mixed_damaged_and_missing_files_are_named(tmp_path):
    write(tmp_path / "mixed", PIXELS[:1])
    write(tmp_path / "mixed", PIXELS[:1, ..., :1], "b.png")
    with pytest.raises(ValueError, match="b.png is an image of mode L and 8x8 pixels; all must be RGB of 8x8"):
        load_image_files(tmp_path / "mixed")
    write(tmp_path / "damaged", PIXELS[:1])
    (tmp_path / "damaged/a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.png cannot be read as an image"):
        load_image_files(tmp_path / "damaged")
    write(tmp_path / "table", PIXELS[:2])
    (tmp_path / "table/metadata.csv").write_text("file_name,label\n00000.png,1\n")
    with pytest.raises(ValueError, match="has no label of 00001.png; it needs the columns file_name, label"):
        load_image_files(tmp_path / "table")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    write(tmp_path / "pipeline/samples", PIXELS[:1])
    assert not is_image_source(str(tmp_path / "pipeline")) and not is_image_source("user/repository")
