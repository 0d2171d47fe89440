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
Vector = tuple[tuple[int, int, int], ...]  # (constraint, part, how often), sorted


def bundles(constraints: Sequence[Parts]) -> tuple[list[list[int]], dict[int, int]]:
    """Balanced bundles of classes, and the classes left without partners with a constraint that holds them.

    Classes that lie alike in every constraint are interchangeable, so a bundle is a small integer vector over such
    kinds; the smallest one that holds the first class left is found by integer programming and taken as often as it
    goes. Deterministic: within a kind the lowest classes go first.

    Args:
        constraints: For each constraint its parts, each an array of class ids; 0 marks channels that stay.
    """
    constraints, where = _distinct(constraints)
    vectors: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
    for c, parts in enumerate(constraints):
        for p, part in enumerate(parts):
            for label in part.tolist():
                if label:
                    vectors[label][(c, p)] = vectors[label].get((c, p), 0) + 1
    kinds: dict[Vector, list[int]] = defaultdict(list)
    for label in sorted(vectors):
        kinds[tuple(sorted((c, p, n) for (c, p), n in vectors[label].items()))].append(label)
    sizes = [len(parts) for parts in constraints]
    found: list[list[int]] = []
    alone: dict[int, int] = {}
    for component in _components(list(kinds)):
        left = {v: list(kinds[v]) for v in component}
        while any(left.values()):
            first = min((v for v in component if left[v]), key=lambda v: left[v][0])
            counts = _smallest(component, {v: len(x) for v, x in left.items()}, first, sizes)
            if counts is None:
                alone.update((label, where[first[0][0]]) for label in left[first])
                left[first] = []
                continue
            for _ in range(min(len(left[v]) // n for v, n in counts.items())):
                bundle = []
                for v, n in counts.items():
                    bundle += left[v][:n]
                    del left[v][:n]
                found.append(sorted(bundle))
    return sorted(found), alone


def _distinct(constraints: Sequence[Parts]) -> tuple[list[Parts], list[int]]:
    """The constraints without repeats, and for each the index it first had."""
    seen: dict[tuple[bytes, ...], int] = {}
    for k, parts in enumerate(constraints):
        seen.setdefault(tuple(sorted(np.sort(p).tobytes() for p in parts)), k)
    return [constraints[k] for k in seen.values()], list(seen.values())


def _components(kinds: list[Vector]) -> list[list[Vector]]:
    """Kinds that share constraints, directly or through others."""
    group: dict[int, set[int]] = {}
    for v in kinds:
        merged = {c for c, _, _ in v}
        for c in list(merged):
            merged |= group.get(c, set())
        for c in merged:
            group[c] = merged
    out: dict[int, list[Vector]] = defaultdict(list)
    for v in kinds:
        out[min(group[v[0][0]])].append(v)
    return list(out.values())


def _smallest(
    kinds: list[Vector], available: dict[Vector, int], first: Vector, sizes: Sequence[int]
) -> dict[Vector, int] | None:
    """How many of each kind the smallest balanced bundle with one of `first` takes, None if there is none."""
    used = sorted({c for v in kinds for c, _, _ in v})
    if len(used) == 1 and all(len(v) == 1 and v[0][2] == first[0][2] for v in kinds):
        by_part = {v[0][1]: v for v in kinds if available[v]}
        return dict.fromkeys(by_part.values(), 1) if len(by_part) == sizes[used[0]] else None
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import, needed by few networks

    live = [v for v in kinds if available[v]]
    column = {v: i for i, v in enumerate(live)}
    level = {c: len(live) + i for i, c in enumerate(used)}
    rows = {(c, p): i for i, (c, p) in enumerate((c, p) for c in used for p in range(sizes[c]))}
    matrix = np.zeros((len(rows), len(live) + len(used)))
    for v in live:
        for c, p, n in v:
            matrix[rows[c, p], column[v]] = n
    for (c, _), i in rows.items():
        matrix[i, level[c]] = -1  # what every part of the constraint gives
    low = np.zeros(matrix.shape[1])
    low[column[first]] = 1
    high = np.asarray([float(available[v]) for v in live] + [np.inf] * len(used))
    weights = np.asarray([1.0] * len(live) + [0.0] * len(used))
    result = milp(
        weights,
        constraints=LinearConstraint(matrix, 0, 0),
        integrality=np.ones(matrix.shape[1]),
        bounds=Bounds(low, high),
        options={"time_limit": 20.0},
    )
    if result.x is None:
        return None
    counts = {v: round(float(result.x[column[v]])) for v in live}
    return {v: n for v, n in counts.items() if n}
