"""Scores, their agreement with pycocoevalcap, and Java that hangs or fails."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import until
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.tokenizer import ptbtokenizer

import metrics
from runtime import caption_metrics
from runtime.caption_tokens import tokenize
from runtime.errors import UserError
from runtime.java import JavaError, jar, java_thread, run_java
from runtime.predictions import predictions_by_id, read_predictions
from runtime.templates import Templates, fill

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

TEMPLATES = [
    "Holding [something] next to [something]",
    "Holding [something]",
    "[Something] falling like a rock",
    "[Something] falling",
    "Pretending to put [number of] things (x) into [part of] y",
    "Putting [something] on [something]",
    "Putting [something] onto [something]",
    "Lifting up one end of [something], then letting it drop down",
    "Trying but failing to attach [something] to [something] because it doesn't stick",
]


def record(i, label, template=None, placeholders=(), paraphrases=()):
    return {
        "id": str(i),
        "video": f"{i}.webm",
        "label": label,
        "template": template,
        "placeholders": list(placeholders),
        "paraphrases": list(paraphrases),
    }


def world(n=60, seed=0):
    """Return records with distinct labels, templates and placeholders."""
    rng = random.Random(seed)
    colours, things = ["red", "green", "blue", "black"], ["cup", "pen", "book", "box", "spoon"]
    records = []
    for i in range(n):
        template = rng.choice(TEMPLATES[:2] + TEMPLATES[5:7])
        fillers = [f"{rng.choice(colours)} {rng.choice(things)} {i}" for _ in range(2)]
        fillers = fillers[: template.count("[")]
        label = template.lower()
        for filler in fillers:
            label = label.replace("[something]", filler, 1)
        records.append(record(i, label, template, fillers))
    return records


def labels(records):
    return {r["id"]: r["label"] for r in records}


def score(predictions, records, **options):
    return metrics.score(predictions, records, **{"templates": TEMPLATES} | options)


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


def fake_java(tmp_path, monkeypatch, script):
    path = tmp_path / "java"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


# ---- tokenizer -----------------------------------------------------------------------------

CAPTIONS = """
Holding potato next to vicks vaporub bottle
Pretending to put something (x), something and [something] on the table.
Don't do it; it's the dog's bone and James' hat, they've said. We'll see!
I cannot, I can't, I won't, isn't, ain't, gonna wanna gotta lemme gimme
a well-known t-shirt, mother-in-law's e-mail, 3-in-1, 5-year-old's toy's, 3.5-inch
3.5 and 1,000 and 1,000,000.50 or 10% of 5. -5 +5 .5 12:30 12:30pm 16:9 1990s '80s
"hello" 'hello' ``x'' “quoted” ‘single’ it’s don’t children’s boys’ «a»
left/right and/or 1/2 3 1/2 a/b/c w/o w/ o c/d/
e.g. this, i.e. that, etc. and U.S. and p.m. vs. Mr. and Mrs. Smith, no. 5, st. x
wait... what.. ok.... … and --- and -- and - and – and a—b and well--done
A & B &amp; C AT&T R&D M&M's a&b
$5 £5 €5 5¢ #3 cup#2 #tag @me a@b.com http://x.com/a?b www.example.com
café naïve Ärger 日本語 Σας ﬁsh 90° 10°C 5² cm² ½ cup 2½ × ÷ ™ → e\u0301
'tis 'twas rock 'n' roll ol' o'clock o'brien d'art ma'am c'mon y'all i'd've
x; y: z, w! v? !! ?? ?! a,b a;b a:b a.b a?b a!b a\\b a"b a(b)c 5,cups cup,cup
wow!cool up.Then down cup.) and (cup.) cup., x (a) (b.) (5) 5) 1. 2) iphone-6 4k 1080p
a * b a*b ** x=5 x+y 5+5 _ a_b __ ~ ^ | || \\ < > 10cm 1st 21st 10-12cm 2020-01-02
holding a. A b. c d.
holding x.
Holding a cup.
the end etc.
😀 a😀b 👍🏽
"""


CAPTIONS = CAPTIONS.split("\n")


@needs_java
def test_tokens_equal_those_of_pycocoevalcap(tmp_path, monkeypatch):
    """pycocoevalcap's class writes files next to its jar, so the jar is linked into `tmp_path`."""
    name = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    (tmp_path / name).symlink_to(jar("tokenizer", name))
    monkeypatch.setattr(ptbtokenizer, "__file__", str(tmp_path / "ptbtokenizer.py"))
    texts = [t for t in CAPTIONS if t.strip() and not re.search("😀|½|3 1/2|holding", t)]
    expected = ptbtokenizer.PTBTokenizer().tokenize({"all": [{"caption": t} for t in texts]})
    tokens, tokenizer, reason = tokenize(texts, 60)
    assert [tokens[t] for t in texts] == expected["all"]
    assert (tokenizer, reason) == ("ptb", None)


