"""Draw the cross-attention of the queries over each window of a clip.

    python -m viz.attention_map clip.webm folder/ --checkpoint results/ssv2/best.pt

Writes <name>_attention.png to --output, or <name>_attention_<start>-<end>.png for each window of a
longer clip, and prints the path of each. Exit code 3 if some clips failed, 1 if all did. Needs
matplotlib: pip install -e '.[viz]'.

The encoder mixes information between tokens, so attention to a token may be due to its surroundings.
"""

import runtime.start

import io
from itertools import groupby

import numpy as np
import torch

import windows
from checkpoint import load_models, read_checkpoint
from dataset import STYLES
from encoder import transform
from runtime import cli, devices
from runtime.cli import note
from runtime.clip_files import find_clips
from runtime.errors import DONE, FAILED, PARTIAL
from runtime.files import write_atomic
from runtime.names import counted
from viz import draw_text

COLUMNS = 8  # time steps drawn
DPI, TITLE = 100, 12  # pixels per inch; font size in points


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "clips", nargs="+", metavar="CLIP", help="video files, or folders of them (recursive)"
    )
    cli.add_models(parser.add_argument_group("model"))
    group = parser.add_argument_group("clips")
    group.add_argument(
        "--style", choices=STYLES, default="label", help="style of the caption above the picture"
    )
    windows.add_flags(group)
    parser.add_argument(
        "--output",
        default="results/attention",
        help="folder to write the pictures to",
    )
    cli.add_common(parser, workers=2)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    draw_text.require()
    paths = find_clips(args.clips)[: args.limit]
    output = cli.output_folder(args.output, "--output")
    checkpoint = read_checkpoint(args.checkpoint)
    device, dtype = devices.resolve(args.device, args.dtype)
    encoder, captioner = load_models(checkpoint, device, dtype, args.encoder, args.lm)
    names = windows.output_names(paths)
    output.mkdir(parents=True, exist_ok=True)

    def explained():
        """Save the picture of every window and yield (`Window`, its caption or None if it failed)."""
        for batch in windows.read(paths, encoder, windows.Windowing.of(args)):
            for w, caption, picture in explain(batch, encoder, captioner, args.style):
                if picture:
                    span = "" if w.alone else f"_{w.start:.2f}-{w.end:.2f}"
                    path = output / f"{names[w.file]}_attention{span}.png"
                    write_atomic(path, picture)
                    print(path, flush=True)
                w.frames = w.stored = None  # a long film has many windows
                yield w, caption

    failed = 0
    for n, group in groupby(explained(), key=lambda pair: pair[0].file):
        result = windows.description(paths[n], list(group))
        failed += "error" in result
        if problem := result.get("error") or result.get("warning"):
            note(problem if str(paths[n]) in problem else f"{paths[n]}: {problem}")
    if failed:
        note(f"{failed} of {counted(len(paths), 'clip')} failed")
    return FAILED if failed == len(paths) else PARTIAL if failed else DONE


def explain(batch, encoder, captioner, style):
    """Yield (`Window`, caption, PNG bytes) for each window; the last two are None if it failed."""
    decoded, explained = [w for w in batch if not w.error], iter(())
    if decoded:
        features = windows.features(decoded, captioner.device)
        explained = zip(
            captioner.captions(features, style), mass(captioner.qformer, features), strict=True
        )
    for w in batch:
        caption, share = (None, None) if w.error else next(explained)
        yield w, caption, None if w.error else picture(w, share, encoder.settings, caption)


def picture(w, share, settings, caption):
    """Draw a `Window`, see `draw`. The title has its times, unless it is the whole clip."""
    title = caption if w.alone else f"{w.start:.1f} - {w.end:.1f} s: {caption}"
    return draw(w.frames, share, settings, title, (w.start, w.end))


def mass(qformer, batch):
    """Compute each token's share of the cross-attention, averaged over blocks, heads and queries.

    batch: `features` (B, N, E), `scale`, `offset` (B, E). Returns float32 (B, T, H, W); each clip's
    shares add up to 1.
    """
    weights = qformer.attention(batch["features"], batch["scale"], batch["offset"])
    return weights.mean((1, 2, 3)).float().cpu().numpy()  # (B, T, H, W)


def draw(frames, share, settings, title="", span=(0.0, 1.0)):
    """Draw frames, the attention to each of them, and the attention over time. Returns PNG bytes.

    frames: uint8 (F, H, W, 3) of a clip. share: (T, H, W), from `mass`. settings: the manifest's, which
    define the part of a frame that the encoder sees. span: start and end of the frames in seconds.
    Colours show multiples of uniform attention, 1 / (T*H*W).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # what the encoder sees, in the proportions of the clip
    aspect = frames.shape[1] / frames.shape[2] if settings.resize == "squash" else 1.0
    frames = as_encoded(frames, settings)  # (F, S, S, 3)
    moments, height, width = share.shape
    step = (span[1] - span[0]) / moments  # seconds
    times = share.size * share  # 1 is uniform attention
    chosen = sorted({(2 * i + 1) * moments // (2 * COLUMNS) for i in range(COLUMNS)})
    highest = max(2.0, float(np.percentile(times[chosen], 99.5)))

    figure = Figure(figsize=(1.5 * len(chosen) + 1, 2.9 * aspect + 2.1), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, len(chosen), height_ratios=(1, 1, 0.5 / aspect))
    for column, t in enumerate(chosen):
        frame = frames[t * len(frames) // moments]  # the first of a tubelet's frames
        plain, over = (figure.add_subplot(grid[row, column]) for row in (0, 1))
        box = (0, width, height, 0)
        plain.imshow(frame, extent=box, aspect=aspect * width / height)
        over.imshow(frame.mean(-1), extent=box, cmap="gray", vmin=0, vmax=255)
        heat = over.imshow(
            times[t],
            extent=box,
            aspect=aspect * width / height,
            cmap="inferno",
            vmin=0,
            vmax=highest,
            alpha=np.clip(times[t] / highest, 0.1, 0.8),
            interpolation="nearest",
        )
        plain.set_title(f"{span[0] + t * step:.1f} s", fontsize=9)
        for panel in (plain, over):
            panel.set(xticks=[], yticks=[])
        if column == 0:
            plain.set_ylabel("frame")
            over.set_ylabel("attention")
    bar = figure.colorbar(heat, ax=figure.axes[1::2], fraction=0.02, extend="max")
    bar.set_label("x uniform")
    below = figure.add_subplot(grid[2, :])
    starts = span[0] + step * np.arange(moments)
    below.bar(starts, share.sum((1, 2)), 0.8 * step, align="edge", color="#0072b2")
    below.axhline(1 / moments, color="#9a9a9a", linestyle=":", label="uniform")
    highest = 1.4 * share.sum((1, 2)).max()  # room for the legend
    below.set(xlabel="seconds", ylabel="share", xlim=span, ylim=(0, highest))
    below.legend(loc="upper right", fontsize=8)
    letters = draw_text.Letters(title, round(TITLE * DPI / 72))
    lines = draw_text.wrap(title, 0.95 * DPI * figure.get_figwidth(), letters)
    title, family = draw_text.for_matplotlib("\n".join(lines))
    figure.suptitle(title, fontsize=TITLE, family=family)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()


def as_encoded(frames, settings):
    """Crop and resize frames, uint8 (F, H, W, 3), as for the encoder. Returns uint8 (F, S, S, 3)."""
    x = transform(torch.as_tensor(frames), settings.size, settings.resize, settings.mean_std)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in settings.mean_std)  # x: (F, 3, S, S)
    return ((x * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    cli.run(main)
