"""--device and --dtype, using torch's own CUDA functions where they work without a GPU."""

import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch

from runtime import devices
from runtime.errors import UserError


@pytest.fixture
def cuda(monkeypatch):
    """Makes torch see two GPUs. Returns the list of indices passed to set_device."""
    chosen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    return chosen


def under_torchrun(monkeypatch, rank, count):
    for name, value in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)]:
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")


@pytest.mark.parametrize("script", ["infer", "probe", "retrieve"])
def test_scripts_of_one_process_refuse_torchrun(script, monkeypatch):
    """Each of the processes of infer.py captioned all clips."""
    under_torchrun(monkeypatch, 0, 2)
    with pytest.raises(UserError, match="runs in a single process; start it without torchrun"):
        importlib.import_module(script).main(["x.mp4"] if script == "infer" else [])


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_a_gpu_device_has_an_index(cuda, capsys, name, index):
    """torch.cuda.set_device(torch.device("cuda")) raises ValueError. Every script failed there with
    --device auto or cuda, and no CPU test ran that line."""
    device, dtype = devices.resolve(name, "auto")
    assert (device, dtype) == (torch.device("cuda", index), torch.bfloat16)
    assert cuda == [index] and f"cuda:{index} (a GPU), bfloat16" in capsys.readouterr().err


def test_each_process_of_torchrun_has_its_own_gpu(cuda, monkeypatch):
    under_torchrun(monkeypatch, 1, 2)
    assert devices.resolve("auto", "float32")[0] == torch.device("cuda", 1) and cuda == [1]
    with pytest.raises(UserError, match="needs its own GPU"):
        devices.resolve("cuda:1", "auto")
    under_torchrun(monkeypatch, 2, 3)
    with pytest.raises(UserError, match="torch sees 2 CUDA devices"):
        devices.resolve("cuda", "auto")


@pytest.mark.parametrize(
    "name", ["cuda:2", "cuda:99", "cuda:256", "cuda:-1", "gpu", "mps", "cpu:x", ""]
)
def test_invalid_devices_are_refused(cuda, name):
    with pytest.raises(UserError, match=re.escape(f"--device {name}")):
        devices.resolve(name, "auto")


def test_only_devices_py_checks_for_cuda():
    """Tests cannot run a GPU branch that does not call `on_gpu`, see gpu.py."""
    check = re.compile(r"""["']cuda["']|\.is_cuda|\.type\s*[!=]=""")
    doctor = ("doctor_checks.py", "doctor_children.py")  # they query torch in child processes
    found = {
        f"{path.name}: {line.strip()}"
        for path in Path(devices.__file__).parent.parent.glob("**/*.py")
        if not {"tests", ".venv"} & set(path.parts)
        for line in path.read_text().splitlines()
        if check.search(line) and path.name not in doctor
    }
    assert found == {
        'devices.py: GPU = "cuda"  # torch\'s device type',
        "devices.py: return device.type == GPU",
    }


# ---- a GPU that torch cannot use -----------------------------------------------------------------


@pytest.fixture
def unusable(monkeypatch):
    """An NVIDIA GPU whose driver is too old for torch."""

    def is_available():
        warnings.warn(
            "The NVIDIA driver on your system is too old (Triggered internally)", stacklevel=2
        )
        return False

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: True)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_torch_cannot_use_is_an_error(unusable, monkeypatch, name):
    """With a driver too old for the wheel, auto silently used the CPU and filled a float32 cache at
    minutes per clip."""
    with pytest.raises(UserError, match=r"13\.0.* too old; .*older CUDA.* pass --device cpu"):
        devices.resolve(name, "auto")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"built for CPUs; install a CUDA build.* --device cpu"):
        devices.resolve(name, "auto")


def test_an_unusable_gpu_is_no_error_unless_it_is_requested(unusable, monkeypatch):
    cpu = torch.device("cpu"), torch.float32
    assert devices.resolve("cpu", "auto") == cpu
    for hidden in ("", "-1", "NoDevFiles", " "):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert devices.resolve("auto", "auto") == cpu
    with pytest.raises(UserError, match="torch sees 0 CUDA devices"):
        devices.resolve("cuda", "auto")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: False)
    assert devices.resolve("auto", "auto") == cpu


def test_an_invalid_cuda_visible_devices_is_named(unusable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=7 leaves no GPU"):
        devices.resolve("auto", "auto")


def test_nvidia_smi_may_exist_without_a_gpu(monkeypatch, tmp_path):
    """Machines without a GPU may have driver packages installed."""
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setattr(devices, "Path", lambda path: tmp_path)  # no /dev/nvidia0
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for script, found in [("exit 9", False), ("echo No devices", False), ("echo GPU 0: A", True)]:
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        assert devices.has_nvidia_gpu() == found
