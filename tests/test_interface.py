"""The user interface: --help, error messages, exit codes, README.md and docs/."""

import ast
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import train_flags, until
from pages import README, pages, prose

import evaluate
import probe
import retrieve
from runtime import cli, start
from runtime.errors import UserError
from runtime.files import write_json
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
    kwargs = {"timeout": 120} | kwargs
    kwargs |= {"capture_output": True, "text": True, "env": start.environment()}
    return subprocess.run(command, **kwargs)


def test_progress_is_shown_by_one_process_and_rarely_in_a_file():
    """tqdm reads its variables when it is imported. They were set later, so all processes of torchrun
    drew their bars. RANK alone is not torchrun's: with another launcher's there was no bar at all. The
    last line of a bar was there twice."""
    code = (  # as if it were in train.py
        f"import __main__; __main__.__file__ = {str(HERE / 'train.py')!r}\n"
        "import runtime.start; import sys, time; from tqdm import tqdm\n"
        "for _ in tqdm(range(600), leave=False): time.sleep(0.001)\n"
        "with tqdm(range(1)) as outer:\n"
        "    for _ in tqdm(range(1)): tqdm.write('note', file=sys.stderr)\n"
        "    outer.refresh()\n"
        "print('end', file=sys.stderr)"
    )

    def updates(**variables):
        env = start.environment() | variables
        done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, env=env)
        return done.stderr.decode().splitlines()

    lines = updates(RANK="1")
    assert all(line.isprintable() and line.strip() for line in lines)
    # the first update; with tqdm's own interval there would be six more
    assert sum("/600 [" in line for line in lines) == 1
    assert "note" in lines and lines[-1] == "end"
    assert all(line != following for line, following in itertools.pairwise(lines))
    assert updates(RANK="1", TORCHELASTIC_RUN_ID="none") == ["note", "end"]


def test_the_main_scripts_are_found():
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
    # names of values are short, and defaults are written as a user would type them
    assert not re.search(r"--[a-z-]+ \[?[A-Z_]{9}|default: [\[(']|default: \S*e-", out)


@pytest.mark.parametrize("name", ["prepare_annotations", "tools.doctor"])
def test_help_names_the_command_that_was_typed(name):
    done = script(name, "--help")
    typed = f"python -m {name}" if "." in name else f"{name}.py"
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {typed} [-h]")


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("infer /nowhere.mp4 --checkpoint x", 2, "infer.py: clip not found: /nowhere.mp4"),
        ("infer", 2, "infer.py: give either the clips to caption"),
        # an empty path would be the working directory
        ("infer ''", 2, "infer.py: clips is empty; is a shell variable not set?"),
        ("train --output=", 2, "train.py: --output is empty; is a shell variable not set?"),
        ("train --seed 4294967296", 2, "argument --seed: 4294967296 is above 4294967295"),
        ("train --features /nowhere", 2, "train.py: no feature cache: /nowhere/manifest.json"),
        ("evaluate", 2, "evaluate.py: --checkpoint results/ssv2/best.pt does not exist."),
        # the file that was given is named first, not the data that its run folder would have named
        ("evaluate --checkpoint /nowhere.pt", 2, "--checkpoint /nowhere.pt does not exist"),
        ("evaluate --predictions /nowhere.json", 2, "predictions not found: /nowhere.json"),
        ("retrieve --evaluate --checkpoint /nowhere", 2, "--checkpoint /nowhere does not exist"),
        ("retrieve --text a --checkpoint /nowhere", 2, "--checkpoint /nowhere does not exist"),
        ("probe --evaluate /nowhere", 2, "probe.py: --evaluate /nowhere does not exist"),
        ("research.embed --checkpoint /nowhere", 2, "--checkpoint /nowhere does not exist"),
        ("preprocess_ssv2 --annotations /nowhere", 2, "Run prepare_annotations.py first"),
        ("prepare_annotations --labels /nowhere", 2, "--labels not found: /nowhere"),
        ("train --epochs 0", 2, "argument --epochs: 0 is below 1"),
        ("train --lr nan", 2, "argument --lr"),
        ("train --batch 3", 2, "train.py: unknown flag --batch; did you mean --batch-size?\n"),
        ("train --frobnicate", 2, "unknown flag --frobnicate; train.py --help lists the flags\n"),
        ("train 3", 2, "unexpected argument 3; train.py --help lists the flags\n"),
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
        (
            "tools.export results/ssv2 shared",
            2,
            "python -m tools.export: run results/ssv2/best.pt does not exist",
        ),
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
        ("evaluate --device cuda:99 --predictions /nowhere.json", 2, "predictions not found"),
    ],
)
def test_mistakes_get_one_message(command, code, sentence, tmp_path, monkeypatch, capsys):
    name, *args = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        start, "program", lambda: f"python -m {name}" if "." in name else f"{name}.py"
    )
    with pytest.raises((UserError, SystemExit)) as error:  # `cli.run` prints both and exits
        importlib.import_module(name).main(args)
    printed = capsys.readouterr()
    message = f"{start.program()}: {error.value}" if error.type is UserError else printed.err
    assert sentence in message and error.value.code == code and printed.out == ""
    assert not list(tmp_path.iterdir()), "a mistake must not leave anything behind"