HOSTILE = [
    "one\rtwo",
    "one\ftwo",
    "one\u2028two",
    "one\ntwo",
    "one\x85\x0b\x00two",
    "one \ud800 two",
]


@needs_java
def test_line_ends_inside_captions_do_not_shift_the_others():
    """pycocoevalcap's tokenizer gave every caption after a `\\r` the text of its neighbour."""
    numbered = [f"number {i}." for i in range(9)]
    tokens, tokenizer, _ = tokenize([*HOSTILE, *numbered, "", " ", "?"], 60)
    assert tokenizer == "ptb"
    assert [tokens[text] for text in HOSTILE] == ["one two"] * len(HOSTILE)
    assert [tokens[text] for text in numbered] == [text[:-1] for text in numbered]
    assert tokens[""] == tokens[" "] == tokens["?"] == ""


@needs_java
def test_tokens_do_not_depend_on_the_next_caption():
    """Java used the next line's first letter, or an emoji, to decide whether "x." ends a sentence."""
    for text, following in (("holding x.", "zoo"), ("holding x.", "Zoo"), ("holding x.😀", "zoo")):
        assert tokenize([text, following], 60)[0][text] == "holding x"


def test_simple_tokenizer(no_java):
    text = "Don't drop (it), it's\r 3.5 T-shirts [and] 1,000 cups!"
    tokens, tokenizer, reason = tokenize([text, "?"], 60)
    assert tokens == {text: "do n't drop it it 's 3.5 t-shirts and 1,000 cups", "?": ""}
    assert tokenizer == "simple"
    assert "java not found" in reason and "NOT comparable with published ones" in reason


# ---- other scripts -------------------------------------------------------------------------

# texts that have the same tokens, and these tokens
SAME_TOKENS = {
    "把 杯 子 放 在 桌 子 上": ["把杯子放在桌子上。", "把杯子、放在桌子上！", "把 杯子 放在桌子上"],
    "把 iphone do n't 放 在": ["把iPhone don't放在。"],
    "コ ッ プ が t シ ャ ツ": ["コップが、Tシャツ", "ｺｯﾌﾟが「Ｔシャツ」", "コップか\u3099Tシャツ"],
    "ว า ง แ ก้ ว": ["วางแก้ว"],
    "ວ າ ງ ຈ ອ ກ": ["ວາງຈອກ"],
    "ដា ក់ ពែ ង": ["ដាក់ពែង។", "ដាក់\u200bពែង"],
    "ခွ က် ချ": ["ခွက်ချ။"],
    "𠮷 野 家": ["𠮷野家"],
}
SPACED = {
    "ಕನ್ನಡ ಭಾಷೆ": ["ಕನ್ನಡ ಭಾಷೆ."],
    "තේ ක්රම": ["තේ ක්\u200dරම"],
    "हिन्दी में": ["हिन्दी में।"],
    "𞤢𞤣𞤤 a": ["𞤀𞤁𞤂 a"],
    "وضع كوب نعم": ["وضع كوب؟ نعم،"],
    "컵을 놓기": ["컵을 놓기", "\u110f\u1165\u11b8을 놓기"],
    "café istanbul": ["Cafe\u0301 İstanbul", "café istanbul."],
}


@pytest.fixture(params=[pytest.param("ptb", marks=needs_java), "simple"])
def tokenizer(request, monkeypatch):
    """The name of the tokenizer that is in use."""
    if request.param == "simple":
        monkeypatch.setenv("PATH", "")
    return request.param


