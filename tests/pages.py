"""README.md and docs/*.md, which tests compare with the code and the files in results/."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def pages():
    """Return {path: text} of README.md and docs/*.md."""
    return {path: path.read_text() for path in [README, *sorted((ROOT / "docs").glob("*.md"))]}


def prose():
    """Return all pages as one line, so that a sentence is found wherever its lines break."""
    return " ".join(" ".join(pages().values()).split())
