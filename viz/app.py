"""Serve the web demo, a page that captions uploaded or recorded clips and shows where the model looked.

    python -m viz.app --checkpoint results/demo/best.pt     (after `make demo`; then http://127.0.0.1:7860)

Needs gradio: pip install -e '.[app]'. It works offline and is reachable only from this machine unless
--host is set. Uploads are deleted after an hour, and when the script ends.
"""

import runtime.start

import copy
import io
import os
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import torch

import heads
import video
import windows
from checkpoint import load_models, read_checkpoint, world_note
from dataset import STYLES, VALIDATION, by_hash, load_records
from runtime import cli, devices
from runtime.caption_files import formatted
from runtime.cli import note
from runtime.clip_files import is_video
from runtime.decode_workers import WorkerPool
from runtime.errors import FAILED, UserError
from runtime.names import list_files
from runtime.templates import Templates, fill
from viz import attention_map, draw_text
from windows import Windowing

NEAREST = 5  # templates shown
EXAMPLES = 6
DELETE = (600, 3600)  # every 600 s, delete uploads older than 3600 s
# label, sentence, actions, templates, picture and result of a clip that failed
EMPTY = "", "", [], [], None, None


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("model")
    cli.add_models(group)
    parser.set_defaults(checkpoint=os.environ.get("CHECKPOINT", cli.CHECKPOINT))
    group.add_argument(
        "--probe", help="checkpoint of a probe (probe.py); also show the five likeliest actions"
    )
    group = parser.add_argument_group("clips")
    windows.add_flags(group)
    group.add_argument(
        "--max-seconds",
        type=cli.number(above=0),
        default=120,
        help="longest clip, in seconds",
    )
    group.add_argument(
        "--max-megabytes", type=cli.whole(1), default=100, help="largest upload, in MB"
    )
    group.add_argument("--examples", default="data/toy/videos", help="folder of example clips")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 also accepts connections from other machines",
    )
    group.add_argument("--port", type=cli.whole(1, 65535), default=7860, help="port of the page")
    cli.add_common(parser, workers=1, limit=False)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    draw_text.require("gradio", "PIL", "matplotlib", extra="app")
    check_port(args.host, args.port)
    checkpoint = read_checkpoint(args.checkpoint)
    device, dtype = devices.resolve(args.device, args.dtype)
    settings = checkpoint["manifest"].settings
    probe = heads.read_matching_probe(args.probe, "--probe", settings) if args.probe else None
    encoder, captioner = load_models(checkpoint, device, dtype, args.encoder, args.lm)
    templates = checkpoint.get("templates", [])
    recognise = heads.recogniser(probe, device) if probe else None
    windowing = Windowing.of(args)
    look = Look(encoder, captioner, templates, windowing, args.max_seconds, recognise)
    styles = checkpoint.get("trained_styles", STYLES)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        examples = example_clips(Path(args.examples), args.seed)
        blocks = page(look, examples, args.max_megabytes, styles, world_note(checkpoint))
        serve(blocks, args.host, args.port, args.max_megabytes)


