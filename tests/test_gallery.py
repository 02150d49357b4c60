"""viz/gallery.py in a real browser."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import until

import evaluate
from dataset import load_records
from runtime.errors import UserError
from runtime.files import write_json
from runtime.predictions import write_predictions
from viz import gallery

HOSTILE = (
    "</script><script>document.title = 'stolen'</script><img src=x onerror=document.title='stolen'>"
)


@pytest.fixture(scope="module")
def scored(prepared, tmp_path_factory):
    """A run folder. Every third clip has another clip's label as its caption, and one caption is
    hostile."""
    folder = tmp_path_factory.mktemp("scored & <odd>")
    records = load_records(prepared / "annotations", "validation")
    captions = {r["id"]: r["label"] for r in records}
    for n, r in enumerate(records):
        if n % 3 == 0:
            captions[r["id"]] = records[(n + 1) % len(records)]["label"]
    captions[records[0]["id"]] = HOSTILE
    write_predictions(folder / "predictions_validation.json", captions)
    rescore(folder / "predictions_validation.json", prepared)
    # as if a checkpoint had written these captions
    result = json.loads((folder / "evaluation_validation_rescored.json").read_text())
    write_json(folder / "evaluation_validation.json", result | {"checkpoint": "best.pt"})
    return folder


@pytest.fixture(scope="module")
def page(scored, world, prepared):
    gallery.main(flags(scored, world, prepared))
    return scored / "gallery.html"


def rescore(predictions, prepared):
    annotations = str(prepared / "annotations")
    flags = ["--predictions", str(predictions), "--annotations", annotations, "--no-meteor"]
    evaluate.main(flags)


def flags(run, world, prepared, *more):
    data = ["--annotations", prepared / "annotations", "--videos", world / "videos"]
    return list(map(str, [run, *data, "--workers", "0", *more]))


def cards(browser):
    return browser.find_elements("css selector", "article")


def shown_scores(browser):
    return [float(e.text.split()[1]) for e in browser.find_elements("css selector", ".cider")]


def choose(browser, control, value):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", control)).select_by_value(value)


def test_sorting(browser, page):
    browser.get(page.as_uri())
    assert shown_scores(browser) == sorted(shown_scores(browser)) and shown_scores(browser)[0] < 5
    choose(browser, "sort", "best")
    assert (
        shown_scores(browser) == sorted(shown_scores(browser), reverse=True)
        and shown_scores(browser)[0] > 9
    )
    choose(browser, "sort", "random")
    order = shown_scores(browser)
    assert order not in (sorted(order), sorted(order, reverse=True))
    browser.find_element("id", "again").click()
    assert shown_scores(browser) != order


def test_the_second_model_is_shown_beside_the_first(browser, scored, world, prepared, tmp_path):
    """The second model's captions are the labels, so they differ where the first model is wrong."""
    labels = {r["id"]: r["label"] for r in load_records(prepared / "annotations", "validation")}
    write_predictions(tmp_path / "labels.json", labels)
    gallery.main(flags(scored, world, prepared, "--versus", tmp_path / "labels.json"))
    browser.get((scored / "gallery_validation_versus.html").as_uri())
    choose(browser, "sort", "different")
    first, *_, last = cards(browser)
    texts = [[e.text for e in c.find_elements("css selector", ".caption")] for c in (first, last)]
    assert texts[0][1] == labels[first.get_attribute("data-id")] != texts[0][0]
    assert texts[1][1] == texts[1][0] and "second 10.00" in first.text
    write_predictions(tmp_path / "few.json", dict([*labels.items()][1:]))
    with pytest.raises(UserError, match="--versus has no caption of 1 clip"):
        gallery.main(flags(scored, world, prepared, "--versus", tmp_path / "few.json"))


def test_filters(browser, page, prepared):
    records = load_records(prepared / "annotations", "validation")
    browser.get(page.as_uri())
    template = records[1]["template"]
    choose(browser, "template", template)
    mine = {r["id"] for r in records if r["template"] == template}
    assert {c.get_attribute("data-id") for c in cards(browser)} == mine
    count = browser.find_element("id", "count")
    assert count.text == f"{len(mine)} of {len(records)} clips"
    choose(browser, "template", "")
    choose(browser, "verdict", "0")
    assert all("✗ wrong template" in c.text for c in cards(browser)) and cards(browser)
    choose(browser, "verdict", "")
    browser.find_element("id", "text").send_keys(records[1]["label"].upper())
    assert records[1]["id"] in {c.get_attribute("data-id") for c in cards(browser)}
    assert len(cards(browser)) < len(records) / 4
    browser.find_element("id", "text").send_keys(" and no such words")
    assert not cards(browser) and count.text.startswith("0 of")


