"""Characters and words in scripts other than Latin, after Unicode 16: scripts without spaces, marks."""

import re
import unicodedata

# Character classes for regular expressions. These scripts put no spaces between words:
UNSPACED = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u302f\u3031-\u303c"  # Han radicals, numerals, iteration marks
    "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # kana
    "\u3100-\u312f\u3190-\u31ef\u3200-\u33ff"  # Bopomofo, strokes, enclosed characters
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u0e01-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\ua000-\ua4cf\ua980-\ua9df\u1b00-\u1b7f"  # Yi, Javanese, Balinese
)
# Combining marks, without variation selectors. \w matches none of them.
MARKS = "".join(
    c
    for c in map(chr, range(0x300, 0x1F000))
    if unicodedata.category(c)[0] == "M" and not "\ufe00" <= c <= "\ufe0f"
)
# letters of scripts other than Latin; punctuation and symbols of all scripts are in U+2000 to U+2BFF
NOT_LATIN = re.compile(
    "[\u0370-\u1cff\u1f00-\u1fff\u2c00-\u2c5f\u2c80-\ua71f\ua800-\uab2f\uab70-\ufaff\ufb07-\ufdff"
    "\ufe70-\ufefe\uff66-\uffdc\U00010300-\U0001efff\U00020000-\U0003ffff]"
)
_UNSPACED = re.compile(f"[{UNSPACED}]")
_PIECE = re.compile(rf"[{UNSPACED}][{MARKS}]*|[^\s{UNSPACED}]+")
# A line is not broken after an opening bracket or a vowel that is written before its consonant, nor
# before closing punctuation.
_OPENING = r"(\[{‘“〈《「『【〔〖（［｛\u0e40-\u0e44\u0ec0-\u0ec4"
_UNBROKEN = re.compile(
    rf"\s*(?:[{_OPENING}]*[{UNSPACED}][^\w\s{_OPENING}]*|(?:(?![{_OPENING}]*[{UNSPACED}])\S)+)"
)


def is_unspaced(text):
    """Return True if a text starts with a character of a script without spaces."""
    return bool(_UNSPACED.match(text))


def pieces(text):
    """Split a text at white space and around each character of a script without spaces.

    Such a character is one piece with its combining marks. "a cup杯子" gives ["a", "cup", "杯", "子"].
    """
    return _PIECE.findall(text)


def unbroken(text):
    """Split a text where a line may be broken. All but the first parts start with their white space."""
    return _UNBROKEN.findall(text)


def split_letters(text):
    """Split a text into letters, each with its combining marks."""
    return re.findall(rf"(?s:.)[{MARKS}]*", text)


def is_foreign_punctuation(character):
    """Return True for punctuation of one script, such as "。" or "؟", but not for "?" or "…"."""
    common = character < "\u0370" or "\u2000" <= character <= "\u206f"
    return not common and unicodedata.category(character)[0] == "P"
