"""prepare_annotations.py: both SSv2 layouts, the user's own clips and invalid input."""

import csv
import json
import unicodedata
from pathlib import Path

import pytest

import prepare_annotations
from dataset import load_records
from prepare_annotations import main
from runtime.caption_files import formatted, header
from runtime.errors import UserError
from runtime.names import id_problem

TRAIN = [
    {
        "id": "1",
        "label": "holding potato next to bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "bottle"],
    },
    {
        "id": "2",
        "label": "dropping cup",
        "template": "Dropping [something]",
        "placeholders": ["cup"],
    },
]
VALIDATION = [
    {
        "id": "3",
        "label": "dropping pen",
        "template": "Dropping [something]",
        "placeholders": ["pen"],
    }
]


@pytest.fixture
def labels(tmp_path):
    """A function that writes a labels folder and returns it."""

    def write(prefix="", train=TRAIN, validation=VALIDATION):
        folder = tmp_path / "labels"
        folder.mkdir(exist_ok=True)
        files = {
            "train": train,
            "validation": validation,
            "test": [{"id": "4"}, {"id": "5"}],
            "labels": {"Dropping something": "0", "Holding something next to something": "1"},
        }
        for name, content in files.items():
            (folder / f"{prefix}{name}.json").write_text(json.dumps(content))
        (folder / "test-answers.csv").write_text(
            "4;Dropping something\n5;Holding something next to something\n"
        )
        return folder

    return write


def run(tmp_path, *flags):
    main([*map(str, flags), "--output", str(tmp_path / "out")])
    return tmp_path / "out"


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_both_layouts_give_the_same_records(labels, tmp_path, prefix, capsys):
    """The original wrote `ssv2_train` and then read `train`."""
    out = run(tmp_path, "--labels", labels(prefix))
    records = load_records(out, "train")
    absent = dict.fromkeys(("start", "end", "actions"))
    assert records[0] == TRAIN[0] | {"video": "1.webm", "paraphrases": []} | absent
    assert [r["id"] for r in load_records(out, "validation")] == ["3"]
    assert [r["template"] for r in load_records(out, "test")] == [
        "Dropping [something]",
        "Holding [something] next to [something]",
    ]
    assert sorted(p.stem for p in out.iterdir()) == ["test", "train", "validation"]
    printed = capsys.readouterr().out
    assert "2 clips" in printed and "holding potato next to bottle" in printed


@pytest.mark.parametrize("given", ["folder", "glob", "file"])
def test_paraphrases_as_file_folder_or_glob(labels, tmp_path, given):
    folder = tmp_path / "paraphrases"
    folder.mkdir()
    one, two = {"1": ["A  hand\nholds it.", ""]}, {"2": ["It falls."], "99": ["Nobody knows me."]}
    if given == "file":
        (folder / "ssv2_paraphrase.json").write_text(json.dumps(one | two))
    else:
        (folder / "ssv2_paraphrase_train_0.json").write_text(json.dumps(one))
        (folder / "ssv2_paraphrase_train_1.json").write_text(json.dumps(two))
    where = {"folder": folder, "glob": f"{folder}/*.json", "file": folder / "ssv2_paraphrase.json"}
    records = load_records(
        run(tmp_path, "--labels", labels(), "--paraphrases", where[given]), "train"
    )
    assert [r["paraphrases"] for r in records] == [["A hand holds it."], ["It falls."]]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([*TRAIN, TRAIN[0]], r"ids occur more than once: 1 \(twice in train\)"),
        ([], r"train\.json contains an empty list"),
        ([*TRAIN, VALIDATION[0]], r"3 \(train and validation\)"),
        ([TRAIN[0] | {"id": "../../x"}], "ids .*not valid file names.*x"),
        ([TRAIN[0] | {"id": None}], "not valid file names"),
        ([*TRAIN, TRAIN[0] | {"id": "a?"}], r"'a\?' of entry 3 contains '\?'"),
        ([TRAIN[0] | {"label": " \n"}], "clips .* empty label"),
        ([TRAIN[0] | {"template": 3}], "wrong type"),
        ({"1": "x"}, "must contain a JSON list"),
    ],
)
def test_bad_labels_are_refused(labels, tmp_path, train, message):
    """An empty train.json became a split of 0 clips, with exit code 0."""
    with pytest.raises(UserError, match=message):
        run(tmp_path, "--labels", labels(train=train))
    assert not (tmp_path / "out").exists()


