"""video.py on clips written by PyAV: chosen frames, damaged files, windows and workers."""

from runtime.start import environment

import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torture import odd_clips
from torture.odd_clips import LOSSLESS, damage, grey, noise, rotate, write_sound

import video
from runtime import clip_files, containers
from runtime.decode_workers import WorkerPool
from runtime.errors import UserError, VideoError
from video import decode, frame_indices, probe, window_spans
from windows import Windowing, description, read

av = pytest.importorskip("av")


def write(*args, **kwargs):
    try:
        return odd_clips.write(*args, **kwargs)
    except ValueError as error:
        pytest.skip(f"this ffmpeg has no such encoder: {error}")


def numbers(clip):
    """Return the frame numbers, read from the brightness of the frames."""
    return np.round((clip.frames.mean((1, 2, 3)) - 20) / 4).astype(int).tolist()


def both(path, num_frames, *window):
    """Decode with both decoders and check that they agree byte for byte."""
    pytest.importorskip("decord")
    one = decode(path, num_frames, *window, backend="decord")
    two = decode(path, num_frames, *window, backend="pyav")
    assert (one.decoder, two.decoder) == ("decord", "pyav")
    np.testing.assert_array_equal(one.frames, two.frames)
    return one


# ---- which frames --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 500])
def test_indices_are_bin_centres(n):
    chosen = frame_indices(n, 32)
    assert chosen.shape == (32,) and chosen[0] >= 0 and chosen[-1] < n
    assert (np.diff(chosen) >= 0).all() and np.ptp(np.diff(chosen)) <= 1
    assert chosen.tolist() == [int((i + 0.5) * n / 32) for i in range(32)]
    if n <= 32:
        assert set(chosen) == set(range(n))
    if n == 32:
        assert chosen.tolist() == list(range(32))


def test_no_frames_is_an_error():
    with pytest.raises(ValueError):
        frame_indices(0, 32)


def test_the_chosen_frames_are_decoded(tmp_path):
    clip = both(write(tmp_path / "a.webm"), 8)
    assert numbers(clip) == frame_indices(48, 8).tolist()
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (8, 48, 64, 3)
    assert clip.duration == pytest.approx(4, abs=1e-3) and clip.damage is None


def test_short_clip_repeats_frames_and_never_pads_with_black(tmp_path):
    clip = both(write(tmp_path / "a.webm", n=5), 16)
    assert numbers(clip) == frame_indices(5, 16).tolist()


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_window_takes_frames_by_timestamp(tmp_path, backend):
    path = write(tmp_path / "a.webm", options={**LOSSLESS, "g": "12"})
    if backend == "decord":
        pytest.importorskip("decord")
    for start, end in [(0, 1), (1.5, 2.5), (3, 4), (3.2, None), (None, 0.5)]:
        inside = [i for i in range(48) if (start or 0) <= i / 12 + 1e-3 < (end or 9)]
        clip = decode(path, len(inside), start, end, backend)
        assert numbers(clip) == inside and clip.damage is None


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libx264"])
def test_decoders_agree_byte_for_byte(tmp_path, codec):
    path = write(tmp_path / "a.mkv", frame=noise, codec=codec, options={"g": "12"})
    both(path, 32)
    both(path, 8, 1.3, 2.9)


def test_odd_heights_are_not_given_to_decord(tmp_path):
    """At odd heights decord's older scaler misplaces chroma."""
    for width, height in [(37, 29), (37, 28)]:
        path = write(tmp_path / "a.webm", n=6, frame=lambda i, s=(width, height): noise(i, *s))
        clip = decode(path, 6)
        assert clip.frames.shape == (6, height, width, 3)
        np.testing.assert_array_equal(clip.frames, decode(path, 6, backend="pyav").frames)


def test_seeking_and_vp8_alt_ref(tmp_path):
    """VP8 may store packets that show nothing, so that counting packets would be wrong."""
    options = {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "2M", "g": "12"}
    path = write(tmp_path / "a.webm", codec="libvpx", options=options)
    assert numbers(decode(path, 48)) == list(range(48))
    assert numbers(decode(path, 12, 2, 3)) == list(range(24, 36))


