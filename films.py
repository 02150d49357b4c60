"""Which scenes of one film are in another, in whatever order: windows, similarities, alignment.

numpy only, but for the picture. Shapes: n windows of film a, m of film b.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Scene:
    """`start_a` to `end_a` seconds of film a are `start_b` to `end_b` of film b; `score`: mean cosine."""

    start_a: float
    end_a: float
    start_b: float
    end_b: float
    score: float


def compare(a, b):
    """Cosines (n, m) of the vectors (n, D) and (m, D) of two films, less what all their windows share."""
    mean = np.concatenate([a, b]).mean(0)
    a, b = (x - mean for x in (a, b))
    norms = (np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    a, b = (x / norm for x, norm in zip((a, b), norms, strict=True))
    return a @ b.T


def clock(seconds):
    """mm:ss.s"""
    return f"{int(seconds // 60):02d}:{seconds % 60:04.1f}"


def threshold(similarity):
    """Half way from what two windows of these films usually have in common to what is the same."""
    return (float(np.median(similarity)) + 1) / 2


def align(similarity, least=None, shortest=1):
    """Runs of windows that follow each other in both films: [(i, j, length)], the best first.

    similarity: (n, m) cosines; least: what a pair of windows must exceed to speak for a match, by
    default `threshold`; shortest: windows that a run must have. Of all runs along a diagonal the one with the largest sum above it is taken,
    then the best that shares no window with it, and so on (local alignment without gaps, after Smith
    and Waterman 1981): scenes may come in any order, and those without a like are left out.
    """
    excess = similarity - (threshold(similarity) if least is None else least)
    found = []
    while True:
        i, j, length, total = best_run(excess)
        if total <= 0:
            return found
        if length < shortest:  # its windows may yet be part of a longer one
            excess[range(i, i + length), range(j, j + length)] = -np.inf
            continue
        found.append((i, j, length))
        excess[i : i + length] = -np.inf
        excess[:, j : j + length] = -np.inf


def best_run(excess):
    """(i, j, length, sum) of the run along a diagonal of (n, m) whose sum is largest."""
    n, m = excess.shape
    sums, lengths = np.zeros(m + 1), np.zeros(m + 1, int)  # of the best run that ends at [i, j - 1]
    best = (0, 0, 0, 0.0)
    for i in range(n):
        goes_on = sums[:-1] > 0
        lengths[1:] = np.where(goes_on, lengths[:-1], 0) + 1
        sums[1:] = np.where(goes_on, sums[:-1], 0) + excess[i]
        j = int(sums[1:].argmax())
        if sums[j + 1] > best[3]:
            length = int(lengths[j + 1])
            best = (i - length + 1, j - length + 1, length, float(sums[j + 1]))
    return best


def scenes(similarity, spans_a, spans_b, least=None):
    """`align` in seconds: a list of `Scene` in the order of film a. spans: [(start, end)] of windows.

    A run must go on for as long as a window: where windows overlap, two that look alike by chance do
    so for a few strides.
    """
    found, shortest = [], 1
    if len(spans_a) > 1:
        (start, end), (following, _) = spans_a[:2]
        shortest = min(math.ceil((end - start) / (following - start)), len(spans_a), len(spans_b))
    for i, j, length in align(similarity, least, shortest):
        cosines = similarity[range(i, i + length), range(j, j + length)]
        found.append(
            Scene(
                spans_a[i][0],
                spans_a[i + length - 1][1],
                spans_b[j][0],
                spans_b[j + length - 1][1],
                float(cosines.mean()),
            )
        )
    return sorted(found, key=lambda scene: scene.start_a)


def as_json(found):
    return [asdict(scene) for scene in found]


def draw(similarity, spans_a, spans_b, found, names):
    """The bytes of a PNG: the similarities of all windows and the scenes on them. names: of a and b."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    edges_a, edges_b = ([*[s for s, _ in spans], spans[-1][1]] for spans in (spans_a, spans_b))
    mesh = panel.pcolormesh(edges_b, edges_a, similarity, cmap="viridis")
    for n, scene in enumerate(found):
        label = "matched" if n == 0 else None
        a, b = (scene.start_a, scene.end_a), (scene.start_b, scene.end_b)
        panel.plot(b, a, color="#d55e00", linewidth=2.5, marker="o", markersize=4, label=label)
    panel.invert_yaxis()
    panel.set(xlabel=f"{names[1]}, seconds", ylabel=f"{names[0]}, seconds")
    figure.colorbar(mesh, label="cosine similarity")
    if found:
        panel.legend(loc="upper right")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()
