"""Captioned films and strips: content, duration and size."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

import infer
import video
import windows
from runtime import start
from runtime.caption_files import CaptionFile
from runtime.errors import UserError
from runtime.feature_cache import Settings
from viz import attention_map, draw_text, films, strips, subtitles

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
FontBuilder = pytest.importorskip("fontTools.fontBuilder").FontBuilder  # matplotlib needs fontTools
TTGlyphPen = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen
LONG = "pretending to take something out of something but nothing is really in it at all, is it"


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """4 s in the size of SSv2's clips, with noise that hardly compresses."""
    path = tmp_path_factory.mktemp("films") / "noisy.webm"
    return film(path, 48, lambda n, rng: rng.integers(0, 256, (240, 427, 3)))


def film(path, frames, picture, rate=12, codec="libvpx-vp9"):
    rng = np.random.default_rng(0)
    # at its default speed VP9 takes 9 s to encode noise
    options = {"crf": "40", "deadline": "realtime", "cpu-used": "8"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = picture(0, rng).shape[:2]
        stream.pix_fmt = "yuv420p"
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(n, rng).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def captioned(caption, path="", **other):
    """The result of infer.py for a clip with one window."""
    spans = [{"start": 0.0, "end": 1.0, "caption": caption}]
    return {"path": str(path), "windows": spans} | other


def write_captions(folder, *results):
    """Write a captions.jsonl and return its name."""
    (folder / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    return str(folder / "captions.jsonl")


def grey(n, rng):
    return np.full((120, 160, 3), 40 + n % 50)


def pictures(gif):
    """Return [(seconds shown, RGB array)] for the bytes of a GIF."""
    image, found = Image.open(io.BytesIO(gif)), []
    for n in range(image.n_frames):
        image.seek(n)
        found.append((image.info["duration"] / 1000, np.array(image.convert("RGB"))))
    return found


def palettes(data):
    """Count the colour tables of a GIF: the global one and those of single pictures."""
    size = 3 << ((data[10] & 7) + 1)
    at, count = 13 + (size if data[10] & 0x80 else 0), data[10] >> 7
    while data[at] != 0x3B:
        if data[at] == 0x21:  # an extension
            at += 2
        else:  # a picture
            flags = data[at + 9]
            count += flags >> 7
            at += 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
        while data[at]:
            at += data[at] + 1
        at += 1
    return count


def test_a_gif_is_small_and_has_one_palette_and_the_speed_of_its_clip(noisy):
    gif = subtitles.gif(noisy, captioned("holding a potato", reference=LONG))
    assert len(gif) < 1_000_000 and palettes(gif) == 1
    assert abs(sum(seconds for seconds, _ in pictures(gif)) - 4) < 0.15


def test_a_long_film_has_fewer_pictures_per_second(tmp_path):
    path = film(tmp_path / "long.webm", 600, grey)  # 50 s
    shown = pictures(subtitles.gif(path, captioned("nothing happens")))
    assert len(shown) <= subtitles.GIF_FRAMES
    assert abs(sum(seconds for seconds, _ in shown) - 50) < 1


def test_the_caption_and_its_reference_are_below_the_picture(tmp_path):
    path = film(tmp_path / "grey.webm", 12, grey)
    sizes = []
    for result in (captioned("one"), captioned("one", reference="two"), captioned(LONG)):
        picture = pictures(subtitles.gif(path, result))[0][1]
        below = picture[240:]  # 160 x 120 is shown as 320 x 240
        assert picture[:240].max() < 120 and (below > 240).mean() > 0.7
        assert below.min() < 60  # letters
        margin = draw_text.MARGIN
        assert (below[:, :margin] > 240).all() and (below[:, -margin:] > 240).all()
        sizes.append(len(below))
    assert sizes[0] < sizes[1] < sizes[2]


def test_each_window_has_its_caption(tmp_path):
    path = film(tmp_path / "two.webm", 48, grey)
    spans = [
        {"start": 0.0, "end": 2.0, "caption": "a"},
        {"start": 2.0, "end": 4.0, "caption": LONG},
    ]
    shown = pictures(subtitles.gif(path, {"windows": spans}))
    ends = np.cumsum([seconds for seconds, _ in shown])
    dark = np.array([(picture[240:] < 100).sum() for _, picture in shown])
    first, second = dark[ends < 2.05], dark[ends > 2.15]
    assert len({*first}) == len({*second}) == 1 and first[0] * 5 < second[0]


def test_an_mp4_is_h264_and_as_long_as_its_clip(tmp_path, noisy):
    (tmp_path / "film.mp4").write_bytes(subtitles.mp4(noisy, captioned(LONG)))
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    clip = video.decode(tmp_path / "film.mp4", 48)
    assert clip.damage is None and abs(clip.duration - 4) < 0.1
    assert (clip.frames[0][260:] > 240).mean() > 0.6  # the caption, on white
    differs = [np.abs(a - b.astype(float)).mean() for a, b in pairwise(clip.frames)]
    assert min(differs) > 1  # every frame is there


def test_a_window_that_could_not_be_read_has_no_caption(tmp_path):
    """The previous caption stayed on screen."""
    path = film(tmp_path / "gap.webm", 48, grey)
    spans = [{"start": 0.0, "end": 1.0, "caption": "a"}, {"start": 3.0, "end": 4.0, "caption": "b"}]
    shown = pictures(subtitles.gif(path, {"windows": spans}))
    ends = np.cumsum([seconds for seconds, _ in shown])
    dark = np.array([(picture[240:] < 100).sum() for _, picture in shown])
    assert (dark[(ends > 1.3) & (ends < 2.9)] == 0).all()
    assert dark[ends < 0.9].min() > 0 and dark[-1] > 0


def test_extreme_frame_durations(tmp_path):
    """4,000 frames per second and a picture shown for 15 minutes each raised an error."""
    path = film(tmp_path / "fast.mp4", 40, grey, rate=4000, codec="libx264")
    (tmp_path / "out.mp4").write_bytes(subtitles.mp4(path, captioned("fast")))
    assert 5 <= len(list(video.stream(tmp_path / "out.mp4"))) <= 11
    shown = pictures(
        subtitles.encode_gif(
            [Image.new("RGB", (8, 8), c) for c in ("black", "white")], (0.0, 900.0), 1
        )
    )
    assert [seconds for seconds, _ in shown] == [655.35, 1.0]


def test_times_of_an_mp4_are_those_of_its_clip(tmp_path):
    """The encoder reordered frames, which made the track end before its last picture."""
    path = film(tmp_path / "a.webm", 24, grey)
    (tmp_path / "a.mp4").write_bytes(subtitles.mp4(path, captioned("a")))
    times = [[t for t, _ in video.stream(tmp_path / name)] for name in ("a.webm", "a.mp4")]
    assert times[0] == pytest.approx(times[1], abs=2e-3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        track = container.streams.video[0]
        assert float(track.duration * track.time_base) > times[0][-1] + 0.03


@pytest.mark.parametrize(
    ("name", "codec", "kept"), [("a.mkv", "aac", True), ("a.avi", "adpcm_ms", False)]
)
def test_an_mp4_keeps_the_sound_of_its_clip(tmp_path, name, codec, kept):
    """It was lost without a word. Pictures and sound of the clip begin at 0.5 s."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        track = container.add_stream("libx264", rate=10)
        track.width = track.height = 64
        sound = container.add_stream(codec, rate=16000, layout="mono")
        for n in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * n, np.uint8))
            frame.pts, frame.time_base = n + 5, Fraction(1, 10)
            container.mux(track.encode(frame))
            tone = (9000 * np.sin(np.arange(1600) / 8)).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(tone, "s16", "mono")
            samples.sample_rate, samples.pts = 16000, 1600 * n + 8000
            samples.time_base = Fraction(1, 16000)
            container.mux(sound.encode(samples))
        container.mux([*track.encode(), *sound.encode()])
    data = subtitles.mp4(path, captioned("a tone"))
    with av.open(io.BytesIO(data)) as film:
        assert len(film.streams.audio) == kept
        for stream in film.streams if kept else ():
            frames = [*film.decode(stream)]
            film.seek(0)
            assert frames[0].time == pytest.approx(0, abs=0.1), stream
            assert frames[-1].time == pytest.approx(1.9, abs=0.15), stream
        if kept:
            loud = np.abs(np.concatenate([f.to_ndarray()[0] for f in film.decode(audio=0)]))
            assert 0.2 < loud.max() < 0.35 and len(loud) == pytest.approx(32000, rel=0.1)
    # of a clip that ends early, the readable part is kept
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    if name.endswith("mkv"):
        with av.open(io.BytesIO(subtitles.mp4(path, captioned("a tone")))) as film:
            assert 0.5 < sum(1 for _ in film.decode(video=0)) / 20 < 0.9 and film.streams.audio


def test_long_words_are_wrapped_too():
    letters = draw_text.font(14)
    lines = draw_text.wrap(f"{LONG} {'x' * 200} end", 200, letters)
    assert all(letters.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == f"{LONG}{'x' * 200}end".replace(" ", "")
    assert lines[0] == "pretending to take"


def test_letters_of_other_scripts_are_drawn():
    """Pillow's own font shows a box for each."""
    font = draw_text.font(20)
    drawn = {bytes(font.getmask(letter)) for letter in "щψüß"}
    assert len(drawn) == 4 and bytes(font.getmask("\uffff")) not in drawn


CHINESE = "把 iPhone 放在（桌子）上。然后「拿走」杯子，看起来什么都没有发生"


def make_font(path, text):
    """Write a font in which every character of `text` is a black square, and nothing else is."""
    builder = FontBuilder(1000, isTTF=True)
    names = [".notdef", *(f"uni{ord(c):04X}" for c in text)]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(text, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1200, descent=-300)
    builder.setupNameTable({"familyName": f"Test {path.stem}", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(monkeypatch):
    """A function that sets the paths of the installed fonts."""

    def set_fonts(*paths):
        monkeypatch.setattr(draw_text, "installed_fonts", lambda: list(paths))
        draw_text.note_missing.cache_clear()

    return set_fonts


def test_a_font_that_has_the_characters_is_used(tmp_path, installed):
    """Chinese captions were drawn as boxes although a font for them was installed."""
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    han = make_font(tmp_path / "han.ttf", "杯子放")
    installed(str(tmp_path / "damaged.ttf"), make_font(tmp_path / "thai.ttf", "กข"), han)
    assert draw_text.find_fonts("a cup") == ([draw_text.default_font()], set())
    assert draw_text.find_fonts("a 杯子 把") == ([draw_text.default_font(), han], {"把"})
    letters = draw_text.Letters("a 杯子 cup", 20)
    assert [text for _, text in letters.runs("a 杯子 cup")] == ["a ", "杯子 ", "cup"]
    dark = (np.array(draw_text.panel([("杯子", "#000000")], 100, 20)) < 50).mean(-1).sum()
    assert dark == pytest.approx(2 * 16 * 16, rel=0.1)  # two squares
    text, families = draw_text.for_matplotlib("$杯$ 把")
    assert text == rf"\$杯\$ {draw_text.BOX}" and families == ["DejaVu Sans", "Test han"]


def test_missing_characters_are_reported_once(tmp_path, installed, capsys):
    """Boxes were drawn without a note, and matplotlib printed a warning for each character."""
    installed(make_font(tmp_path / "thai.ttf", "กข"))
    for _ in range(2):
        draw_text.warn_missing(["a cup ก \u200b❤\ufe0f", "杯子、把", "កខ"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "CJK" in lines[0] and "KHMER" in lines[1]
    assert "fonts-noto-cjk" in lines[0] and "fonts-noto-core" in lines[1]

    pictures = [draw_text.panel([(t, "#000000")], 200, 20) for t in ("杯子", draw_text.BOX * 2)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    clip = np.zeros((2, 64, 64, 3), np.uint8), np.full((2, 2, 2), 1 / 8)
    attention_map.draw(*clip, Settings(size=64), CHINESE * 3)  # warns not


def test_films_report_missing_characters(tmp_path, installed, capsys):
    installed()
    clips = [film(tmp_path / f"{name}.webm", 12, grey) for name in "ab"]
    path = write_captions(tmp_path, *map(captioned, ("มือ", "杯子"), clips))
    films.main([path, "--videos", str(tmp_path / "v"), "--workers", "0"])
    assert [line.split()[5] for line in capsys.readouterr().err.splitlines()] == ["CJK", "THAI"]


def test_lines_are_broken_between_characters_of_scripts_without_spaces():
    """A Chinese sentence began on a new line, and Thai tone marks and Latin words were torn apart."""
    width = SimpleNamespace(getlength=len)
    assert draw_text.wrap(CHINESE, 10, width) == [
        *("把 iPhone 放", "在（桌子）上。然后", "「拿走」杯子，看起来", "什么都没有发生"),
    ]
    assert draw_text.wrap("reference: 把杯子放下", 13, width) == ["reference: 把杯", "子放下"]
    assert draw_text.wrap("แก้วน้ำ", 3, width) == ["แก้", "วน้", "ำ"]
    assert draw_text.wrap("holding (a cup)", 10, width) == ["holding (a", "cup)"]


def film_flags(world, prepared, *flags):
    videos = ["--videos", str(world / "videos")]
    return [*videos, "--annotations", str(prepared / "annotations"), "--workers", "0", *flags]


def test_films_of_captions_from_infer(world, trained, prepared, tmp_path, capsys):
    """Two clips with the same name get two files. A clip of the data set also shows its label."""
    records = json.loads((prepared / "annotations" / "validation.json").read_text())
    clip = world / "videos" / f"{records[0]['id']}.webm"
    other = Path(shutil.copy(clip, tmp_path))
    broken = tmp_path / "broken.webm"
    broken.write_bytes(b"no film")
    output = tmp_path / "out"
    flags = ["--checkpoint", str(trained), "--workers", "0", "--output", str(output)]
    assert infer.main([str(clip), str(other), str(broken), *flags]) == 3
    capsys.readouterr()
    flags = film_flags(world, prepared, "--gif", "--video")
    assert films.main([str(output / "captions.jsonl"), *flags]) == 3
    printed, name = capsys.readouterr(), clip.stem
    expected = [f"{n}_captioned.{e}" for n in (name, f"{name}-2") for e in ("gif", "mp4")]
    assert printed.out.split() == [str(output / n) for n in expected]
    assert sorted(p.name for p in output.iterdir()) == sorted([*expected, "captions.jsonl"])
    assert printed.err.count(str(broken)) == 2  # the clip, and its name inside the error
    heights = []
    for path in (output / n for n in expected if n.endswith("gif")):
        with Image.open(path) as image:
            heights.append(image.height)
    assert heights[0] > heights[1], "the reference is drawn below the caption"


def test_a_missing_clip_gets_one_line(world, prepared, tmp_path, capsys):
    clip = film(tmp_path / "a.webm", 12, grey)
    path = write_captions(tmp_path, *(captioned("x", p) for p in (tmp_path / "gone.webm", clip)))
    flags = film_flags(world, prepared, "--gif", "--video", "--output", str(tmp_path / "out"))
    assert films.main([path, *flags]) == 3
    first, last = capsys.readouterr().err.splitlines()
    assert "gone.webm" in first and last == "1 of 2 clips failed"
    clip.unlink()
    assert films.main([path, *flags]) == 1


def test_no_two_clips_share_a_file(tmp_path):
    """With a.mkv, a.webm and a real a-2.webm, one film was lost, with exit code 0."""
    names = windows.output_names([Path(p) for p in ("a-2.webm", "a.mkv", "a.webm", "b/a.webm")])
    assert len(set(names)) == 4 and names[:2] == ["a-2", "a"]
    [long] = windows.output_names([Path("ä" * 120 + ".webm")])
    assert len(f".{long}_attention_0000.00-0000.00.png.{'0' * 16}.tmp".encode()) < 255


def test_names_in_an_ascii_locale(monkeypatch, tmp_path):
    """captions.jsonl named Café.webm Caf\\udcc3\\udca9.webm, and so did its film."""
    monkeypatch.setattr(os, "fsencode", lambda n: str(n).encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda n: n.decode("ascii", "surrogateescape"))
    name = os.fsdecode("Café.webm".encode())
    saved = tmp_path / "captions.jsonl"
    CaptionFile(saved, "jsonl").write(captioned("x", f"/{name}"))
    assert json.loads(saved.read_text(encoding="utf-8"))["path"] == "/Café.webm"
    assert films.read_captions(saved)[0]["path"] == f"/{name}"
    assert windows.output_names([Path(name)]) == [Path(name).stem]


def test_a_clip_is_not_replaced_by_the_film_of_another(tmp_path):
    names = "a.webm", "a_captioned.gif"
    path = write_captions(tmp_path, *(captioned("x", tmp_path / name) for name in names))
    with pytest.raises(UserError, match=r"a_captioned\.gif is one of the clips"):
        films.main([path])


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[]", "1", '{"path": "a"}', '{"path": "a", "caption": "x"}'),
        *('{"path": "a", "windows": []}', '{"path": "a", "windows": [{"caption": "x"}]}'),
        '{"path": "a", "windows": "yes"}',
        '{"path": "a", "windows": [{"caption": 1, "start": 0, "end": 1}]}',
        '{"path": "a", "windows": [{"caption": "x", "start": 0, "end": NaN}]}',
        *(r'{"path": "a\u0000b", "error": "x"}', r'{"path": "\ud800", "error": "x"}'),
    ],
)
def test_a_file_without_captions_is_refused(content, tmp_path):
    """Windows that are no list, and a path that no file can have, ended in a traceback."""
    (tmp_path / "captions.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"was not written by infer\.py --output"):
        films.main([str(tmp_path / "captions.jsonl")])
    (tmp_path / "captions.csv").write_text("path,start,end,caption,score,actions\n")
    with pytest.raises(UserError, match=r"is a table; films need the captions\.jsonl"):
        films.main([str(tmp_path / "captions.csv")])


def test_strips_of_predictions(world, prepared, tmp_path, capsys):
    records = json.loads((prepared / "annotations" / "validation.json").read_text())
    entries = [{"image_id": r["id"], "caption": r["label"]} for r in records]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    flags = ["--predictions", str(tmp_path / "p.json"), "--num-samples", "3"]
    flags += film_flags(world, prepared)[:-2]  # strips need no workers
    strips.main([*flags, "--output", str(tmp_path / "new" / "strips.png")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "strips.png")
    with Image.open(tmp_path / "new" / "strips.png") as picture:
        assert picture.width > strips.FRAMES * strips.HEIGHT
        assert picture.height > 3 * strips.HEIGHT


@pytest.mark.parametrize("output", ["strip.xyz", "."])
def test_strips_must_be_a_png(output, tmp_path):
    with pytest.raises(UserError, match=r"must be the name of a \.png file"):
        strips.main(["--predictions", "x", "--output", str(tmp_path / output)])


def test_a_missing_library_is_reported_before_anything_is_read(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "viz.draw_text.find_spec", lambda name: None if name == "PIL" else find(name)
    )
    with pytest.raises(UserError, match=r"PIL is not installed: pip install -e '\.\[viz\]'"):
        films.main(["/nowhere/captions.jsonl"])


def test_decode_workers_do_not_import_torch():
    """torch would add seconds and 200 MB to each worker."""
    code = "import sys, viz.subtitles; sys.exit('torch' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], env=start.environment()).returncode
