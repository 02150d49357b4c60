"""Captions -> tokens, as everybody's caption scores have them: the Penn Treebank's, lower-case, without
punctuation. Java does it if it is there, a Python imitation if it is not.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

JAVA_LIMIT = 600  # seconds for one run of Java; all of SSv2's validation split takes about 15


RUNNING, STOPPED = set(), threading.Event()  # runs of Java


# ---- Java ----------------------------------------------------------------------------------


class JavaError(Exception):
    """Why Java gave no result, in a few words."""


def jar(*path):
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        raise JavaError("pycocoevalcap is not installed")
    return Path(next(iter(spec.submodule_search_locations)), *path)


def run_java(arguments, lines, time_limit):
    """Run Java on `lines` (stdin) and return the lines of its stdout. Raises JavaError."""
    java = shutil.which("java")
    if java is None:
        raise JavaError("java not found")
    # METEOR reads and prints numbers in the locale's format, and hangs on a decimal comma.
    locale = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
    text = "".join(f"{line}\n" for line in lines)
    pipe = subprocess.PIPE
    try:
        # a session of its own, so that a wrapper script and what it started can be ended together
        process = subprocess.Popen(
            [java, *locale, *arguments],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )
    except OSError as error:
        raise JavaError(f"java cannot be started: {error}") from None
    RUNNING.add(process)
    try:
        if STOPPED.is_set():
            raise JavaError("stopped by a signal")
        out, errors = process.communicate(text.encode(), time_limit)
    except subprocess.TimeoutExpired:
        raise JavaError(f"java took longer than {time_limit:g} s") from None
    finally:
        kill(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):  # closing stdin flushes what java never read
                stream.close()
    if process.returncode:
        last = errors.decode(errors="replace").strip().split("\n")[-1]
        raise JavaError(f"java exited with {process.returncode}: {last[:200]}")
    # not splitlines(): that would also cut at U+2028 and its kind
    return out.decode(errors="replace").replace("\r\n", "\n").removesuffix("\n").split("\n")


def kill(process):
    """End a run of Java and all that it started."""
    RUNNING.discard(process)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def beside():
    """A thread for Java; a signal or an error in the block ends what runs there, or is about to."""
    try:
        with ThreadPoolExecutor(1) as thread:
            try:
                yield thread
            except BaseException:
                STOPPED.set()
                for process in list(RUNNING):
                    kill(process)
                raise
    finally:
        STOPPED.clear()


# ---- tokenizer -----------------------------------------------------------------------------

# What pycocoevalcap's PTBTokenizer drops. It lists -LRB- and the other brackets too, but Java prints
# them in lower case, so that they stay; scores comparable with everybody else's need the same.
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_LETTER, _CHAR = r"[^\W\d_]", r"(?:[^\W_²³¹½¼¾⅓⅔]|[\u0300-\u036f])"
_ABBREVIATIONS = (
    "adj|al|alex|apr|assn|aug|ave|bldg|bros|capt|cf|cie|co|col|corp|dec|dept|dr|est|etc|ext|feb|"
    "fri|ft|gen|gov|hon|inc|jan|jos|jr|lt|ltd|maj|mar|messrs|mo|mon|mr|mrs|ms|mt|nov|oct|pres|"
    "prof|rd|rep|rev|sen|sept|sgt|sr|st|tel|thu|thurs|tue|tues|univ|vs|wed|wm"
)
_TOKEN = re.compile(
    "|".join(
        (
            r"-[lr][rsc]b-",  # brackets, spelt by the Penn Treebank
            r"(?:https?://|www\.)\S+",
            rf"(?:{_LETTER}\.){{2,}}(?!\w)",  # u.s. p.m. e.g.
            rf"(?:{_ABBREVIATIONS})\.(?!\w)",
            r"(?:no|nos|fig|pp|art|ca)\.(?=\s*\d)",
            # an initial, but not at the end of a sentence
            rf"{_LETTER}\.(?!\s*$|\s+(?-i:[A-Z])|{_LETTER}|\.)|{_LETTER}+\.(?=[,;:])",
            r"n't|'(?:s|m|re|ve|ll|d|em|cause|til|\d0s)(?!\w)|'n'|'t(?=\s+(?:is|was)\b)",
            r"ol'|y'(?=all)|(?:o|d|l)'[^\W\d_]{2,}|ma'am|c'mon",
            r"[-+]?\d+(?:[.,:]\d+)+(?:-\w+)*(?!\w)|\d+(?:[.,:]\d+)+(?=[^\W\d])|[-+]?\.\d+|[-+]\d+",
            # letters and digits, held together by what the Penn Treebank rules hold together
            rf"{_CHAR}+(?:(?:[-/]|(?<={_LETTER})(?:[.?!_](?={_LETTER})|@|(?-i:(?<=[A-Z])&(?=[A-Z]))))"
            rf"{_CHAR}+)*",
            r"@\w+|#[^\W\d_]\w*|c\+\+|[!?]{2,}|\*+|_+|\S",
        )
    ),
    re.IGNORECASE,
)
_CLITIC = re.compile(r"(?<=[^\W_])(n't|'(?:s|m|re|ve|ll|d))(?![^\W_])", re.IGNORECASE)
_JOINED = re.compile(
    r"\b(can(?=not)|gon(?=na)|wan(?=na)|got(?=ta)|lem(?=me)|gim(?=me))(\w\w\w?)\b(?!['-])",
    re.IGNORECASE,
)
_TWAS = re.compile(r"(?<!\w)'t(is|was)\b", re.IGNORECASE)
_SPELT = str.maketrans(
    {"’": "'", "‘": "'", "‛": "'", "‹": "'", "›": "'"}
    | {"–": " - ", "—": " - ", "―": " - ", "…": " . ", "‐": "", "‑": ""}
    | dict.fromkeys('"“”«»`', " ")
    | {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- "}
    | {"{": " -lcb- ", "}": " -rcb- ", "€": "$", "£": " # ", "¢": " cents "}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
)
_ENTITIES = {"&amp;": " & ", "&lt;": " < ", "&gt;": " > ", "&quot;": " "}


def clean(text):
    """Put a caption on one line: unprintable characters and astral ones (emoji) become spaces.

    Java's tokenizer takes `\\r`, `\\f` and U+2028 for line ends, which gives every later caption to
    the wrong clip, and deletes what lies beyond U+FFFF.
    """
    if not text.isascii() or not text.isprintable():
        text = "".join(c if c.isprintable() and c <= "\uffff" else " " for c in text)
    return " ".join(text.split())


def _tokenize_python(text):
    """Imitate `PTBTokenizer -lowerCase` on one cleaned caption.

    It knowingly differs on smileys, <tags>, US$5, (555) 555-1234, "cups,5", a phrase in single
    quotes that ends in s, initials (J. Smith) and rare symbols, and knows fewer abbreviations.
    """
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = _JOINED.sub(r"\1 \2", text.translate(_SPELT).replace("''", " "))
    text = _TWAS.sub(r"'t \1", _CLITIC.sub(r" \1 ", text))
    return " ".join(t for t in _TOKEN.findall(text) if t not in _DROPPED).lower()


def _tokenize_java(texts, time_limit):
    """Tokenise cleaned texts in one run of Java; raises JavaError.

    A line with a capital after each makes a caption independent of what follows: Java looks there
    to decide whether the full stop of "... x." belongs to the x.
    """
    main = ("edu.stanford.nlp.process.PTBTokenizer", "-encoding", "UTF-8")
    path = jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    lines = [line for text in texts for line in (text, "A")]
    out = run_java(
        ["-cp", str(path), *main, "-preserveLines", "-lowerCase"], lines or ["A"], time_limit
    )
    if len(out) != len(lines) or set(out[1::2]) != {"a"}:
        raise JavaError(f"the tokenizer gave {len(out)} lines for {len(lines)}")
    # split() also parts "1\xa01/2", as the n-gram metrics would
    return [" ".join(t for t in line.split() if t not in _DROPPED) for line in out[::2]]


def tokenize(captions, tokenizer=None, time_limit=JAVA_LIMIT):
    """Tokenise and lower-case captions and drop punctuation, as pycocoevalcap's PTBTokenizer does.

    captions: {id: list of texts}; tokenizer: None (Java if it works), or "python" to do without.
    Returns ({id: list of tokens joined by spaces}, name "ptb" or "python", reason why not "ptb" or
    None). Predictions and references must go through one call: the two tokenizers differ in places.
    Each distinct text is tokenised once, whatever its neighbours.
    """
    cleaned = {text: clean(text) for texts in captions.values() for text in texts}
    distinct = sorted(set(cleaned.values()))
    name, reason, done = "python", None, None
    if tokenizer != "python":
        try:
            done, name = _tokenize_java(distinct, time_limit), "ptb"
        except JavaError as error:
            reason = str(error)
    if done is None:
        done = [_tokenize_python(text) for text in distinct]
    done = dict(zip(distinct, done, strict=True))
    return {i: [done[cleaned[t]] for t in texts] for i, texts in captions.items()}, name, reason
