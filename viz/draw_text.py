"""Draw text with Pillow, and check that Pillow and matplotlib are installed.

Decode workers import this file, so it must not import torch (as runtime.files does).
"""

import re
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from runtime.cli import note
from runtime.errors import FAILED, UserError
from runtime.writing_systems import split_letters, unbroken

MARGIN = 8  # pixels around text
BLACK, GREY, GREEN, RED = "#000000", "#555555", "#136313", "#a31515"
BOX = "\u25a1"  # drawn for a character that no font has; DejaVu Sans has it
# regular expressions for names of font files and for the first words of names of characters
STYLED = "bold|italic|oblique|black|heavy|light|thin|condensed|narrow|serif"
EAST_ASIAN = "CJK|HIRAGANA|KATAKANA|HALFWIDTH|FULLWIDTH|IDEOGRAPHIC|HANGUL|BOPOMOFO"


def require(*packages, extra="viz"):
    """Raise UserError if an optional package is missing. extra: the pip extra that installs it."""
    for name in packages or ("PIL", "matplotlib"):
        if find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install -e '.[{extra}]'", code=FAILED)


@cache
def default_font():
    """Return the path of DejaVu Sans, which comes with matplotlib and covers more than Latin letters."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def installed_fonts():
    """List the paths of all installed fonts, upright sans-serif fonts of normal weight first."""
    from matplotlib.font_manager import findSystemFonts

    def rank(path):
        name = Path(path).name.lower()
        return bool(re.search(STYLED, name)), "sans" not in name, "mono" in name, path

    return sorted(findSystemFonts(), key=rank)


@cache
def covered(path):
    """Return the code points that a font file has glyphs for. A font that cannot be used has none."""
    from matplotlib.ft2font import FT2Font

    if "LastResort" in path:  # draws a box for every character
        return frozenset()
    try:
        face = FT2Font(path)
    except (OSError, RuntimeError):  # damaged, or a bitmap font
        return frozenset()
    return frozenset(face.get_charmap() if face.scalable else ())


def find_fonts(text):
    """Choose fonts for a text. Returns (paths, missing characters).

    The first path is DejaVu Sans; installed fonts follow if it lacks some of the characters.
    """
    # spaces, control characters and variation selectors need no glyph
    wanted = {ord(c) for c in text if c.isprintable() and not c.isspace()}
    wanted -= {n for n in wanted if 0xFE00 <= n <= 0xFE0F or 0xE0100 <= n <= 0xE01EF}
    fonts = [default_font()]
    missing = wanted - covered(fonts[0])
    while missing:
        installed = installed_fonts()
        best = next((path for path in installed if missing <= covered(path)), None)
        best = best or max(installed, key=lambda path: len(missing & covered(path)), default=None)
        if best is None or not missing & covered(best):
            break
        fonts.append(best)
        missing -= covered(best)
    return fonts, {chr(n) for n in missing}


def warn_missing(texts):
    """Print a note, once per script, if no font has some of the characters of the texts."""
    _, missing = find_fonts("".join(texts))
    letters = {c for c in missing if c.isalpha()}
    for script in sorted({unicodedata.name(c, "UNNAMED").split()[0] for c in letters or missing}):
        note_missing(script)


@cache
def note_missing(script):
    """Print which font to install for a script, given as the first word of its characters' names."""
    package = "fonts-noto-cjk" if re.fullmatch(EAST_ASIAN, script) else "fonts-noto-core"
    note(
        f"no installed font has the {script} characters of some texts, so boxes are drawn; install one,"
        f" for example with apt install {package}"
    )


def drawable(text, missing):
    """Replace the `missing` characters of a text by boxes, and combining marks among them by nothing."""
    return "".join(
        c if c not in missing else "" if unicodedata.category(c)[0] == "M" else BOX for c in text
    )


def for_matplotlib(text):
    """Return (text, font families) for drawing a text with matplotlib.

    It is drawn without formulas, and without matplotlib's warnings for missing characters.
    """
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    warn_missing([text])
    paths, missing = find_fonts(text)
    families = [FT2Font(path).family_name for path in paths]
    for path, family in zip(paths, families, strict=True):
        if family not in fontManager.get_font_names():
            fontManager.addfont(path)
    text = drawable(text, missing).replace("$", r"\$")  # a pair of $ would start a formula
    return text, families


def font(size):
    """Load DejaVu Sans for Pillow."""
    from PIL import ImageFont

    return ImageFont.truetype(default_font(), size)


class Letters:
    """Measures and draws text with Pillow, each character in the first font that has it.

    text: all that will be drawn. size: font size in pixels.
    """

    def __init__(self, text, size):
        from PIL import ImageFont

        paths, self.missing = find_fonts(text)
        self.fonts = [(ImageFont.truetype(path, size), covered(path)) for path in paths]
        self.ascent = self.fonts[0][0].getmetrics()[0]

    def runs(self, text):
        """Split a text into [(font, text)]. Marks, spaces and the like stay with what precedes them."""
        runs = []
        for c in drawable(text, self.missing):
            letters = next((font for font, known in self.fonts if ord(c) in known), None)
            attached = letters is None or c.isspace() or unicodedata.category(c)[0] == "M"
            if runs and (attached or letters is runs[-1][0]):
                runs[-1] = runs[-1][0], runs[-1][1] + c
            else:
                runs.append((letters or self.fonts[0][0], c))
        return runs

    def getlength(self, text):
        """Measure the width of a line of text in pixels."""
        return sum(letters.getlength(run) for letters, run in self.runs(text))

    def draw(self, canvas, corner, text, colour):
        """Draw a line of text on a PIL.ImageDraw. corner: (left, top) in pixels."""
        left, top = corner
        for letters, run in self.runs(text):
            canvas.text((left, top + self.ascent), run, font=letters, fill=colour, anchor="ls")
            left += letters.getlength(run)


def wrap(text, width, letters):
    """Break a text into lines of at most `width` pixels.

    Lines end between words, or between the characters of scripts without spaces. Other words are only
    split if they are wider than a line. letters: a `Letters` or a Pillow font.
    """
    lines = [""]
    for part in unbroken(" ".join(text.split())):
        if letters.getlength(longer := lines[-1] + (part if lines[-1] else part.lstrip())) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in split_letters(part.strip()):
            if lines[-1] and letters.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def panel(texts, width, size, height=0):
    """Draw wrapped texts [(text, colour)] below each other on a white PIL image, `width` pixels wide.

    size: font size in pixels. The image is as high as the texts need, and at least `height`.
    """
    from PIL import Image, ImageDraw

    letters = Letters("".join(text for text, _ in texts), size)
    lines = [(line, c) for text, c in texts for line in wrap(text, width - 2 * MARGIN, letters)]
    step = round(size * 1.35)
    height = max(height, step * len(lines) + 2 * MARGIN)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for n, (line, colour) in enumerate(lines):
        letters.draw(draw, (MARGIN, MARGIN + n * step), line, colour)
    return picture


def stacked(pictures):
    """Combine PIL images into one, from top to bottom."""
    from PIL import Image

    size = max(p.width for p in pictures), sum(p.height for p in pictures)
    canvas, top = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas
