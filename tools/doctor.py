"""Check which scripts can run on this machine, and print the commands that fix problems.

    python -m tools.doctor            (one line per finding, then one per script; about 20 s)
    python -m tools.doctor --json     (the same as a JSON object)

It does not use the network or change anything. A finding is "ok", "missing" (with the command that
fixes it, if there is one) or "note" (the scripts run, but slower or without a feature). The exit code is 1
if a required package of pyproject.toml is missing or broken. Otherwise it is 0, even if a GPU, model, data
set or optional package is missing.
"""

import runtime.start
from runtime.start import ROOT

import importlib
import json
import operator
import re
import shlex
import sys
import textwrap
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime import cli
from runtime.errors import DONE, FAILED
from tools.findings import INSTALL, MISSING, NOTE, OK, PROJECT, Finding, in_child

NEEDS = {  # per script: names of findings, or of lists of packages
    "prepare_annotations.py": ["packages", "labels"],
    "preprocess_ssv2.py": ["packages", "encoder", "annotations", "videos"],
    "train.py": ["packages", "lm", "annotations", "features"],
    "probe.py": ["packages", "annotations", "features"],
    "retrieve.py": ["packages", "lm", "annotations", "features"],
    "evaluate.py": [
        *("packages", "checkpoint", "checkpoint's lm"),
        *("annotations", "features", "checkpoint's features"),
    ],
    "infer.py": ["packages", "checkpoint", "checkpoint's encoder", "checkpoint's lm"],
    "worlds.demo": ["packages"],
    "viz.app": ["packages", "app", "checkpoint", "checkpoint's encoder", "checkpoint's lm"],
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("--encoder", default=cli.ENCODER, help="Hub id or folder of the video encoder")
    add("--lm", default=cli.LM, help="Hub id or folder of the language model")
    add("--checkpoint", default=cli.CHECKPOINT, help=cli.CHECKPOINT_KINDS)
    add = parser.add_argument_group("data").add_argument
    add("--labels", default=cli.LABELS, help="folder of SSv2's label files")
    add("--videos", default=cli.VIDEOS, help="folder with the clips")
    add("--annotations", default=cli.ANNOTATIONS, help="output of prepare_annotations.py")
    add("--features", default=cli.FEATURES, help="feature cache of preprocess_ssv2.py")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    findings, packages = software()
    missing = {f.what for f in findings if f.state == MISSING}
    if missing & packages["packages"].keys():
        why = "not checked: install the packages first"
        findings += [Finding(NOTE, what, why) for what in ("machine", "models", "data")]
    else:
        from tools import doctor_checks  # imports the packages, so only after they were found

        findings += doctor_checks.everything(args, "torch" + packages["packages"]["torch"])
    missing = [f.what for f in findings if f.state == MISSING]
    lacks = {}
    for script, needs in NEEDS.items():
        all_needs = {*needs, *(name for need in needs for name in packages.get(need, ()))}
        lacks[script] = [what for what in missing if what in all_needs]
    if args.json:
        print(json.dumps({"findings": [f._asdict() for f in findings], "lacks": lacks}, indent=1))
    else:
        print(table(findings, lacks))
    return FAILED if lacks["worlds.demo"] else DONE


def table(findings, lacks):
    """The report as text: the findings, then one line per script."""
    lines, margin = [], " " * 31
    wrap = textwrap.TextWrapper(100, subsequent_indent=margin, break_on_hyphens=False)
    wrap.break_long_words = False
    for state, what, found, fix in findings:
        lines += wrap.wrap(f"{state:<9}{what:<22}" + cli.printable(found))
        lines += [f"{margin}$ {cli.printable(fix)}"] if fix else []
    lines.append("")
    for script, names in lacks.items():
        verdict = f"cannot run yet: missing {', '.join(names)}" if names else "can run"
        lines.append(f"{script:<31}{verdict}")
    return "\n".join(lines)


def software():
    """Check Python and the packages. Returns (findings, {list: {package: version range}})."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lists = {"packages": project["dependencies"], "viz": extras["viz"], "app": extras["app"]}
    packages = {extra: dict(map(name_and_range, lines)) for extra, lines in lists.items()}
    required = {}  # a package in several lists counts for the first
    for extra, ranges in packages.items():
        required = {name: (limits, extra) for name, limits in ranges.items()} | required
    with ThreadPoolExecutor(4) as threads:
        futures = {name: threads.submit(check_package, name, *required[name]) for name in required}
    findings = [check_python(ROOT / ".venv")]
    names = dict.fromkeys(name for ranges in packages.values() for name in ranges)
    return findings + [futures[name].result() for name in names], packages


def check_python(venv):
    """Check that this is the Python of the folder's virtual environment, if there is one."""
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if venv.is_dir() and Path(sys.prefix).resolve() != venv.resolve():
        return Finding(NOTE, "Python", f"{found}; .venv is not active", ". .venv/bin/activate")
    return Finding(OK, "Python", found)


def name_and_range(requirement):
    """Split a requirement: "torch>=2.10,<2.14; marker" gives ("torch", ">=2.10,<2.14")."""
    return re.match(r"([\w-]+)\s*([^;\s]*)", requirement).groups()


def within(version, limits):
    """True if a version satisfies `limits`. Only >= and < are supported, as used in pyproject.toml."""

    def numbers(text):
        return [int(n) for n in re.findall(r"\d+", text.split("+")[0])]

    compare = {">=": operator.ge, "<": operator.lt}
    parts = re.findall(r"(>=|<)([\d.]+)", limits)
    return all(compare[sign](numbers(version), numbers(limit)) for sign, limit in parts)


def check_package(package, limits, extra):
    """Check that a package is installed, in the version range, and can be imported.

    extra: its list in pyproject.toml, or "packages" for the required ones.
    """
    fix = f"{INSTALL} -e {shlex.quote(PROJECT if extra == 'packages' else f'{PROJECT}[{extra}]')}"
    try:
        found = version(package)
    except PackageNotFoundError:
        found, bad = "not installed", True
    else:
        bad = not within(found, limits)
        if bad:
            found += f"; required: {limits}"
        elif why := in_child(import_module, package)[1]:
            # without --force-reinstall pip would consider it installed
            fix = f"{INSTALL} --force-reinstall {shlex.quote(package + limits)}"
            found, bad = f"{found} cannot be imported: {why}", True
    if bad and package == "decord":
        return Finding(NOTE, package, f"{found}; PyAV is used instead")
    return Finding(MISSING if bad else OK, package, found, fix if bad else None)


def import_module(package):
    importlib.import_module({"pillow": "PIL"}.get(package, package))


if __name__ == "__main__":
    cli.run(main)
