"""Templates of SSv2's labels, such as "Holding [something]": fill them, and find that of a caption."""

import re

from runtime.caption_tokens import normalise
from runtime.writing_systems import MARKS, UNSPACED

# Spaces mean nothing next to a character of a script without them, unless a word is on the other side.
NO_SPACE = re.compile(
    rf" (?<=[{UNSPACED}{MARKS}\[\]] )(?=[{UNSPACED}])| (?<=[{UNSPACED}{MARKS}] )(?=[\[\]])"
)
FULL_STOPS = ".。．｡।॥۔።။។"


def _plain(text):
    text = " ".join(normalise(text).lower().split())
    return text if text.isascii() else NO_SPACE.sub("", text)


def canonical(template):
    """Return a template in lower case and without brackets, as in labels.json and test-answers.csv."""
    return _plain(re.sub(r"[\[\]]", "", template))


def fill(template, fillers):
    """Fill the brackets of a template in order and return the text in lower case.

    If there are fewer fillers than brackets, the words in the remaining brackets are kept.
    """
    words = iter(fillers)
    return _plain(re.sub(r"\[([^\]]*)\]", lambda slot: next(words, slot[1]), template))


class Templates:
    """Finds the template that a caption was made from.

    A template such as "Holding [something] next to [something]" matches like a regular expression with
    `(.+?)` for each bracket. It must match the whole caption, without regard to case and white space. If
    several templates match, the one with the most literal characters is used, and among equals the first
    in the list.
    """

    def __init__(self, templates):
        parts = [(t, re.split(r"\[[^\]]*\]", _plain(t))) for t in dict.fromkeys(templates)]
        self._parts = sorted(parts, key=lambda p: -sum(map(len, p[1])))

    def parse(self, caption):
        """Return (template, fillers in lower case), or None if no template matches.

        Full stops at the end of the caption are ignored.
        """
        text = _plain(caption).rstrip(FULL_STOPS + " ")
        for template, parts in self._parts:
            fillers = self._fillers(parts, text)
            if fillers is not None:
                return template, fillers
        return None

    @staticmethod
    def _fillers(parts, text):
        """Return the text in each bracket between the literal `parts`, or None if they do not match.

        The result is the same as with the regular expression, but searching for the parts from left to
        right takes linear time. On a repetitive caption, three `(.+?)` would take minutes.
        """
        if len(parts) == 1:
            return [] if text == parts[0] else None
        first, *middle, last = parts
        if not (text.startswith(first) and text.endswith(last)):
            return None
        fillers, start, end = [], len(first), len(text) - len(last)
        for part in middle:
            at = text.find(part, start + 1, end)  # + 1: a filler has at least one character
            if at < 0:
                return None
            fillers.append(text[start:at])
            start = at + len(part)
        return [*fillers, text[start:end]] if start < end else None
