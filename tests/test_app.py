"""The web demo in a real browser, compared with infer.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import until

import infer
import prepare_annotations
import probe
import windows
from runtime.files import write_json
from viz import app
from windows import Windowing

HERE = Path(__file__).parent.parent
LIMITS = {"--max-seconds": "10", "--max-megabytes": "1"}


@pytest.fixture(scope="module")
def probed(prepared, tmp_path_factory):
    """The run folder of a probe."""
    folder = tmp_path_factory.mktemp("probe")
    cached = ["--annotations", prepared / "annotations", "--features", prepared / "features"]
    flags = ["--head", "linear", "--epochs", 1, "--lr", 1e-3, "--workers", 0, "--output", folder]
    assert not probe.main([*map(str, [*cached, *flags])])
    return folder


@pytest.fixture(scope="module")
def address(trained, probed, world, tmp_path_factory):
    """The address of a running viz/app.py. It is stopped by Ctrl-C, which must remove all uploads."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    uploads_folder = tmp_path_factory.mktemp("uploads_folder")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = ["--checkpoint", trained / "best.pt", "--examples", world / "videos", "--port", port]
    flags += ["--probe", probed]
    flags += [flag for pair in LIMITS.items() for flag in pair]
    command = [sys.executable, "-m", "viz.app", *map(str, flags)]
    process = subprocess.Popen(
        command, text=True, cwd=HERE, env=os.environ | {"TMPDIR": str(uploads_folder)}
    )

    def answers():
        assert process.poll() is None, "app.py ended"
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}").status == 200
        except OSError:
            return False

    until(answers, seconds=120)
    yield f"http://127.0.0.1:{port}"
    uploads = [path for path in uploads_folder.rglob("*") if path.is_file()]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert uploads and not any(path.exists() for path in uploads)


@pytest.fixture
def page(browser, address):
    browser.get(address)
    until(lambda: browser.find_elements("css selector", "#clip input[type=file]"))
    return browser


def upload(page, path):
    page.find_element("css selector", "#clip input[type=file]").send_keys(str(path))


def value(page, name):
    return "".join(
        e.get_attribute("value") for e in page.find_elements("css selector", f"#{name} textarea")
    )


def test_an_upload_gets_the_same_captions_as_with_infer(page, world, trained, probed, capsys):
    clip = sorted((world / "videos").glob("*.webm"))[0]
    captions, flags = {}, ["--workers", "0", "--probe", str(probed), "--format", "jsonl"]
    for style in ("label", "sentence"):
        infer.main([str(clip), "--checkpoint", str(trained), "--style", style, *flags])
        [result] = json.loads(capsys.readouterr().out)["windows"]
        captions[style] = result["caption"]
    upload(page, clip)
    until(lambda: value(page, "label"))
    assert {style: value(page, style) for style in captions} == captions
    table = page.find_element("css selector", "#templates")
    until(lambda: table.text.lower().count("[something]") >= app.NEAREST)
    table = page.find_element("css selector", "#actions")
    for action in result["actions"]:
        until(lambda action=action: action["action"] in table.text)
        assert f"{round(action['probability'], 3)}" in table.text
    assert len(result["actions"]) == 5
    picture = "const i = document.querySelector('#picture img'); return i && i.naturalWidth"
    until(lambda: (page.execute_script(picture) or 0) > 500)


def test_a_text_file_gets_an_error_message(page, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a film")
    upload(page, text)
    until(lambda: "Invalid file type: notes.txt" in page.find_element("tag name", "body").text)
    named = tmp_path / "notes.mp4"
    named.write_text("not a film")
    page.refresh()
    until(lambda: page.find_elements("css selector", "#clip input[type=file]"))
    upload(page, named)
    message = until(lambda: value(page, "message"))
    assert message.startswith("notes.mp4 cannot be read as a video") and not value(page, "label")


def test_an_upload_that_is_too_large_is_refused(page, tmp_path):
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(2 * 2**20))
    upload(page, large)
    until(lambda: "exceed the maximum allowed size" in page.find_element("tag name", "body").text)