def test_bad_paraphrases_are_refused(labels, tmp_path):
    """The original dumped str(list), which is not JSON."""
    file = tmp_path / "p.json"
    for content, message in [
        ("{'1': ['a']}", "as JSON"),
        ('{"1": "a"}', "must contain"),
        ("[]", "must contain"),
    ]:
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            run(tmp_path, "--labels", labels(), "--paraphrases", file)
    with pytest.raises(UserError, match="does not match a file"):
        run(tmp_path, "--labels", labels(), "--paraphrases", tmp_path / "none*.json")


def test_a_labels_folder_with_other_files(labels, tmp_path, capsys):
    """Any .json in --labels became a split or ended the run, even `._train.json`, which macOS leaves."""
    folder = labels()
    (folder / "._train.json").write_bytes(b"\0\5\x16\7\xff")
    (folder / "classes.json").write_text('["Dropping something"]')
    (folder / "notes.json").write_text("not JSON")
    (folder / "extra.json").write_text("[]")
    (folder / "val.json").write_text('[{"id": "9", "label": "x"}]')
    out = run(tmp_path, "--labels", folder)
    assert sorted(p.stem for p in out.iterdir()) == ["test", "train", "val", "validation"]
    noted = capsys.readouterr().err
    assert "skipped" in noted and "classes.json: it is not a list of clips" in noted
    assert "extra.json: it is not a list of clips" in noted
    assert "notes.json cannot be read as JSON" in noted
    assert "split 'val'" in noted and "did you mean 'validation'?" in noted


def test_two_files_of_one_split_are_refused(labels, tmp_path):
    """If both releases of SSv2 were in one folder, one of the two train files was ignored."""
    folder = labels()
    (folder / "something-something-v2-train.json").write_text("[]")
    with pytest.raises(UserError, match=r"something-something-v2-train\.json and train\.json"):
        run(tmp_path, "--labels", folder)


def test_paraphrases_next_to_hidden_files(labels, tmp_path):
    folder = tmp_path / "paraphrases [1]"  # brackets are part of a glob pattern
    folder.mkdir()
    (folder / "p.json").write_text('{"1": ["A."]}')
    (folder / "._p.json").write_bytes(b"\0\5\x16\7\xff")
    for given in (folder, folder / "p.json"):
        out = run(tmp_path, "--labels", labels(), "--paraphrases", given)
        assert load_records(out, "train")[0]["paraphrases"] == ["A."]


def test_ids_are_compared_in_one_unicode_form(labels, tmp_path):
    """The paraphrases of an id from a Mac were skipped as "in no split"."""
    composed, decomposed = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    (tmp_path / "p.json").write_text(json.dumps({decomposed: ["A."]}))
    folder = labels(train=[TRAIN[0] | {"id": composed}])
    (record,) = load_records(
        run(tmp_path, "--labels", folder, "--paraphrases", tmp_path / "p.json"), "train"
    )
    assert record["paraphrases"] == ["A."]


def test_missing_labels_are_reported_with_the_files_found(tmp_path):
    with pytest.raises(UserError, match="not found"):
        run(tmp_path, "--labels", tmp_path / "nowhere")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "readme.txt").write_text("")
    with pytest.raises(UserError, match=r"must contain train\.json.*found readme\.txt"):
        run(tmp_path, "--labels", tmp_path / "labels")


