"""doctor.py on incomplete machines: findings with a command and no traceback."""

from runtime.start import ROOT

import ast
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import encoders
import pytest
from huggingface_hub import constants

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
    """Create a model in a Hub cache with huggingface_hub's layout."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).write_text('{"model_type": "vjepa2"}')


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python interpreter without packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=False)
    return folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"


def test_each_missing_package_has_a_line_with_a_command(bare, tmp_path):
    done = run(bare, tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    for package in ("torch", "transformers", "av", "numpy"):
        line = rf"^missing  {package} +not installed\n +\$ \S+ -m pip install -e \S+$"
        assert re.search(line, done.stdout, re.MULTILINE)
    assert re.search(r"^note     decord +not installed; PyAV is used instead$", done.stdout, re.M)
    assert re.search(r"^missing  gradio .*\n +\$ .* -e '?\S+\[app\]'?$", done.stdout, re.MULTILINE)
    assert re.search(r"^worlds.demo +cannot run yet: missing torch, ", done.stdout, re.MULTILINE)
    assert re.search(r"^note     data +not checked: install", done.stdout, re.MULTILINE)


def test_a_virtual_environment_that_is_not_active_is_noted(tmp_path):
    assert doctor.check_python(tmp_path / ".venv").state == "ok"
    (tmp_path / ".venv").mkdir()
    found = doctor.check_python(tmp_path / ".venv")
    assert (found.state, found.fix) == ("note", ". .venv/bin/activate")
    assert doctor.check_python(Path(sys.prefix)).state == "ok"


def test_a_script_lists_its_missing_packages_and_a_command(bare, tmp_path):
    """It ended in a traceback: No module named 'numpy'."""
    done = subprocess.run([bare, ROOT / "train.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: not installed in") and "torch, numpy" in done.stderr
    assert ". .venv/bin/activate" in done.stderr or "pip install" in done.stderr


def test_the_command_that_installs_packages_works_where_it_is_printed(tmp_path, monkeypatch):
    """In the system's Python, pip refused; in an incomplete .venv, activating it again did not help."""
    venv, install = tmp_path / ".venv", "python -m pip install -c constraints.txt -e ."
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    make = "python3 -m venv .venv && . .venv/bin/activate && "
    assert start.install_command(venv) == make + install
    venv.mkdir()
    assert start.install_command(venv) == ". .venv/bin/activate"
    monkeypatch.setattr(sys, "prefix", str(venv))
    assert start.install_command(venv) == install


