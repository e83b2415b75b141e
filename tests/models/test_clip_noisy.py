"""NoisyCLIP: GLIDE's towers, number for number, and what its parts promise."""

import pytest
import torch

from hf_diffusion import NoisyCLIP
from tests.golden.manifests import FULL_SET, records
from tests.golden.replay import replay
from tests.golden.replays_glide import CLIP, REPLAYS


@pytest.mark.skipif(not (FULL_SET / "glide").is_dir(), reason="the vectors of GLIDE are not here")
def test_embeddings_gradient_and_guided_steps_are_those_of_glide():
    found = [record for record in records(FULL_SET / "glide") if record.kind == "clip"]
    for record in found:
        replay(record, REPLAYS)
    assert [record.name for record in found] == ["embeddings", "guided_step"]


def test_what_follows_the_end_of_a_text_does_not_matter_and_the_timestep_does():
    torch.manual_seed(0)
    clip = NoisyCLIP(**CLIP).eval()
    tokens, mask = torch.randint(3, 40, (2, 10)), torch.ones(2, 10, dtype=torch.int64)
    mask[:, 6:] = 0
    changed = torch.where(mask == 1, tokens, 5)
    assert torch.equal(clip.text_embeddings(tokens, mask), clip.text_embeddings(changed, mask))
    x = torch.randn(2, 3, 8, 8)
    one, other = clip.image_embeddings(x, 3), clip.image_embeddings(x, torch.tensor([3, 40]))
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])
    torch.testing.assert_close(one.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"patch_size": 3}, "patch_size 3 does not divide the sides \\(8, 8\\); give one that does"),
        ({"num_heads": 3}, "num_heads 3 does not divide the width 16"),
        ({"text_heads": 5}, "text_heads 5 does not divide the width 16"),
    ],
)
def test_sizes_that_do_not_divide_are_met_by_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        NoisyCLIP(**{**CLIP, **options})