def test_a_clip_plays(browser, page):
    browser.get(page.as_uri())
    play = (
        "const v = document.querySelector('video'); return [v.currentTime, v.videoWidth, v.paused]"
    )
    _, width, paused = until(lambda: (s := browser.execute_script(play))[0] > 0.2 and s)
    assert width == 64 and not paused


def test_the_page_and_its_clips_move_together(browser, page, world, tmp_path):
    """A copy of the results and the videos, for example on another machine, still plays."""
    common = Path(os.path.commonpath([page, world]))
    there = tmp_path / "elsewhere"
    (there / page.parent.relative_to(common)).mkdir(parents=True)
    moved = shutil.copy(page, there / page.relative_to(common))
    videos = (world / "videos").relative_to(common)
    shutil.copytree(world / "videos", there / videos)
    browser.get(moved.as_uri())
    source = "const v = document.querySelector('video'); return v.readyState > 0 && v.currentSrc"
    assert str(there) in until(lambda: browser.execute_script(source))


@pytest.mark.parametrize(("line", "other"), [("caption", "reference"), ("reference", "caption")])
def test_words_in_only_one_of_both_texts_are_marked(browser, page, line, other):
    browser.get(page.as_uri())
    for card in cards(browser)[1:10]:
        same, marks = (
            [e.text for e in card.find_elements("css selector", f".{line} {tag}")]
            for tag in ("span", "mark")
        )
        words = card.find_element("css selector", f".{other}").text.split()
        assert set(same) <= set(words) and not set(marks) & set(words) and same + marks


def test_the_page_fits_a_phone(browser, page):
    browser.set_window_size(500, 800)  # Chromium's minimum
    browser.get(page.as_uri())
    frame = (
        "const f = document.createElement('iframe'); f.style.width = '360px'; f.src = arguments[0];"
    )
    wide = "return [document.documentElement.scrollWidth, innerWidth]"
    browser.execute_script(frame + "document.body.replaceChildren(f)", page.as_uri())
    content, window = browser.execute_script(wide)
    browser.set_window_size(1280, 1000)
    assert content <= window


def test_only_what_is_on_screen_is_loaded(browser, page):
    browser.get(page.as_uri())
    playing = "return document.querySelectorAll('video[src]').length"
    shown = until(lambda: browser.execute_script(playing))
    assert shown < len(cards(browser)) / 2
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    first = "return document.querySelector('video').hasAttribute('src')"
    until(lambda: not browser.execute_script(first))


def test_captions_are_shown_as_text(browser, page):
    """A caption with <script> in it runs nothing."""
    browser.get(page.as_uri())
    browser.find_element("id", "text").send_keys("onerror")
    assert [c.find_element("css selector", ".caption").text for c in cards(browser)] == [HOSTILE]
    assert browser.title == "validation, style label"


def test_nothing_is_loaded_from_the_network(browser, page):
    browser.get_log("performance")
    browser.get(page.as_uri())
    until(lambda: cards(browser))
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"].endswith("WillBeSent")]
    assert urls and all(url.startswith(("file:", "data:")) for url in urls)


def test_the_scores_are_shown_on_top(browser, page, scored):
    browser.get(page.as_uri())
    result = json.loads((scored / "evaluation_validation.json").read_text())
    rows = [r.text for r in browser.find_elements("css selector", "table tr")]
    assert "shuffled" in rows[0] and "ceiling" in rows[0]
    [cider] = [r for r in rows if r.startswith("CIDEr")]
    assert f"{result['metrics']['CIDEr']:.3f}" in cider
    assert f"{result['controls']['shuffled']['CIDEr']:.3f}" in cider


def test_other_predictions_do_not_replace_the_page(scored, world, prepared, tmp_path):
    """The gallery of the still control replaced that of the run, under the same heading."""
    run = shutil.copytree(scored, tmp_path / "run", ignore=shutil.ignore_patterns("*.html"))
    other = shutil.copy(run / "predictions_validation.json", run / "predictions_blip.json")
    with pytest.raises(UserError, match=r"_rescored\.json has the scores of .* Run evaluate\.py"):
        gallery.main(flags(run, world, prepared, "--predictions", other))
    rescore(other, prepared)
    gallery.main(flags(run, world, prepared, "--predictions", other))
    for kind in ("predictions", "evaluation"):
        shutil.copy(run / f"{kind}_validation.json", run / f"{kind}_validation_still.json")
    still = run / "predictions_validation_still.json"
    gallery.main(flags(run, world, prepared, "--predictions", still))
    pages = sorted(p.name for p in run.glob("*.html"))
    assert pages == ["gallery_validation_rescored.html", "gallery_validation_still.html"]