def test_files_of_the_server_cannot_be_downloaded(address, world, trained):
    for path in ("/etc/hostname", trained / "args.json", world / "toy.json", HERE / "README.md"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")


def test_examples_are_clips_that_were_not_trained_on(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.webm", "b.txt"):
        (tmp_path / "videos" / name).touch()
    assert len(app.example_clips(tmp_path / "videos", 0)) == 2
    (tmp_path / "annotations").mkdir()
    write_json(
        tmp_path / "annotations" / "validation.json", [prepare_annotations.record("b", label="x")]
    )
    assert [p.name for p in app.example_clips(tmp_path / "videos", 0)] == ["b.webm"]


def test_an_example_clip_can_be_captioned(page):
    """The click is scripted because the layout shifts while the example clips load."""
    items = until(lambda: page.find_elements("css selector", ".gallery-item"))
    page.execute_script("arguments[0].click()", items[0])
    until(lambda: value(page, "label"))


@pytest.fixture(scope="module")
def look(trained):
    """The object that the page calls to caption a clip."""
    import torch

    from checkpoint import load_captioner, read_checkpoint
    from encoder import VideoEncoder

    checkpoint, device = read_checkpoint(trained), torch.device("cpu")
    return app.Look(
        VideoEncoder.from_manifest(checkpoint["manifest"], device),
        load_captioner(checkpoint, device, torch.float32),
        checkpoint["templates"],
        Windowing(window=2.0, stride=2.0),
        max_seconds=10.0,
    )


def film(path, seconds):
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=12)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for n in range(12 * seconds):
            picture = np.full((64, 64, 3), 10 + n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_long_clip_has_a_line_for_each_window(look, tmp_path, monkeypatch):
    """The page's progress bar ended at "8/1 window": it shows the total that tqdm's bar was made with."""
    totals = []

    class Bar(windows.tqdm):
        def __init__(self, **kwargs):
            totals.append(kwargs["total"])
            super().__init__(**kwargs)

    monkeypatch.setattr(windows, "tqdm", Bar)
    path = film(tmp_path / "film.webm", 6)
    message, label, sentence, actions, templates, picture, result = look(path)
    times = ["0.0 - 2.0 s", "2.0 - 4.0 s", "4.0 - 6.0 s"]
    for text in (label, sentence):
        assert [line.split("  ")[0] for line in text.splitlines()] == times and message == ""
    assert [row[2] for row in templates] == [t for t in times for _ in range(app.NEAREST)]
    assert picture.height > 3 * 300 and actions == [] and totals == [3]
    assert [w["caption"] for w in result["windows"]] == [
        x.split("  ")[1] for x in label.splitlines()
    ]
    assert result["path"] == "film.webm", "the folder of the upload is not shown"


def test_a_clip_that_is_too_long_is_not_read(look, tmp_path):
    message, label, *_ = look(film(tmp_path / "long.webm", 12))
    assert (
        message
        == "long.webm is 12 s long; this page accepts up to 10 s. Shorten it, or use infer.py"
    )
    assert label == ""


def test_a_truncated_clip_gets_a_message(look, tmp_path):
    """The page captioned the readable half without a message, unlike infer.py."""
    path = film(tmp_path / "cut.webm", 1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    message, label, *_ = look(path)
    assert label and message.startswith("the file is truncated: it ends at ")
    assert message.endswith("; the caption covers the readable part")


def test_messages_do_not_show_the_upload_folder(look, tmp_path):
    path = tmp_path / "silent.mp4"
    path.write_bytes(b"")
    assert look(path)[0] == "silent.mp4 is an empty file"


def test_templates_are_ranked_by_likelihood(look, world, prepared):
    """The best template comes first, and the scores depend on the clip."""
    from dataset import load_records
    from runtime.feature_cache import load_features, stack_stored

    settings, ranks = look.encoder.settings, []
    for record in load_records(prepared / "annotations", "validation")[:2]:
        path = prepared / "features" / "validation" / f"{record['id']}.pt"
        batch = stack_stored([load_features(path, record["id"], settings)])
        rows = app.nearest(look.captioner, batch, record["label"], look.templates)
        scores = [score for _, score in rows]
        assert scores == sorted(scores, reverse=True) and scores[0] < 0
        assert {template for template, _ in rows} <= set(look.templates)
        ranks.append(rows)
    assert ranks[0] != ranks[1]
    assert app.nearest(look.captioner, batch, record["label"], []) == []


def test_the_default_host_is_localhost():
    assert app.parse_args([]).host == "127.0.0.1"
