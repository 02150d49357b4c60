"""What a person meets first: --help, one-sentence errors, exit codes, the README."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import train_flags

from runtime import start
from tools import doctor

HERE = Path(__file__).parent.parent
FOLDERS = ("", "bench", "research", "tools", "viz", "worlds")
SCRIPTS = sorted(
    ".".join(path.relative_to(HERE).with_suffix("").parts)
    for folder in FOLDERS
    for path in (HERE / folder).glob("*.py")
    if "def parse_args(" in path.read_text()
)


def script(name, *args, **kwargs):
    """Run train.py, given as "train", or python -m viz.app, given as "viz.app"."""
    code = ["-m", name] if "." in name else [str(HERE / f"{name}.py")]
    command = [sys.executable, *code, *map(str, args)]
    kwargs |= {"capture_output": True, "text": True, "timeout": 120, "env": start.environment()}
    return subprocess.run(command, **kwargs)


def test_all_scripts_are_known():
    assert {"prepare_annotations", "preprocess_ssv2", "train", "evaluate", "infer"} < set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_flag_once(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        module.parse_args(["--help"])
    out = capsys.readouterr().out
    flags = re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE)
    assert end.value.code == 0 and len(flags) == len(set(flags)) and "--help" in out
    assert out.startswith("usage:") and "python " in out


@pytest.mark.parametrize("name", ["train", "worlds.demo"])
def test_help_names_the_command_that_was_typed(name):
    done = script(name, "--help")
    typed = f"python -m {name}" if "." in name else f"{name}.py"
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {typed} [-h]")


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("infer /nowhere.mp4 --checkpoint x", 2, "infer.py: clip not found: /nowhere.mp4"),
        ("infer", 2, "infer.py: name the clips to caption"),
        ("train --features /nowhere", 2, "train.py: no feature cache: /nowhere/manifest.json"),
        (
            "evaluate --annotations /nowhere",
            2,
            "evaluate.py: no annotations for split 'validation'",
        ),
        ("preprocess_ssv2 --annotations /nowhere", 2, "Run prepare_annotations.py first"),
        ("prepare_annotations --labels /nowhere", 2, "--labels not found: /nowhere"),
        ("train --epochs 0", 2, "argument --epochs: 0 is below 1"),
        ("train --lr nan", 2, "argument --lr"),
        ("train --batch 3", 2, "unrecognized arguments: --batch 3"),
        ("preprocess_ssv2 --shard 3/3", 2, "is not i/n with 0 <= i < n"),
        (
            "viz.app --checkpoint /nowhere.pt",
            2,
            "python -m viz.app: --checkpoint /nowhere.pt does not exist",
        ),
        (
            "viz.curves /nowhere",
            2,
            "python -m viz.curves: /nowhere is not a run folder of train.py",
        ),
        ("infer --gif /nowhere.mp4", 2, "infer.py: clip not found: /nowhere.mp4"),
        ("train --export shared", 2, "train.py: --output results/ssv2/best.pt does not exist"),
        (
            "bench.speed --preset full --device cpu",
            2,
            "python -m bench.speed: --preset full needs a CUDA GPU",
        ),
        (
            "bench.speed --table /nowhere.json",
            2,
            "python -m bench.speed: bench result not found: /nowhere.json",
        ),
        ("evaluate --device cuda:99 --predictions /nowhere.json", 2, "no annotations"),
    ],
)
def test_mistakes_get_one_sentence(command, code, sentence, tmp_path):
    name, *args = shlex.split(command)
    done = script(name, *args, cwd=tmp_path)
    assert done.returncode == code and sentence in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not list(tmp_path.iterdir()), "a mistake must not leave anything behind"


def test_an_output_that_is_a_file_is_told_before_the_work(tmp_path):
    """It once cost a whole evaluation, and ended in a traceback."""
    (tmp_path / "file").write_text("")
    for name, flag in [("train", "--output"), ("prepare_annotations", "--output")]:
        done = script(name, flag, tmp_path / "file" / "run", cwd=tmp_path)
        assert done.returncode == 2 and "is a file, not a folder" in done.stderr


def readme_commands():
    """The python and torchrun commands in the README's code blocks, continuation lines joined."""
    text = (HERE / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("$SLURM_ARRAY_TASK_ID", "3").splitlines()
    lines = [re.split(r"  #|\|\|", line)[0].strip() for line in lines]
    commands = [re.sub(r"^(srun )?torchrun .*?(\w+\.py)", r"python \2", line) for line in lines]
    return [line for line in commands if line.startswith("python ")]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_parse(command):
    """8 of 21 admired repositories have a README command that cannot run."""
    _, *args = shlex.split(command)
    name = args[1] if args[0] == "-m" else args[0].removesuffix(".py")
    args = args[2:] if args[0] == "-m" else args[1:]
    assert name in SCRIPTS
    importlib.import_module(name).parse_args(args)


def test_readme_paths_exist():
    """Every link and every file that the README names is there."""
    text = (HERE / "README.md").read_text()
    assert len(readme_commands()) > 8
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    names = [n for n in links if not n.startswith("http")]
    names += re.findall(r"`((?:[a-z0-9_/]+\.py|Makefile|LICENSE|pyproject\.toml))`", text)
    names = [n for n in names if n not in ("preprocess_something_something_v2.py",)]
    assert not [n for n in names if not (HERE / n).exists()]


def test_readme_pictures_are_light():
    """A page that takes seconds to load is not read."""
    assert sum(p.stat().st_size for p in (HERE / "results" / "readme").iterdir()) < 2_000_000


def test_readme_lists_every_file():
    text = (HERE / "README.md").read_text()
    paths = [
        p for folder in (*FOLDERS, "runtime", "tests/torture") for p in (HERE / folder).glob("*.py")
    ]
    names = {p.relative_to(HERE).as_posix() for p in paths if p.name != "__init__.py"}
    assert not {name for name in names if f"`{name}`" not in text}


def test_a_folder_of_ours_wins_over_one_of_the_same_name(tmp_path):
    """Without its empty __init__.py a folder loses against any installed package of its name."""
    for folder in filter(None, (*FOLDERS, "runtime")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f"raise SystemExit('another {folder}')")
        assert (HERE / folder / "__init__.py").read_bytes() == b""
    code = f"import {', '.join(filter(None, (*FOLDERS, 'runtime')))}"
    path = os.pathsep.join([str(HERE), str(tmp_path)])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_readme_table_is_the_measured_one():
    """A number in the README has a file in results/ behind it."""
    from worlds import demo

    files = sorted((HERE / "results").glob("demo_seed*.json"))
    assert len(files) >= 3
    assert demo.markdown(files) in (HERE / "README.md").read_text()


def test_what_works_prints_no_warning(world, prepared, tmp_path):
    """Every command printed three lines about deprecated arguments, and `make demo` 21. The number of
    workers is the default, since torch warns if it exceeds the number of CPUs."""
    run = tmp_path / "run"
    flags = ["--epochs", 1, "--limit", 8, "--no-meteor"]
    flags = train_flags(world, prepared, run, *flags)
    i = flags.index("--workers")
    commands = [("train", flags[:i] + flags[i + 2 :])]
    cached = ["--features", prepared / "features", "--annotations", prepared / "annotations"]
    common = ["--checkpoint", run, "--limit", 4]
    commands.append(("evaluate", [*common, *cached, "--no-meteor", "--num-beams", 2]))
    commands.append(("infer", [*common, world / "videos"]))
    for name, args in commands:
        done = script(name, *args)
        assert done.returncode == 0, done.stderr
        assert not re.search("warning|deprecated", done.stderr, re.IGNORECASE), done.stderr


def test_constraints_fit_every_machine():
    """`torch==2.13.0+cpu`, as pip freeze writes it, would install a CPU build on GPU machines."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    ranges = dict(map(doctor.name_and_range, project["dependencies"]))
    lines = (HERE / "constraints.txt").read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+( *;.*)?", pin) for pin in pins)
    versions = dict(re.match(r"([\w-]+)==([\d.]+)", pin).groups() for pin in pins)
    assert {"torch", "transformers", "tokenizers", "huggingface_hub", "numpy"} < versions.keys()
    pinned = ranges.keys() & versions.keys()
    assert len(pinned) > 4 and all(doctor.within(versions[n], ranges[n]) for n in pinned)