def test_filters_without_choices_are_hidden(browser, scored, prepared, tmp_path):
    """Style sentence has no template accuracy, but its filter was shown."""
    records = [{"id": str(n), "template": None} for n in range(2)]
    result = json.loads((scored / "evaluation_validation.json").read_text())
    texts = {"0": "a", "1": "b"}
    references = {i: [text] for i, text in texts.items()}
    clips = gallery.describe(records, [texts], references, [{"0": {}, "1": {}}], {})
    (tmp_path / "g.html").write_text(gallery.render(result, clips))
    browser.get((tmp_path / "g.html").as_uri())
    assert len(cards(browser)) == 2 and "no video" in cards(browser)[0].text
    for name in ("template", "verdict"):
        assert not browser.find_element("id", name).is_displayed()


def test_embedded_clips_need_no_file(browser, scored, world, prepared, tmp_path):
    """The page contains the GIFs of the requested number of clips, so that it can be sent alone."""
    gallery.main(flags(scored, world, prepared, "--embed", "3"))
    shutil.move(scored / "gallery_validation_embedded.html", tmp_path / "sent.html")
    browser.get((tmp_path / "sent.html").as_uri())
    assert len(cards(browser)) == 3
    drawn = "return [...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
    until(lambda: browser.execute_script(drawn) == 3)
    assert "this page shows 3 of the 64 clips" in browser.find_element("tag name", "body").text


def test_cards_of_a_large_split_are_created_on_demand(browser, tmp_path):
    """24,777 cards would take seconds and gigabytes. The page creates only those near the screen."""
    records = [
        {"id": str(n), "label": f"moving thing {n}", "template": "Moving [something]"}
        for n in range(24_777)
    ]
    captions = {r["id"]: r["label"] for r in records}
    references = {i: [text] for i, text in captions.items()}
    scores = {i: {"CIDEr": n / 2500, "template_accuracy": 1.0} for n, i in enumerate(captions)}
    result = {"n": 24_777, "metrics": {}, "controls": {}, "ci95": {}, "counts": {}, "skipped": {}}
    result |= {"tokenizer": "ptb", "checkpoint": "x", "settings": {"split": "a", "style": "label"}}
    clips = gallery.describe(records, [captions], references, [scores], {})
    (tmp_path / "g.html").write_text(gallery.render(result, clips))
    browser.get((tmp_path / "g.html").as_uri())
    assert len(cards(browser)) < 500
    choose(browser, "sort", "best")
    assert shown_scores(browser)[0] == 9.91 and len(cards(browser)) < 500
    browser.find_element("id", "text").send_keys("24776")
    assert [c.get_attribute("data-id") for c in cards(browser)] == ["24776"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--split", "train"], "predictions not found: .*predictions_train.json. evaluate.py"),
        (["--videos", "/nowhere"], "--videos not found"),
        (["--videos", "."], "none of the 64 clips"),
        (["--output", "."], "is a folder"),
        ("no run", "run folder not found"),
        ("no evaluation", "scores not found: .*evaluation_validation.json. Run evaluate.py --pred"),
        ("another file", "was not written by evaluate.py"),
        (("metrics", {"CIDEr": "high"}), "was not written by evaluate.py"),
        (("ci95", {"CIDEr": [1]}), "was not written by evaluate.py"),
        (("controls", []), "was not written by evaluate.py"),
        (("settings", {"split": 1}), "was not written by evaluate.py"),
        (("checkpoint", ["a\0b"]), "was not written by evaluate.py"),
        ("another style", "was made with --split validation --style sentence"),
        ("another clip", "captions of 64 clips; 63 of them are in split 'validation'"),
    ],
)
def test_mistakes_are_reported_before_scoring(
    change, sentence, scored, world, prepared, tmp_path, monkeypatch
):
    """Scoring takes a minute on all of SSv2. Scores of another type ended in a traceback."""
    monkeypatch.setattr("viz.gallery.score", lambda *_, **__: pytest.fail("scoring started"))
    run = shutil.copytree(scored, tmp_path / "run")
    evaluation = run / "evaluation_validation.json"
    if change == "no run":
        shutil.rmtree(run)
    elif change == "no evaluation":
        evaluation.unlink()
    elif change == "another file":
        evaluation.write_text("{}")
    elif isinstance(change, tuple):
        write_json(evaluation, json.loads(evaluation.read_text()) | dict([change]))
    elif change == "another style":
        evaluation.write_text(evaluation.read_text().replace('"label"', '"sentence"'))
    elif change == "another clip":
        predictions = run / "predictions_validation.json"
        entries = json.loads(predictions.read_text())
        write_json(predictions, [*entries[1:], {"image_id": "else", "caption": "x"}])
    more = change if isinstance(change, list) else []
    with pytest.raises(UserError, match=sentence):
        gallery.main(flags(run, world, prepared, *more))