ROWS = [
    ("a.mp4", "a cat", "train"),
    ("b/c.mp4", "a dog", "validation"),
    ("a.mp4", "a cat, asleep", "train"),
]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_own_captions(tmp_path, kind):
    """Several rows of one clip give it several captions."""
    path = tmp_path / f"mine.{kind}"
    if kind == "csv":
        with open(
            path, "w", newline="", encoding="utf-8-sig"
        ) as file:  # with a BOM, as spreadsheets save it
            csv.writer(file).writerows([("video", "caption", "split"), *ROWS])
    else:
        keys = ("video", "caption", "split")
        path.write_text("\n".join(json.dumps(dict(zip(keys, r, strict=True))) for r in ROWS))
    out = run(tmp_path, "--captions", path)
    (train,), (validation,) = load_records(out, "train"), load_records(out, "validation")
    assert train["id"] == "a" and train["video"] == "a.mp4" and train["template"] is None
    assert train["label"] == "a cat" and train["paraphrases"] == ["a cat, asleep"]
    assert validation["id"] == "c" and validation["video"] == "b/c.mp4"


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_captions_of_infer_are_used_for_training(tmp_path, form, capsys):
    """They are the likeliest samples, of videos without captions by people, and never used for validation.

    A clip with a single window keeps its id, so that its features are found.
    """

    def result(name, *windows):
        keys = ("start", "end", "samples")
        windows = [dict(zip(keys, w, strict=True)) for w in windows]
        for w in windows:
            w["samples"] = [{"caption": text, "score": score} for text, score in w["samples"]]
            w["caption"] = w["samples"][0]["caption"]
        return {"path": str(tmp_path / "clips" / name), "windows": windows}

    results = [
        result("a.mp4", (0.0, 3.75, [("=a cat", -0.5)])),
        result("x/b.mp4", (0.0, 3.75, [("a dog", -0.1), ("a log", -0.2)])),
        result("film.mp4", (0.0, 6.0, [("a bird", -0.4)]), (6.0, 12.5, [("a word", -0.7)])),
        {"path": str(tmp_path / "clips/bad.mp4"), "error": "is corrupt"},
        result("low.mp4", (0.0, 3.0, [("what", -0.9)])),
    ]
    labelled = tmp_path / f"labelled.{form}"
    labelled.write_text(header(form) + "".join(formatted(r, form) for r in results))
    own = tmp_path / "own.csv"
    rows = [("a.mp4", "someone's words"), *((f"v{i}.mp4", f"clip {i}") for i in range(3))]
    rows.append(rows[0])  # a row that occurs twice is no paraphrase
    own.write_text("video,caption\n" + "".join(f"{v},{c}\n" for v, c in rows))
    flags = "--captions", labelled, own, "--videos", tmp_path / "clips", "--min-score", "-0.8"
    out = run(tmp_path, *flags, "--validation-share", "0.5")
    splits = {split: load_records(out, split) for split in ("train", "validation")}
    assert len(splits["validation"]) == 2
    assert {r["video"] for r in splits["validation"]} < {v for v, _ in rows}
    records = {r["id"]: r for r in splits["train"] + splits["validation"]}
    assert records.keys() == {"a", "v0", "v1", "v2", "b", "film_0-6", "film_6-12.5"}
    assert records["a"]["label"] == "someone's words" and not records["a"]["paraphrases"]
    assert (records["b"]["video"], records["b"]["label"]) == ("x/b.mp4", "a dog")
    assert records["b"]["start"] is None and not records["b"]["paraphrases"]
    assert records["film_6-12.5"]["label"] == "a word"
    scores = {r["id"]: r.get("score") for r in json.loads((out / "train.json").read_text())}
    assert (scores["b"], scores["film_0-6"]) == (-0.1, -0.4)
    err = capsys.readouterr().err
    assert "5 captions; a quarter, half and three quarters of the scores are at least -0.4" in err
    assert "3 added to train, 1 clip left out because your own files name the video" in err

    assert "1 caption below --min-score -0.8 left out" in err
    with pytest.raises(UserError, match=r"no caption is left of .* with --min-score 0$"):
        run(tmp_path, *flags[:-1], "0")
    with pytest.raises(UserError, match="--min-score needs a file"):
        run(tmp_path, "--captions", own, "--min-score", "0")
    with pytest.raises(UserError, match=r" or were moved: .*a\.mp4 \("):
        run(tmp_path, "--captions", labelled, own, "--videos", tmp_path / "other")
    with pytest.raises(UserError, match="validation needs"):
        run(tmp_path, "--captions", labelled, "--videos", tmp_path / "clips")
    if form != "jsonl":  # a part of which all clips failed
        (failed := tmp_path / f"failed.{form}").write_text(header(form))
        run(tmp_path, "--captions", labelled, failed, own, *flags[3:])
        assert f"note: {failed} has no captions" in capsys.readouterr().err
    without = results[1]["windows"][0]
    del without["samples"]
    labelled.write_text(header(form) + "".join(formatted(r, form) for r in results))
    with pytest.raises(UserError, match="captions without a score"):
        run(tmp_path, *flags)
    labelled.write_text(labelled.read_text().replace("0.0", "NaN"))
    with pytest.raises(UserError, match=r"not (valid JSON|a line written by infer)"):
        run(tmp_path, *flags)


