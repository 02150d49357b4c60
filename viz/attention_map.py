"""Where the queries look: the cross-attention of a clip, drawn over what the encoder saw of it.

infer.py --explain and viz/app.py make these pictures; they need matplotlib: pip install -e '.[viz]'.
A token of V-JEPA 2 knows its surroundings, so weight on a place is weight on what was found around it.
"""

import io

import numpy as np
import torch

from encoder import MEAN, STD, transform

COLUMNS = 8  # moments drawn


def mass(qformer, batch):
    """The share of the cross-attention that falls on each token, over blocks, heads and queries.

    batch: `features` (B, N, E), `scale`, `offset` (B, E). Returns float32 (B, T, H, W); each clip's
    adds up to 1.
    """
    weights = qformer.attention(batch["features"], batch["scale"], batch["offset"])
    return weights.mean((1, 2, 3)).float().cpu().numpy()  # (B, T, H, W)


def draw(frames, weights, settings, title=""):
    """The bytes of a PNG. Raises ImportError without matplotlib.

    frames: uint8 (F, H, W, 3) of a clip; weights: (T, H, W) of `mass`; settings: the manifest's, which
    say what part of a frame the encoder sees. Colour is in units of even attention, 1 / (T*H*W).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seen = as_encoded(frames, settings)  # (F, S, S, 3)
    moments, height, width = weights.shape
    shape = frames.shape[1] / frames.shape[2] if settings.resize == "squash" else 1.0
    times = weights.size * weights  # 1 is even attention
    chosen = sorted({(2 * i + 1) * moments // (2 * COLUMNS) for i in range(COLUMNS)})
    highest = max(2.0, float(np.percentile(times[chosen], 99.5)))

    figure = Figure(figsize=(1.5 * len(chosen) + 1, 2.9 * shape + 2.1), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, len(chosen), height_ratios=(1, 1, 0.5 / shape))
    for column, t in enumerate(chosen):
        frame = seen[t * len(seen) // moments]  # the first of a tubelet's frames
        plain, over = (figure.add_subplot(grid[row, column]) for row in (0, 1))
        box = (0, width, height, 0)
        plain.imshow(frame, extent=box, aspect=shape * width / height)
        over.imshow(frame.mean(-1), extent=box, cmap="gray", vmin=0, vmax=255)
        heat = over.imshow(
            times[t],
            extent=box,
            aspect=shape * width / height,
            cmap="inferno",
            vmin=0,
            vmax=highest,
            alpha=np.clip(times[t] / highest, 0.1, 0.8),
            interpolation="nearest",
        )
        plain.set_title(f"{100 * t // moments} %", fontsize=9)
        for panel in (plain, over):
            panel.set(xticks=[], yticks=[])
        if column == 0:
            plain.set_ylabel("frame")
            over.set_ylabel("attention")
    bar = figure.colorbar(heat, ax=figure.axes[1::2], fraction=0.02, extend="max")
    bar.set_label("times even")
    below = figure.add_subplot(grid[2, :])
    below.bar(range(moments), weights.sum((1, 2)), color="#0072b2")
    below.axhline(1 / moments, color="#9a9a9a", linestyle=":", label="even")
    below.set(xlabel="moment of the clip (tubelets)", ylabel="share")
    below.set(xticks=range(moments), xlim=(-0.5, moments - 0.5))
    below.legend(loc="upper right", fontsize=8)
    figure.suptitle(title.replace("$", r"\$"), wrap=True)  # between two of them is no mathematics
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def as_encoded(frames, settings):
    """uint8 (F, H, W, 3) -> what the encoder sees of it, uint8 (F, S, S, 3)."""
    x = transform(torch.as_tensor(frames), settings.size, settings.resize)  # (F, 3, S, S)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((x * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
