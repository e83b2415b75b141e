"""The papers on a card: those that a run's settings name, each whole and once in papers.bib."""

import re

import pytest

from hf_diffusion.cards.papers import PAPERS, bibtex, read_bibliography
from hf_diffusion.training.train_classifier import ClassifierConfig
from hf_diffusion.training.train_ddgan import DDGANConfig
from hf_diffusion.training.train_ddpm import DDPMConfig


ADM = {"ho2020denoising", "dhariwal2021diffusion"}
GAN = {"xiao2022tackling", "song2021score"}
EPSILON = {"prediction_type": "epsilon", "beta_schedule": "linear", "sampler": "ddpm"}
USED = {
    "a plain DDPM": (DDPMConfig, EPSILON, ADM),
    "what DDPM does by default": (
        DDPMConfig,
        {},
        ADM | {"song2021denoising", "nichol2021improved", "salimans2022progressive"},
    ),
    "guidance and weights": (
        DDPMConfig,
        EPSILON | {"class_conditional": True, "loss_weighting": "min_snr"},
        ADM | {"ho2022classifier", "hang2023efficient"},
    ),
    "no labels left out": (DDPMConfig, EPSILON | {"class_conditional": True, "label_dropout": 0.0}, ADM),
    "another objective": (
        DDPMConfig,
        EPSILON | {"objective": "vlb", "loss_weighting": "p2", "rescale_betas_zero_snr": True},
        ADM | {"nichol2021improved", "choi2022perception", "lin2024common"},
    ),
    "points": (DDPMConfig, EPSILON | {"dataset_name": "swiss_roll"}, {"ho2020denoising"}),
    "a classifier": (ClassifierConfig, {"beta_schedule": "linear"}, ADM),
    "a classifier of another schedule": (
        ClassifierConfig,
        {"rescale_betas_zero_snr": True},
        ADM | {"nichol2021improved", "lin2024common"},
    ),
    "a GAN": (DDGANConfig, {}, GAN | {"mescheder2018which"}),
    "a Wasserstein GAN": (
        DDGANConfig,
        {"divergence": "wasserstein", "r1_gamma": 0.0, "wgan_gp": 10.0, "spectral_norm": True},
        GAN | {"arjovsky2017wasserstein", "gulrajani2017improved", "miyato2018spectral"},
    ),
    "an f-GAN": (DDGANConfig, {"divergence": "hellinger", "r1_gamma": 0.0}, GAN | {"nowozin2016fgan"}),
}


@pytest.mark.parametrize(("cls", "settings", "keys"), USED.values(), ids=USED)
def test_the_papers_of_what_a_run_uses_are_cited_and_no_others(cls, settings, keys):
    papers = cls(**{"dataset_name": "digits", **settings}).papers()
    assert set(papers) == keys and len(papers) == len(keys)
    assert [re.match(r"@\w+\{(\w+),", entry)[1] for entry in bibtex(papers)] == list(papers)


def test_every_entry_of_the_bibliography_is_whole_and_found_by_its_key():
    text, entries = PAPERS.read_text(), read_bibliography()
    assert "\n\n".join(entries.values()) == text.strip()
    assert len(entries) == len(re.findall(r"^@", text, re.MULTILINE)) > 20
    for key, entry in entries.items():
        assert entry.count("{") == entry.count("}") and entry.startswith("@") and f"{{{key},\n" in entry
        year = re.search(r"year=\{(\d{4})\}", entry)[1]
        assert year in key and f"{{{key}," in entry
        assert all(re.search(rf"\b{field}=\{{.+?\}}", entry) for field in ("title", "author", "eprint")), key
        # Of arXiv: year and month, then five digits, four before 2015.
        assert re.search(r"eprint=\{(0\d|1[0-4])\d{2}\.\d{4}\}|eprint=\{(1[5-9]|2\d)\d{2}\.\d{5}\}", entry), key


def test_a_paper_of_ones_own_is_its_entry_and_an_unknown_key_names_the_file():
    own = "@misc{me2026mine,\n  title={Mine}\n}"
    assert bibtex(["ho2020denoising", f"\n{own}\n"])[1] == own and bibtex([]) == []
    with pytest.raises(
        ValueError, match=r"papers\.bib has no paper 'karras2022'; take karras2022elucidating, or give"
    ):
        bibtex(["karras2022"])
