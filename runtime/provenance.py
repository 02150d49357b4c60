"""What a result was computed with, which args.json and the reports in results/ record."""

from runtime.start import ROOT

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "numpy", "av")


def provenance():
    """Return {"versions": {package: version}, "processor", "threads" of torch and "git_commit"}.

    The commit is None if the project is not a git checkout.
    """
    versions = {"python": platform.python_version()}
    return {
        "versions": versions | {name: installed(name) for name in PACKAGES},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
    }


def provenance_of(run):
    """Return the `provenance` of a training run, and its device. run: the content of its args.json."""
    names = "versions", "processor", "threads", "git_commit", "device"
    return {name: run[name] for name in names if name in run}


def summary():
    """Return versions, processor and commit as one line, for reports that are only text."""
    found = provenance()
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    commit = found["git_commit"] or "unknown"
    return f"{versions}; {found['processor']}; commit {commit[:7]}"


def installed(name):
    """Return the version of a package, or None. PyAV is not needed to train on cached features."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit():
    """Return the commit of the project's checkout, or None."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        lines = subprocess.run(command, capture_output=True, encoding="utf-8").stdout.splitlines()
    except FileNotFoundError:
        return None
    # another repository may contain the project's folder
    return lines[1] if len(lines) == 2 and Path(lines[0]) == ROOT.resolve() else None


def processor():
    """Return the processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
