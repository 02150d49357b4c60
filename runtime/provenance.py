"""What a result was computed with. Every JSON file in results/ and every args.json records it."""

from runtime.start import ROOT

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "numpy", "av")


def provenance():
    """Return {"versions": {package: version}, "processor", "threads" of torch and "git_commit"}.

    The commit is None if the project is not a git checkout.
    """
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, encoding="utf-8").stdout.strip()
    except FileNotFoundError:
        commit = ""
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "git_commit": commit or None,
    }


def provenance_of(run):
    """Return the `provenance` of a training run. run: the content of its args.json."""
    return {name: run[name] for name in provenance() if name in run}


def processor():
    """Return the processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
