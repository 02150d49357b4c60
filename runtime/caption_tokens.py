"""Tokenise captions for the metrics, as PTBTokenizer of pycocoevalcap does, and in any script."""

import re
import unicodedata

from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

from runtime.java import JavaError, jar, run_java
from runtime.writing_systems import MARKS, is_foreign_punctuation, is_unspaced, pieces

# the fallback without Java: words, numbers and contractions (do n't, it 's)
LETTER = rf"[\w{MARKS}]"
SIMPLE_TOKEN = re.compile(
    rf"n't|'(?:s|m|re|ve|ll|d)\b|\d+(?:[.,]\d+)+|{LETTER}+(?=n't)|{LETTER}+(?:-{LETTER}+)*"
)
# Java's tokenizer drops vowel signs and whole letters of these scripts, which splits their words: Oriya,
# Telugu to Sinhala, Tibetan, Cherokee to Vedic extensions, Lisu to Meetei Mayek, and all beyond U+FFFF.
UNKNOWN_TO_JAVA = re.compile(
    "[\u0b00-\u0b7f\u0c00-\u0dff\u0f00-\u0fff\u13a0-\u1cff\ua4d0-\ua71f\ua800-\uabff\U00010000-\U0003ffff]"
)
WIDTH = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff66-\uffdc]+")  # full or half
CHARACTERS = "+characters"  # in the tokenizer's name if some texts are tokenised by character


def normalise(text):
    """Return a text in one of several equivalent spellings.

    Combining marks are composed ("é" may be one character or two, Qwen2 writes one). Letters and digits
    are not full-width, Katakana is. Joiners are removed. "İ", which Python and Java lower-case to two
    characters, is "i".
    """
    if text.isascii():
        return text
    text = WIDTH.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = unicodedata.normalize("NFC", text).replace("İ", "i")
    return text.replace("\u200c", "").replace("\u200d", "")


def clean(text):
    """Put a caption on one line. Unprintable characters and emoji become spaces.

    Java's tokenizer treats `\\r`, `\\f` and U+2028 as line ends, which would shift all later captions
    by a line. It drops most characters beyond U+FFFF, but they change how the text next to them is
    tokenised, so only letters are kept. Java also keeps the punctuation of scripts other than Latin.
    """

    def is_kept(c):
        printable = c.isprintable() and (c <= "\uffff" or c.isalnum() or c in MARKS)
        return printable and not is_foreign_punctuation(c)

    text = "".join(c if is_kept(c) else " " for c in normalise(text))
    return " ".join(text.split())


def tokenize(texts, time_limit):
    """Tokenise and lower-case captions and drop punctuation, as pycocoevalcap's PTBTokenizer does.

    Scripts that put no spaces between words, such as Chinese, Japanese and Thai, are split into
    characters, and so are texts with nothing but emoji. Words of scripts that Java's tokenizer does not
    know are split at spaces.

    time_limit: seconds for Java. Returns ({text: tokens joined by spaces}, tokenizer, reason). The
    tokenizer is "ptb" and the reason None, or, if Java fails, the tokenizer is "simple" and the reason
    is the error. If any text was split into characters, the tokenizer ends in "+characters". Predictions
    and references must be tokenised in one call, because the two tokenizers differ.
    """
    parts = {text: _parts(clean(text)) or _emoji(text) for text in sorted(set(texts))}
    spaced = sorted({part for some in parts.values() for part, known in some if known}) or [""]
    tokenizer, reason = "ptb", None
    try:
        tokens = _ptb_tokens(spaced, time_limit)
    except JavaError as error:
        reason = f"{error}; simple tokenizer used, scores are NOT comparable with published ones"
        tokens, tokenizer = [" ".join(SIMPLE_TOKEN.findall(t.lower())) for t in spaced], "simple"
    tokens = dict(zip(spaced, tokens, strict=True))
    tokenised = {
        text: " ".join(filter(None, (tokens[part] if known else part for part, known in some)))
        for text, some in parts.items()
    }
    if any(is_unspaced(part) or _emoji(part) for some in parts.values() for part, _ in some):
        tokenizer += CHARACTERS
    return tokenised, tokenizer, reason


def _emoji(text):
    """Split the emoji of a text into parts, as `_parts` does. Other texts lose their emoji in `clean`."""
    return [(c, False) for c in text if c > "\uffff" and unicodedata.category(c)[0] == "S"]


def _parts(text):
    """Split a clean text into [(part, whether Java has to tokenise it)]. Other parts are tokens."""
    parts = []
    for piece in pieces(text):
        if is_unspaced(piece):
            parts.append((piece, False))
        elif UNKNOWN_TO_JAVA.search(piece):
            parts += [(word, False) for word in SIMPLE_TOKEN.findall(piece.lower())]
        elif parts and parts[-1][1]:
            parts[-1] = f"{parts[-1][0]} {piece}", True
        else:
            parts.append((piece, True))
    return parts


def _ptb_tokens(texts, time_limit):
    """Tokenise `texts` in one run of Java. Raises JavaError.

    A line "A" is added after each caption, so that its tokens do not depend on the next caption. Java
    looks at the first letter of the next line to decide whether the full stop of "... x." belongs to the x.
    """
    main = ("edu.stanford.nlp.process.PTBTokenizer", "-encoding", "UTF-8")
    path = jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    lines = [line for text in texts for line in (text, "A")]
    out = run_java(["-cp", path, *main, "-preserveLines", "-lowerCase"], lines, time_limit)
    if len(out) != len(lines) or set(out[1::2]) != {"a"}:
        raise JavaError(f"PTBTokenizer returned {len(out)} lines for {len(lines)}")
    # PUNCTUATIONS lists brackets as -LRB-, which does not match Java's lower-case output. Brackets are
    # therefore kept, as in all published scores. split() also splits "1\xa01/2", as the n-gram metrics do.
    dropped = frozenset(PUNCTUATIONS)
    return [" ".join(t for t in line.split() if t not in dropped) for line in out[::2]]
