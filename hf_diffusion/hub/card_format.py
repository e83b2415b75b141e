"""The form of a model card: metadata, then text, of which two markers enclose what is generated."""

import re
from typing import Any

import yaml


START, END = "<!-- hf_diffusion:generated:start -->", "<!-- hf_diffusion:generated:end -->"
FRONT = re.compile(r"\s*---\r?\n(.*?)\r?\n?---\r?\n", re.DOTALL)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def parse_card(content: str, name: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card; ValueError names one whose metadata or markers are damaged."""
    front = FRONT.match(content)
    text = content[front.end() :] if front else content
    try:
        metadata = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of {name} are not valid YAML; repair them or remove the file") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"the metadata of {name} must be `key: value` lines; repair them or remove the file")
    if text.count(START) > 1 or text.count(START) != text.count(END) or text.find(START) > text.find(END):
        raise ValueError(
            f"the markers {START} and {END} in {name} must be there once each, in this order, or not at all"
        )
    return metadata or {}, text


def format_card(metadata: dict[str, Any], text: str) -> str:
    """The content of a card; undoes `parse_card`."""
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{text}"


def split_generated(text: str) -> tuple[str, str, str]:
    """The text before the generated part, that part with its markers, and the text after it.

    A text without that part, which a person wrote, stands before it.
    """
    if START not in text:
        return text, "", ""
    start, end = text.index(START), text.index(END) + len(END)
    return text[:start], text[start:end], text[end:]


def sections(text: str) -> dict[str, str]:
    """The parts of a text by their headings of the second level; "" holds what stands before.

    A part begins with its heading; joined, the parts are the text. A line of code is no heading.
    """
    found, heading, in_code = {"": ""}, "", False
    for line in text.splitlines(keepends=True):
        in_code ^= line.startswith("```")
        if line.startswith("## ") and not in_code:
            heading = line[3:].strip()
        found[heading] = found.get(heading, "") + line
    return found


def pictures(text: str) -> dict[str, str]:
    """The pictures that a text shows: path -> alternative text, in their order."""
    return {path: words for words, path in PICTURE.findall(text)}
