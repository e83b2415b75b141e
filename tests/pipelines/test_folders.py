"""One folder, saved to again and again: shards, variants, nothing stale and nothing lost."""

import pytest
import torch

from hf_diffusion import ClassifierFreeGuidancePipeline
from tests.pipelines.tiny import make_classifier_free, sample


PLAIN = ["diffusion_pytorch_model.safetensors"]


def weights(folder) -> list[str]:
    return sorted(file.name for file in (folder / "unet").glob("*safetensors*"))


def drawn(folder, **options) -> torch.Tensor:
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return sample(pipe, [0, 1])


def other_weights():
    pipe = make_classifier_free()
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(0.9)
    return pipe


def test_shards_and_whole_weights_replace_each_other(tmp_path):
    first, second = make_classifier_free(), other_weights()
    first.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = weights(tmp_path)
    assert len(shards) > 2 and shards[-1] == "diffusion_pytorch_model.safetensors.index.json"
    assert torch.equal(drawn(tmp_path), sample(first, [0, 1]))
    second.save_pretrained(tmp_path)
    assert weights(tmp_path) == PLAIN and torch.equal(drawn(tmp_path), sample(second, [0, 1]))
    first.save_pretrained(tmp_path, max_shard_size="10KB")
    assert weights(tmp_path) == shards and torch.equal(drawn(tmp_path), sample(first, [0, 1]))
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weights(tmp_path)) < len(shards) and torch.equal(drawn(tmp_path), sample(first, [0, 1]))


@pytest.mark.parametrize("size", [None, "10KB"])
def test_a_variant_leaves_the_other_weights_of_the_folder_alone(tmp_path, size):
    first, second = make_classifier_free(), other_weights()
    first.save_pretrained(tmp_path, max_shard_size="10KB")
    before = weights(tmp_path)
    second.save_pretrained(tmp_path, variant="small", max_shard_size=size)
    assert set(before) <= set(weights(tmp_path))
    assert torch.equal(drawn(tmp_path), sample(first, [0, 1]))
    assert torch.equal(drawn(tmp_path, variant="small"), sample(second, [0, 1]))
    second.save_pretrained(tmp_path)
    assert torch.equal(drawn(tmp_path), sample(second, [0, 1])) and "diffusion_pytorch_model.safetensors" in weights(
        tmp_path
    )
    assert torch.equal(drawn(tmp_path, variant="small"), sample(second, [0, 1]))
