"""Classes of two sets are matched by their names, never by their numbers."""

from collections.abc import Sequence

import numpy as np


def match_classes(names: Sequence[str], known: Sequence[str], whose: str) -> np.ndarray:
    """Return int64 (len(names),): the place of each name in `known`, which may have more names.

    ValueError names the classes that are not known; `whose` says whose classes `names` are.
    """
    places = {name: place for place, name in enumerate(known)}
    others = [name for name in names if name not in places]
    if others or not names:
        raise ValueError(
            f"{whose} has {_listed('the classes', others) if others else 'no classes'}, which are not among "
            f"{_listed('', list(known))}; rename them, or give data of the same classes"
        )
    return np.array([places[name] for name in names], np.int64)


def _listed(what: str, names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {', '.join(map(repr, names[:most]))}{more}".strip()