def test_scripts_without_spaces_are_split_into_characters(tokenizer):
    """Every Chinese, Japanese or Thai sentence was one word, and Java dropped the vowel signs of Khmer
    and Burmese and all characters beyond U+FFFF."""
    found, name, _ = tokenize([t for texts in SAME_TOKENS.values() for t in texts], 60)
    assert name == f"{tokenizer}+characters"
    assert [found[t] for texts in SAME_TOKENS.values() for t in texts] == [
        tokens for tokens, texts in SAME_TOKENS.items() for _ in texts
    ]


def test_words_of_other_scripts_keep_their_marks(tokenizer):
    """Java dropped the vowel signs of Kannada, Sinhala and others, which split their words. Without
    Java, Hindi words were split at each vowel sign. "é" of two characters was not "é" of one."""
    found, name, _ = tokenize([t for texts in SPACED.values() for t in texts], 60)
    assert name == tokenizer
    assert [found[t] for texts in SPACED.values() for t in texts] == [
        tokens for tokens, texts in SPACED.items() for _ in texts
    ]


CHINESE = ["把杯子放在桌子上", "把书放在椅子上", "假装把笔拿起来", "撕纸", "打开盒子然后关上"]


def test_chinese_captions_get_scores(no_java):
    """All scores were 0.000, without a note."""
    records = [record(i, text, placeholders=[text[1:3]]) for i, text in enumerate(CHINESE)]
    perfect, _ = score({i: f"{t}。" for i, t in labels(records).items()}, records)
    assert perfect["metrics"]["exact_match"] == perfect["metrics"]["placeholder_match"] == 1
    close, _ = score({i: t[:-1] + "下" for i, t in labels(records).items()}, records)
    assert close["controls"]["shuffled"]["CIDEr"] < close["metrics"]["CIDEr"] < 9
    assert close["metrics"]["Bleu_4"] > 0.5 and close["metrics"]["exact_match"] == 0
    assert close["tokenizer"] == "simple+characters"
    assert "scored by character" in metrics.format_table(close)


def test_captions_without_words(no_java):
    """Any emoji matched any other exactly, and so did "..." and "!"; CIDEr was 0 for the right emoji."""
    records = [record(i, text) for i, text in enumerate(["🐶", "🐱☕", "🐭🧀", "...", "a cup"])]
    wrong, per_clip = score({"0": "🐱", "1": "🐭", "2": "🐭🧀", "3": "!", "4": "cup"}, records)
    assert wrong["metrics"]["exact_match"] == 0.2
    assert per_clip["0"]["CIDEr"] == 0 < per_clip["2"]["CIDEr"]
    assert "captions of emoji" in metrics.format_table(wrong)


@pytest.mark.parametrize("text", ["把杯子放在桌子上", "Поставить чашку на стол"])
def test_meteor_is_skipped_for_other_scripts(text, no_java):
    """METEOR's English rules gave a number for Chinese and Russian references."""
    result, _ = score({"0": "a", "1": "b"}, [record(0, text), record(1, "holding a cup")])
    assert "defined for English; 1 of 2 clips" in result["skipped"]["METEOR"]
    one_of_many = [record(0, text), *world(200)[1:]]
    result, _ = score(labels(one_of_many), one_of_many)
    assert result["skipped"]["METEOR"] == "java not found"


def test_templates_without_spaces():
    """A Chinese full stop, or spaces around the brackets of a template, made the template wrong."""
    templates = ["把 [某物] 放在 [某物] 上", "把[某物]拿起来"]
    parser = Templates(templates)
    assert parser.parse("把杯子放在桌子上。") == (templates[0], ["杯子", "桌子"])
    assert parser.parse("把 杯子 拿起来") == (templates[1], ["杯子"])
    english = Templates(["Holding [something] next to [something]"])
    assert english.parse("holding 杯子 next to 桌子")[1] == ["杯子", "桌子"]
    records = [record(0, "把杯子拿起来", templates[1])]
    assert metrics.template_accuracy({"0": "把杯子拿起来。"}, records, parser) == {"0": 1.0}


