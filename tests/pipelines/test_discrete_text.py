"""What the pipeline of texts promises: prompts, samplers, guidance, and one seed for one text."""

import importlib
import inspect

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from hf_diffusion import D3PMScheduler, DiscreteTextPipeline, MDLMScheduler, TokenTransformerModel, UDLMScheduler
from hf_diffusion.data.tokenizing import character_tokenizer
from tests.pipelines.tiny import NAMES, quiet, seeds, with_random_weights


LETTERS = "abcdefg"
# With [UNK] and [MASK].
V, MASK, LENGTH = 9, 8, 12
ABSORBING = {"transition_type": "absorbing", "beta_schedule": "jsd", "mask_token_id": MASK, "decoder": "posterior"}
SCHEDULERS = {
    "mdlm": lambda: MDLMScheduler(V, noise_eps=0.0),
    "remdm": lambda: MDLMScheduler(V, noise_eps=0.0, remasking="cap", eta=0.3),
    "udlm": lambda: UDLMScheduler(V - 1, noise_eps=0.0),
    "d3pm": lambda: D3PMScheduler(V, 20, **ABSORBING),
    "d3pm uniform": lambda: D3PMScheduler(V - 1, 20, decoder="posterior"),
}
every_process = pytest.mark.parametrize("process", SCHEDULERS)


def make(process: str = "mdlm", classes: int | None = None) -> DiscreteTextPipeline:
    scheduler = SCHEDULERS[process]()
    torch.manual_seed(0)
    knowledge = {"num_class_embeds": classes, "null_class": classes is not None}
    sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "condition_size": 8}
    network = TokenTransformerModel(
        scheduler.config.num_classes, LENGTH, time_conditioning=process != "mdlm", **sizes, **knowledge
    )
    network = with_random_weights(network, std=0.5)
    names = NAMES if classes else None
    return quiet(DiscreteTextPipeline(network, scheduler, character_tokenizer(LETTERS), names, LENGTH))


def draw(pipe: DiscreteTextPipeline, *numbers: int, **options) -> torch.Tensor:
    call = {"batch_size": len(numbers), "num_inference_steps": 5, "generator": seeds(*numbers), "output_type": "pt"}
    return pipe(**call | options).texts


@every_process
def test_one_seed_gives_one_text_in_any_batch_and_micro_batch(process):
    pipe = make(process)
    whole = draw(pipe, 5, 6, 7, 8)
    assert whole.shape == (4, LENGTH) and whole.dtype == torch.int64 and len(whole.unique(dim=0)) == 4
    assert torch.equal(torch.cat([draw(pipe, n) for n in (5, 6, 7, 8)]), whole)
    assert torch.equal(draw(pipe, 8, 5, micro_batch_size=1), whole[[3, 0]])
    assert whole.max() < MASK


@every_process
def test_what_a_prompt_says_is_there_after_every_step_and_masks_in_it_are_filled(process):
    pipe, seen = make(process), []

    def look(pipe, i, t, tensors):
        seen.append(tensors["tokens"].clone())
        return {}

    texts = draw(pipe, 0, 1, prompt="ab[MASK:2]c[MASK]", suffix=["fg", "gf"], callback_on_step_end=look)
    expected = torch.tensor(pipe.encode("abc"))
    assert len(seen) == 5 and all(torch.equal(x[:, [0, 1, 4]], expected.expand(2, 3)) for x in [*seen, texts])
    assert [text[-2:] for text in pipe.decode(texts)] == ["fg", "gf"] and texts.max() < MASK


def test_a_list_of_prompts_is_a_batch_and_texts_may_be_of_another_length():
    pipe = make()
    texts = pipe(["ab", "cde"], num_inference_steps=2, sequence_length=7).texts
    assert len(texts) == 2 and texts[0].startswith("ab") and texts[1].startswith("cde")
    assert draw(pipe, 0, sequence_length=7).shape == (1, 7)