def test_file_names_keep_spaces_and_line_breaks_separate_words(tmp_path):
    """Two spaces in a file name became one, and a line break in a quoted caption joined two words."""
    path = tmp_path / "mine.csv"
    path.write_text('video,caption,split\na  b.mp4,"picking\nup",train\n')
    (record,) = load_records(run(tmp_path, "--captions", path), "train")
    assert (record["video"], record["label"]) == ("a  b.mp4", "picking up")
    path = tmp_path / "mine.jsonl"
    row = {"video": "c.mp4", "caption": "one\u2028two", "split": "train"}
    path.write_text(json.dumps(row, ensure_ascii=False))
    (record,) = load_records(run(tmp_path, "--captions", path), "train")
    assert record["label"] == "one two"


def test_own_captions_without_splits_get_a_validation_split(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("video,caption\n" + "".join(f"clips/{i}.mp4,clip {i}\n" for i in range(40)))
    out = run(tmp_path, "--captions", path, "--validation-share", 0.25)
    train, validation = load_records(out, "train"), load_records(out, "validation")
    assert (len(train), len(validation)) == (30, 10)
    assert not {r["id"] for r in train} & {r["id"] for r in validation}


def test_ids_of_clips_with_the_same_name_contain_their_folders(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("video,caption,split\nx/1.mp4,one,train\ny/1.mp4,other,train\n")
    assert [r["id"] for r in load_records(run(tmp_path, "--captions", path), "train")] == [
        "x__1",
        "y__1",
    ]


def test_labelled_clips_do_not_rename_own_clips(tmp_path):
    """Own clips got other ids, so they were encoded again and other clips were used for validation."""
    own, labelled = tmp_path / "own.csv", tmp_path / "labelled.csv"
    own.write_text("video,caption\n" + "".join(f"x/{i}.mp4,clip {i}\n" for i in range(9)))
    paths = [tmp_path / "clips" / name for name in ("y/3.mp4", "3.mp4", "z/9.mp4")]
    labelled.write_text(header("csv") + "".join(f"{p},0.0,3.0,a cat,,\n" for p in paths))
    before = run(tmp_path, "--captions", own)
    before = {s: load_records(before, s) for s in ("train", "validation")}
    out = run(tmp_path, "--captions", own, labelled, "--videos", tmp_path / "clips")
    assert load_records(out, "validation") == before["validation"]
    [*kept, one, two, three] = load_records(out, "train")
    assert kept == before["train"] and (one["id"], three["id"]) == ("y__3", "9")
    assert two["id"].startswith("3-") and two["video"] == "3.mp4"


def test_names_that_are_no_ids_get_one(tmp_path):
    """A clip named `what?.mp4`, or with a long name, stopped the whole data set."""
    names = ["what?", "what:", "what_", "x/1", "y/1", "x__1", "é" * 120, "é" * 121]
    rows = "".join(f"{name}.mp4,c,train\n" for name in names)
    (tmp_path / "mine.csv").write_text("video,caption,split\n" + rows)
    records = load_records(run(tmp_path, "--captions", tmp_path / "mine.csv"), "train")
    assert [r["video"] for r in records] == [f"{name}.mp4" for name in names]
    ids = [r["id"] for r in records]
    assert len(set(ids)) == len(ids) and not any(map(id_problem, ids))
    assert [ids[2], ids[4], ids[5]] == ["what_", "y__1", "x__1"]


def test_a_clip_in_both_unicode_forms_is_one_clip(tmp_path):
    names = [unicodedata.normalize(form, "Café.mp4") for form in ("NFD", "NFC")]
    rows = "".join(f"{name},caption {n},train\n" for n, name in enumerate(names))
    (tmp_path / "mine.csv").write_text("video,caption,split\n" + rows)
    (record,) = load_records(run(tmp_path, "--captions", tmp_path / "mine.csv"), "train")
    assert (record["id"], record["video"]) == ("Café", names[0])
    assert (record["label"], record["paraphrases"]) == ("caption 0", ["caption 1"])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("val", "validation"),
        ("Train", "train"),
        ("testing", "test"),
        ("dev", "validation"),
        ("tran", "train"),
    ],
)
def test_an_unusual_split_is_noted(tmp_path, capsys, name, meant):
    """A split named `val` was written, and train.py then missed the validation split."""
    (tmp_path / "mine.csv").write_text(f"video,caption,split\na,b,{name}\nc,d,unseen\n")
    run(tmp_path, "--captions", tmp_path / "mine.csv")
    noted = capsys.readouterr().err
    assert f"split {name!r} is used only with" in noted and f"did you mean {meant!r}?" in noted
    assert "split 'unseen' is used only with" in noted and noted.count("did you mean") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a header"),
        ("video,caption\n\n._a.mp4,hi\n", r"hidden files.*'\._a\.mp4' \(line 3\)"),
        ("video,caption,split\na,hi,a?\n", r"'a\?' contains '\?'"),
        ("clip,text\na.mp4,hi\n", "needs a header"),
        ("video,caption\n", "contains no rows"),
        ("video,caption\na.mp4,hi\nb.mp4,ho\n", "too few videos to hold out two"),
        ("video,caption\na.mp4,\n", "rows .* have no text .* line 2"),
        ("video,caption,split\na.mp4,hi,train\na.mp4,ho,validation\n", "more than one split"),
        ("video,caption,split\na.mp4,hi,../x\n", "not valid"),
        ("video,caption,split\na.mp4,hi,train\nb.mp4,ho,\n", "have no split"),
        (
            "video,caption\na.mp4,hi\na.webm,ho\n",
            "differ only in the extension.*keep one, or rename",
        ),
    ],
)
def test_bad_captions_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        run(tmp_path, "--captions", path)
    assert not (tmp_path / "out").exists()


