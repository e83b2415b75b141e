"""Without a network a name is found in the cache, or said to be out of reach, at once."""

import socket
import time
from functools import partial

import datasets
import pytest
from huggingface_hub import constants

from hf_diffusion.data import reaching
from hf_diffusion.data.autoencoders import load_autoencoder
from hf_diffusion.data.caption_coders import load_text_encoder
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.reaching import hub_answers, hub_or_cache
from hf_diffusion.data.tokenizing import open_tokenizer
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.loop.masked_language_models import holds_masked_lm


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The Hub at a port that nobody listens at."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(reaching, "BEFORE_ANOTHER", 0.1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    "load, sentence",
    [
        (load_data, "the Hub cannot be reached for data set 'me/none' and the cache"),
        (partial(load_data, tokenizer="chars", streaming=True), "the Hub cannot be reached for data set"),
        (lambda name: open_tokenizer(name, list), "tokenizer me/none cannot be loaded"),
        (load_pipeline, "the Hub could not be asked for 'me/none', and it is not in the cache"),
        (load_autoencoder, "vae me/none"),
        (load_text_encoder, "text_encoder me/none cannot be opened"),
        (holds_masked_lm, "'me/none' is no path here, and the Hub, which may have it, cannot be reached"),
    ],
    ids=["data", "stream", "tokenizer", "pipeline", "vae", "text encoder", "masked language model"],
)
def test_a_name_out_of_reach_is_one_sentence_within_seconds(no_network, load, sentence):
    began = time.monotonic()
    with pytest.raises((OSError, ValueError), match=sentence):
        load("me/none")
    assert time.monotonic() - began < 8
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_a_path_needs_no_hub_and_one_that_answers_is_asked(no_network, monkeypatch, tmp_path):
    with hub_or_cache(tmp_path):
        assert not constants.HF_HUB_OFFLINE
    with hub_or_cache("me/none"):
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    with socket.create_server(("127.0.0.1", 0)) as listening:
        where = f"127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{where}")
        assert hub_answers()
        with hub_or_cache("me/none"):
            assert not constants.HF_HUB_OFFLINE
        # also through a proxy, which knows a host that this machine does not
        monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
        assert not hub_answers()
        monkeypatch.setenv("http_proxy", f"http://{where}")
        assert hub_answers()