# ---- n-gram metrics ------------------------------------------------------------------------


def test_case_and_full_stop_do_not_change_scores(no_java):
    """The original scored raw text: a capital and a full stop lowered CIDEr from 5.5 to 1.9."""
    records = world()
    plain, _ = score(labels(records), records)
    written, _ = score({i: f"{t.capitalize()}." for i, t in labels(records).items()}, records)
    assert plain["metrics"] == written["metrics"]


def test_perfect_predictions_reach_the_ceiling_and_the_controls_do_not(no_java):
    records = world()
    result, per_clip = score(labels(records), records, most_frequent=records[0]["label"])
    assert result["metrics"]["CIDEr"] == pytest.approx(result["controls"]["ceiling"]["CIDEr"])
    for name in ("Bleu_4", "ROUGE_L", "exact_match", "template_accuracy", "placeholder_match"):
        assert result["metrics"][name] == pytest.approx(1, abs=1e-6), name
    for control in ("shuffled", "most_frequent"):
        assert result["controls"][control]["CIDEr"] < 2
        assert result["controls"][control]["exact_match"] < 0.1
    assert result["parser_on_references"] == 1
    mean = np.mean([clip["CIDEr"] for clip in per_clip.values()])
    assert result["metrics"]["CIDEr"] == pytest.approx(mean)


def test_ceiling_depends_on_the_length_of_the_reference(no_java):
    """A reference of 2 words allows 5.0, one of 3 words 7.5, and a longer one 10."""
    texts = [
        "tearing paper",
        "folding blue napkin",
        "holding a small spoon",
        "one two three four five",
    ]
    records = [record(i, text) for i, text in enumerate(texts)]
    records += [record(9 + i, f"filler{i} caption{i} number{i} word{i}") for i in range(20)]
    _, per_clip = score(labels(records), records)
    assert [per_clip[str(i)]["CIDEr"] for i in range(4)] == pytest.approx([5, 7.5, 10, 10])


def test_ceiling_is_the_best_of_several_references(no_java):
    records = [
        record(
            i, None, paraphrases=[f"a{i} b{i} c{i} d{i} e{i}", f"a{i} b{i} c{i} d{i}", "odd one"]
        )
        for i in range(10)
    ]
    result, _ = score({r["id"]: r["paraphrases"][1] for r in records}, records, style="sentence")
    odd, _ = score({r["id"]: "odd one" for r in records}, records, style="sentence")
    best = result["controls"]["ceiling"]["CIDEr"]
    assert best >= result["metrics"]["CIDEr"] > odd["metrics"]["CIDEr"]
    assert odd["controls"]["ceiling"]["CIDEr"] == best


def test_the_oracle_is_the_best_sample_of_each_clip(no_java):
    """A clip may have fewer distinct samples than the others."""
    records = [record(i, f"moving cup{i} up fast") for i in range(6)]
    wrong = {str(i): f"moving jar{i} up fast" for i in range(6)}
    samples = {i: [text, "nothing at all", records[int(i)]["label"]] for i, text in wrong.items()}
    samples["5"] = [wrong["5"]]
    result, per_clip = score(wrong, records, greedy=labels(records), samples=samples)
    assert result["metrics"]["exact_match"] == 0
    assert result["controls"]["greedy"]["exact_match"] == 1
    oracle = result["controls"]["oracle"]
    assert oracle["exact_match"] == pytest.approx(5 / 6)
    assert oracle["CIDEr"] == pytest.approx((5 * 10 + per_clip["5"]["CIDEr"]) / 6)


def test_document_frequencies_are_frozen(no_java):
    """pycocoevalcap counts over the scored references only, so that one clip alone scores 0."""
    records = world()
    rng = random.Random(1)
    predictions = {r["id"]: rng.choice([r, records[0]])["label"] + " slowly" for r in records}
    _, full = score(predictions, records)
    some = records[7:19]
    _, part = score({r["id"]: predictions[r["id"]] for r in some}, some, all_records=records)
    assert {i: c["CIDEr"] for i, c in part.items()} == {i: full[i]["CIDEr"] for i in part}
    _, one = score({"7": predictions["7"]}, records[7:8], all_records=records)
    assert one["7"]["CIDEr"] == full["7"]["CIDEr"] > 0


def test_cider_equals_pycocoevalcap_on_the_whole_split():
    references = {str(i): [r["label"], "holding a thing"] for i, r in enumerate(world())}
    hypotheses = {i: texts[0] + " and more" for i, texts in references.items()}
    _, expected = Cider().compute_score(references, {i: [t] for i, t in hypotheses.items()})
    assert list(metrics.Cider(references)(hypotheses).values()) == pytest.approx(list(expected))


@pytest.fixture
def small_meteor(tmp_path, monkeypatch):
    """METEOR with an empty paraphrase table, also in pycocoevalcap. Loading the real one takes 10 s."""
    shutil.copy(jar("meteor", "meteor-1.5.jar"), tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "paraphrase-en.gz").write_bytes(gzip.compress(b""))
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.__file__", str(tmp_path / "meteor.py"))
    monkeypatch.setattr(
        caption_metrics,
        "jar",
        lambda *path: tmp_path / path[1] if path[0] == "meteor" else jar(*path),
    )
    for module in (metrics, caption_metrics):
        monkeypatch.setattr(module, "JAVA_LIMIT", 60)


@needs_java
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # pycocoevalcap's pipes
def test_meteor_equals_pycocoevalcap_in_a_german_jvm(small_meteor, monkeypatch):
    """METEOR hung forever if the JVM printed 0,37 or a caption contained `|||`."""
    references = {str(i): [r["label"], "he holds a big thing"] for i, r in enumerate(world(12))}
    hypotheses = {i: texts[0].replace("holding", "keeping") for i, texts in references.items()}
    hypotheses |= {"0": "", "1": "a ||| holding ||| b", "2": "one | two"}
    without_bars = {i: [" ".join(t.replace("|", " ").split())] for i, t in hypotheses.items()}
    expected, _ = Meteor().compute_score(references, without_bars)
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    lines = metrics.meteor_statistics(hypotheses, references)
    found = caption_metrics.meteor_scores(lines)[-1]
    assert found == pytest.approx(expected, abs=1e-12) and expected > 0.1
    # evaluate.py --versus needs METEOR of sums over clips; a perfect match adds no chunk to the sum
    sums = metrics.meteor_counts(lines).sum(0)  # (23,)
    assert metrics.meteor_of_sums(sums[None]) == pytest.approx([expected], abs=1e-12)


@needs_java
def test_hostile_predictions_get_every_metric(small_meteor):
    records = world(len(HOSTILE) + 2)
    hostile = {str(i): text for i, text in enumerate([*HOSTILE, "a ||| b ||| c", ""])}
    result, _ = score(hostile, records)
    assert result["tokenizer"] == "ptb"
    assert set(result["skipped"]) == {"most_frequent"}
    assert set(result["metrics"]) == {*metrics.CAPTION_METRICS, *metrics.PER_CLIP}


def test_empty_predictions_score_zero(no_java):
    records = world(5)
    result, _ = score(dict.fromkeys(labels(records), ""), records)
    assert result["metrics"] == pytest.approx(dict.fromkeys(result["metrics"], 0.0))
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    "script, reason",
    [("exec /bin/sleep 1000", "longer than 0.2 s"), ("echo no memory >&2; exit 1", "no memory")],
)
def test_java_that_hangs_or_fails_leaves_the_other_metrics(tmp_path, monkeypatch, script, reason):
    fake_java(tmp_path, monkeypatch, script)
    for module in (metrics, caption_metrics):
        monkeypatch.setattr(module, "JAVA_LIMIT", 0.2)
    records = world(5)
    result, _ = score(labels(records), records)
    assert result["tokenizer"] == "simple"
    assert reason in result["skipped"]["METEOR"] and reason in result["skipped"]["PTBTokenizer"]
    assert result["metrics"]["Bleu_4"] > 0.9 and result["metrics"]["CIDEr"] > 5