def test_output_types_hold_the_same_texts_and_an_unfinished_one_shows_its_masks():
    pipe = make()
    tokens, array, texts = (draw(pipe, 0, 1, output_type=kind) for kind in ("pt", "np", "text"))
    assert array.dtype == np.int64 and np.array_equal(array, tokens.numpy()) and texts == pipe.decode(tokens)
    assert pipe.decode(torch.tensor([[0, MASK, 1]])) == ["a░b"]
    assert pipe(num_inference_steps=2, generator=seeds(3), return_dict=False) == (
        pipe(num_inference_steps=2, generator=seeds(3)).texts,
    )


class PairNetwork(ModelMixin, ConfigMixin):
    """The exact answer for texts of two equal letters: "aa" three times as often as "bb"."""

    @register_to_config
    def __init__(self, num_class_embeds: int | None = None, hidden_size: int = 1):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, tokens, level, class_labels=None, return_dict=True):
        other = tokens.flip(1)
        first = torch.tensor([0.75, 0.25, *[0.0] * (V - 2)])
        p = torch.where((other == MASK)[..., None], first, torch.nn.functional.one_hot(other, V))
        return (self.scale * p.clamp(min=1e-30).log(),)


@pytest.mark.parametrize(
    "sampler, steps, equal, first",
    [
        # two at once are 1 in 100 of the pairs
        ("ancestral", 100, 1.0, 0.75),
        # in one step each is drawn by what it is alone
        ("confidence", 1, 0.75**2 + 0.25**2, 0.75),
        # of two that are drawn the surer one stays: frequent tokens become more so
        ("confidence", 2, 1.0, 1 - 0.25**2),
    ],
)
def test_an_exact_network_draws_what_the_sampler_promises(sampler, steps, equal, first):
    pipe = quiet(DiscreteTextPipeline(PairNetwork(), MDLMScheduler(V, noise_eps=0.0), character_tokenizer(LETTERS)))
    pipe.register_to_config(sequence_length=2)
    call = {"sampler": sampler, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    drawn = pipe(batch_size=2000, output_type="np", **call).texts
    assert abs((drawn[:, 0] == drawn[:, 1]).mean() - equal) < 0.045
    assert abs((drawn[:, 0] == 0).mean() - first) < 4 * (0.75 * 0.25 / 2000) ** 0.5


def test_confidence_sets_an_equal_share_in_each_step_the_surest_first():
    pipe, left = make(), []

    def count(pipe, i, t, tensors):
        left.append((tensors["tokens"] == MASK).sum(dim=1).tolist())
        return {}

    draw(pipe, 0, 1, sampler="confidence", num_inference_steps=4, prompt=["", "abcd"], callback_on_step_end=count)
    assert left == [[9, 6], [6, 4], [3, 2], [0, 0]]
    log_p = torch.full((1, 3, V), -20.0, dtype=torch.float64)
    log_p[0, :, 1] = torch.tensor([0.2, 0.9, 0.5]).log()
    x_t = torch.full((1, 3), MASK)
    first = pipe.most_confident(log_p, x_t, 3, seeds(0))
    assert first.tolist() == [[MASK, 1, MASK]]


def test_tokens_that_are_masked_again_change_and_those_of_a_prompt_do_not():
    pipe, seen = make(), []

    def look(pipe, i, t, tensors):
        seen.append(tensors["tokens"].clone())
        return {}

    call = {"num_inference_steps": 40, "callback_on_step_end": look, "prompt": "abc"}
    draw(pipe, 0, remasking="cap", eta=0.2, **call)
    again = sum(int(((a != MASK) & (b == MASK)).sum()) for a, b in zip(seen, seen[1:]))
    assert again > 5 and all(x[0, :3].tolist() == [0, 1, 2] for x in seen)
    seen.clear()
    draw(pipe, 0, **call)
    assert not any(((a != MASK) & (b == MASK)).any() for a, b in zip(seen, seen[1:]))
    assert pipe.scheduler.config.remasking == "none"


@every_process
def test_guidance_of_1_is_the_class_of_0_is_none_and_more_is_something_else(process):
    pipe = make(process, classes=4)
    labels = {"class_labels": ["dog"], "batch_size": None}
    plain, none = draw(pipe, 0, **labels), draw(pipe, 0)
    assert torch.equal(draw(pipe, 0, guidance_scale=1.0, class_labels=[1], batch_size=None), plain)
    assert torch.equal(draw(pipe, 0, guidance_scale=1e-12, **labels), none) and not torch.equal(plain, none)
    assert not torch.equal(draw(pipe, 0, guidance_scale=4.0, **labels), plain)


def test_a_low_temperature_and_a_small_nucleus_leave_the_most_probable_token():
    pipe = make()
    texts = [
        pipe(batch_size=3, sampler="confidence", num_inference_steps=LENGTH, generator=seeds(*s), **options).texts
        for options in ({"temperature": 1e-4}, {"top_p": 1e-4})
        for s in ((0, 1, 2), (3, 4, 5))
    ]
    assert len(set(sum(texts, []))) == 1
    assert len(set(pipe(batch_size=3, num_inference_steps=5, generator=seeds(0, 1, 2)).texts)) == 3


def test_a_callback_can_change_the_tokens_and_stop_the_run():
    pipe = make()

    def erase(pipe, i, t, tensors):
        return {"tokens": torch.zeros_like(tensors["tokens"])}

    def stop(pipe, i, t, tensors):
        pipe._interrupt = i == 1
        return {}

    assert draw(pipe, 0, callback_on_step_end=erase).eq(0).all() and pipe.num_timesteps == 5
    stopped = draw(pipe, 0, callback_on_step_end=stop)
    assert 0 < (stopped == MASK).sum() < LENGTH and "░" in pipe.decode(stopped)[0]


def test_what_it_says_of_itself_is_so():
    pipe, arguments = make(classes=4), inspect.signature(DiscreteTextPipeline.__call__).parameters
    assert set(DiscreteTextPipeline.sampling_options) <= set(arguments)
    for place in DiscreteTextPipeline.measures.values():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert pipe.sample_shape == (LENGTH,) and pipe.null_class_id == 4 and pipe.num_classes == 4
    assert pipe.example_call()["class_labels"] == ["cat", "dog", 2, 3]
    assert len(pipe(**pipe.example_call()).texts) == 4 and len(make()(**make().example_call()).texts) == 2
    other = DiscreteTextPipeline.from_pipe(pipe)
    assert other.config.sequence_length == LENGTH and other.id2label == NAMES


@pytest.mark.parametrize(
    "process, call, message",
    [
        ("mdlm", {"prompt": "a" * 9, "suffix": "b" * 4}, "13 tokens long, and a text has 12; give fewer"),
        ("mdlm", {"prompt": "xyz"}, "holds what the tokenizer does not know"),
        ("mdlm", {"prompt": ["a", "b"], "batch_size": 3}, "2 entries of prompt were given for 3 texts"),
        ("mdlm", {"sampler": "beam"}, "unknown sampler 'beam'; choose from"),
        ("udlm", {"sampler": "confidence"}, "needs masks, and UDLMScheduler has none; use 'ancestral'"),
        ("d3pm", {"remasking": "cap"}, "needs an MDLMScheduler and sampler='ancestral', not D3PMScheduler"),
        ("mdlm", {"eta": 0.1}, "give remasking, too, such as 'cap'"),
        ("mdlm", {"remasking": "often"}, "unknown remasking 'often'"),
        ("mdlm", {"guidance_scale": 2.0}, "needs class_labels, and a model that was trained with a null class"),
        ("mdlm", {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ("mdlm", {"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1"),
        ("d3pm", {"num_inference_steps": 21}, "between 1 and num_train_timesteps=20"),
        ("mdlm", {"class_labels": [1]}, "to a model without classes"),
        ("mdlm", {"generator": 3}, "neither a torch.Generator nor a list"),
        ("mdlm", {"output_type": "pil"}, "unknown output_type 'pil'"),
        ("mdlm", {"batch_size": 0}, "ask for at least 1 of each"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(process, call, message):
    with pytest.raises(ValueError, match=message):
        make(process)(**call)
