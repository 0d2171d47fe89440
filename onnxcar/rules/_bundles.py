"""Equal counts: split classes into the smallest bundles that take the same number from every block.

A constraint is a list of parts (the blocks of one grouped Conv's inputs or outputs). A class counts in a part as
often as it occurs there. A bundle is balanced if it takes, for each constraint, the same number from every part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Parts = Sequence[npt.NDArray[np.int64]]
_TRIES = 4_000  # nodes of the search for one bundle


def bundles(constraints: Sequence[Parts]) -> tuple[list[list[int]], dict[int, int]]:
    """Balanced bundles of classes, and the classes left without partners with a constraint that holds them.

    Args:
        constraints: For each constraint its parts, each an array of class ids; 0 marks channels that stay.

    Deterministic: first come, first bundled; so the bundles that are left after some were removed stay the same.
    """
    vectors: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
    for c, parts in enumerate(constraints):
        for p, part in enumerate(parts):
            for label in part.tolist():
                if label:
                    key = (c, p)
                    vectors[label][key] = vectors[label].get(key, 0) + 1
    sizes = [len(parts) for parts in constraints]
    holders: dict[tuple[int, int], list[int]] = defaultdict(list)
    for label in sorted(vectors):
        for key in vectors[label]:
            holders[key].append(label)
    used: set[int] = set()
    found: list[list[int]] = []
    alone: dict[int, int] = {}
    for label in sorted(vectors):
        if label in used:
            continue
        bundle = _complete(label, vectors, holders, sizes, used)
        if bundle is None:
            alone[label] = next(iter(vectors[label]))[0]
            used.add(label)
        else:
            used.update(bundle)
            found.append(bundle)
    return found, alone


def _complete(
    label: int,
    vectors: dict[int, dict[tuple[int, int], int]],
    holders: dict[tuple[int, int], list[int]],
    sizes: Sequence[int],
    used: set[int],
) -> list[int] | None:
    """The first balanced bundle that contains `label`, None if the search finds none."""
    counts: dict[tuple[int, int], int] = defaultdict(int)
    chosen: list[int] = []
    tries = 0

    def add(x: int, sign: int) -> None:
        for key, n in vectors[x].items():
            counts[key] += sign * n

    def short() -> tuple[int, int] | None:
        """The first part that has fewer than the fullest part of its constraint."""
        best: dict[int, int] = defaultdict(int)
        for (c, _), n in counts.items():
            best[c] = max(best[c], n)
        for c in sorted(best):
            for p in range(sizes[c]):
                if counts[(c, p)] < best[c]:
                    return c, p
        return None

    def search(limit: int) -> bool:
        nonlocal tries
        part = short()
        if part is None:
            return True
        if len(chosen) >= limit:
            return False
        for x in holders[part]:
            if x in used or x in chosen:
                continue
            tries += 1
            if tries > _TRIES:
                return False
            chosen.append(x)
            add(x, 1)
            if search(limit):
                return True
            chosen.pop()
            add(x, -1)
        return False

    chosen.append(label)
    add(label, 1)
    # small bundles first: as many members as the widest constraint has parts, then more
    for factor in (1, 2, 4):
        limit = factor * max((sizes[c] for c, _ in vectors[label]), default=1)
        if search(limit):
            return chosen
    return None
