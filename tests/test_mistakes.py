"""research/mistakes.py: what kinds of mistakes captions make."""

import json

import pytest

from research import mistakes
from runtime.errors import UserError

UP, DOWN = "Moving [something] up", "Moving [something] down"


def record(clip, template, *objects):
    words = iter(objects)
    label = " ".join(next(words) if "[" in w else w for w in template.lower().split())
    return {
        "id": clip,
        "video": clip,
        "label": label,
        "template": template,
        "placeholders": list(objects),
        "paraphrases": [],
    }


def write(folder, captions):
    folder.mkdir()
    train = [record(f"t{n}", template, "cup") for n, template in enumerate((UP, DOWN))]
    clips = [record(i, UP, "cup") for i in captions]
    for split, records in (("train", train), ("validation", clips)):
        (folder / f"{split}.json").write_text(json.dumps(records))
    entries = [{"image_id": i, "caption": text} for i, text in captions.items()]
    (folder / "predictions_validation.json").write_text(json.dumps(entries))
    return str(folder / "predictions_validation.json")


def test_every_caption_is_one_kind_of_mistake(tmp_path, capsys):
    captions = {
        "a": "Moving cup  up.",
        "b": "moving mug up",
        "c": "moving cup down",
        "d": "moving mug down",
        "e": "lifting cup",
    }
    path = write(tmp_path / "one", captions)
    other = write(tmp_path / "two", {"a": "moving mug up"})
    folders = ["--annotations", str(tmp_path / "one"), str(tmp_path / "two")]
    output = tmp_path / "mistakes.json"
    mistakes.main([path, other, *folders, "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["kinds"] == {"exact": 1, "objects": 2, "template": 1, "both": 1, "none": 1}
    assert found["templates"] == {f"{UP} -> {DOWN}": 2} and found["objects"] == {"cup -> mug": 2}
    assert found["words"] == {"mug": 3, "lifting": 1}
    line = next(x for x in capsys.readouterr().out.splitlines() if "right template" in x)
    assert line.split()[-2:] == ["2", "33.3%"]
    with pytest.raises(UserError, match="one for each file of predictions"):
        mistakes.main([path, path, path, *folders])
    with pytest.raises(UserError, match="has no caption of a labelled clip"):
        mistakes.main([write(tmp_path / "none", {}), "--annotations", str(tmp_path / "one")])