def check_port(host, port):
    """Raise UserError if the server could not listen on this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise cannot_listen(host, port, error) from None


def cannot_listen(host, port, error):
    why = error.strerror or error
    return UserError(f"cannot listen on --host {host} --port {port}: {why}", code=FAILED)


def serve(blocks, host, port, max_megabytes):
    """Serve a page until a signal stops the script. Raises UserError if it cannot open the port."""
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=max_megabytes * 2**20,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise cannot_listen(host, port, error) from None
    note(f"open http://{host}:{port} in a browser; Ctrl-C stops the server")
    if host not in ("127.0.0.1", "localhost", "::1"):
        note(f"WARNING: anyone who can reach {host} can upload clips")
    while True:
        threading.Event().wait(3600)


def example_clips(folder, seed):
    """Sample up to EXAMPLES clips of a folder. Returns an empty list if the folder does not exist.

    If there are annotations beside it, clips of the validation split are preferred.
    """
    names, held_out = {path.name: path for path in list_files(folder) if is_video(path)}, set()
    with suppress(UserError):
        held_out = {r["id"] for r in load_records(folder.parent / "annotations", VALIDATION)}
    names = {name: path for name, path in names.items() if path.stem in held_out} or names
    return [names[name] for name in by_hash(names, seed)[:EXAMPLES]]


class Look:
    """Computes what the page shows for a clip.

    templates: the action templates of the training set, or []. windowing: a `Windowing`.
    max_seconds: the length of the longest clip that is accepted. recognise: a function that returns the
    actions in each of a list of stored clips, see `heads.recogniser`, or None.
    """

    def __init__(self, encoder, captioner, templates, windowing, max_seconds, recognise=None):
        self.encoder, self.captioner, self.templates = encoder, captioner, templates
        self.recognise = recognise
        self.windowing, self.max_seconds = windowing, max_seconds

    def __call__(self, path):
        """Return (message, label, sentence, rows of actions, rows of templates, picture, result) for a clip.

        path: the uploaded file, or None if the user has removed it. result: see `windows.description`.
        """
        if path is None:
            return "", *EMPTY
        path = Path(path)
        try:
            pairs = self.windows(path)
        except UserError as error:
            return str(error), *EMPTY
        result = windows.description(path, [(w, look and look["label"]) for w, look in pairs])
        message = result.get("error") or result.get("warning") or ""
        message = message.replace(str(path), path.name)  # do not reveal the server's folders
        looks = [look for _, look in pairs if look]
        if not looks:
            return message, *EMPTY
        captions = [
            "\n".join(f"{w['time']}  {w[style]}" if len(pairs) > 1 else w[style] for w in looks)
            for style in STYLES
        ]
        tables = [
            [[*row, w["time"]] for w in looks for row in w[name]]
            for name in ("actions", "templates")
        ]
        picture = draw_text.stacked([w["picture"] for w in looks])
        return message, *captions, *tables, picture, result | {"path": path.name}

    def windows(self, path):
        """Caption each window of a clip.

        Returns [(`Window`, a dict from `batch` or None if the window failed)] in order. Raises UserError
        if the clip is too long.
        """
        with WorkerPool(self.windowing.workers, self.windowing.timeout) as pool:
            info = pool.call(video.probe, path)
        if isinstance(info, video.Info) and info.duration > self.max_seconds:
            raise UserError(
                f"{path.name} is {info.duration:,.0f} s long; this page accepts up to"
                f" {self.max_seconds:g} s. Shorten it, or use infer.py"
            )
        pairs = []
        for batch in windows.read([path], self.encoder, self.windowing):
            decoded = [w for w in batch if not w.error]
            looks = iter(self.batch(decoded) if decoded else [])
            pairs += [(w, None if w.error else next(looks)) for w in batch]
        return pairs

    def batch(self, decoded):
        """Yield the captions, actions, nearest templates and picture of each window, as a dict."""
        from PIL import Image

        captioner = self.captioner
        features = windows.features(decoded, captioner.device)
        with torch.inference_mode():
            cache = captioner.prefix(**features)
        captions = {style: captioner.generate(copy.deepcopy(cache), style) for style in STYLES}
        if self.recognise:
            windows.add_actions(decoded, self.recognise)
        shares = attention_map.mass(captioner.qformer, features)
        for n, w in enumerate(decoded):
            one = {k: v[n : n + 1] for k, v in features.items()}
            label = captions["label"][n]
            picture = attention_map.picture(w, shares[n], self.encoder.settings, label)
            yield {
                "time": f"{w.start:.1f} - {w.end:.1f} s",
                **{style: texts[n] for style, texts in captions.items()},
                "actions": [[a["action"], round(a["probability"], 3)] for a in w.actions or ()],
                "templates": nearest(captioner, one, label, self.templates),
                "picture": Image.open(io.BytesIO(picture)),
            }


def nearest(captioner, clip, caption, templates):
    """Rank the action templates by their likelihood as labels of one clip.

    clip: its stored features, as a batch of one. Returns [[template, log-likelihood per token]], best
    first. If the caption follows a template, its objects fill the placeholders, because a language model
    that has learned to name objects assigns the word "something" a low probability in any template.
    """
    if not templates:
        return []
    found = Templates(templates).parse(caption)
    texts = [fill(template, found[1] if found else []) for template in templates]
    with torch.inference_mode():
        cache = captioner.prefix(**clip)
    scores = captioner.log_likelihoods(cache, "label", texts)[0]  # (templates,)
    best = scores.topk(min(NEAREST, len(templates)))
    return [
        [templates[i], round(score, 3)]
        for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def caption_files(result):
    """Write the captions of a clip as text and as SRT. Returns both paths, or None twice without a result."""
    if not result:
        return None, None
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    paths = [folder / f"captions.{form}" for form in ("txt", "srt")]
    for path, form in zip(paths, ("text", "srt"), strict=True):
        path.write_text(formatted(result, form), encoding="utf-8", errors="backslashreplace")
    return [*map(str, paths)]


def page(look, examples, max_megabytes, styles=STYLES, remark=""):
    """Build the page, a gradio `Blocks`.

    look: a `Look`. examples: paths of clips. styles: those that the captioner was trained on. remark: a
    sentence about the captioner.
    """
    import gradio

    with gradio.Blocks(title="Video captioner", delete_cache=DELETE) as blocks:
        gradio.Markdown(
            "# Video captioner\nUpload or record a clip of up to"
            f" {look.max_seconds:g} s and {max_megabytes} MB."
        )
        gradio.Textbox(remark, show_label=False, container=False, visible=bool(remark))
        with gradio.Row():
            with gradio.Column():
                clip = gradio.Video(label="clip", sources=["upload", "webcam"], elem_id="clip")
                if examples:
                    gradio.Examples([str(path) for path in examples], clip, label="examples")
            with gradio.Column():
                # a Textbox and not Markdown, because file names may contain Markdown characters
                message = gradio.Textbox(label="message", visible=False, elem_id="message")
                label = gradio.Textbox(label="caption", elem_id="label", buttons=["copy"])
                sentence = gradio.Textbox(
                    label="as a sentence",
                    elem_id="sentence",
                    buttons=["copy"],
                    visible="sentence" in styles,
                )
                with gradio.Row():
                    files = [
                        gradio.DownloadButton(name, visible=False, size="sm")
                        for name in ("captions.txt", "captions.srt")
                    ]
                how = {"wrap": True, "column_widths": ["54%", "20%", "26%"], "interactive": False}
                how |= {"buttons": ["copy"], "max_height": 400}
                actions = gradio.Dataframe(
                    headers=["action", "probability", "time"],
                    label="likeliest actions",
                    visible=look.recognise is not None,
                    elem_id="actions",
                    **how,
                )
                templates = gradio.Dataframe(
                    headers=["template", "score", "time"],
                    label="nearest action templates: log-likelihood per token",
                    visible=bool(look.templates),
                    elem_id="templates",
                    **how,
                )
        gradio.Markdown("Where the queries look:")
        picture = gradio.Image(
            show_label=False, elem_id="picture", buttons=["download", "fullscreen"]
        )

        windows_done = gradio.Progress(track_tqdm=True)  # shows the bar of `windows.read`

        def show(path, progress=windows_done):
            problem, *rest, result = look(path)
            downloads = [gradio.update(value=f, visible=bool(f)) for f in caption_files(result)]
            return gradio.update(value=problem, visible=bool(problem)), *rest, *downloads

        outputs = [message, label, sentence, actions, templates, picture, *files]
        clip.change(show, clip, outputs, api_name="caption", show_progress_on=label)
    return blocks.queue(max_size=20)


if __name__ == "__main__":
    cli.run(main)
