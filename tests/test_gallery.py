"""The gallery, in a real browser."""

import json
import os
from pathlib import Path

import pytest
from conftest import until

import evaluate
from dataset import load_records
from runtime.errors import UserError

HOSTILE = (
    "</script><script>document.title = 'stolen'</script><img src=x onerror=document.title='stolen'>"
)


@pytest.fixture(scope="module")
def scored(prepared, tmp_path_factory):
    """A folder with predictions: of every third clip another's label, and one hostile caption."""
    folder = tmp_path_factory.mktemp("scored & <odd>")
    records = load_records(prepared / "annotations", "validation")
    said = {r["id"]: r["label"] for r in records}
    for n, r in enumerate(records):
        if n % 3 == 0:
            said[r["id"]] = records[(n + 1) % len(records)]["label"]
    said[records[0]["id"]] = HOSTILE
    evaluate.write_predictions(folder / "predictions_validation.json", said)
    return folder


@pytest.fixture(scope="module")
def gallery(scored, world, prepared):
    evaluate.main(flags(scored, world, prepared))
    return scored / "gallery.html"


def flags(scored, world, prepared, *more):
    return [
        *["--predictions", str(scored / "predictions_validation.json"), "--gallery", "--no-meteor"],
        *["--annotations", str(prepared / "annotations"), "--videos", str(world / "videos"), *more],
    ]


def cards(browser):
    return browser.find_elements("css selector", "article")


def scores(browser):
    return [float(e.text.split()[1]) for e in browser.find_elements("css selector", ".cider")]


def choose(browser, control, value):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", control)).select_by_value(value)


def test_sorting(browser, gallery):
    browser.get(gallery.as_uri())
    assert scores(browser) == sorted(scores(browser)) and scores(browser)[0] < 5
    choose(browser, "sort", "best")
    assert scores(browser) == sorted(scores(browser), reverse=True) and scores(browser)[0] > 9
    choose(browser, "sort", "random")
    order = scores(browser)
    assert order not in (sorted(order), sorted(order, reverse=True))
    browser.find_element("id", "again").click()
    assert scores(browser) != order


def test_filters(browser, gallery, prepared):
    records = load_records(prepared / "annotations", "validation")
    browser.get(gallery.as_uri())
    template = records[1]["template"]
    choose(browser, "template", template)
    mine = {r["id"] for r in records if r["template"] == template}
    assert {c.get_attribute("data-id") for c in cards(browser)} == mine
    count = browser.find_element("id", "count")
    assert count.text == f"{len(mine)} of {len(records)} clips"
    choose(browser, "template", "")
    choose(browser, "verdict", "0")
    assert all("✗ template wrong" in c.text for c in cards(browser)) and cards(browser)
    choose(browser, "verdict", "")
    browser.find_element("id", "text").send_keys(records[1]["label"].upper())
    assert records[1]["id"] in {c.get_attribute("data-id") for c in cards(browser)}
    assert len(cards(browser)) < len(records) / 4
    browser.find_element("id", "text").send_keys(" and no such words")
    assert not cards(browser) and count.text.startswith("0 of")


def test_a_clip_plays(browser, gallery):
    browser.get(gallery.as_uri())
    play = (
        "const v = document.querySelector('video'); return [v.currentTime, v.videoWidth, v.paused]"
    )
    _, width, paused = until(lambda: (s := browser.execute_script(play))[0] > 0.2 and s)
    assert width == 64 and not paused


def test_the_page_and_its_clips_move_together(browser, gallery, world, tmp_path):
    """A copy of the results with the videos beside them, on another machine, still plays."""
    import shutil

    common = Path(os.path.commonpath([gallery, world]))
    there = tmp_path / "elsewhere"
    (there / gallery.parent.relative_to(common)).mkdir(parents=True)
    moved = shutil.copy(gallery, there / gallery.relative_to(common))
    videos = (world / "videos").relative_to(common)
    shutil.copytree(world / "videos", there / videos)
    browser.get(moved.as_uri())
    source = "const v = document.querySelector('video'); return v.readyState > 0 && v.currentSrc"
    assert str(there) in until(lambda: browser.execute_script(source))


def test_other_words_than_the_references_are_marked(browser, gallery):
    browser.get(gallery.as_uri())
    for card in cards(browser)[1:10]:
        said, marks = (
            [e.text for e in card.find_elements("css selector", f".said {tag}")]
            for tag in ("span", "mark")
        )
        reference = card.find_element("css selector", ".reference").text.split()
        assert set(said) <= set(reference) and not set(marks) & set(reference) and said + marks


def test_it_fits_a_telephone(browser, gallery):
    browser.set_window_size(500, 800)  # chromium's least
    browser.get(gallery.as_uri())
    frame = (
        "const f = document.createElement('iframe'); f.style.width = '360px'; f.src = arguments[0];"
    )
    wide = "return [document.documentElement.scrollWidth, innerWidth]"
    browser.execute_script(frame + "document.body.replaceChildren(f)", gallery.as_uri())
    content, window = browser.execute_script(wide)
    browser.set_window_size(1280, 1000)
    assert content <= window