def test_window_between_two_frames_shows_the_frame_on_screen(tmp_path):
    path = write(tmp_path / "a.webm", n=4, pts=[0, 100, 200, 5000])
    assert numbers(both(path, 2, 2, 4)) == [2, 2]
    with pytest.raises(VideoError) as error:
        decode(path, 2, 60, 70)
    # a wrong `start` in the annotations was called a truncated file
    assert error.value.reason == "empty" and "before 60-70 s" in str(error.value)


def test_large_clips_bypass_decord(tmp_path, monkeypatch):
    """decord decodes ahead without bound, so that a long 4K clip would fill the memory."""
    path = write(tmp_path / "a.webm", n=4)
    monkeypatch.setattr(video, "DECORD_BYTES", 1000)
    assert decode(path, 4).decoder == "pyav"


def test_pyav_is_used_without_decord(tmp_path, monkeypatch):
    path = write(tmp_path / "a.webm", n=4)
    monkeypatch.setitem(sys.modules, "decord", None)  # import decord now raises ImportError
    assert decode(path, 4).decoder == "pyav"
    with pytest.raises(VideoError):
        decode(path, 4, backend="decord")


# ---- unusual and damaged files ---------------------------------------------------------------


@pytest.mark.parametrize("where", [(0.5, 1, True), (0.5, 1), (0.4, 0.6)])
def test_missing_part_of_a_webm_is_noticed(tmp_path, where):
    """Every decoder returns 24 of 48 frames of a half-downloaded clip without an error."""
    path = damage(write(tmp_path / "a.webm", frame=noise, options={"b": "1M"}), *where)
    for backend in ("auto", "pyav"):
        assert decode(path, 8, backend=backend).damage
    assert decode(path, 8, 0, 4).damage
    assert decode(path, 8, 0, 1).damage is None


@pytest.mark.parametrize("where", [(0.5, 1, True), (0.5, 1), (0.4, 0.6)])
def test_damage_in_an_mp4_is_noticed(tmp_path, where):
    """decord returns concealed H.264 frames as if they were intact, at any fault_tol."""
    path = write(tmp_path / "a.mp4", frame=noise, codec="libx264", movflags="faststart")
    clip = decode(damage(path, *where), 8)
    assert clip.damage and clip.decoder == "pyav"


def test_cut_mp4_with_its_index_at_the_end_is_unreadable(tmp_path):
    path = damage(write(tmp_path / "a.mp4", codec="libx264", frame=noise), 0.5, 1, cut=True)
    with pytest.raises(VideoError) as error:
        decode(path, 8)
    assert error.value.reason == "unreadable"


def test_undecodable_packet_is_damage_not_a_repeated_frame(tmp_path):
    path = write(tmp_path / "a.webm", frame=noise, options={"b": "1M"})
    with av.open(str(path)) as container:
        packet = [bytes(p) for p in container.demux(video=0)][20]
    path.write_bytes(path.read_bytes().replace(packet, b"\xff" * 12 + packet[12:]))
    clip = decode(path, 48)
    assert clip.damage and clip.decoder == "pyav" and len(clip.frames) == 48


@pytest.mark.parametrize("suffix, codec", [("webm", "libvpx-vp9"), ("mp4", "libx264")])
def test_intact_clip_of_variable_rate_is_not_called_truncated(tmp_path, suffix, codec):
    """`frames < duration x rate` also holds for phone and screen recordings that dropped frames."""
    pts = [0, 33, 66, 100, 1500, 1533, 1566, 3000, 3033, 3066, 4500]
    clip = decode(write(tmp_path / f"a.{suffix}", n=11, pts=pts, codec=codec), 11)
    assert clip.damage is None and len(clip.frames) == 11


def test_files_that_are_no_video(tmp_path):
    (tmp_path / "empty.webm").touch()
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 100)
    write_sound(tmp_path / "sound.mkv")
    reasons = {"empty.webm": "empty", "text.mp4": "unreadable", "sound.mkv": "no_video"}
    for name, reason in {**reasons, "absent.webm": "unreadable", ".": "unreadable"}.items():
        for function in (probe, lambda path: decode(path, 4)):
            with pytest.raises(VideoError) as error:
                function(tmp_path / name)
            assert error.value.reason == reason and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_frames(tmp_path, n):
    """decord refuses a clip of a single frame."""
    assert numbers(decode(write(tmp_path / "a.webm", n=n), 4)) == frame_indices(n, 4).tolist()


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_clip_comes_out_upright(tmp_path, degrees):
    """Phones store sideways pictures and a rotation matrix, which PyAV does not apply."""

    def corner(i):  # red in the upper left corner
        image = np.full((64, 128, 3), 128, np.uint8)  # decord fails on widths it would have to pad
        image[:32, :64] = 255, 0, 0
        return image

    path = write(tmp_path / "a.mp4", n=4, frame=corner, codec="libx264")
    rotate(path, degrees)
    for clip in (decode(path, 2), both(path, 2)):
        upright = np.rot90(corner(0), -degrees // 90)
        assert clip.frames.shape[1:] == upright.shape
        assert np.abs(clip.frames[0].astype(int) - upright).mean() < 10
    info = probe(path)
    assert (info.height, info.width) == upright.shape[:2] and info.rotation == (-degrees) % 360


@pytest.mark.parametrize(
    "name, codec, pix",
    [
        ("ten_bit.mp4", "libx264", "yuv420p10le"),
        ("av1.mp4", "libsvtav1", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.avi", "mpeg4", "yuv420p"),
    ],
)
def test_formats_beyond_decord(tmp_path, name, codec, pix):
    clip = decode(write(tmp_path / name, n=24, codec=codec, pix=pix), 6)
    assert clip.decoder == "pyav" and clip.damage is None
    assert np.abs(np.array(numbers(clip)) - frame_indices(24, 6)).max() <= 3  # gif: few greys
    assert clip.duration == pytest.approx(2, abs=0.1)


def test_large_frames_are_downscaled(tmp_path):
    """With 4K files, look-ahead kept 24 clips of 0.8 GB each in memory."""
    path = write(tmp_path / "a.mp4", n=2, frame=lambda i: grey(i, 1920, 1080), codec="libx264")
    clip = decode(path, 2)
    assert clip.frames.shape == (2, 540, 960, 3) and numbers(clip) == [0, 1]
    assert (probe(path).height, probe(path).width) == (1080, 1920)


def test_probe_reads_the_header(tmp_path):
    info = probe(write(tmp_path / "a:b %d.webm"))
    assert info == video.Info(pytest.approx(4.0, abs=1e-3), 64, 48, 0)


# ---- headers that are wrong ----------------------------------------------------------------


def claim(path, seconds):
    """Make the header of a 4 s WebM declare another duration."""
    data = path.read_bytes()
    assert data.count(b"00:00:04.") == 1
    path.write_bytes(data.replace(b"00:00:04.", seconds + b"."))
    return path


def test_frames_after_the_declared_end_are_read(tmp_path):
    """The header of a 20 s film declared 7 s. The film was captioned as 7 s long, without a message."""
    path = claim(write(tmp_path / "a.webm"), b"00:00:01")
    assert probe(path).duration == pytest.approx(4, abs=0.01)
    assert decode(path, 8).damage is None and numbers(decode(path, 2, 3, 4)) == [39, 45]


def test_a_header_that_declares_more_means_truncation(tmp_path):
    path = claim(write(tmp_path / "a.webm"), b"00:00:09")
    assert probe(path).duration == pytest.approx(9)
    reason, text = decode(path, 8).damage
    assert reason == "truncated" and "ends at 4.00 s" in text and "declares 9.00 s" in text


def test_an_implausible_header_is_reported_with_the_last_window(tmp_path):
    """A film of 20 s whose header declared 99 hours got windows over 20 s, without a message."""
    path = claim(write(tmp_path / "a.webm"), b"99:00:00")
    length = probe(path).duration
    assert length == pytest.approx(4, abs=0.01)
    assert decode(path, 8, 0, 2).damage is None
    assert "declares 356,400.00 s" in decode(path, 8, 2, length).damage[1]


CONTAINERS = {
    "a.mpg": "mpeg2video",
    "a.vob": "mpeg2video",
    "a.m1v": "mpeg1video",
    "a.ts": "libx264",
    "a.flv": "flv1",
    "a.wmv": "wmv2",
    "a.avi": "libx264",
    "a.mkv": "libx264",
    "a.mov": "libx264",
}


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_is_read_to_its_last_frame(tmp_path, name, start):
    """MPEG program streams lost up to a second, raw MPEG was 0.002 s long or "truncated", and WMV and
    AVI whose first frame was at 5 s lacked their last 5 s."""
    options = (
        {"b": "4k", "minrate": "4k", "maxrate": "4k", "bufsize": "40k"} if "m1v" in name else {}
    )
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        track = container.add_stream(CONTAINERS[name], rate=24, options=options)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for i in range(48):
            image = av.VideoFrame.from_ndarray(grey(i), format="rgb24")
            image.pts, image.time_base = i + start * 24, Fraction(1, 24)
            container.mux(track.encode(image))
        container.mux(track.encode())
    length = probe(path).duration
    assert 1.9 < length < 2.1 or (name, start) == ("a.avi", 5)
    assert decode(path, 48).damage is None
    last = numbers(decode(path, 4, length - 0.5, length))
    assert abs(last[0] - 37) <= 2 and abs(last[-1] - 46) <= 2


@pytest.mark.parametrize(
    ("name", "codec"), [("a.vob", "mpeg2video"), ("a.ts", "libx264"), ("b.ts", "mpeg2video")]
)
def test_films_that_were_joined_are_read_to_the_end(tmp_path, name, codec):
    """The parts of a DVD joined by `cat` have two frames at each time. The second part was left out, and
    MPEG-TS files joined like this were called corrupt."""
    path = write(tmp_path / name, codec=codec)
    path.write_bytes(2 * path.read_bytes())
    assert probe(path).duration == pytest.approx(8, abs=0.1)
    clip = decode(path, 4, 4, 8)
    assert clip.damage is None
    assert np.abs(np.array(numbers(clip)) - frame_indices(48, 4)).max() <= 1


@pytest.mark.parametrize(
    ("name", "codec", "box"),
    [
        ("a.mp4", "libx264", {}),
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.flv", "flv1", {}),
        ("a.wmv", "wmv2", {}),
    ],
)
def test_a_second_film_that_is_not_read_is_reported(tmp_path, name, codec, box):
    """Of `cat a.mp4 b.mp4` only the first film was captioned, without a message."""
    path = write(tmp_path / name, codec=codec, **box)
    film = path.read_bytes()
    for rest in (b"\0\0\0\x10free12345678", b"TAG" + bytes(125), b"\0\0\0\x18udta" + bytes(16)):
        path.write_bytes(film + rest)
        assert decode(path, 4).damage is None
    path.write_bytes(film + film)
    reason, text = decode(path, 4).damage
    assert reason == "corrupt" and "another film" in text and f"{len(film) / 1e6:,.2f} MB" in text
    assert decode(path, 4, 0, 1).damage is None


def test_a_rotated_webm_is_upright_with_any_decoder(tmp_path):
    """decord knows the rotation of MP4, but not that of WebM."""
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        track = container.add_stream("libvpx-vp9", rate=12, options=LOSSLESS)
        track.width, track.height, track.pix_fmt = 128, 64, "yuv420p"
        track.set_display_rotation(90)
        for i in range(4):
            image = av.VideoFrame.from_ndarray(grey(i, 128, 64), format="rgb24")
            image.pts, image.time_base = i, Fraction(1, 12)
            container.mux(track.encode(image))
        container.mux(track.encode())
    assert decode(tmp_path / "a.webm", 2).frames.shape == (2, 128, 64, 3)


# ---- early end or damage inside ------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "codec", "where", "reason"),
    [
        ("webm", "libvpx-vp9", (0.5, 1, True), "truncated"),
        ("webm", "libvpx-vp9", (0.5, 1), "truncated"),  # zeros, as in an unfinished download
        ("webm", "libvpx-vp9", (0.4, 0.6), "corrupt"),
        ("mp4", "libx264", (0.5, 1, True), "truncated"),
        ("mp4", "libx264", (0.4, 0.6), "corrupt"),
        ("flv", "flv1", (0.5, 1, True), "truncated"),
        ("mpg", "mpeg2video", (0.4, 0.6), "corrupt"),
        ("mpg", "mpeg2video", (0.5, 1, True), "truncated"),
        ("wmv", "wmv2", (0.5, 1, True), "truncated"),
        ("ts", "libx264", (0.4, 0.6), "corrupt"),
        ("ts", "libx264", (0.5, 1, True), "truncated"),
        ("ts", "mpeg2video", (0.61, 1, True), "truncated"),
        ("ts", "libx264", (0.7, 1), "truncated"),
        ("wmv", "wmv2", (0.95, 1, True), "truncated"),
        ("gif", "gif", (0.5, 1, True), "truncated"),
    ],
)
def test_an_early_end_is_told_from_damage_inside(tmp_path, suffix, codec, where, reason):
    """A clip with damage in its middle "ends before its declared 4.00 s", at 4.00 s. An intact part before
    the end of a truncated MP4 was called damaged, and half of an MPEG or WMV file corrupt or intact."""
    options = {"b": "1M"} if codec == "libvpx-vp9" else {}
    pix = {"pix": "rgb8"} if codec == "gif" else {}
    box = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = write(tmp_path / f"a.{suffix}", frame=noise, codec=codec, options=options, **box, **pix)
    assert decode(path, 8).damage is None
    damage(path, *where)
    found, text = decode(path, 8).damage
    assert found == reason and reason in text
    assert decode(path, 4, 0, 1).damage is None


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_an_mp4_without_its_index_is_named_as_unfinished(tmp_path, share):
    """The usual broken download of a phone's film was "Invalid data found when processing input"."""
    path = damage(write(tmp_path / "a.mp4", frame=noise, codec="libx264"), share, 1, True)
    with pytest.raises(VideoError, match=r"has no index .* interrupted download"):
        decode(path, 4)


def test_a_window_without_decodable_frames_is_corrupt_not_empty(tmp_path):
    path = write(tmp_path / "a.mp4", frame=noise, codec="libx264", movflags="faststart")
    with pytest.raises(VideoError, match="no decodable frame in 3-4 s") as error:
        decode(damage(path, 0.5, 1), 4, 3, 4)
    assert error.value.reason == "corrupt"


# ---- files that refer to other files -------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.m3u8", "a.mp4", "a.webm", "a.sdp", "a.mpd", "a.png", "a%d.jpg"]
)
def test_playlists_and_images_are_never_opened(tmp_path, name):
    """An ffconcat file named .mp4, or an .m3u8, opened any file of the disk that it named."""
    Image = pytest.importorskip("PIL.Image")
    write(tmp_path / "secret.ts", n=4, codec="libx264")
    texts = {
        "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "a.mp4": "ffconcat version 1.0\nfile secret.ts\n",
        "a.webm": "ffconcat version 1.0\nfile secret.ts\n",
        "a.sdp": "v=0\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "a.mpd": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet mimeType="video/mp4">'
        "<Representation><BaseURL>secret.ts</BaseURL></Representation></AdaptationSet></Period></MPD>",
    }
    path = tmp_path / name
    if name in texts:
        path.write_text(texts[name])
    else:
        Image.fromarray(grey(0)).save(path)
    for backend in ("auto", "decord", "pyav"):
        with pytest.raises(VideoError, match=r"playlists, lists of files|Invalid data") as error:
            decode(path, 4, backend=backend)
        assert error.value.reason == "unreadable"


