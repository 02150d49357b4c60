"""Choose the device (CPU or NVIDIA GPU) and the dtype.

Every branch that depends on the device calls `on_gpu`. The tests patch it to run the GPU branches on a
CPU.
"""

import os
import subprocess
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from runtime import ranks
from runtime.cli import note
from runtime.errors import UserError

GPU = "cuda"  # torch's device type
# values of CUDA_VISIBLE_DEVICES that hide every GPU; Slurm sets the second
HIDDEN = ("-1", "NoDevFiles")


def on_gpu(device):
    """Return True if this torch.device is a GPU."""
    return device.type == GPU


def autocast(device):
    """Return an autocast context for the trained modules: bfloat16 on a GPU, a null context on a CPU."""
    return torch.autocast(device.type, torch.bfloat16) if on_gpu(device) else nullcontext()


def backend(device):
    """Return the torch.distributed backend for this device."""
    return "cpu:gloo,cuda:nccl" if on_gpu(device) else "gloo"


def resolve(name, dtype):
    """Return the torch.device (a GPU with its index) and the torch.dtype for --device and --dtype.

    Prints both and, for a GPU, makes it the current CUDA device. Raises UserError if the device does not
    exist, or if the machine has an NVIDIA GPU that torch cannot use.
    """
    if name == "auto":
        name = GPU if usable_gpu() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:N") from None
    # the second condition: torch wraps cuda:256 to cuda:0
    if device.type not in ("cpu", GPU) or str(device) != name.lower():
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if on_gpu(device):
        if device.index is not None and ranks.world_size() > 1:
            raise UserError(
                f"--device {name}: under torchrun each process needs its own GPU; use --device cuda"
            )
        # Streams and events belong to the current device, and set_device needs an index.
        index = ranks.local_rank() if device.index is None else device.index
        count = torch.cuda.device_count() if usable_gpu() else 0
        if index >= count:
            raise UserError(f"--device {name}: torch sees {count} CUDA devices; use --device cpu")
        device = torch.device(GPU, index)
        torch.cuda.set_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu(device) else "float32"
    note(f"device       {device}{f' ({describe(device)})' if on_gpu(device) else ''}, {dtype}")
    return device, getattr(torch, dtype)


def describe(device):
    """Return the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if on_gpu(device) else "cpu"


def peak_memory(device):
    """Return the peak GPU memory in bytes, as (allocated for tensors, reserved by torch). On a CPU, (0, 0)."""
    if not on_gpu(device):
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def usable_gpu():
    """Return True if torch can use a GPU.

    Raises UserError if the machine has a visible NVIDIA GPU that torch cannot use. Silently falling back
    to the CPU would take days and fill the cache with float32 features.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return True
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden() or not has_nvidia_gpu():
        return False
    if visible and not caught:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} leaves no GPU; correct it or pass --device cpu"
        )
    if torch.version.cuda is None:
        why, fix = "torch is built for CPUs", "install a CUDA build of torch"
    else:
        reason = str(caught[0].message).split(" (Triggered")[0] if caught else "no reason given"
        why = f"torch, built for CUDA {torch.version.cuda}, cannot use it: {reason}"
        fix = "update the driver, install torch built for an older CUDA (https://pytorch.org)"
    raise UserError(f"this machine has an NVIDIA GPU, but {why}; {fix}, or pass --device cpu")


def hidden():
    """Return True if CUDA_VISIBLE_DEVICES hides every GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    return not visible or visible.startswith(HIDDEN)


def has_nvidia_gpu():
    """Return True if the machine has an NVIDIA GPU with a driver, whether or not torch can use it."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    try:  # Windows and WSL have no /dev/nvidia*
        command = ["nvidia-smi", "--list-gpus"]
        listed = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and listed.stdout.startswith(b"GPU ")