@pytest.mark.parametrize("answer", ["0,37", "", "0.5", "Error: no"])
def test_java_output_that_is_no_score_is_refused(tmp_path, monkeypatch, answer):
    fake_java(tmp_path, monkeypatch, f"/bin/cat >/dev/null; echo '{answer}'")
    records = world(5)
    result, _ = score(labels(records), records)
    assert result["tokenizer"] == "simple"
    assert "METEOR printed" in result["skipped"]["METEOR"]


def test_without_java(no_java):
    records = world(5)
    result, _ = score(labels(records) | {"4": " "}, records)
    assert result["tokenizer"] == "simple" and "METEOR" not in result["metrics"]
    assert result["skipped"]["METEOR"] == "java not found"
    text = metrics.format_table(result)
    assert "tokenizer simple" in text and "NOT comparable with published ones" in text
    assert "\nempty: 1 caption\n" in text
    json.dumps(result, allow_nan=False)


def test_captions_that_do_not_depend_on_the_clip_are_reported(no_java):
    """A run of 42 steps on 54 own clips ended with the CIDEr of shuffled captions, and no word about it."""
    records = world(60)
    right, _ = score(labels(records), records)
    constant, _ = score(dict.fromkeys(labels(records), records[0]["label"]), records)
    assert metrics.UNRELATED in metrics.format_table(constant)
    assert metrics.UNRELATED not in metrics.format_table(right)


def test_meteor_is_skipped_on_request(no_java):
    result, _ = score(labels(world(5)), world(5), with_meteor=False)
    assert result["skipped"]["METEOR"] == "not requested"


# ---- templates -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption, template, fillers",
    [
        ("holding a cup next to two pens", 0, ["a cup", "two pens"]),
        ("holding a cup", 1, ["a cup"]),
        ("Holding  A cup\nnext to it.", 0, ["a cup", "it"]),
        ("holding cup next to box next to pen", 0, ["cup", "box next to pen"]),
        ("holding next to cup", 1, ["next to cup"]),
        ("a ball falling like a rock", 2, ["a ball"]),
        ("a ball falling", 3, ["a ball"]),
        ("falling falling", 3, ["falling"]),
        ("pretending to put 3 things (x) into the rim of y", 4, ["3", "the rim of"]),
        ("pretending to put 3 things x into the rim of y", None, None),
        ("putting cup onto on box", 6, ["cup", "on box"]),
        ("putting cup on onto box", 6, ["cup on", "box"]),
        ("lifting up one end of a book, then letting it drop down", 7, ["a book"]),
        ("falling", None, None),
        ("holding", None, None),
        ("someone holding a cup", None, None),
        ("", None, None),
    ],
)
def test_template_parser(caption, template, fillers):
    expected = None if template is None else (TEMPLATES[template], fillers)
    assert Templates(TEMPLATES).parse(caption) == expected
    assert Templates(TEMPLATES[::-1]).parse(caption) == expected


def test_parser_equals_the_regular_expression():
    """The linear search finds what `(.+?)` per bracket would, in random ambiguous captions."""
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        words = ["[x]", "[y z]", "[x]on", "on", "to", "(x)", "on.", "b"]
        template = " ".join(rng.choices(words, k=rng.randint(1, 6)))
        caption = " ".join(rng.choices(["on", "to", "(x)", "on.", "b", "c"], k=rng.randint(1, 8)))
        caption = caption.rstrip(". ")
        pattern = "(.+?)".join(map(re.escape, re.split(r"\[[^\]]*\]", template)))
        match = re.fullmatch(pattern, caption)
        found = Templates([template]).parse(caption)
        assert (found and found[1]) == (match and list(match.groups())), (template, caption)
        hits += match is not None
    assert hits > 100


def test_template_accuracy_and_placeholder_match_are_means_over_clips(no_java):
    template = TEMPLATES[0]
    records = [
        record(0, "holding red cup next to blue pen", template, ["red cup", "blue pen"]),
        record(1, "holding box next to spoon", template, ["box", "spoon"]),
        record(2, "holding a lid", "Holding [something]", []),
    ]
    predictions = {
        "0": "holding pen next to red cup.",
        "1": "putting boxes on spoon",
        "2": "holding a lid",
    }
    result, per_clip = score(predictions, records)
    assert result["metrics"]["template_accuracy"] == pytest.approx(2 / 3)
    assert per_clip["0"]["placeholder_match"] == 0.5  # red cup, but the pen is not blue
    assert per_clip["1"]["placeholder_match"] == 0.5  # boxes is not box
    assert "placeholder_match" not in per_clip["2"]
    assert result["metrics"]["placeholder_match"] == 0.5
    assert result["counts"] == {"placeholder_match": 2}
    assert result["metrics"]["exact_match"] == pytest.approx(1 / 3)


