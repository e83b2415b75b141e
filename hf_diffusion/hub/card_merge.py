"""Model cards on their way to the Hub: people's words stay, examples name the repository."""

import re
from typing import Any

from hf_diffusion.hub.card_format import START, format_card, parse_card, split_generated


def merge_cards(theirs: str, mine: str) -> str:
    """The card `mine` for a repository with the card `theirs`: my generated part, the text of both.

    Text that one of them has around the generated part and the other lacks is kept. A card of mine
    without a generated part is written by hand as a whole and takes the place of theirs. ValueError
    for damaged metadata or markers.
    """
    their_metadata, their_text = parse_card(theirs, "the card on the Hub")
    my_metadata, my_text = parse_card(mine, "the card")
    if START not in my_text:
        return mine
    my_head, my_block, my_tail = split_generated(my_text)
    their_head, _, their_tail = split_generated(their_text)
    pieces = (_joined(their_head, my_head), my_block, _joined(their_tail, my_tail))
    text = "\n\n".join(piece for piece in pieces if piece)
    return format_card(_merged_metadata(their_metadata, my_metadata), f"\n{text}\n", mine, theirs)


def name_repository(card: str, repo_id: str, revision: str | None) -> str:
    """The card with the examples of its generated part loading from `repo_id` at `revision`.

    Without a revision, examples that name this repository keep theirs.
    """
    if START not in card or (revision is None and f'"{repo_id}"' in card):
        return card
    head, block, tail = split_generated(card)
    pinned = f'"{revision}",' if revision else '"main",  # better the hash of that commit: main may change'
    block = re.sub(
        r'(\.from_pretrained\(\n)( +)"[^"\n]+",.*\n(?: +revision=.*\n)?',
        lambda match: f'{match[1]}{match[2]}"{repo_id}",\n{match[2]}revision={pinned}\n',
        block,
    )
    at = f', revision="{revision}"' if revision else ""
    block = re.sub(
        r'\.from_pretrained\("[^"\n]+"(?:, revision="[^"\n]+")?\)', f'.from_pretrained("{repo_id}"{at})', block
    )
    return head + block + tail


def _joined(theirs: str, mine: str) -> str:
    theirs, mine = theirs.strip(), mine.strip()
    if mine in theirs:
        return theirs
    return mine if theirs in mine else f"{theirs}\n\n{mine}"


def _merged_metadata(theirs: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    # Not theirs: the results of the earlier weights.
    kept = {key: value for key, value in theirs.items() if key != "model-index"}
    merged = {**kept, **mine}
    tags = [*(mine.get("tags") or []), *(theirs.get("tags") or [])]
    return {**merged, "tags": list(dict.fromkeys(tags))} if tags else merged
