"""Find the class template that a caption was made from: action classification by caption."""

import re


def _plain(text):
    return " ".join(text.lower().split())


def canonical(template):
    """A template without brackets, lower-case: the form of SSv2's labels.json and test-answers.csv."""
    return _plain(re.sub(r"[\[\]]", "", template))


def fill(template, fillers):
    """A template as a label would have it, its brackets filled in order; those left over keep their words."""
    words = iter(fillers)
    return _plain(re.sub(r"\[([^\]]*)\]", lambda slot: next(words, slot[1]), template))


class Templates:
    """Finds the template that a caption was made from.

    Each template such as "Holding [something] next to [something]" stands for the regular
    expression with `(.+?)` per bracket and its other text taken literally, whatever the case and
    the white space; the whole caption must match. Of several, the one with the most literal
    characters wins, then the first in the list.
    """

    def __init__(self, templates):
        # The literal parts, searched one after the other, find what the regular expression would,
        # in linear time: on a caption that stutters, (.+?) thrice would take minutes.
        parts = [(t, re.split(r"\[[^\]]*\]", _plain(t))) for t in dict.fromkeys(templates)]
        self._parts = sorted(parts, key=lambda p: -sum(map(len, p[1])))
        self._known = {}

    def parse(self, caption):
        """Return (template, fillers in lower case), or None where no template matches.

        A full stop at the end of the caption is ignored.
        """
        text = _plain(caption).rstrip(". ")
        if text not in self._known:
            self._known[text] = None
            for template, parts in self._parts:
                fillers = self._fillers(parts, text) if text.startswith(parts[0]) else None
                if fillers is not None:
                    self._known[text] = template, fillers
                    break
        return self._known[text]

    def finds(self, template, caption):
        """True if `parse` finds this template (brackets or not) in the caption."""
        found = self.parse(caption)
        return found is not None and (
            found[0] == template or canonical(found[0]) == canonical(template)
        )

    @staticmethod
    def _fillers(parts, text):
        first, *middle, last = parts if len(parts) > 1 else (*parts, None)
        if last is None:
            return [] if text == first else None
        if not text.endswith(last):
            return None
        fillers, start, end = [], len(first), len(text) - len(last)
        for part in middle:
            at = text.find(part, start + 1, end)  # + 1: a filler has at least one character
            if at < 0:
                return None
            fillers.append(text[start:at])
            start = at + len(part)
        return [*fillers, text[start:end]] if start < end else None
