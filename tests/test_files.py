"""runtime/files.py, runtime/table.py and their users: listings, text encodings and names of files."""

import errno
import json
import os
from unicodedata import normalize
from unittest.mock import Mock

import pytest

from dataset import load_records, unsafe_content
from prepare_annotations import read_labels, record
from runtime import hub, run_folder
from runtime.clip_files import find_files
from runtime.errors import UserError, explain
from runtime.feature_cache import load_manifest, require_features
from runtime.files import read_json, read_text, write_atomic, write_new
from runtime.names import duration, file_size, id_problem, list_names, safe_id
from runtime.table import read_table
from worlds import ssv2_files

CAFE, LONG = "Café 1", "é" * 120


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return folder


# ---- listings --------------------------------------------------------------------------------


def test_a_listing_has_visible_regular_files(tmp_path):
    make(tmp_path, "b.json", "a.JSON", "._b.json", ".a.json.12ab.tmp", "c.txt", "d.json/e.json")
    (tmp_path / "f.json").symlink_to(tmp_path / "b.json")
    (tmp_path / "g.json").symlink_to(tmp_path / "nowhere.json")
    assert list_names(tmp_path, ".json") == ["a.JSON", "b.json", "f.json"]
    assert list_names(tmp_path, ".json", ".txt") == ["a.JSON", "b.json", "c.txt", "f.json"]
    assert list_names(tmp_path / "none") == list_names(tmp_path / "c.txt") == []


def test_hidden_files_of_macos_do_not_change_a_model(tmp_path):
    """A copy made by a Mac had another fingerprint, because of `._model.safetensors`, and was refused."""
    before = hub.fingerprint(make(tmp_path, "config.json", "model.safetensors"))
    assert hub.fingerprint(make(tmp_path, "._model.safetensors")) == before


def test_hidden_files_of_macos_are_not_a_run_or_a_clip(tmp_path):
    """Opening a new folder in the Finder, which adds .DS_Store, made it "already contains a run"."""
    run = make(tmp_path / "run", ".DS_Store")
    assert run_folder.check(run, resume=False, overwrite=False) == run
    make(tmp_path / "world", ".DS_Store")
    ssv2_files.mark_started(tmp_path / "world", {"clips": 1})
    make(tmp_path / "features", "train/._1.pt")
    with pytest.raises(UserError, match="1 of 1 clip of"):
        require_features(tmp_path / "features", "train", [record("._1")])
    with pytest.raises(UserError, match="available splits: test"):
        load_records(make(tmp_path / "annotations", "._train.json", "test.json"), "train")


@pytest.mark.parametrize(
    ("flag", "read"),
    [
        ("--annotations", lambda path: load_records(path, "train")),
        ("--features", load_manifest),
        ("--videos", lambda path: find_files(path, {})),
        ("--labels", read_labels),
        ("--lm", lambda path: hub.find_model(path, "--lm")),
    ],
)
def test_a_file_in_place_of_a_folder_and_the_reverse(tmp_path, flag, read):
    """A file given as --labels "found nothing", and as --videos it was "not found"."""
    with pytest.raises(UserError, match=f"{flag} .*a.json is a file, but must be a folder"):
        read(make(tmp_path, "a.json") / "a.json")
    with pytest.raises(UserError, match=r"captions .* is a folder, but must be a file"):
        read_text(tmp_path, "captions")


# ---- texts -----------------------------------------------------------------------------------


def test_a_byte_order_mark_is_not_part_of_a_text(tmp_path):
    """JSON that Windows had saved with a byte order mark was refused."""
    (tmp_path / "a.json").write_text('{"a": "é"}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json", "labels") == {"a": "é"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "é".encode("utf-16"),
            r"probably UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 '.*a b.json'",
        ),
        ("é".encode("utf-32"), "probably UTF-32"),
        (b"{\0}\0", "probably UTF-16LE"),
        (b"\0{\0}", "probably UTF-16BE"),
        (
            b"a\nCaf\xe9",
            "0xe9 in line 2.* if its language is West European.* iconv -f WINDOWS-1252 -t UTF-8 .* > new.json",
        ),
        (b"PK\3\4\xff\0\0", "is not a text file"),
    ],
)
def test_another_encoding_is_named_with_the_way_to_convert_it(tmp_path, data, message):
    """The message was "'utf-8' codec can't decode byte 0xff in position 0"."""
    (tmp_path / "a b.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "a b.json", "labels")


@pytest.mark.parametrize(
    "text",
    [
        " Video ;CAPTION;note\n\na.mp4;x, y;1\n;;\nb.mp4;z\n",
        '"video"\t"caption"\na.mp4\tx, y\nb.mp4\tz\t\n',
        'video,caption\r\na.mp4,"x, y"\r\nb.mp4,z,,\r\n',
        '[{"Video": "a.mp4", "caption": "x, y"},\n {"video": "b.mp4", "caption": "z"}]',
        '{"video": "a.mp4", "caption": "x, y"}\n\n{"Video ": "b.mp4", "caption": "z"}',
        '{\n "video": "a.mp4",\n "caption": "x, y"\n}\n{\n "video": "b.mp4",\n "caption": "z"\n}\n',
    ],
)
def test_a_table_that_can_be_read_in_one_way_is_read(tmp_path, text):
    """Capitals and spaces in the header, semicolons, tabs, a JSON list and JSON objects of several lines
    each were refused."""
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "mine.txt").write_text(text, encoding=encoding, newline="")
        rows = read_table(tmp_path / "mine.txt", "--captions", ("video", "caption"))
        assert [(r["video"], r["caption"]) for _, r in rows] == [("a.mp4", "x, y"), ("b.mp4", "z")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v,c,c\n1,2,3\n", "two columns named 'c'"),
        ("v,c, C\n1,2,3\n", "two columns named 'c'"),
        ('[{"v": 1, "c": 2, "C": 3}]', "a key twice.*entry 1"),
        ("v|c\n1|2\n", r"commas, semicolons or tabs; its first line is 'v\|c'"),
        ('v,c\n\n1,"2\n\n3"\n4,5,6\n', "more cells than the header .* line 6"),
        ('v,c\n\n1,"2\n3\n', "in the row on line 3: unexpected end"),
        ('{"v": 1}\n\n{"v":, "c": 2}', r"line 3: Expecting value, at character 6"),
        (
            '{"clips": [\n {"v": 1, "c": 2}]}',
            r"must be a list of objects, or one object per row, with the keys v, c",
        ),
        ('[{"v": 1},\n {"v":}]', "valid JSON, line 2: .*, at character 7"),
        ('{"v": 1}\n3', "not objects: line 2"),
        ('{\n "v": 1\n}\n{\n "v":\n}', r"line 6: Expecting value, at character 1"),
        ('{\n "v": 1}\n\n[{"v": 1}]', "not objects: line 4"),
        ('{"v": ' + 9999 * "[", "cannot be read as JSON"),
        (9999 * "1", "needs a header"),
        (200_000 * "1", "is not valid CSV, in the row on line 1: field larger"),
        (
            "v,c\n1,2\n\ufeffv,c\n3,4\n",
            "a byte order mark on line 3, as if two files had been joined",
        ),
        ('{"v": ' + 9999 * "1", "cannot be read as JSON"),
        (" \n", "needs a header"),
        ("[]", "contains no rows"),
    ],
)
def test_any_other_table_is_refused_with_the_line(tmp_path, text, message):
    """Of two columns of one name, the last one won. Lines were counted wrongly after quoted cells."""
    (tmp_path / "mine.txt").write_text("\ufeff" + text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "mine.txt", "--captions", ("v", "c"))


# ---- names -----------------------------------------------------------------------------------


def test_clips_are_found_in_either_unicode_form(tmp_path):
    """A clip from a Mac was not found: "looked for Café 1.webm; the folder has, e.g., Café 1.webm"."""
    composed, decomposed = (normalize(form, CAFE) for form in ("NFC", "NFD"))
    assert composed != decomposed
    for wanted, found in [(composed, decomposed), (decomposed, composed)]:
        videos = make(tmp_path / found, f"{found}.webm", f"{found}/{found}.mp4", "x/y.mp4")
        names = f"{wanted}.webm", f"{wanted}/{wanted}.mp4", "x\\y.mp4", "x/z.mp4"
        paths, missing = find_files(videos, {n: record("-", n) for n in names})
        assert list(paths.values()) == [
            videos / f"{found}.webm",
            videos / found / f"{found}.mp4",
            videos / "x/y.mp4",
        ]
        assert missing == ["x/z.mp4"]
    make(tmp_path / "both", f"{composed}.webm", f"{decomposed}.webm")
    for name in (composed, decomposed):
        paths, _ = find_files(tmp_path / "both", {1: record("-", f"{name}.webm")})
        assert paths[1].stem == name


def test_hidden_files_and_folders_are_not_the_file_of_a_clip(tmp_path):
    make(tmp_path, "._1.webm", "1.webm/a", "2.webm")
    paths, missing = find_files(tmp_path, {i: record(i) for i in ("._1", "1", "2")})
    assert list(paths) == ["2"] and missing == ["._1", "1"]


@pytest.mark.parametrize("name", ["a?b", "a:b|c", "a\u00a0b", "...", LONG, "\ud800", "a\nb", ""])
def test_every_name_has_a_safe_id(name):
    assert not id_problem(safe_id(name)) and not id_problem(safe_id(name, add_hash=True))
    assert safe_id(name) == safe_id(safe_id(name))
    assert safe_id(LONG) != safe_id(LONG + "é")


def test_an_absolute_windows_path_is_outside_the_video_folder():
    for name in ("C:\\x.mp4", "C:/x.mp4", "\\\\host\\x.mp4", "a\\..\\..\\x.mp4"):
        assert "outside the video folder" in unsafe_content(record("1", name))
    assert unsafe_content(record("1", "a:b?.mp4")) is None


def test_a_name_that_the_locale_cannot_write_is_explained(monkeypatch):
    """In an ASCII locale, a clip named Café ended preprocessing with a traceback."""
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    with pytest.raises(UnicodeEncodeError) as caught:
        CAFE.encode("ascii")
    assert "PYTHONUTF8=1" in explain(caught.value)


def test_a_new_file_replaces_none(tmp_path, monkeypatch):
    """Where files have no hard links, the manifest of another shard was overwritten."""
    for path in (tmp_path / "linked", tmp_path / "moved"):
        assert write_new(path, b"first") and not write_new(path, b"second")
        assert path.read_bytes() == b"first"
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "not permitted")))
    assert len(os.listdir(tmp_path)) == 2


def test_a_run_of_another_script_is_not_replaced(tmp_path, monkeypatch):
    """probe.py --output results/demo --overwrite deleted the captioner."""
    (tmp_path / "args.json").write_text('{"script": "train.py"}')
    monkeypatch.setattr("runtime.start.program", lambda: "probe.py")
    for resume, overwrite in ((True, False), (False, True)):
        with pytest.raises(UserError, match=r"contains a run of train\.py; choose another folder"):
            run_folder.check(tmp_path, resume, overwrite)
    monkeypatch.setattr("runtime.start.program", lambda: "train.py")
    assert run_folder.check(tmp_path, False, True) == tmp_path


def test_scores_of_other_clips_or_files_are_not_replaced_silently(tmp_path, capsys):
    """probe.py --evaluate on other clips also kept a control that was scored on the first ones."""
    path = tmp_path / "evaluation_validation.json"
    first = {"settings": {"clips": "a"}, "checkpoint": ["/x.json"]}
    assert run_folder.replaced_scores(path, first) == {}
    path.write_text(json.dumps(first))
    assert run_folder.replaced_scores(path, first) == first and not capsys.readouterr().err
    path.write_text('{"settings": {}}')  # of an earlier version
    assert run_folder.replaced_scores(path, first) and not capsys.readouterr().err
    path.write_text(json.dumps(first))
    run_folder.replaced_scores(path, first | {"settings": {"clips": "b"}})
    assert "had the scores of other clips" in capsys.readouterr().err
    run_folder.replaced_scores(path, first | {"checkpoint": ["/y.json"]})
    assert "had the scores of /x.json, which are replaced" in capsys.readouterr().err


def test_a_long_message_keeps_its_start_and_end(tmp_path):
    """A name of 70,000 characters in a file filled the terminal, and what to do was out of sight."""
    (tmp_path / "toy.json").write_text(f'{{"clips": "{"x" * 70_000}"}}')
    with pytest.raises(
        UserError, match=r"has a toy world with clips = 'xx.*choose another one"
    ) as error:
        ssv2_files.mark_started(tmp_path, {"clips": 4})
    assert len(str(error.value)) < 2100


def test_a_text_with_a_lone_surrogate_is_written(tmp_path):
    """The gallery of a run whose scores name such a file ended in a traceback."""
    write_atomic(tmp_path / "page.html", "caf\ud800é")
    assert (tmp_path / "page.html").read_bytes() == b"caf\\ud800\xc3\xa9"


def test_sizes_and_times_are_in_units_that_people_read():
    sizes = 999, 4_202_000, 999_600, 811_900_000_000, 42e12
    assert [*map(file_size, sizes)] == ["999 bytes", "4.2 MB", "1 MB", "812 GB", "42.0 TB"]
    assert [*map(duration, (89, 91, 5401, 1e7))] == ["89 s", "2 min", "1.5 h", "2,777.8 h"]