def test_names_are_no_protocols(tmp_path, monkeypatch):
    """decord took a file name such as `concat:a|b` for a list of files to open."""
    monkeypatch.chdir(tmp_path)
    both(write(tmp_path / "a.webm").rename("subfile,,start,0,end,0,,:a.webm"), 4)


# ---- which files are clips -----------------------------------------------------------------


def test_folders_are_searched_for_all_containers(tmp_path, capsys):
    """A folder's .wmv, .ts and linked folders were passed over without a message, and macOS's ._ files
    were taken for clips."""
    films, other = tmp_path / "films", tmp_path / "other"
    (films / "sub").mkdir(parents=True)
    (films / ".cache").mkdir()
    other.mkdir()
    clip = write(tmp_path / "a.ts", n=2, codec="mpeg2video").read_bytes()
    found = ("B.WMV", "a.ts", "sub/no_ending", "sub/x.dat")
    for name in (*found, "._B.WMV", ".cache/c.mp4", "d.json", "../other/e.mp4"):
        (films / name).write_bytes(clip)
    (films / "f.ts").write_text("export const answer = 42\n" * 50)
    os.mkfifo(films / "pipe")
    (films / "loop").symlink_to(films)
    (films / "sub" / "self").symlink_to("self")
    (films / "linked").symlink_to(other)
    (films / "again").symlink_to(other)
    paths = [path.relative_to(films).as_posix() for path in clip_files.find_clips([films])]
    assert [name.replace("again/", "linked/") for name in paths] == sorted([*found, "linked/e.mp4"])
    assert (
        "passed over 4 files that are not videos: d.json, f.ts, pipe, …" in capsys.readouterr().err
    )


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """It counted as a file that is not a video, and its clips were missing from a run that ended with 0."""
    listed = clip_files.visible

    def visible(folder):
        if folder.name in ("private", "lost+found"):
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(clip_files, "visible", visible)
    (tmp_path / "a.mp4").touch()
    (tmp_path / "lost+found").mkdir()  # unreadable on most disks
    assert clip_files.find_clips([tmp_path]) == [tmp_path / "a.mp4"]
    (tmp_path / "private").mkdir()
    with pytest.raises(UserError, match="private cannot be read: Permission denied"):
        clip_files.find_clips([tmp_path])


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_recognised_without_their_ending(tmp_path, name):
    """Films of a DVD and FLV files were passed over if their names had no known ending."""
    write(tmp_path / name, n=12, codec=CONTAINERS[name]).rename(tmp_path / "film")
    assert clip_files.find_clips([tmp_path, tmp_path / "film"]) == [tmp_path / "film"]


