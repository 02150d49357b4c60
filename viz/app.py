"""A page in the browser: upload or record a clip, read its caption and see where the model looked.

    python -m viz.app --checkpoint results/demo/best.pt     (after `make demo`; then http://127.0.0.1:7860)

Needs gradio: pip install -e '.[app]'. No network is used, and none can reach it unless --host says so.
Uploads are deleted after an hour, and when it ends.
"""

import runtime.start

import copy
import importlib.util
import io
import os
import tempfile
import threading
from pathlib import Path

import torch

import video
import windows
from checkpoint import load_models, read_checkpoint
from dataset import STYLES, by_hash
from metrics import Templates, fill
from runtime import cli, devices
from runtime.cli import note
from runtime.decode_workers import WorkerPool
from runtime.errors import UserError
from video import VIDEO_EXTENSIONS
from viz import attention_map, films

NEAREST = 5  # templates shown
EXAMPLES = 6
KEPT = (600, 3600)  # seconds: how often uploads are looked through, and how old they may become


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("model")
    cli.add_models(group)
    group = parser.add_argument_group("clips")
    windows.add_flags(group)
    group.add_argument("--max-seconds", type=cli.number(above=0), default=120.0, help="of a clip")
    group.add_argument("--max-megabytes", type=cli.whole(1), default=100, help="of an upload")
    group.add_argument("--examples", default="data/toy/videos", help="folder of clips to offer")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    group.add_argument("--port", type=cli.whole(1, 65535), default=7860, help="of the page")
    cli.add_common(parser, workers=1)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    checkpoint = read_checkpoint(args.checkpoint)
    encoder, captioner = load_models(
        checkpoint, *devices.resolve(args.device, args.dtype), args.encoder, args.lm
    )
    for name in ("gradio", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is missing: pip install -e '.[app]'", code=1)
    look = Look(encoder, captioner, checkpoint.get("templates", []), args)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        serve(page(look, example_clips(Path(args.examples), args.seed), args), args)


def serve(blocks, args):
    """Answer until a signal ends the script. Raises UserError where it cannot listen."""
    try:
        blocks.launch(
            server_name=args.host,
            server_port=args.port,
            max_file_size=args.max_megabytes * 2**20,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError:
        raise UserError(
            f"--port {args.port} is taken, or --host {args.host} is no address of this machine:"
            " name another",
            code=1,
        ) from None
    note(f"open http://{args.host}:{args.port} in a browser; Ctrl-C ends it")
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        note(f"WARNING: whoever reaches {args.host} can upload clips")
    while True:
        threading.Event().wait(3600)


def example_clips(folder, seed):
    """Some clips of a folder, drawn by a seed; none where it is not there."""
    clips = folder.iterdir() if folder.is_dir() else []
    names = {path.name: path for path in clips if path.suffix.lower() in VIDEO_EXTENSIONS}
    return [names[name] for name in by_hash(names, seed)[:EXAMPLES]]


class Look:
    """What the page shows of a clip: a call gives the contents of its five outputs.

    templates: the action templates of training, none for captions of one's own; args: of `parse_args`.
    """

    def __init__(self, encoder, captioner, templates, args):
        self.encoder, self.captioner = encoder, captioner
        self.templates, self.args = templates, args

    def __call__(self, path):
        """path: of an upload, or None. Returns (message, label, sentence, rows of templates, picture)."""
        if path is None:
            return "", "", "", [], None
        path = Path(path)
        try:
            pairs = self.windows(path)
        except UserError as error:
            return str(error), "", "", [], None
        result = windows.description(path, [(w, look and look["label"]) for w, look in pairs])
        message = result.get("error") or result.get("warning") or ""
        # where it lies on the server is nobody's business
        message = message.replace(str(path), path.name)
        looks = [look for _, look in pairs if look]
        if not looks:
            return message, "", "", [], None
        said = [
            "\n".join(f"{w['time']}  {w[style]}" if len(pairs) > 1 else w[style] for w in looks)
            for style in STYLES
        ]
        templates = [[*row, w["time"]] for w in looks for row in w["templates"]]
        return message, *said, templates, films.stacked([w["picture"] for w in looks])

    def windows(self, path):
        """[(`Window`, what is shown of it or None)], in order. Raises UserError for too long a clip."""
        with WorkerPool(self.args.workers, self.args.timeout) as pool:
            info = pool.call(video.probe, path)
        if isinstance(info, video.Info) and info.duration > self.args.max_seconds:
            raise UserError(
                f"{path.name} takes {info.duration:,.0f} s, this page up to {self.args.max_seconds:g}:"
                " cut it, or use infer.py"
            )
        pairs = []
        for batch in windows.read([path], self.encoder, windows.Windowing.of(self.args)):
            sound = [w for w in batch if not w.error]
            looks = iter(self.batch(sound) if sound else [])
            pairs += [(w, None if w.error else next(looks)) for w in batch]
        return pairs

    def batch(self, sound):
        """Captions, templates and pictures of windows without error."""
        from PIL import Image

        captioner = self.captioner
        features = windows.features(sound, captioner.device)
        with torch.inference_mode():
            cache = captioner.prefix(**features)
        said = {style: captioner.generate(copy.deepcopy(cache), style) for style in STYLES}
        maps = attention_map.mass(captioner.qformer, features)
        for n, w in enumerate(sound):
            one = {k: v[n : n + 1] for k, v in features.items()}
            picture = attention_map.draw(w.frames, maps[n], self.encoder.settings, said["label"][n])
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
