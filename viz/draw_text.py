"""Draw text with Pillow, and check that Pillow and matplotlib are installed.

Decode workers import this file, so it must not import torch (as runtime.files does).
"""

from importlib.util import find_spec
from pathlib import Path

from runtime.errors import FAILED, UserError

MARGIN = 8  # pixels around text
BLACK, GREY, GREEN, RED = "#000000", "#555555", "#136313", "#a31515"


def require(*packages, extra="viz"):
    """Raise UserError if an optional package is missing. extra: the pip extra that installs it."""
    for name in packages or ("PIL", "matplotlib"):
        if find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install -e '.[{extra}]'", code=FAILED)


def font(size):
    """Load DejaVu Sans, which comes with matplotlib and covers more than Latin letters."""
    import matplotlib
    from PIL import ImageFont

    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(file, size)


def wrap(text, width, letters):
    """Break a text into lines of at most `width` pixels. Only words wider than a line are split."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if letters.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and letters.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def panel(texts, width, size, height=0):
    """Draw wrapped texts [(text, colour)] below each other on a white PIL image, `width` pixels wide.

    size: font size in pixels. The image is as high as the texts need, and at least `height`.
    """
    from PIL import Image, ImageDraw

    letters = font(size)
    lines = [(line, c) for text, c in texts for line in wrap(text, width - 2 * MARGIN, letters)]
    step = round(size * 1.35)
    height = max(height, step * len(lines) + 2 * MARGIN)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for n, (line, colour) in enumerate(lines):
        draw.text((MARGIN, MARGIN + n * step), line, font=letters, fill=colour)
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