def test_labels_beside_captions_are_refused(tmp_path, capsys):
    """--labels was silently ignored."""
    with pytest.raises(SystemExit):
        run(tmp_path, "--captions", "mine.csv", "--labels", tmp_path)
    assert "--labels cannot be used with --captions" in capsys.readouterr().err


def test_help_lists_the_columns(capsys):
    with pytest.raises(SystemExit):
        prepare_annotations.parse_args(["--help"])
    assert "video,caption[,split]" in capsys.readouterr().out
    assert Path(prepare_annotations.__file__).name == "prepare_annotations.py"


# ---- parts of videos, Charades ----------------------------------------------------------------


def test_captions_of_parts_of_a_video(tmp_path):
    """All parts of a film are on the same side of the split, or validation would score training pictures."""
    rows = ["video,caption,start,end"]
    for film in range(10):
        rows += [f"{film}.mp4,caption {i},{i},{i + 0.5}" for i in range(3)] * 2
    rows.append("whole.mp4,a caption,,")
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    main(
        [
            "--captions",
            str(tmp_path / "mine.csv"),
            "--output",
            str(out),
            "--validation-share",
            "0.3",
        ]
    )
    splits = {split: load_records(out, split) for split in ("train", "validation")}
    films = [{r["video"] for r in records} for records in splits.values()]
    assert films[0].isdisjoint(films[1]) and len(films[1]) == 3
    records = {r["id"]: r for records in splits.values() for r in records}
    assert len(records) == 31
    part, whole = records["3_1-1.5"], records["whole"]
    assert (part["start"], part["end"], part["label"]) == (1, 1.5, "caption 1")
    assert part["paraphrases"] == [] and whole["end"] is None  # the rows of a film occur twice
    for bad in ("1,", "2,1", "a,b", "-1,1", "0,nan"):
        (tmp_path / "mine.csv").write_text(f"video,caption,start,end\na.mp4,x,{bad}\n")
        with pytest.raises(UserError, match=r"no valid start and end.* line 2"):
            main(["--captions", str(tmp_path / "mine.csv"), "--output", str(out)])


CHARADES = """id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length
{}
"""
CHARADES_CLASSES = "c000 Holding some clothes\nc001 Opening a door\n\nc002 Sneezing\n"


