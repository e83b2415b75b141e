"""Telling which text belongs to which noisy image."""

import math

import pytest
import torch

from hf_diffusion.losses.noisy_clip import NoisyCaptionObjective, contrast
from hf_diffusion.randomness import Draw
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler
from hf_diffusion.training.train_clip import CLIPConfig


def test_the_loss_is_the_entropy_of_a_guess_and_0_where_all_fits():
    eye, captions = torch.eye(4), torch.arange(4)
    loss, hits = contrast(torch.zeros(4, 4), eye, captions, torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.full((4,), math.log(4)))
    loss, hits = contrast(eye, eye, captions, torch.tensor(100.0))
    assert loss.max() < 1e-6 and hits.tolist() == [1.0] * 4


def test_images_with_one_caption_share_it():
    """Two of three have the same text: both copies are right, at no cost beyond log 2."""
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss, hits = contrast(embeddings, embeddings, torch.tensor([7, 7, 3]), torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.tensor([math.log(2), math.log(2), 0.0]), rtol=1e-5, atol=1e-5)
    assert hits.tolist() == [1.0] * 3


def test_groups_do_not_see_each_other():
    class Network(torch.nn.Module):
        def forward(self, x, t, input_ids, attention_mask):
            return x.flatten(1), input_ids.float(), torch.tensor(5.0)

    def losses(rows: slice) -> torch.Tensor:
        objective = NoisyCaptionObjective(LinearDDPMScheduler(), Network(), 1e-3, 4, "x")
        generator = torch.Generator().manual_seed(0)
        batch = {
            "x_0": torch.randn(8, 1, 2, 2, generator=generator),
            "input_ids": torch.randint(9, (8, 4), generator=generator),
        }
        batch |= {"captions": torch.arange(8), "attention_mask": torch.ones(8, 4)}
        batch = {name: value[rows] for name, value in batch.items()}
        return objective.values(objective.players[0].network, batch, Draw(0, 0, rows, 8, torch.device("cpu")))["loss"]

    halves = torch.cat([losses(slice(0, 4)), losses(slice(4, 8))])
    torch.testing.assert_close(losses(slice(0, 8)), halves)


def test_a_group_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="contrast_size 32 does not divide train_batch_size 48, so the groups"):
        CLIPConfig(dataset_name="digits", max_train_steps=1, train_batch_size=48).validate()