def test_a_folder_without_videos_names_what_it_contains(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"no videos, but 1 file that is not a video: a\.txt"):
        clip_files.find_clips([tmp_path])


def test_annotated_clips_may_have_any_ending(tmp_path):
    """Clips named <id>.avi or <id>.MOV were missing, and a folder of folders was "other files"."""
    for name in ("1.avi", "2.MOV", "3.mp4", "3.webm", "._4.mp4"):
        (tmp_path / name).touch()
    records = {i: {"id": i, "video": None} for i in "1234"}
    paths, missing = clip_files.find_files(tmp_path, records)
    assert {i: path.name for i, path in paths.items()} == {
        "1": "1.avi",
        "2": "2.MOV",
        "3": "3.webm",
    }
    assert missing == ["4"]
    (tmp_path / "outer" / "videos").mkdir(parents=True)
    with pytest.raises(UserError, match="subfolders such as videos are not searched"):
        clip_files.find_files(tmp_path / "outer", records)


# ---- windows -------------------------------------------------------------------------------


@pytest.mark.parametrize("duration", [0.5, 6, 6.01, 8.9, 9, 9.1, 12, 12.0001, 61.3, 600])
@pytest.mark.parametrize("window, stride", [(6, 6), (6, 3), (6, 5.5), (6, 20), (0.7, 0.1)])
def test_windows_cover_the_video_without_slivers(duration, window, stride):
    spans = window_spans(duration, window, stride)
    assert spans[0][0] == 0 and spans[-1][1] == duration
    if duration <= window:
        assert spans == [(0, duration)]
    else:
        assert all(0.5 * window <= end - start < 1.5 * window for start, end in spans)
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(spans))
    if stride <= window:
        assert all(b <= a for (_, a), (b, _) in itertools.pairwise(spans))