# ---- what can be scored --------------------------------------------------------------------


def test_test_split_gets_template_accuracy_only(no_java):
    """test-answers.csv names the class without brackets and gives no caption."""
    records = [record(0, None, "Holding something"), record(1, None, TEMPLATES[5])]
    result, per_clip = score({"0": "holding a cup", "1": "holding a cup"}, records)
    assert result["metrics"] == {"template_accuracy": 0.5}
    assert {*metrics.CAPTION_METRICS, "exact_match", "placeholder_match"} <= set(result["skipped"])
    assert set(result["controls"]) == {"shuffled"}
    assert "parser_on_references" not in result
    assert per_clip["0"] == {"template_accuracy": 1.0}
    assert "template_accuracy" in metrics.format_table(result)


def test_own_data_skip_template_metrics(no_java):
    records = [record(i, f"clip{i} shows cat number{i} here") for i in range(4)]
    result, _ = score(labels(records), records)
    assert result["metrics"]["CIDEr"] > 9
    assert "no templates" in result["skipped"]["template_accuracy"]
    assert "no placeholders" in result["skipped"]["placeholder_match"]


def test_sentences_are_scored_against_paraphrases(no_java):
    records = world(6)
    for r in records:
        r["paraphrases"] = [f"A person shows {r['label']}."]
    result, _ = score({r["id"]: r["paraphrases"][0] for r in records}, records, style="sentence")
    assert result["metrics"]["exact_match"] == 1
    assert "label only" in result["skipped"]["template_accuracy"]
    assert "template_accuracy" not in result["controls"]["shuffled"]


def test_one_clip_has_no_shuffled_control_and_no_nan(no_java):
    result, _ = score({"0": "holding a cup"}, [record(0, "holding a cup", TEMPLATES[1], ["cup"])])
    assert {"shuffled", "CIDEr"} <= set(result["skipped"])
    assert result["metrics"]["template_accuracy"] == 1
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p, r: p.pop("3"), "1 of 6 clips have no prediction: 3"),
        (
            lambda p, r: p.update(x="a", y="b"),
            "2 of 8 predictions are for clips .* not in the annotations: x, y",
        ),
        (lambda p, r: r[4].update(label=" "), "1 of 6 clips have no label caption: 4"),
        (lambda p, r: p.clear(), r"6 of 6 clips have no prediction: 0, 1, 2, …"),
    ],
)
def test_clips_and_predictions_must_be_one_to_one(change, message):
    records = world(6)
    predictions = labels(records)
    change(predictions, records)
    with pytest.raises(UserError, match=message):
        score(predictions, records)


def test_predictions_in_coco_format(tmp_path):
    """The original computed ids from batch sizes, so two clips shared one in the short last batch.

    The message about a file that is not valid did not say which of several files it was.
    """
    entries = [{"image_id": 7, "caption": "a"}, {"image_id": "8", "caption": "b"}]
    assert predictions_by_id(entries) == {"7": "a", "8": "b"}
    with pytest.raises(UserError, match="clips predicted more than once: 7"):
        predictions_by_id([*entries, {"image_id": "7", "caption": "c"}])
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(entries))
    wrong = (
        {},
        ["7", "a"],
        [{"image_id": "7"}],
        [*entries[:1], {"image_id": "7", "caption": None}],
    )
    for value, where in zip(wrong, (" must", ": entry 1", ": entry 1", ": entry 2"), strict=True):
        second.write_text(json.dumps(value))
        with pytest.raises(UserError, match=rf"{second}{where}.*image_id"):
            read_predictions([first, second], {"7", "8"})


# ---- controls and intervals ----------------------------------------------------------------


