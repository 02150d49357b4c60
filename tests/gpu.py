"""A model of a GPU on the CPU, for the product's GPU branches: it refuses what a GPU refuses, and keeps
nothing ready that a GPU would not have ready.

What it models: `torch.cuda.set_device` and `Event`; copies that do not block, which leave garbage on the
host until an event recorded after them was waited for, and which need pinned memory on the way up; the
DataLoader's pinning. Not modelled: kernels that run late, and tensors on two devices.
"""

import torch

import devices

INT_GARBAGE, FLOAT_GARBAGE = 85, float("nan")


class PretendedGPU:
    """Patches torch so that the CPU is the GPU of this process. `most_in_flight`: batches, see `Event`."""

    def __init__(self, patch, count=1):
        self.count, self.current = count, None
        self.copies, self.waiting, self.most_in_flight = [], [], 0
        self.real_to = torch.Tensor.to
        gpu = self

        def to(tensor, *args, **kwargs):
            return gpu.to(tensor, *args, **kwargs)

        def pin_memory(tensor, device=None):
            pinned = tensor.clone()
            pinned.lies_in_pinned_memory = True
            return pinned

        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        patch.setattr(devices, "GPU", "cpu")
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.Tensor, "pin_memory", pin_memory)
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(
            torch.accelerator,
            "current_accelerator",
            lambda check_available=False: torch.device("cpu"),
        )
        patch.setattr(torch.accelerator, "current_device_index", lambda: self.current)
        patch.setattr(torch.accelerator, "set_device_index", lambda index: None)
        patch.setattr(
            torch.cuda, "max_memory_allocated", lambda device: self.index(device, True) + 7
        )
        for name in ("set_device", "get_device_name", "synchronize"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "Event", lambda *args, **kwargs: Event(self, *args, **kwargs))

    def index(self, device, optional=False):
        """As torch's `_get_device_index`, which CUDA's functions call first."""
        device = torch.device(device) if isinstance(device, str) else device
        if isinstance(device, torch.device):
            if device.type != devices.GPU:
                raise ValueError(f"Expected a cuda device, but got: {device}")
            device = device.index
        if device is None and optional:
            return self.current
        if not isinstance(device, int):
            raise ValueError("Expected a torch.device with a specified index or an integer")
        if device >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return device

    def set_device(self, device):
        self.current = self.index(device)

    def get_device_name(self, device=None):
        return f"pretended GPU {self.index(device, optional=True)}"

    def to(self, tensor, *args, non_blocking=False, **kwargs):
        """Copies that do not block. The host is "cpu", as a string; a torch.device is the GPU."""
        device = kwargs.get("device", next(iter(args), None))
        if not non_blocking or not isinstance(device, str | torch.device):
            return self.real_to(tensor, *args, **kwargs)
        if self.current is None:
            raise RuntimeError("a copy to or from a GPU before set_device")
        if device == "cpu":
            host = torch.empty_like(tensor)
            host.fill_(FLOAT_GARBAGE if host.is_floating_point() else INT_GARBAGE)
            self.copies.append((host, tensor.clone()))
            return host
        if not getattr(tensor, "lies_in_pinned_memory", False):
            raise RuntimeError("a copy that does not block, from memory that is not pinned")
        return self.real_to(tensor, *args, **kwargs).clone()

    @torch.inference_mode()
    def finish(self, copies):
        for host, tensor in copies:
            host.copy_(tensor)
        self.copies = [c for c in self.copies if not any(c is done for done in copies)]

    def synchronize(self, device=None):
        self.index(device, optional=True)
        self.finish(self.copies)


class Event:
    """torch.cuda.Event: `synchronize` waits for what was queued when it was recorded, and only that."""

    def __init__(
        self, gpu, enable_timing=False, blocking=False, interprocess=False, external=False
    ):
        self.gpu, self.timing, self.copies = gpu, enable_timing, None

    def record(self, stream=None):
        if stream is not None:
            raise TypeError("the pretended GPU has one stream")
        self.copies = list(self.gpu.copies)
        self.gpu.waiting.append(self)
        self.gpu.most_in_flight = max(self.gpu.most_in_flight, len(self.gpu.waiting))

    def synchronize(self):
        if self.copies is None:
            return  # as CUDA: an event that was never recorded waits for nothing
        self.gpu.finish(self.copies)
        self.gpu.waiting.remove(self)

    def query(self):
        return self not in self.gpu.waiting

    def elapsed_time(self, end):
        if not (self.timing and end.timing):
            raise RuntimeError("Both events must be created with enable_timing=True")
        return 1.0
