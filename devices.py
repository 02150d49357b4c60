"""Which device the tensors are on: a CPU or an NVIDIA GPU.

Every branch of the product that depends on it asks `on_gpu`, so that the tests can run them all on a
CPU that pretends.
"""

import os
import subprocess
import warnings
from pathlib import Path

import ranks
from cli import UserError, note

GPU = "cuda"  # torch's type of a GPU
HIDDEN = (
    "-1",
    "NoDevFiles",
)  # values of CUDA_VISIBLE_DEVICES that mean none; the latter is Slurm's


def on_gpu(device):
    """True if tensors on this torch.device are in a GPU's memory."""
    return device.type == GPU


def backend(device):
    """The torch.distributed backend that sums gradients on this device."""
    return "cpu:gloo,cuda:nccl" if on_gpu(device) else "gloo"


def resolve(name, dtype):
    """Return the torch.device, its index included, and the torch.dtype of --device and --dtype.

    Makes the GPU the current one and prints both. Raises UserError where there is no such device, or
    where an NVIDIA GPU is there and torch cannot use it.
    """
    import torch

    if name == "auto":
        name = GPU if usable_gpu() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", GPU):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if on_gpu(device):
        if device.index is not None and ranks.count() > 1:
            raise UserError(f"--device {name}: the processes of torchrun need a GPU each; use cuda")
        # streams and events belong to the current device, and set_device wants an index
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
    """cpu, or the GPU's name."""
    import torch

    return torch.cuda.get_device_name(device) if on_gpu(device) else "cpu"


def usable_gpu():
    """True if torch can use a GPU.

    Raises UserError where an NVIDIA GPU is there, not hidden, and torch cannot use it: to go on
    without it would take days and fill a cache with float32 features.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return True
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    if not hidden or hidden.startswith(HIDDEN) or not has_nvidia_gpu():
        return False
    if torch.version.cuda is None:
        why, remedy = "torch is built for CPUs", "install a CUDA build of torch"
    else:
        said = str(caught[0].message).split(" (Triggered")[0] if caught else "no reason is given"
        why = f"torch, built for CUDA {torch.version.cuda}, cannot use it: {said}"
        remedy = "install torch for an older CUDA (https://pytorch.org) or update the driver"
    raise UserError(f"there is an NVIDIA GPU, but {why}; {remedy}, or pass --device cpu")


def has_nvidia_gpu():
    """True if the machine has an NVIDIA GPU with a driver, whether or not torch can use it."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    try:  # Windows, and Linux inside it
        command = ["nvidia-smi", "--list-gpus"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and listed.stdout.startswith("GPU ")