def test_derangement_has_no_fixed_point():
    for n in range(2, 51):
        order = metrics.derangement(n, seed=n)
        assert sorted(order) == list(range(n))
        assert all(i != j for i, j in enumerate(order))
    assert metrics.derangement(50, 1) == metrics.derangement(50, 1) != metrics.derangement(50, 2)


def test_bootstrap_interval():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = metrics.bootstrap(values, seed=5)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert metrics.bootstrap(values, seed=5) == [low, high] != metrics.bootstrap(values, seed=6)


def test_scores_do_not_depend_on_the_order_of_the_clips(no_java):
    """The mean of the same floats in another order differed in its last digit."""
    records, rng = world(), random.Random(1)
    predictions = {r["id"]: rng.choice(records)["label"] for r in records}
    result, _ = score(predictions, records, seed=3)
    again, _ = score(dict(reversed(predictions.items())), records, seed=3)
    assert result == again


def test_importing_metrics_loads_no_torch():
    code = "import sys, metrics; sys.exit('torch' in sys.modules)"
    root = Path(metrics.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize(
    ("template", "fillers", "text"),
    [
        ("Holding [something] next to [something]", ["a cup", "it"], "holding a cup next to it"),
        ("Holding [something] next to [something]", ["a cup"], "holding a cup next to something"),
        ("[Something] falling", [], "something falling"),
        ("[Something] falling", ["a", "b"], "a falling"),
    ],
)
def test_a_filled_template_equals_the_label(template, fillers, text):
    assert fill(template, fillers) == text
    if fillers and "something" not in text:
        found, named = Templates([template]).parse(text)
        assert found == template and named == fillers[: len(named)]


# ---- running Java --------------------------------------------------------------------------


def test_an_exception_does_not_wait_for_java(tmp_path, monkeypatch):
    """SIGTERM while METEOR hung took effect only after its time limit of 10 minutes, and the children
    of a wrapper script named java kept running. The next call must work normally."""
    pid = tmp_path / "pid"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\nread line; sleep 300 & echo $! > {pid}; wait\n")
    java.chmod(0o755)
    with pytest.raises(KeyError), java_thread() as thread:
        pending = thread.submit(run_java, [], ["x"], 20)
        while not pid.exists() or not pid.read_text():
            assert not pending.done()
        raise KeyError("as if by a signal")
    assert isinstance(pending.exception(), JavaError)
    assert "exited" in str(pending.exception())  # and not because of the time limit
    state = Path(f"/proc/{pid.read_text().strip()}/stat")

    def gone():
        try:
            return state.read_text().split()[2] in "ZX"
        except OSError:
            return True

    until(gone, seconds=20)  # a killed process needs a moment to end
    java.write_text("#!/bin/sh\ncat\n")
    assert run_java([], ["x", "y"], 20) == ["x", "y"]


def test_java_does_not_start_after_an_exception(tmp_path, monkeypatch):
    """METEOR runs Java twice: a signal that ends its first run must also prevent the second."""
    fake_java(tmp_path, monkeypatch, "exec /bin/sleep 1000")
    raised = threading.Event()

    def start_late():
        raised.wait()
        return run_java([], [], 5)

    with pytest.raises(KeyError), java_thread() as thread:
        pending = thread.submit(start_late)
        threading.Timer(0.5, raised.set).start()
        raise KeyError("as if by a signal")
    assert str(pending.exception()) == "cancelled"


def test_rouge_n_is_the_f1_of_n_grams():
    references = {"a": ["the cat sat on the mat"], "b": ["x", "opening a door"]}
    hypotheses = {"a": "the the cat", "b": "opening a box"}
    # a: "the" twice and "cat" of 3 and 6 words; "the cat" of 2 and 5 pairs. b: its second reference.
    one, two = (metrics.rouge_n(hypotheses, references, n) for n in (1, 2))
    assert [*one.values()] == pytest.approx([6 / 9, 4 / 6])
    assert [*two.values()] == pytest.approx([2 / 7, 2 / 4])
    assert metrics.rouge_n({"a": ""}, {"a": ["x"]}, 1) == {"a": 0}
