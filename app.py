"""A page in the browser: upload or record a clip, read its caption and see where the model looked.

    python app.py --checkpoint results/demo/best.pt     (after `make demo`; then http://127.0.0.1:7860)

Needs gradio: pip install -e '.[app]'. No network is used, and none can reach it unless --host says so.
Uploads are deleted after an hour.
"""

import importlib.util
import io
import os
from pathlib import Path

import attention
import cli
import render
import windows
from cli import UserError, note
from dataset import STYLES, by_hash
from templates import Templates, fill

NEAREST = 5  # templates shown
EXAMPLES = 6
KEPT = (600, 3600)  # seconds: how often uploads are looked through, and how old they may become


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", default="results/ssv2/best.pt", help=cli.CHECKPOINT)
    group.add_argument("--encoder", help="where the checkpoint's V-JEPA 2 lies, if elsewhere")
    group.add_argument("--lm", help="where the checkpoint's language model lies, if elsewhere")
    group = parser.add_argument_group("clips")
    windows.add_flags(group)
    group.add_argument("--max-seconds", type=cli.number(above=0), default=120.0, help="of a clip")
    group.add_argument("--max-megabytes", type=cli.whole(1), default=100, help="of an upload")
    group.add_argument("--examples", default="data/toy/videos", help="folder of clips to offer")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    group.add_argument("--port", type=cli.whole(1), default=7860, help="of the page")
    cli.add_common(parser, workers=1)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for name in ("gradio", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is missing: pip install -e '.[app]'", code=1)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # says nothing to anybody
    device, dtype = cli.device_and_dtype(args)
    from captioner import from_checkpoint, read_checkpoint
    from encoder import VideoEncoder

    checkpoint = read_checkpoint(args.checkpoint)
    encoder = VideoEncoder.from_manifest(checkpoint["manifest"], device, args.encoder)
    captioner = from_checkpoint(checkpoint, device, dtype, args.lm)
    look = Look(encoder, captioner, checkpoint.get("templates", []), args)
    examples = example_clips(Path(args.examples), args.seed)
    try:
        page(look, examples, args).launch(
            server_name=args.host,
            server_port=args.port,
            max_file_size=args.max_megabytes * 2**20,
            allowed_paths=[str(path.resolve()) for path in examples],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--host {args.host} --port {args.port}: {error}") from None
    note(f"open http://{args.host}:{args.port} in a browser; Ctrl-C ends it")
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        note(f"WARNING: whoever reaches {args.host} can upload clips")
    wait()


def wait():
    """Until a signal ends the script."""
    import threading

    while True:
        threading.Event().wait(3600)


def example_clips(folder, seed):
    """Some clips of a folder, drawn by a seed; none where it is not there."""
    from video import VIDEO_EXTENSIONS

    clips = folder.iterdir() if folder.is_dir() else []
    names = {path.name: path for path in clips if path.suffix.lower() in VIDEO_EXTENSIONS}
    return [names[name] for name in by_hash(names, seed)[:EXAMPLES]]


class Look:
    """What the page shows of a clip: a call gives the contents of its five outputs.

    templates: the action templates of training, none for captions of one's own; args: of `parse_args`.
    """

    def __init__(self, encoder, captioner, templates, args):
        self.encoder, self.captioner, self.templates, self.args = (
            encoder,
            captioner,
            templates,
            args,
        )

    def __call__(self, path):
        """path: of an upload, or None. Returns (message, label, sentence, rows of templates, picture)."""
        if path is None:
            return "", "", "", [], None
        path = Path(path)
        try:
            seen = self.windows(path)
        except UserError as error:
            return str(error), "", "", [], None
        sound = [w for w in seen if isinstance(w, dict)]
        errors = [str(w) for w in seen if not isinstance(w, dict)]
        # where it lies on the server is nobody's business
        message = errors[0].replace(str(path), path.name) if errors else ""
        if not sound:
            return message, "", "", [], None
        said = [
            "\n".join(f"{w['time']}  {w[style]}" if len(seen) > 1 else w[style] for w in sound)
            for style in STYLES
        ]
        templates = [[*row, w["time"]] for w in sound for row in w["templates"]]
        return message, *said, templates, render.stacked([w["picture"] for w in sound])

    def windows(self, path):
        """What is shown of each window, in order, or its VideoError. Raises UserError for too long a clip."""
        import pool
        import video

        crew = pool.Crew(self.args.timeout)
        try:
            info = crew.ask(video.probe, path)
        finally:
            crew.close()
        if isinstance(info, video.Info) and info.duration > self.args.max_seconds:
            raise UserError(
                f"{path.name} takes {info.duration:,.0f} s, this page up to {self.args.max_seconds:g}:"
                " cut it, or use infer.py"
            )
        seen = []
        for batch in windows.read([path], self.encoder, self.args):
            sound = [w for w in batch if not w.error]
            looks = iter(self.batch(sound) if sound else [])
            seen += [w.error or next(looks) for w in batch]
        return seen

    def batch(self, sound):
        """Captions, templates and pictures of windows without error."""
        from PIL import Image

        captioner = self.captioner
        features = windows.features(sound, captioner.device)
        said = {style: captioner.captions(features, style) for style in STYLES}
        maps = attention.mass(captioner.qformer, features)
        for n, w in enumerate(sound):
            one = {k: v[n : n + 1] for k, v in features.items()}
            picture = attention.draw(w.frames, maps[n], self.encoder.settings, said["label"][n])
            yield {
                "time": f"{w.start:.1f} - {w.end:.1f} s",
                **{style: texts[n] for style, texts in said.items()},
                "templates": nearest(captioner, one, said["label"][n], self.templates),
                "picture": Image.open(io.BytesIO(picture)),
            }


def nearest(captioner, batch, caption, templates):
    """The action templates that are likeliest as the label of one clip: [[template, score]].

    score: log-likelihood per token, behind one prefix. The placeholders are filled with what the
    caption names, where it is of a template itself: a language model that has learned to name objects
    finds the word "something" unlikely in any template, the more so the more often it occurs.
    """
    import torch

    if not templates:
        return []
    found = Templates(templates).parse(caption)
    texts = [fill(template, found[1] if found else []) for template in templates]
    with torch.inference_mode():
        cache = captioner.prefix(batch["features"], batch["scale"], batch["offset"])
    scores = captioner.log_likelihoods(cache, "label", texts)[0]  # (templates,)
    best = scores.topk(min(NEAREST, len(templates)))
    return [
        [templates[i], round(score, 3)]
        for score, i in zip(*map(torch.Tensor.tolist, best), strict=True)
    ]


def page(look, examples, args):
    """The page, a gradio `Blocks`."""
    import gradio

    with gradio.Blocks(title="Video captioner", delete_cache=KEPT) as blocks:
        gradio.Markdown(
            "# Video captioner\nUpload or record a clip of up to"
            f" {args.max_seconds:g} s and {args.max_megabytes} MB."
        )
        with gradio.Row():
            with gradio.Column():
                clip = gradio.Video(label="clip", sources=["upload", "webcam"], elem_id="clip")
                if examples:
                    gradio.Examples([str(path) for path in examples], clip, label="examples")
            with gradio.Column():
                # not Markdown: a file's name is text
                message = gradio.Textbox(label="message", visible=False, elem_id="message")
                label = gradio.Textbox(label="caption", elem_id="label")
                sentence = gradio.Textbox(label="as a sentence", elem_id="sentence")
                templates = gradio.Dataframe(
                    headers=["template", "score", "time"],
                    label="nearest action templates: log-likelihood per token",
                    visible=bool(look.templates),
                    wrap=True,
                    column_widths=["60%", "15%", "25%"],
                    interactive=False,
                    elem_id="templates",
                )
        picture = gradio.Image(label="where the queries look", elem_id="picture")

        def show(path):
            problem, *rest = look(path)
            return gradio.update(value=problem, visible=bool(problem)), *rest

        outputs = [message, label, sentence, templates, picture]
        clip.change(show, clip, outputs, api_name="caption", show_progress="minimal")
    return blocks.queue(max_size=20)


if __name__ == "__main__":
    cli.run(main)
