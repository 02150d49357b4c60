"""README.md and docs/*.md, which the tests hold to the code and to the files in results/."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def pages():
    """{path: text} of every page for users."""
    return {path: path.read_text() for path in [README, *sorted((ROOT / "docs").glob("*.md"))]}


def prose():
    """All pages as one line, so that a sentence is found however it is wrapped."""
    return " ".join(" ".join(pages().values()).split())
