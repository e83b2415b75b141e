"""The papers that a card cites, kept as BibTeX in papers.bib."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path


PAPERS = Path(__file__).with_name("papers.bib")
# An entry ends with a brace at the beginning of a line.
ENTRY = re.compile(r"^@\w+\{([^,\s]+),.*?^\}$", re.MULTILINE | re.DOTALL)


def read_bibliography(path: Path = PAPERS) -> dict[str, str]:
    """The entries of a BibTeX file by their keys."""
    return {entry[1]: entry[0] for entry in ENTRY.finditer(path.read_text(encoding="utf-8"))}


def bibtex(papers: Iterable[str]) -> list[str]:
    """BibTeX entries for keys of papers.bib; what begins with "@" is an entry itself.

    ValueError for a key that the file does not have.
    """
    known = read_bibliography()
    return [paper.strip() if paper.lstrip().startswith("@") else _entry(paper, known) for paper in papers]


def _entry(key: str, known: dict[str, str]) -> str:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"take {close[0]}" if close else f"take one of {', '.join(known)}"
        raise ValueError(f"{PAPERS} has no paper {key!r}; {hint}, or give the BibTeX entry itself")
    return known[key]
