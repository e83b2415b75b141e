"""Cards as text: their parts and back, two cards as one, and whose repository the examples name."""

import pytest

from hf_diffusion.hub.card_format import END, START, format_card, parse_card, pictures, sections, split_generated
from hf_diffusion.hub.card_merge import merge_cards, name_repository


def card(body: str, before: str = "", after: str = "") -> str:
    return f"---\nlibrary_name: diffusers\ntags:\n- hf_diffusion\n---\n{before}{START}\n{body}\n{END}\n{after}"


def test_a_card_is_the_same_after_it_was_taken_apart_and_put_together():
    text = card("# x\n\n## Use\n\n```bash\n## no heading\n```\n\n## Limits\n", "Intro.\n", "Outro.\n")
    metadata, body = parse_card(text, "the card")
    assert metadata == {"library_name": "diffusers", "tags": ["hf_diffusion"]} and format_card(metadata, body) == text
    head, block, tail = split_generated(body)
    assert (head, tail) == ("Intro.\n", "\nOutro.\n") and block.startswith(START) and block.endswith(END)
    parts = sections(block)
    assert list(parts) == ["", "Use", "Limits"] and "".join(parts.values()) == block
    assert split_generated("By hand.") == ("By hand.", "", "")


def test_pictures_are_found_with_their_words_in_their_order():
    assert pictures("![b](x/b.png) text [a](a.png)\n![](a.png)") == {"x/b.png": "b", "a.png": ""}


def test_damaged_metadata_and_markers_are_refused_by_the_name_of_the_card():
    for text, reason in (
        ("---\na: [\n---\n", "valid YAML"),
        ("---\n- a\n---\n", "`key: value` lines"),
        (f"{END}\n{START}", "once each"),
        (f"{START}{START}{END}{END}", "once each"),
    ):
        with pytest.raises(ValueError, match=f"my card.*{reason}"):
            parse_card(text, "my card")


def test_merging_keeps_the_text_of_both_and_changes_nothing_the_second_time():
    mine = card("new", after="mine\n")
    theirs = "---\nlicense: mit\ntags:\n- art\n---\nIntro.\n" + card("old", after="\ntheirs\n").split("---\n", 2)[2]
    merged = merge_cards(theirs, mine)
    assert all(text in merged for text in ("Intro.", "theirs", "mine", "license: mit", "- art", "new"))
    assert "old" not in merged and merge_cards(merged, mine) == merged
    assert merge_cards("Only text.", mine).index("Only text.") < merge_cards("Only text.", mine).index("new")
    assert merge_cards(theirs, "# By hand\n") == "# By hand\n"


def test_examples_of_the_card_name_the_repository_and_the_tag():
    example = 'X.from_pretrained(\n    "run",  # this folder\n    trust_remote_code=True,\n)\nX.from_pretrained("run")'
    named = name_repository(card(example), "alice/run", "v1")
    assert '    "alice/run",\n    revision="v1",\n' in named
    assert 'from_pretrained("alice/run", revision="v1")' in named
    assert name_repository(named, "alice/run", None) == named
    other = name_repository(named, "bob/other", None)
    assert "alice" not in other and "v1" not in other and 'revision="main",  # better the hash' in other
    assert name_repository(other, "alice/run", "v1") == named