def write_charades(folder, rows, header=CHARADES):
    folder.mkdir(exist_ok=True)
    (folder / "Charades_v1_classes.txt").write_text(CHARADES_CLASSES)
    for split, letter in (("train", "A"), ("test", "T")):
        lines = [row.replace("ID", f"{letter}{i:03}") for i, row in enumerate(rows)]
        (folder / f"Charades_v1_{split}.csv").write_text(header.format("\n".join(lines)))


def test_charades(tmp_path, capsys):
    rows = [
        'ID,S,Kitchen,6,7,Yes,"A person opens, then closes, a door.",door,He opens it.;He leaves.,'
        "c001 0.00 4.10;c001 3.00 40.00;c000 11.90 21.20,20.0",
        "ID,S,Kitchen,6,7,Yes,A person stands.,,,,10.5",
        "ID,S,Kitchen,6,7,Yes,A person sneezes.,,She sneezes.,c002 50 60;c002 8 7;c002 2 3,10",
    ]
    write_charades(tmp_path / "charades", rows * 7)
    out = tmp_path / "out"
    flags = ["--charades", str(tmp_path / "charades"), "--output", str(out)]
    main(flags)
    printed = capsys.readouterr()
    for note in (
        "actions that start after the end of the video, left out: 14",
        "actions that do not end after they start, left out: 14",
        "actions that end after the end of the video, cut there: 28",
        "actions that occur more than once in a video: 14",
        "videos without actions: 14",
    ):
        assert note in printed.err
    splits = {split: load_records(out, split) for split in ("train", "validation", "test")}
    assert [len(records) for records in splits.values()] == [19, 2, 21]
    first, second, third = splits["test"][:3]
    assert (first["id"], first["video"]) == ("T000", "T000.mp4")
    assert first["label"] == "A person opens, then closes, a door."
    assert first["paraphrases"] == ["He opens it.", "He leaves."]
    assert first["actions"] == ["c000 Holding some clothes", "c001 Opening a door"]
    assert second["actions"] == [] and third["actions"] == ["c002 Sneezing"]

    # windows: an action belongs to every window that it overlaps
    main([*flags, "--window", "6", "--stride", "3"])
    parts = [r for r in load_records(out, "test") if r["video"] == "T000.mp4"]
    assert [(r["start"], r["end"]) for r in parts] == [
        (3 * i, min(20, 3 * i + 6)) for i in range(6)
    ]
    door, clothes = "c001 Opening a door", "c000 Holding some clothes"
    assert [r["actions"] for r in parts] == [[door]] * 2 + [[clothes, door]] * 4
    assert parts[0]["label"] is None and parts[1]["id"] == "T000_3-9"

    # old copies have no lengths, so windows are not known
    old, row = CHARADES.replace(",length", ""), "ID,S,K,6,7,Yes,Stands.,,,c000 1.0 2.0"
    write_charades(tmp_path / "charades", [row] * 5, header=old)
    main(flags)
    with pytest.raises(UserError, match="needs the column length, which old copies"):
        main([*flags, "--window", "6"])
    write_charades(tmp_path / "charades", [f"{row},"] + [f"{row},9"] * 4)
    capsys.readouterr()
    main([*flags, "--window", "2", "--stride", "3"])
    printed = capsys.readouterr().err
    assert "videos without a length, left out: 2" in printed and "are in no window" in printed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("c009 1.0 2.0,9", r"class 'c009' is not in Charades_v1_classes\.txt"),
        ("c000 1.0,9", "the action 'c000 1.0' is not a class, a start and an end"),
        ("c000 1.0 x,9", "the action 'c000 1.0 x' is not a class, a start and an end"),
        ("c000 1.0 2.0,abc", "the length 'abc' is not a number of seconds"),
    ],
)
def test_bad_rows_of_charades_are_named(tmp_path, row, message):
    write_charades(tmp_path / "charades", [f"ID,S,K,6,7,Yes,Stands.,,,{row}"] * 5)
    with pytest.raises(UserError, match=f"line 2: {message}"):
        main(["--charades", str(tmp_path / "charades"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    file = str(tmp_path / "charades" / "Charades_v1_train.csv")
    with pytest.raises(UserError, match="is a file, but must be a folder"):
        main(["--charades", file, "--output", str(tmp_path / "out")])