def test_a_file_with_too_many_windows_does_not_stop_the_others(tmp_path):
    """One file whose timestamps were wrong by days ended the captioning of a whole folder."""
    long = write(tmp_path / "a.webm", n=2, pts=[0, 10**9])
    whole = write(tmp_path / "b.webm", n=2)
    encoder = SimpleNamespace(settings=SimpleNamespace(num_frames=2), stored=lambda clips: clips)
    [[first, second]] = read([long, whole], encoder, Windowing())
    assert "use a larger --stride" in str(first.error) and second.error is None
    results = [description("a", [(w, None if w.error else "text")]) for w in (first, second)]
    assert "100,000 windows" in results[0]["error"]
    assert results[1]["windows"][0]["caption"] == "text"


# ---- many clips ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def workers_find_this_file(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def behave(path):
    """Hang, crash, fail, wait or return the file's name, depending on that name."""
    name = os.path.basename(path)
    if name.startswith("hang"):
        os.mkfifo(path)
        av.open(path)  # in C, where no Python signal handler runs
    if name.startswith("die"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("bug"):
        raise KeyError(name)
    if name.startswith("slow"):
        time.sleep(0.5)
    return name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_hang_and_crash_cost_one_clip_only(tmp_path):
    """decord hangs on some files and crashes on others. Neither may end a run of 220,847 clips."""
    names = ["a", "hang", "b", "die", "c", "bug", "d", "e"]
    jobs = [(i, str(tmp_path / name)) for i, name in enumerate(names)]
    got = list(WorkerPool(2, 1.5).map(behave, jobs))
    assert [key for key, _ in got] == list(range(len(names)))
    answers = [getattr(answer, "reason", answer) for _, answer in got]
    assert answers == ["a", "timeout", "b", "crashed", "c", "crashed", "d", "e"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_header_that_hangs_costs_one_clip(tmp_path):
    """infer.py read headers in its own process, without a time limit."""
    with WorkerPool(1, 1.5) as pool:
        assert pool.call(behave, str(tmp_path / "hang")).reason == "timeout"
        assert pool.call(behave, "b") == "b"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_killed_run_leaves_no_decoder_behind(tmp_path):
    """A decoder that hung ran forever, because it did not notice that its parent had ended."""
    code = """if True:
        import os, sys, threading
        import test_video
        from runtime.decode_workers import WorkerPool
        pool = WorkerPool(1, 60)
        pool.idle.append(pool._start(test_video.behave))
        print(pool.idle[0].pid, flush=True)
        threading.Timer(1, os.kill, (os.getpid(), 9)).start()
        pool.call(test_video.behave, sys.argv[1])"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "hang"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{int(done.stdout)}") and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def half_sent(path):
    """Get killed with part of the answer in the pipe, as when the machine runs out of memory."""
    if path == "die":
        import threading

        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return Endless()
    return path


class Endless:
    def __reduce__(self):
        time.sleep(30)


def test_worker_killed_while_answering_does_not_stop_the_others():
    """pebble's pool shares one pipe, so a worker killed while sending blocked all others."""
    jobs = [(name, name) for name in ("a", "die", "b", "c")]
    got = dict(WorkerPool(2, 20).map(half_sent, jobs))
    assert got.pop("die").reason == "crashed"
    assert got == {"a": "a", "b": "b", "c": "c"}


def test_waiting_for_a_worker_does_not_count_as_decoding(tmp_path):
    jobs = [(i, f"slow{i}") for i in range(4)]  # 2 s of work for one worker
    got = list(WorkerPool(1, 1.2).map(behave, jobs, ahead=4))
    assert [answer for _, answer in got] == [f"slow{i}" for i in range(4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pool_gives_the_same_results_as_decode(tmp_path, workers):
    good, bad = write(tmp_path / "a.webm"), tmp_path / "absent.webm"
    jobs = [("whole", good, 6), ("bad", bad, 6), ("part", good, 6, 1.0, 2.0)]
    got = list(WorkerPool(workers, 60).map(decode, jobs))
    assert [key for key, _ in got] == ["whole", "bad", "part"]
    np.testing.assert_array_equal(got[0][1].frames, decode(good, 6).frames)
    np.testing.assert_array_equal(got[2][1].frames, decode(good, 6, 1.0, 2.0).frames)
    assert got[1][1].reason == "unreadable"


def test_look_ahead_is_bounded_and_closing_kills_the_workers():
    taken = []

    def jobs():
        for i in range(1000):
            taken.append(i)
            yield i, f"clip{i}" if i < 2 else f"slow{i}"

    pool = WorkerPool(2, 60)
    clips = pool.map(behave, jobs(), ahead=4)
    assert next(clips) == (0, "clip0")
    assert len(taken) == 4
    begin = time.monotonic()
    workers = list(pool.all)
    clips.close()
    assert time.monotonic() - begin < 2
    assert workers and all(process.poll() is not None for process in workers)


def test_a_worker_imports_neither_torch_nor_the_script(tmp_path, monkeypatch):
    """With both it would take 245 MB and seconds to start."""
    (tmp_path / "asks.py").write_text("import sys, video\ndef modules(_): return set(sys.modules)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    with WorkerPool(1, 30) as pool:
        imported = pool.call(importlib.import_module("asks").modules, "")
    assert {"video", "numpy"} <= imported
    assert not {"torch", "transformers", "pytest", "preprocess_ssv2"} & imported


def test_import_is_light():
    code = "import sys, video; print({'torch', 'av', 'decord', 'transformers'} & set(sys.modules))"
    root = os.path.dirname(video.__file__)
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root).strip() == b"set()"


# ---- a whole film --------------------------------------------------------------------------


def test_a_stream_gives_every_frame_at_its_time(tmp_path):
    path = write(tmp_path / "a.webm")
    times, frames = zip(*video.stream(path), strict=True)
    np.testing.assert_array_equal(np.stack(frames), decode(path, 48).frames)
    assert times == pytest.approx([n / 12 for n in range(48)], abs=2e-3)


def test_a_stream_with_fewer_frames_keeps_their_times(tmp_path):
    """At 5 of 12 frames per second, each frame is the first at or after a multiple of 0.2 s."""
    times = [time for time, _ in video.stream(write(tmp_path / "a.webm"), rate=5)]
    assert len(times) == 20 and min(np.diff(times)) > 0.15
    assert max(abs(t - n / 5) for n, t in enumerate(times)) < 1 / 12


def test_a_stream_is_upright_and_skips_damage(tmp_path):
    path = write(tmp_path / "a.mp4", codec="libx264")
    rotate(path, 90)
    assert {frame.shape for _, frame in video.stream(path)} == {(64, 48, 3)}
    path = write(tmp_path / "b.webm", frame=noise)
    damage(path, 0.5, 1, cut=True)
    assert 0 < len(list(video.stream(path))) < 48


def test_a_stream_that_appears_late_does_not_end_in_an_error():
    """A film with bytes of another inside gave "crashed: IndexError", which PyAV raises at its end."""

    class Container:
        def demux(self, stream):
            yield from stream
            raise IndexError("list index out of range")

    assert [*containers.read_packets(Container(), [1, 2])] == [1, 2]