def test_a_complete_and_an_incomplete_model(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub_copy(tmp_path, "some/encoder", ["config.json", "model.safetensors"])
    hub_copy(tmp_path, "some/lm", ["config.json", "tokenizer.json"])
    found, fingerprint = doctor_checks.check_model("encoder", "some/encoder")
    assert found.state == "ok" and fingerprint
    found, fingerprint = doctor_checks.check_model("lm", "some/lm")
    assert (found.state, found.fix, fingerprint) == ("missing", "hf download some/lm", None)
    assert "incomplete: model.safetensors is missing" in found.found


@pytest.mark.slow
def test_the_whole_report_and_nothing_is_written(tmp_path):
    """One model in the Hub's cache is complete, the other is only partly downloaded."""
    cache = tmp_path / "hub"
    hub_copy(cache, "some/encoder", ["config.json", "model.safetensors"])
    hub_copy(cache, "some/lm", ["config.json", "tokenizer.json"])
    before = names(tmp_path)
    flags = ["--json", "--encoder", "some/encoder", "--lm", "some/lm"]
    here = {"HOME": str(tmp_path), "HF_HUB_CACHE": str(cache), "HF_HOME": str(tmp_path / "hf")}
    done = run(sys.executable, tmp_path, *flags, **here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert names(tmp_path) == before
    report = json.loads(done.stdout)
    findings = {f["what"]: f for f in report["findings"]}
    assert all(findings[name]["state"] == "ok" for name in ("torch", "transformers"))
    assert findings["encoder"]["state"] == "ok"
    assert findings["lm"]["state"] == "missing"
    assert "incomplete: model.safetensors is missing" in findings["lm"]["found"]
    assert findings["lm"]["fix"] == "hf download some/lm"
    assert report["lacks"]["worlds.demo"] == []
    assert report["lacks"]["train.py"] == ["lm", "annotations", "features"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ImportError('libcudart.so.13 is missing')", "libcudart.so.13 is missing"),
        ("import os; os.kill(os.getpid(), 4)", "ended with -4"),
        ("print('hello'); raise SystemExit(3)", "ended with 3"),
    ],
)
def test_a_broken_package_is_reported(code, why, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.check_package("torch", RANGE, "packages")
    assert finding.state == "missing" and why in finding.found
    assert finding.fix == f"{sys.executable} -m pip install --force-reinstall 'torch{RANGE}'"


def test_a_package_that_prints_when_imported_is_ok(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("print('hello')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.check_package("torch", "", "packages").state == "ok"


@pytest.mark.parametrize("version", ["2.9.1", "2.14.0", "1.13.0+cu117"])
def test_a_version_out_of_range(version, tmp_path, monkeypatch):
    folder = tmp_path / f"torch-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.check_package("torch", RANGE, "packages")
    assert finding.state == "missing" and finding.found == f"{version}; required: {RANGE}"
    assert finding.fix == f"{sys.executable} -m pip install -e ."


@pytest.mark.parametrize("version", ["2.10.0", "2.10", "2.13.0+cpu", "2.13.1"])
def test_a_version_in_range(version):
    assert doctor.within(version, RANGE)


def test_version_ranges_in_pyproject_have_the_supported_form():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["app"]
    for limits in [doctor.name_and_range(line)[1] for line in lines] + [project["requires-python"]]:
        assert re.fullmatch(r"((>=|<)[\d.]+(,(?=.)|$))*", limits), limits


def test_a_python_that_is_too_old_gets_one_message():
    """On Python 3.9 the import of a newer itertools function gave a traceback instead of the message.
    start.py must run on the versions that it refuses, and scripts must import it first."""
    for module in ("start", "ranks"):  # start.py imports ranks.py
        tree = ast.parse((ROOT / "runtime" / f"{module}.py").read_text(), feature_version=(3, 8))
        imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {ast.unparse(n) for n in imports if getattr(n, "module", "") == "runtime"}
        assert names <= {"from runtime import ranks"}
        names = {getattr(n, "module", None) or n.names[0].name for n in imports}
        assert names <= {"os", "re", "signal", "sys", "importlib.util", "pathlib", "runtime"}
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")):
        if "\n    cli.run(main)\n" in path.read_text():
            body = ast.parse(path.read_text()).body
            first = next(n for n in body if isinstance(n, ast.Import | ast.ImportFrom))
            assert ast.unparse(first) == "import runtime.start", path
    code = "import sys; sys.version_info = (3, 9); from tools import doctor"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr and "\n" not in done.stderr[:-1]


def test_an_nvidia_gpu_with_a_cpu_build_of_torch(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0: a card\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu_build = {"name": None, "built_for": None}, None
    monkeypatch.setattr(doctor_checks, "in_child", lambda *_: cpu_build)
    assert "hides every GPU" in doctor_checks.check_gpu("torch>=2.10").found  # see conftest.py
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    finding = doctor_checks.check_gpu("torch>=2.10")
    assert finding.state == "missing" and "built for CPUs" in finding.found
    assert "--force-reinstall 'torch>=2.10'" in finding.fix


def test_missing_data_has_a_command_with_its_folders(tmp_path):
    annotations, features = tmp_path / "my annotations", tmp_path / "features"
    flags = ["--annotations", str(annotations), "--features", str(features)]
    args = doctor.parse_args([*flags, "--checkpoint", str(tmp_path / "run")])
    found = {f.what: f for f in doctor_checks.check_data(args) + doctor_checks.check_models(args)}
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
    found = {f.what: f for f in doctor_checks.check_models(doctor.parse_args(flags))}
    assert found["checkpoint"].state == found["lm"].state == "missing"
    assert "not a valid checkpoint" in found["checkpoint"].found


def test_the_type_of_the_encoder_is_checked(tmp_path):
    """doctor.py reported "ok" for models that preprocess_ssv2.py refuses."""
    encoders.save("dinov2", tmp_path)
    args = doctor.parse_args(["--encoder", str(tmp_path)])

    def encoder():
        return next(f for f in doctor_checks.check_models(args) if f.what == "encoder")

    assert encoder().state == "ok"
    (tmp_path / "preprocessor_config.json").unlink()
    assert encoder().state == "missing" and "preprocessor_config.json" in encoder().found
    (tmp_path / "config.json").write_text('{"model_type": "x_clip"}')
    assert encoder().state == "missing" and "Possible types: vjepa2" in encoder().found


def test_the_models_of_a_checkpoint_are_found(trained, world):
    """Like infer.py, doctor.py takes their folders from the flags or from the checkpoint."""

    def look(*flags):
        args = doctor.parse_args(["--checkpoint", str(trained), *map(str, flags)])
        return {f.what: f.state for f in doctor_checks.check_models(args)}

    here = look("--encoder", world / "encoder", "--lm", world / "lm")
    assert here == dict.fromkeys(("encoder", "lm", "checkpoint"), "ok")
    states = look("--lm", world / "encoder")
    assert states["checkpoint's lm"] == states["checkpoint's encoder"] == "ok"


def test_an_encoder_is_not_a_language_model(world):
    """The doctor said that train.py can run with it."""
    found, fingerprint = doctor_checks.check_model("lm", str(world / "encoder"))
    assert found.state == doctor_checks.MISSING and "is an encoder of type vjepa2" in found.found
    assert fingerprint is None


def test_a_missing_local_model_has_no_download_command(trained, tmp_path, monkeypatch):
    """A relative folder such as toy/lm looks like a Hub id."""
    state = checkpoint.read_checkpoint(trained)
    state["lm"]["name"] = "toy/lm"
    monkeypatch.setattr(doctor_checks, "read_checkpoint", lambda path: state)
    args = doctor.parse_args(["--checkpoint", str(trained)])
    found = {f.what: f for f in doctor_checks.check_models(args)}
    assert found["checkpoint's lm"].state == "missing" and not found["checkpoint's lm"].fix
    assert "if it is elsewhere, pass --lm FOLDER" in found["checkpoint's lm"].found


def test_a_step_on_the_gpu(gpu, monkeypatch):
    """doctor.py reported "ok" on machines where every script failed at its first CUDA call."""
    seconds, peak = doctor_checks.try_step("auto")
    assert 0 < seconds < 60 and peak == 7
    properties = {"name": "a card", "count": 1, "bytes": 24e9, "bf16": True, "built_for": "13.0"}
    answers = {"gpu_properties": (properties, None), "try_step": ([1.26, 34.2e6], None)}
    monkeypatch.setattr(doctor_checks, "in_child", lambda function, *_: answers[function.__name__])
    finding = doctor_checks.check_gpu("torch>=2.10")
    assert finding.state == "ok" and "took 1.3 s and 34 MB" in finding.found
    answers["try_step"] = (None, "RuntimeError: no kernel image is available")
    finding = doctor_checks.check_gpu("torch>=2.10")
    assert finding.state == "missing" and "no kernel image" in finding.found
