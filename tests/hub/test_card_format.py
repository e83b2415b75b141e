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


FORMS = {
    "a value that ends in dashes": ("title: a ---\nlicense: mit\n", {"title": "a ---", "license": "mit"}),
    "dashes in a text": ("description: |\n  ---\n  b\n", {"description": "---\nb\n"}),
    "one tag": ("tags: art\n", {"tags": ["art"]}),
    "no tags": ("tags:\n", {"tags": []}),
    "a year as a tag": ("tags: [art, 2024]\n", {"tags": ["art", "2024"]}),
    "flow style": ("{license: mit, tags: [a]}\n", {"license": "mit", "tags": ["a"]}),
    "comments": ("# mine\nlicense: mit  # really\n", {"license": "mit"}),
    "folded text": ("summary: >-\n  a\n  b\n", {"summary": "a b"}),
    "quotes and colons": ("title: 'a: b'\n", {"title": "a: b"}),
    "anchors": ("a: &x [1]\nb: *x\n", {"a": [1], "b": [1]}),
    "a nested map": (
        "widget:\n- text: a\n  output:\n    url: b\n",
        {"widget": [{"text": "a", "output": {"url": "b"}}]},
    ),
    "nothing": ("", {}),
}  # fmt: skip


@pytest.mark.parametrize("front, metadata", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("form", ["---\n{}---\nText\n", "\ufeff---\r\n{}---\r\nText\n", "\n--- \n{}--- \nText\n"])
def test_every_form_of_front_matter_is_read_and_the_text_after_it_is_whole(front, metadata, form):
    content = form.format(front.replace("\n", "\r\n") if "\r" in form else front)
    assert parse_card(content, "the card") == (metadata, "Text\n")
    # Written anew, it says the same, and the second time nothing changes.
    again = format_card(metadata, "Text\n", content)
    assert parse_card(again, "the card") == (metadata, "Text\n") and format_card(metadata, "Text\n", again) == again


def test_front_matter_without_a_text_ends_with_the_file():
    assert parse_card("---\nlicense: mit\n---", "the card") == ({"license": "mit"}, "")


def test_what_the_user_wrote_stays_as_it_was_written():
    mine = "# why\nlanguage: no\n# when\ndate: 2024-01-01  # of the data\ntitle: 'a: b'\n"
    content = f"---\n{mine}tags: [old]\n---\n"
    metadata, text = parse_card(content, "the card")
    again = format_card({**metadata, "tags": ["new"], "license": "mit"}, text, content)
    assert again == f"---\n{mine}tags:\n- new\nlicense: mit\n---\n"


def test_a_key_that_stands_twice_is_refused_as_the_hub_refuses_it():
    with pytest.raises(ValueError, match="the metadata of my card have 'license' 2 times; keep one"):
        parse_card("---\nlicense: mit\nlicense: gpl\n---\n", "my card")


def test_merging_keeps_one_tag_and_the_words_of_both():
    theirs = "---\nlanguage: no\ntags: art\n---\n" + card("old").split("---\n", 2)[2]
    merged = merge_cards(theirs, card("new"))
    assert (
        "language: no\n" in merged
        and "- hf_diffusion\n- art\n" in merged
        and merge_cards(merged, card("new")) == merged
    )
