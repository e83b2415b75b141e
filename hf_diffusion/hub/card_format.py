"""The form of a model card: metadata, then text, of which two markers enclose what is generated."""

import re
from typing import Any

import yaml


START, END = "<!-- hf_diffusion:generated:start -->", "<!-- hf_diffusion:generated:end -->"
BYTE_ORDER_MARK = "\ufeff"
# As huggingface_hub finds it: the line that ends it holds three dashes and nothing else.
FRONT = re.compile(rf"{BYTE_ORDER_MARK}?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def parse_card(content: str, name: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card; ValueError names one whose metadata or markers are damaged.

    Tags are a list of text, whatever form of them the card has.
    """
    front = FRONT.match(content)
    text = content[front.end() :] if front else content.removeprefix(BYTE_ORDER_MARK)
    try:
        metadata = (yaml.safe_load(front[1]) if front else None) or {}
        if not isinstance(metadata, dict):
            raise ValueError(f"the metadata of {name} must be `key: value` lines; repair them or remove the file")
        _refuse_repeated_keys(front[1] if front else "", name)
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of {name} are not valid YAML; repair them or remove the file") from error
    if text.count(START) > 1 or text.count(START) != text.count(END) or text.find(START) > text.find(END):
        raise ValueError(
            f"the markers {START} and {END} in {name} must be there once each, in this order, or not at all"
        )
    if "tags" in metadata:
        tags = metadata["tags"]
        metadata["tags"] = [str(tag) for tag in ([] if tags is None else tags if isinstance(tags, list) else [tags])]
    return metadata, text


def _refuse_repeated_keys(front: str, name: str) -> None:
    """ValueError for a key that stands twice, which the Hub refuses and YAML's reader overlooks."""
    node = yaml.compose(front, Loader=yaml.SafeLoader)
    keys = [key.value for key, _ in node.value] if node is not None else []
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the metadata of {name} have {key!r} {keys.count(key)} times; keep one of them")


def format_card(metadata: dict[str, Any], text: str, *formers: str) -> str:
    """The content of a card; undoes `parse_card`.

    formers: the contents of earlier cards. What the metadata of one and `metadata` say alike is
        written as it stands there, comments included: a word such as `no`, which YAML 1.1 takes for
        false, stays what the Hub reads.
    """
    written = [_blocks(former) for former in formers]
    lines = []
    for key, value in metadata.items():
        same = [blocks[key][0] for blocks in written if key in blocks and blocks[key][1] == value]
        lines.append(same[0] if same else _dumped({key: value}))
    front = "".join(lines)
    try:
        # An anchor may stand in a part that was replaced.
        kept = yaml.safe_load(front) or {}
    except yaml.YAMLError:
        kept = None
    if kept is None or _with_listed_tags(kept) != metadata:
        front = _dumped(metadata)
    return f"---\n{front}---\n{text}"


def _dumped(metadata: dict[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _with_listed_tags(metadata: dict[str, Any]) -> dict[str, Any]:
    tags = metadata.get("tags", [])
    return metadata if isinstance(tags, list) else {**metadata, "tags": [str(tags)]}


def _blocks(content: str) -> dict[str, tuple[str, Any]]:
    """The lines of each key of a card's metadata, with the comments above it, and its value."""
    front = FRONT.match(content)
    node = yaml.compose(front[1], Loader=yaml.SafeLoader) if front else None
    if node is None or getattr(node, "flow_style", True):
        return {}
    metadata, lines = yaml.safe_load(front[1]), front[1].splitlines()
    starts = [key.start_mark.line for key, _ in node.value]
    found, above = {}, 0
    for (key, _), end in zip(node.value, [*starts[1:], len(lines)]):
        # Comments and empty lines before a key belong to it.
        while end < len(lines) and end > key.start_mark.line + 1 and (lines[end - 1] + "#").lstrip(" ")[0] == "#":
            end -= 1
        block = "\n".join(lines[above:end]) + "\n"
        found[key.value] = block, metadata.get(key.value)
        above = end
    return found


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