@pytest.mark.parametrize("command", ["tools.doctor --batch 3", "viz.curves /nowhere"])
def test_a_mistake_is_printed_without_a_traceback(command, tmp_path):
    name, *args = shlex.split(command)
    done = script(name, *args, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_data_are_found_in_the_run_folder(tmp_path, monkeypatch, capsys):
    """evaluate.py --checkpoint results/demo looked for the annotations and features of SSv2."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "mine/features", "mine/annotations", "results/a", "results/b"):
        Path(name).mkdir(parents=True)
    known = {"features": "mine/features", "annotations": "mine/annotations", "num_blocks": 1}
    for run in ("run", "results/a"):
        write_json(Path(run, "args.json"), {"args": known})
    for flags, name in (
        ("--checkpoint run", "evaluate"),
        ("--checkpoint run/best.pt", "evaluate"),
        ("--predictions run/predictions_validation.json", "evaluate"),
        ("--evaluate run", "probe"),
        ("--checkpoint run --text cup", "retrieve"),
        ("--checkpoint run --text cup", "research.embed"),
    ):
        args = importlib.import_module(name).parse_args(flags.split())
        assert (args.features, args.annotations) == ("mine/features", "mine/annotations"), flags
    given = retrieve.parse_args(["--checkpoint", "run", "--evaluate", "--features", "data"])
    assert (given.features, given.annotations) == ("data", "mine/annotations")
    Path("mine/features").rmdir()
    args = evaluate.parse_args(["--checkpoint", "run"])
    assert (args.features, args.annotations) == (cli.FEATURES, "mine/annotations")
    noted = capsys.readouterr().err
    assert (
        f"note: --features mine/features of that run does not exist; using {cli.FEATURES}" in noted
    )
    assert retrieve.parse_args([]).features == probe.parse_args([]).features == cli.FEATURES

    # without --checkpoint, infer.py names the runs that are there
    Path("results/a/best.pt").touch()
    Path("results/b/best.pt").touch()
    Path("clip.mp4").touch()
    with pytest.raises(UserError, match=r"There are runs of train.py in results/a\.$"):
        importlib.import_module("infer").main(["clip.mp4"])


def test_the_tests_that_docs_name_exist():
    """docs/security.md says where each of its claims is tested."""
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (HERE / "docs" / "security.md").read_text())
    assert len(named) > 10
    missing = [name for path, name in named if f"def {name}(" not in (HERE / path).read_text()]
    assert not missing


def test_make_refuses_an_old_python_at_once(tmp_path):
    """pip searched for minutes for versions of the packages that support Python 3.10."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(HERE / name, tmp_path)
    old, code = tmp_path / "old", "import sys; sys.version_info = (3, 10, 12); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$2"\n')
    old.chmod(0o755)
    outside = {
        k: v for k, v in os.environ.items() if not k.startswith("MAKE")
    }  # not of `make test`
    command = ["make", "demo", f"PYTHON={old}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=outside)
    assert done.returncode == 2 and not (tmp_path / ".venv").exists() and not done.stdout
    assert f"Python 3.11 or newer is needed, but {old} is 3.10" in done.stderr


@pytest.mark.parametrize("name", ["train", "prepare_annotations"])
def test_an_output_that_is_a_file_is_refused_before_the_work(name, tmp_path, monkeypatch):
    """The traceback came only after a whole evaluation."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        importlib.import_module(name).main(["--output", "file/run"])


def commands(text):
    """Return the python and torchrun commands in a page's shell blocks, with joined lines."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("$SLURM_ARRAY_TASK_ID", "3").splitlines()
    lines = [re.split(r"  #|\|\|", line)[0].strip() for line in lines]
    lines = [re.sub(r"^(srun )?torchrun .*?(\w+\.py)", r"python \2", line) for line in lines]
    return [line for line in lines if line.startswith("python ")]


COMMANDS = [(path.name, command) for path, text in pages().items() for command in commands(text)]


def parsed(command):
    """Return (name of the module, arguments) of a command that begins with "python "."""
    _, *args = shlex.split(command)
    name = args[1] if args[0] == "-m" else args[0].removesuffix(".py")
    return name, args[2:] if args[0] == "-m" else args[1:]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_readme_commands_parse(page, command):
    """8 of 21 repositories that were examined have a README command that cannot run."""
    name, args = parsed(command)
    assert name in SCRIPTS
    importlib.import_module(name).parse_args(args)


def test_readme_commands_without_data_end_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in dict.fromkeys(command for _, command in COMMANDS):
        name, args = parsed(command)
        if name.startswith(("worlds.", "bench.")) or name == "tools.doctor":
            continue  # they need no data, and run for minutes
        with pytest.raises((UserError, SystemExit)) as error:
            importlib.import_module(name).main(args)
        assert error.type is UserError and "\n" not in str(error.value), command
        # a report runs other scripts
        assert error.value.code == 2 or name.endswith("_report"), command
        assert not [*tmp_path.iterdir()], command


TOY = ("data/toy/", "results/demo ", "results/demo/", "results/captioned/")


@pytest.mark.slow
def test_readme_commands_after_the_demo(tmp_path):
    """Each command for the toy world runs as printed after a small demo, without a warning."""
    small = ["--clips", 120, "--epochs", 1, "--lm-steps", 20]
    done = script("worlds.demo", *small, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    clip = min((tmp_path / "data/toy/videos").iterdir()).stem
    commands = [c for c in dict.fromkeys(c for _, c in COMMANDS) if any(t in f"{c} " for t in TOY)]
    commands = [c for c in commands if not re.search(r"demo1|pretrained|smollm2", c)]
    ran = 0
    for command in commands:
        name, args = parsed(re.sub(r"\b(31331|238715)\b", clip, command))
        args += ["--help"] if name == "viz.app" else []  # it does not end by itself
        done = script(name, *args, cwd=tmp_path, timeout=200)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert "arning" not in done.stderr, f"{command}: {done.stderr}"
        ran += 1
    assert ran >= 8


def test_readme_python_runs(world, trained, monkeypatch, capsys):
    """README's Python example captions a clip."""
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "results/demo/best.pt" in code and "data/toy/videos/31331.webm" in code
    clip = next((world / "videos").glob("*.webm"))
    code = code.replace("results/demo/best.pt", str(trained / "best.pt"))
    exec(code.replace("data/toy/videos/31331.webm", str(clip)), {})
    [window] = ast.literal_eval(capsys.readouterr().out)
    assert isinstance(window["caption"], str)


def test_the_notebook_runs(world, prepared, trained, capsys):
    """The code of docs/inside.ipynb runs on a small world, and its saved output has no warning."""
    cells = json.loads((HERE / "docs" / "inside.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {o.get("name", o["output_type"]) for cell in cells for o in cell["outputs"]}
    assert kinds == {"stdout", "execute_result"}
    [record, *_] = json.loads((prepared / "annotations" / "validation.json").read_text())
    code = "\n".join("".join(cell["source"]) for cell in cells)
    for name, there in {
        "results/demo/best.pt": trained / "best.pt",
        "data/toy/annotations": prepared / "annotations",
        "data/toy/videos": world / "videos",
        '"6449"': f'"{record["id"]}"',
    }.items():
        assert name in code
        code = code.replace(name, str(there))
    exec(code, {})
    *_, encoder, qformer, lm = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Q-Former +(\d+) of +\1 weights have a gradient", qformer)
    assert all(re.search(" 0 of +[1-9]", line) for line in (encoder, lm))


def heading_anchors(text):
    """Return GitHub's #anchors for a page's headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_link_targets_exist():
    """All links between pages, with their #headings, and all pictures are checked."""
    for path, text in pages().items():
        links = re.findall(r"\]\(([^)]+)\)", text)
        for link in (link for link in links if not link.startswith("https://")):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), f"{path.name} links to {link}"
            assert not anchor or anchor in heading_anchors(target.read_text()), link


def test_files_named_in_the_pages_exist():
    """The first column in from-the-original.md is left out, since it lists files of the original."""
    for path, text in pages().items():
        if path.name == "from-the-original.md":
            text = re.sub(r"^\| [^|]+\|", "|", text, flags=re.MULTILINE)
        names = re.findall(r"`((?:[a-z0-9_/]+\.py|Makefile|LICENSE|pyproject\.toml))`", text)
        assert not [name for name in names if not (HERE / name).exists()], path.name
        targets = re.findall(r"^make (\w+)|`make (\w+)`", text, re.MULTILINE)
        for target in map("".join, targets):
            assert f"\n{target}:" in (HERE / "Makefile").read_text(), target


def test_only_scripts_of_the_repository_hold_signals_back(tmp_path, monkeypatch):
    """Nobody released them in a user's own script beside train.py, so Ctrl-C did nothing."""
    monkeypatch.setattr(start, "ROOT", tmp_path)
    for code, is_script in ((None, False), ("import dataset", False), ("cli.run(main)", True)):
        path = tmp_path / "mine.py"
        if code:
            path.write_text(code)
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
        assert start.is_script() == is_script


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_the_readmes_tree_is_complete():
    """It lists all scripts and modules at the root and all folders, and nothing else."""
    [tree] = re.findall(
        r"^## Layout\n\n```\n(.*?)```", README.read_text(), re.DOTALL | re.MULTILINE
    )
    folders = [p for p in HERE.iterdir() if p.is_dir() and p.name[0] != "."]
    there = {f"{p.name}/" for p in folders if [*p.glob("*.py"), *p.glob("*.md")]}
    there |= {p.name for p in HERE.glob("*.py")}
    assert sorted(re.findall(r"\w+\.py|\w+/", tree)) == sorted(there)


def test_pictures_are_small_and_used():
    """The page must load quickly."""
    pictures = list((HERE / "results" / "readme").iterdir())
    assert sum(p.stat().st_size for p in pictures) < 2_000_000
    assert not [p.name for p in pictures if f"results/readme/{p.name})" not in prose()]


def test_the_projects_folders_shadow_installed_packages(tmp_path):
    """Without its empty __init__.py, a folder is shadowed by an installed package of the same name."""
    for folder in filter(None, (*FOLDERS, "runtime")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f"raise SystemExit('another {folder}')")
        assert (HERE / folder / "__init__.py").read_bytes() == b""
    code = f"import {', '.join(filter(None, (*FOLDERS, 'runtime')))}"
    path = os.pathsep.join([str(HERE), str(tmp_path)])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_tables_match_the_committed_results():
    """The demo's tables in README.md and docs/ are made from results/demo_seed*.json."""
    from worlds import demo

    files = sorted((HERE / "results").glob("demo_seed*.json"))
    assert len(files) >= 3
    table = demo.markdown(files)
    assert table in (HERE / "docs" / "evaluation.md").read_text()
    readme, table = README.read_text().splitlines(), table.splitlines()
    rows = readme[readme.index(table[0]) : readme.index("", readme.index(table[0]))]
    assert rows[:2] == table[:2] and len(rows) == 5 and set(rows) <= set(table)


def test_the_probes_tables_match_the_committed_results():
    from research import probe_report

    results = HERE / "results"
    table = probe_report.markdown(json.loads((results / "probe.json").read_text())["runs"])
    assert (results / "probe.md").read_text() == table
    assert table in (HERE / "docs" / "probe.md").read_text()


def test_successful_commands_print_no_warning(world, prepared, tmp_path):
    """Every command printed three lines about deprecated arguments, and `make demo` printed 21. The
    default number of workers is used, since torch warns if it exceeds the number of CPUs."""
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


def as_in_a_terminal():
    """Undo `nohup pytest` and `pytest &`, in which these signals are ignored. A `preexec_fn`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_signal_during_imports_prints_one_line():
    """Importing torch takes seconds, and Ctrl-C in that time printed a traceback from an import."""

    def blocks_signals(pid):
        mask = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
        return int(mask, 16) & 1 << signal.SIGINT - 1

    command = [sys.executable, HERE / "prepare_annotations.py", "--labels", "/nowhere"]
    numbers = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}

    how = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": as_in_a_terminal}
    runs = [subprocess.Popen(command, **how) for _ in numbers]
    for process, number in zip(runs, numbers, strict=True):
        until(lambda pid=process.pid: blocks_signals(pid))
        process.send_signal(number)
    for process, (number, name) in zip(runs, numbers.items(), strict=True):
        assert process.communicate(timeout=60)[1] == f"prepare_annotations.py: stopped by {name}\n"
        assert process.returncode == 128 + number


def run_main(code, preexec_fn=as_in_a_terminal):
    """Run the body of a `main` as a script, and return its exit code, stdout and stderr."""
    lines = ["import ctypes, gc, os, signal, time", "from runtime import cli, start"]
    lines += ["def main():", *(f"    {line}" for line in code.splitlines()), "cli.run(main)"]
    command = [sys.executable, "-c", "\n".join(lines)]
    how = {"env": start.environment(), "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, preexec_fn=preexec_fn, **how)
    return done.returncode, done.stdout, done.stderr


SWALLOWED = {
    "finalizer": """
class Foreign:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
Foreign()
""",
    "garbage collector": """
gc.callbacks.append(lambda *_: gc.callbacks.clear() or signal.raise_signal(signal.SIGTERM))
gc.collect()
""",
    "C library": """
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def compare(a, b):
    signal.raise_signal(signal.SIGTERM)
    return 0
ctypes.CDLL(None).qsort((ctypes.c_int * 2)(), 2, 4, compare)
""",
    "bare except": """
try:
    signal.raise_signal(signal.SIGTERM)
except:
    pass
""",
}


@pytest.mark.parametrize(
    ("where", "then"),
    [
        *((where, "time.sleep(50)") for where in SWALLOWED),
        *(("finalizer", then) for then in ("return", "raise ValueError")),
    ],
)
def test_a_signal_is_not_lost_in_foreign_code(where, then):
    """The exception of the signal handler was discarded there, and the run went on and ended with 0. A
    blocking call is interrupted, and a script that is at its end does not report success."""
    code, out, err = run_main(f"{SWALLOWED[where]}\nprint('went on', flush=True)\n{then}")
    assert (code, out) == (143, "went on\n")
    assert err.splitlines()[-1].endswith("stopped by SIGTERM") and "Traceback" not in err


def test_cleanup_is_not_disturbed_by_a_signal():
    """`Stopped` is raised again only if it is lost: not while `finally` blocks or generators end."""
    code, out, err = run_main("""
def clips():
    try:
        yield 1
    finally:
        time.sleep(0.5)
        print("generator", flush=True)
try:
    for clip in clips():
        signal.raise_signal(signal.SIGINT)
finally:
    time.sleep(0.5)
    print("finally", flush=True)
""")
    assert (code, out) == (130, "generator\nfinally\n")
    assert err.splitlines() == ["-c: stopped by Ctrl-C"]


def test_a_second_signal_ends_a_script_that_hangs():
    code, out, _ = run_main("""
try:
    signal.raise_signal(signal.SIGINT)
finally:
    signal.raise_signal(signal.SIGTERM)
    print("went on", flush=True)
""")
    assert (code, out) == (-signal.SIGTERM, "")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signals_that_are_ignored_on_entry_stay_ignored(number):
    """`nohup` ignores SIGHUP, and a shell without job control ignores SIGINT for `train.py &`: a Ctrl-C
    in that shell stopped the run in the background."""
    code, out, err = run_main(
        f"signal.raise_signal({int(number)})\nprint('went on')",
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )
    assert (code, out, err) == (0, "went on\n", "")


@pytest.mark.parametrize("closed", ["1", "0 1 2"])
def test_closed_standard_streams(prepared, trained, tmp_path, closed):
    """With `>&-`, sys.stdout is None, and every script ended with an AttributeError. The next file that
    was opened got the number of the stream, and what was printed was written into it."""
    flags = ["--annotations", prepared / "annotations", "--no-meteor", "--output", tmp_path]
    flags += ["--predictions", trained / "predictions_validation.json"]
    closing = " ".join(f"{number}>&-" for number in closed.split())
    command = f"{shlex.join(map(str, [sys.executable, HERE / 'evaluate.py', *flags]))} {closing}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Error" not in done.stderr
    assert ("CIDEr" in done.stdout) == ("1" not in closed)
    result = json.loads((tmp_path / "evaluation_validation_rescored.json").read_text())
    assert result["n"] > 1


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Shells do not expand `~` in --output=~/run, and a folder named `~` was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, flag in (("train", "output"), ("infer", "output"), ("evaluate", "features")):
        args = importlib.import_module(name).parse_args([f"--{flag}=~/run"])
        assert getattr(args, flag) == f"{tmp_path}/run"
    module = importlib.import_module("evaluate")
    args = module.parse_args(["--predictions", "a.json", "~/b.json", "--split", "~"])
    assert args.predictions == ["a.json", f"{tmp_path}/b.json"]
    assert importlib.import_module("infer").parse_args(["~clip.mp4"]).clips == ["~clip.mp4"]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("infer", ["a.mp4", "http://host/x.mp4"]),
        ("preprocess_ssv2", ["--videos=s3://bucket/clips"]),
        ("viz.films", ["captions.jsonl", "--videos", "HTTPS://host/clips"]),
        ("research.embed", ["--query", "file:///x.mp4"]),
    ],
)
def test_urls_are_refused(script, flags):
    """`infer.py http://host/x.mp4` ended with "clip not found: http:/host/x.mp4"."""
    with pytest.raises(
        UserError, match=r"://.* is a URL, and URLs are not read: download it first"
    ):
        importlib.import_module(script).parse_args(flags)


def test_the_path_of_a_file_that_looks_like_a_flag_is_named(tmp_path, monkeypatch, capsys):
    """`infer.py -clip.webm` was answered with "unknown flag", and the file was there."""
    monkeypatch.chdir(tmp_path)
    Path("-clip.webm").touch()
    with pytest.raises(SystemExit):
        importlib.import_module("infer").parse_args(["-clip.webm"])
    assert "did you mean ./-clip.webm?" in capsys.readouterr().err
    assert importlib.import_module("infer").parse_args(["./-clip.webm"]).clips == ["./-clip.webm"]