def test_only_what_is_on_screen_is_loaded(browser, gallery):
    browser.get(gallery.as_uri())
    playing = "return document.querySelectorAll('video[src]').length"
    shown = until(lambda: browser.execute_script(playing))
    assert shown < len(cards(browser)) / 2
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    first = "return document.querySelector('video').hasAttribute('src')"
    until(lambda: not browser.execute_script(first))


def test_a_caption_is_text(browser, gallery):
    """A caption with <script> in it, from whatever model or file, shows as text and runs nothing."""
    browser.get(gallery.as_uri())
    browser.find_element("id", "text").send_keys("onerror")
    assert [c.find_element("css selector", ".said").text for c in cards(browser)] == [HOSTILE]
    assert browser.title == "validation, style label"


def test_nothing_comes_from_the_network(browser, gallery):
    browser.get_log("performance")
    browser.get(gallery.as_uri())
    until(lambda: cards(browser))
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"].endswith("WillBeSent")]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)


def test_the_scores_stand_above(browser, gallery, scored):
    browser.get(gallery.as_uri())
    result = json.loads((scored / "evaluation_validation_rescored.json").read_text())
    rows = [r.text for r in browser.find_elements("css selector", "table tr")]
    assert "shuffled" in rows[0] and "ceiling" in rows[0]
    [cider] = [r for r in rows if r.startswith("CIDEr")]
    assert f"{result['metrics']['CIDEr']:.3f}" in cider
    assert f"{result['controls']['shuffled']['CIDEr']:.3f}" in cider


def test_another_prediction_does_not_replace_the_page(scored, world, prepared, tmp_path):
    """The gallery of the still control replaced that of the run, under the same heading."""
    said = (scored / "predictions_validation.json").read_bytes()
    (tmp_path / "predictions_validation_still.json").write_bytes(said)
    more = flags(tmp_path, world, prepared)
    more[1] = str(tmp_path / "predictions_validation_still.json")
    evaluate.main(more)
    pages = [p.name for p in tmp_path.glob("*.html")]
    assert pages == ["gallery_validation_rescored.html"]


def test_embedded_clips_need_no_file(browser, scored, world, prepared, tmp_path):
    """The page alone can be sent to somebody: it holds the GIFs, of as many clips as asked for."""
    more = ["--embed", "3", "--workers", "0", "--output", str(tmp_path)]
    evaluate.main(flags(scored, world, prepared, *more))
    (tmp_path / "gallery_validation_embedded.html").rename(tmp_path / "sent.html")
    browser.get((tmp_path / "sent.html").as_uri())
    assert len(cards(browser)) == 3
    drawn = "return [...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
    until(lambda: browser.execute_script(drawn) == 3)
    assert "this page shows 3 of them" in browser.find_element("tag name", "body").text


def test_a_large_split_is_not_made_at_once(browser, tmp_path):
    """24,777 cards would take seconds and gigabytes; the page makes those near the screen."""
    from viz import gallery

    records = [
        {"id": str(n), "label": f"moving thing {n}", "template": "Moving [something]"}
        | {"video": None, "placeholders": [], "paraphrases": []}
        for n in range(24_777)
    ]
    per_clip = {
        r["id"]: {"CIDEr": n / 2500, "template_accuracy": 1.0} for n, r in enumerate(records)
    }
    result = {"n": 24_777, "metrics": {}, "controls": {}, "ci95": {}, "counts": {}, "skipped": {}}
    result |= {"tokenizer": "ptb", "checkpoint": "x", "settings": {"split": "a", "style": "label"}}
    said = {r["id"]: r["label"] for r in records}
    without = gallery.write(
        tmp_path / "g.html", result, per_clip, said, records, {}, "label", None, 0, 0
    )
    assert without == 24_777
    browser.get((tmp_path / "g.html").as_uri())
    assert len(cards(browser)) < 500
    choose(browser, "sort", "best")
    assert scores(browser)[0] == 9.91 and len(cards(browser)) < 500
    browser.find_element("id", "text").send_keys("24776")
    assert [c.get_attribute("data-id") for c in cards(browser)] == ["24776"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--embed", "3"], "--embed is about the page"),
        (["--gallery", "--shard", "0/2"], "leave one out"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(more, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate.main(["--annotations", "/nowhere", *more])


def test_clips_are_looked_for_before_the_work(prepared, tmp_path, monkeypatch):
    """An hour of captions, and then no clip was found to show."""
    monkeypatch.setattr("evaluate.predict", lambda *_: pytest.fail("it began to caption"))
    common = ["--gallery", "--annotations", str(prepared / "annotations"), "--checkpoint", "x/y.pt"]
    for folder, sentence in ((tmp_path / "no", "--videos not found"), (tmp_path, "none of the 64")):
        with pytest.raises(UserError, match=sentence):
            evaluate.main([*common, "--videos", str(folder)])
