"""The transformer of tokens: what it sees, what it is told, and that positions are relative."""

import pytest
import torch

from hf_diffusion.models.transformer_tokens import TokenTransformerModel, rotate, rotations
from tests.pipelines.tiny import with_random_weights


SIZES = {"sequence_length": 8, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "condition_size": 8}


def network(**options) -> TokenTransformerModel:
    torch.manual_seed(0)
    return with_random_weights(TokenTransformerModel(11, **SIZES | options), std=0.3)


def test_what_the_rotations_give_depends_on_the_distance_of_two_places_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator).expand(1, 1, 12, 8) for _ in range(2))
    turns = rotations(12, 8, 10000.0, torch.device("cpu"))
    products = (rotate(q, turns) @ rotate(k, turns).transpose(-1, -2))[0, 0]
    for distance in (-5, 0, 3):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert (products[0] - products[0, 0]).abs().max() > 0.1


def test_every_place_sees_every_other_one():
    tokens = torch.arange(8)[None]
    tokens.requires_grad_(False)
    net, changed = network(), tokens.clone()
    for place in (0, 7):
        changed[0, place] = 9
        moved = (net(changed).sample - net(tokens).sample).abs().amax(dim=-1)[0]
        assert (moved > 1e-5).all()
        changed = tokens.clone()


def test_a_level_is_told_where_it_is_asked_for_and_not_looked_at_elsewhere():
    tokens = torch.arange(8)[None].expand(2, 8)
    told, untold = network(time_conditioning=True), network()
    first, second = told(tokens, torch.tensor([0.2, 0.9])).sample
    assert not torch.allclose(first, second)
    torch.testing.assert_close(told(tokens[:1], 0.2).sample[0], first)
    assert torch.equal(untold(tokens, 0.1).sample, untold(tokens).sample)
    with pytest.raises(ValueError, match="timestep is missing"):
        told(tokens)


def test_classes_and_no_class_are_told_apart_and_missing_ones_refused():
    net, tokens = network(num_class_embeds=3, null_class=True), torch.arange(8)[None].expand(4, 8)
    answers = net(tokens, class_labels=torch.arange(4)).sample
    assert net.null_class_id == 3 and all(not torch.allclose(answers[i], answers[3]) for i in range(3))
    for call in (lambda: net(tokens), lambda: network()(tokens, class_labels=torch.arange(4))):
        with pytest.raises(ValueError, match="class_labels are"):
            call()


def test_a_new_network_knows_nothing_and_learns():
    torch.manual_seed(0)
    net = TokenTransformerModel(11, **SIZES, time_conditioning=True)
    tokens = torch.arange(8)[None]
    assert net(tokens, 0.5).sample.abs().max() == 0
    optimizer = torch.optim.AdamW(net.parameters(), 0.02)
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(net(tokens, 0.5).sample[0], tokens[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 1.0


def test_recomputed_activations_give_the_same_gradients():
    tokens, gradients = torch.arange(8)[None], []
    for checkpointing in (False, True):
        net = network(time_conditioning=True).train()
        if checkpointing:
            net.enable_gradient_checkpointing()
        net(tokens, 0.5).sample.square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": 18, "num_attention_heads": 4}, "multiple of twice the num_attention_heads, 8"),
        ({"num_layers": 0}, "num_layers is 0; it must be 1 or more"),
        ({"null_class": True}, "null_class=True needs num_class_embeds"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenTransformerModel(11, **SIZES | options)


def test_numbers_that_are_no_tokens_are_refused():
    with pytest.raises(ValueError, match=r"input_ids are torch.float32 of shape \(1, 8\); give int64 tokens"):
        network()(torch.zeros(1, 8))
