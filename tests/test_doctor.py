"""doctor.py on machines that lack things: findings with a command, never a traceback."""

from runtime.start import ROOT

import ast
import json
import os
import re
import subprocess
import sys
import venv

import pytest

import checkpoint
from runtime import start
from tools import doctor, doctor_checks

RANGE = ">=2.10,<2.14"


def run(python, folder, *flags, **environment):
    command = [str(python), "-m", "tools.doctor", *flags]
    env = {k: v for k, v in start.environment().items() if not k.startswith("HF_")} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=600)


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def hub_copy(cache, name, files):
    """A model in the Hub's cache, as huggingface_hub lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).write_text("{}")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=False)
    return folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"


def test_without_any_package_each_is_a_line_with_its_command(bare, tmp_path):
    done = run(bare, tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    for package in ("torch", "transformers", "av", "numpy"):
        line = rf"^missing  {package} +not installed\n +\$ \S+ -m pip install -e \S+$"
        assert re.search(line, done.stdout, re.MULTILINE)
    assert re.search(r"^note     decord +not installed; PyAV is used instead$", done.stdout, re.M)
    assert re.search(r"^missing  gradio .*\n +\$ .* -e '?\S+\[app\]'?$", done.stdout, re.MULTILINE)
    assert re.search(r"^worlds.demo +cannot run yet: missing torch, ", done.stdout, re.MULTILINE)
    assert re.search(r"^note     data +not checked: install", done.stdout, re.MULTILINE)


def test_a_script_without_its_packages_names_them_and_the_command(bare, tmp_path):
    """It was a traceback: No module named 'numpy'."""
    done = subprocess.run([bare, ROOT / "train.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: not installed in") and "torch, numpy" in done.stderr
    assert ". .venv/bin/activate" in done.stderr or "pip install" in done.stderr


def test_what_is_here_what_is_half_here_and_nothing_is_written(tmp_path):
    """One run on this machine, with one model whole in the Hub's cache and one half downloaded."""
    cache = tmp_path / "hub"
    hub_copy(cache, "some/encoder", ["config.json", "model.safetensors"])
    hub_copy(cache, "some/lm", ["config.json", "tokenizer.json"])
    before = names(tmp_path)
    flags = ["--json", "--encoder", "some/encoder", "--lm", "some/lm"]
    here = {"HOME": str(tmp_path), "HF_HUB_CACHE": str(cache), "HF_HOME": str(tmp_path / "hf")}
    done = run(sys.executable, tmp_path, *flags, **here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert names(tmp_path) == before
    said = json.loads(done.stdout)
    findings = {f["what"]: f for f in said["findings"]}
    assert all(findings[name]["state"] == "ok" for name in ("Python", "torch", "transformers"))
    assert findings["encoder"]["state"] == "ok"
    assert findings["lm"]["state"] == "missing"
    assert "incomplete, without model.safetensors" in findings["lm"]["found"]
    assert findings["lm"]["fix"] == "hf download some/lm"
    assert said["lacks"]["worlds.demo"] == []
    assert said["lacks"]["train.py"] == ["lm", "annotations", "features"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ImportError('libcudart.so.13 is missing')", "libcudart.so.13 is missing"),
        ("import os; os.kill(os.getpid(), 4)", "ended with -4"),
        ("print('hello'); raise SystemExit(3)", "ended with 3"),
    ],
)
def test_a_package_that_is_installed_and_broken(code, why, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.look_at("torch", RANGE, "packages")
    assert finding.state == "missing" and why in finding.found
    assert finding.fix == f"{sys.executable} -m pip install --force-reinstall 'torch{RANGE}'"


def test_a_package_that_talks_when_imported_is_well(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("print('hello')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.look_at("torch", "", "packages").state == "ok"


@pytest.mark.parametrize("version", ["2.9.1", "2.14.0", "1.13.0+cu117"])
def test_a_version_out_of_range(version, tmp_path, monkeypatch):
    folder = tmp_path / f"torch-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.look_at("torch", RANGE, "packages")
    assert finding.state == "missing" and finding.found == f"{version}; needed: {RANGE}"
    assert finding.fix == f"{sys.executable} -m pip install -e ."


@pytest.mark.parametrize("version", ["2.10.0", "2.10", "2.13.0+cpu", "2.13.1"])
def test_a_version_in_range(version):
    assert doctor.within(version, RANGE)


def test_only_signs_that_are_understood_are_in_pyproject():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["app"]
    for limits in [doctor.name_and_range(line)[1] for line in lines] + [project["requires-python"]]:
        assert re.fullmatch(r"((>=|<)[\d.]+(,(?=.)|$))*", limits), limits


def test_too_old_a_python_is_named_in_one_sentence():
    """On 3.9 a name of itertools that is newer gave a traceback in place of the sentence: start.py and
    what comes before it must run on the Pythons that it refuses, and it must come first."""
    tree = ast.parse((ROOT / "runtime" / "start.py").read_text(), feature_version=(3, 8))
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {getattr(n, "module", None) or n.names[0].name for n in imports}
    assert names <= {"os", "signal", "sys", "importlib.util", "pathlib"}
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")):
        if "\n    cli.run(main)\n" in path.read_text():
            body = ast.parse(path.read_text()).body
            first = next(n for n in body if isinstance(n, ast.Import | ast.ImportFrom))
            assert ast.unparse(first) == "import runtime.start", path
    code = "import sys; sys.version_info = (3, 9); from tools import doctor"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr and "\n" not in done.stderr[:-1]


def test_an_nvidia_gpu_beside_a_torch_for_cpus(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0: a card\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu_build = {"name": None, "built_for": None}, None
    monkeypatch.setattr(doctor_checks, "in_child", lambda *_: cpu_build)
    assert "hides every GPU" in doctor_checks.look_at_gpu("torch>=2.10").found  # see conftest.py
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    finding = doctor_checks.look_at_gpu("torch>=2.10")
    assert finding.state == "missing" and "built for CPUs" in finding.found
    assert "--force-reinstall 'torch>=2.10'" in finding.fix


def test_data_that_is_not_there_comes_with_the_command_for_these_folders(tmp_path):
    annotations, features = tmp_path / "my annotations", tmp_path / "features"
    flags = ["--annotations", str(annotations), "--features", str(features)]
    args = doctor.parse_args([*flags, "--checkpoint", str(tmp_path / "run")])
    found = {f.what: f for f in doctor_checks.data(args) + doctor_checks.models(args)}
    states = {found[what].state for what in ("annotations", "features", "checkpoint")}
    assert states == {"missing"}
    assert found["annotations"].fix == f"python prepare_annotations.py --output '{annotations}'"
    assert found["features"].fix == (
        f"python preprocess_ssv2.py --annotations '{annotations}' --features {features}"
    )
    assert found["checkpoint"].fix.endswith(f" --output {tmp_path / 'run'}")


def test_a_damaged_checkpoint_and_a_model_with_a_damaged_config(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"PK no archive")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{")
    flags = ["--checkpoint", str(tmp_path), "--lm", str(tmp_path)]
    found = {f.what: f for f in doctor_checks.models(doctor.parse_args(flags))}
    assert found["checkpoint"].state == found["lm"].state == "missing"
    assert "not a valid checkpoint" in found["checkpoint"].found


def test_a_checkpoint_wants_the_models_it_was_trained_with(trained, world):
    """They lie where the checkpoint says, or where the flags say; elsewhere infer.py would refuse."""

    def look(*flags):
        args = doctor.parse_args(["--checkpoint", str(trained), *map(str, flags)])
        return {f.what: f.state for f in doctor_checks.models(args)}

    here = look("--encoder", world / "encoder", "--lm", world / "lm")
    assert here == dict.fromkeys(("encoder", "lm", "checkpoint"), "ok")
    said = look("--lm", world / "encoder")
    assert said["checkpoint's lm"] == said["checkpoint's encoder"] == "ok"


def test_a_checkpoint_whose_models_moved_is_no_matter_of_a_download(trained, tmp_path, monkeypatch):
    """A relative folder such as toy/lm looks like a Hub id."""

    state = checkpoint.read_checkpoint(trained)
    state["lm"]["name"] = "toy/lm"
    monkeypatch.setattr(doctor_checks, "read_checkpoint", lambda path: state)
    args = doctor.parse_args(["--checkpoint", str(trained)])
    found = {f.what: f for f in doctor_checks.models(args)}
    assert found["checkpoint's lm"].state == "missing" and not found["checkpoint's lm"].fix
    assert "if it is elsewhere: --lm FOLDER" in found["checkpoint's lm"].found


def test_a_step_on_the_gpu(gpu, monkeypatch):
    """doctor.py reported "ok" on machines where every script died on its first CUDA line."""
    seconds, peak = doctor_checks.try_step("auto")
    assert 0 < seconds < 60 and peak == 7
    asked = {"name": "a card", "count": 1, "bytes": 24e9, "bf16": True, "built_for": "13.0"}
    answers = {"ask_cuda": (asked, None), "try_step": ([1.26, 34.2e6], None)}
    monkeypatch.setattr(doctor_checks, "in_child", lambda function, *_: answers[function.__name__])
    finding = doctor_checks.look_at_gpu("torch>=2.10")
    assert finding.state == "ok" and "took 1.3 s and 34 MB" in finding.found
    answers["try_step"] = (None, "RuntimeError: no kernel image is available")
    finding = doctor_checks.look_at_gpu("torch>=2.10")
    assert finding.state == "missing" and "no kernel image" in finding.found
