"""What the card of the training data says of its licence, its biases and its limits."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HFValidationError

from hf_diffusion.data.reaching import hub_or_cache
from hf_diffusion.hub.card_format import parse_card
from hf_diffusion.hub.errors import bounded_requests, is_transient


CARD = "README.md"
ABOUT_LIMITS = re.compile(r"bias|limitation|social impact|sensitive|known (issue|problem)", re.IGNORECASE)
# What the Hub's template asks for.
UNFILLED = re.compile(r"more information needed|needs more information", re.IGNORECASE)
# Characters of a section.
LONGEST_QUOTE = 700
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# scikit-learn's load_digits is the test half of this set, whose description tells how it was made.
DIGITS = {
    "license": "cc-by-4.0",
    "data_card": "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    "considerations": [
        "The digits of this half of the data set were written by 13 people on a preprinted form; other hands and "
        "other ways to write a digit are missing."
    ],
}


def data_set_facts(
    config: dict[str, Any], data: dict[str, Any] | None = None, cache_dir: str | os.PathLike | None = None
) -> dict[str, Any]:
    """What is known about the data that the settings name; {} where nothing is.

    config: all settings of the run. data: `describe()` of the data.

    Returns `license`, `data_card` (where that stands) and `considerations` (quotations). Asks the
    Hub for a data set of the Hub, once and with time limits: a card that cannot be had is no reason
    not to train.
    """
    if config.get("dataset_name") == "digits":
        return dict(DIGITS)
    name, folder = hub_data_set(config, data or {}), config.get("train_data_dir") or config.get("dataset_name")
    try:
        if name is not None:
            with hub_or_cache(name), bounded_requests():
                card = Path(hf_hub_download(name, CARD, repo_type="dataset", cache_dir=cache_dir))
            where = f"{constants.ENDPOINT}/datasets/{name}"
        elif folder is not None and (Path(folder) / CARD).is_file():
            card, where = Path(folder) / CARD, "the README.md beside the images"
        else:
            return {}
        return {"data_card": where, **facts_of_card(card.read_text(encoding="utf-8", errors="replace"))}
    # Those of huggingface_hub are OSErrors or ValueErrors.
    except (OSError, ValueError, HFValidationError):
        return {}
    except Exception as error:
        if is_transient(error):
            return {}
        raise


def hub_data_set(config: dict[str, Any], data: dict[str, Any]) -> str | None:
    """The data set's id on the Hub; None for embedded data and for data of one's own.

    config, data: as for `data_set_facts`.
    """
    name = config.get("dataset_name")
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or name == "digits" or Path(name).exists():
        return None
    # The Hub's first sets of images have no owner; points of such a name are computed here.
    return name if "/" in name or data.get("kind", "images") == "images" else None


def facts_of_card(text: str) -> dict[str, Any]:
    """The licence and the sections on biases and limits of a data set's card, as plain text.

    ValueError for damaged metadata.
    """
    metadata, body = parse_card(text, "the card of the data")
    license = metadata.get("license")
    facts: dict[str, Any] = {}
    if license:
        facts["license"] = ", ".join(map(str, license)) if isinstance(license, list) else str(license)
    quotes = [_plain(section) for section in _sections(body)]
    quotes = [quote for quote in quotes if quote and not UNFILLED.search(quote)]
    return {**facts, "considerations": quotes} if quotes else facts


def _sections(body: str) -> list[str]:
    """The text below every heading that is about limits, up to the next heading."""
    parts = re.split(r"^#{1,6} +(.+)$", body, flags=re.MULTILINE)
    return [text for title, text in zip(parts[1::2], parts[2::2]) if ABOUT_LIMITS.search(title)]


def _plain(section: str) -> str:
    """One paragraph without comments, pictures and tags, cut at the end of a sentence."""
    text = re.sub(r"<!--.*?(-->|\Z)|!\[[^\]]*\]\([^)]*\)|<[^>\n]*>|```", " ", section, flags=re.DOTALL)
    text = " ".join(text.replace("<", "‹").split())
    if len(text) <= LONGEST_QUOTE:
        return text
    cut = text[:LONGEST_QUOTE]
    end = max(cut.rfind(mark) for mark in (". ", "! ", "? "))
    return (cut[: end + 1] if end > LONGEST_QUOTE // 3 else cut[: cut.rfind(" ")]) + " [...]"
