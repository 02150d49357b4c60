"""An emulated GPU on the CPU, to test the GPU branches. It raises errors where a GPU does, and results
are not available earlier than on a GPU.

It models:
- the argument checks of `torch.cuda.set_device` and `Event`
- non-blocking copies to the host, which are garbage until an event recorded after them is synchronised
- non-blocking copies to the GPU, which need pinned memory, and the DataLoader's pinning
- operations that mix tensors in host and GPU memory, which fail

It models neither asynchronous kernels nor several GPUs.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from runtime import devices

INT_GARBAGE, FLOAT_GARBAGE = 85, float("nan")
HOST, PINNED, GPU = "host", "pinned", "gpu"


class EmulatedGPU(TorchFunctionMode):
    """Patches torch so that this process uses its CPU as a GPU.

    The device "cpu" as a string, or no device, is the host. Any torch.device is the GPU. As a
    TorchFunctionMode it intercepts every operation and records which memory each tensor is in.
    most_in_flight: the largest number of recorded events that were not yet synchronised.
    """

    def __init__(self, patch, count=1):
        super().__init__()
        self.count, self.current, self.where = count, None, WeakTensorKeyDictionary()
        self.copies, self.waiting, self.most_in_flight = [], [], 0
        gpu, module_to, new_parameter = self, torch.nn.Module.to, torch.nn.Parameter.__new__
        torch_load = torch.load

        def to(module, *args, **kwargs):
            with torch._C.DisableTorchFunction():
                moved = module_to(module, *args, **kwargs)
            if any(isinstance(arg, torch.device) for arg in args):
                for tensor in (*module.parameters(), *module.buffers()):
                    gpu.where[tensor] = GPU
            return moved

        def parameter(cls, data=None, requires_grad=True):
            made = new_parameter(cls, data, requires_grad)
            return made if data is None else gpu.put(made, gpu.where.get(data))

        def load(*args, **kwargs):  # always with map_location="cpu"
            with torch._C.DisableTorchFunction():
                loaded = torch_load(*args, **kwargs)
            for tensor in tree_leaves(loaded):
                if isinstance(tensor, torch.Tensor):
                    gpu.where[tensor] = HOST
            return loaded

        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        patch.setattr(torch, "load", load)
        patch.setattr(devices, "GPU", "cpu")
        patch.setattr(torch.nn.Module, "to", to)
        patch.setattr(torch.nn.Parameter, "__new__", parameter)
        # a mode is active in one thread only, and the DataLoader pins in another
        patch.setattr(torch.Tensor, "pin_memory", lambda x, device=None: gpu.put(x.clone(), PINNED))
        accelerator = {
            "is_available": lambda: True,
            "current_accelerator": lambda check_available=False: torch.device("cpu"),
            "current_device_index": lambda: self.current,
            "set_device_index": lambda index: None,
        }
        cuda = {
            "is_available": lambda: True,
            "device_count": lambda: count,
            "max_memory_allocated": lambda device: self.index(device, optional=True) + 7,
            "max_memory_reserved": lambda device: self.index(device, optional=True) + 9,
            "set_device": self.set_device,
            "get_device_name": lambda device=None: f"emulated GPU {self.index(device, True)}",
            "synchronize": lambda device=None: self.finish(self.copies),
            "current_stream": lambda device: f"stream of GPU {self.index(device)}",
            "Event": lambda *args, **kwargs: Event(self, *args, **kwargs),
        }
        for module, functions in ((torch.accelerator, accelerator), (torch.cuda, cuda)):
            for name, function in functions.items():
                patch.setattr(module, name, function)

    def index(self, device, optional=False):
        """Like torch's `_get_device_index`, which the torch.cuda functions call first."""
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

    # ---- where tensors are ---------------------------------------------------------------------

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        if name == "to" and isinstance(args[0], torch.Tensor):
            return self.to(*args, **kwargs)
        if name == "cpu":
            return self.to(args[0], "cpu")
        out = function(*args, **kwargs)
        if isinstance(kwargs.get("device"), torch.device):
            place = GPU if kwargs["device"].type == devices.GPU else None
        else:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            # tensors without dimensions in host memory may be mixed with tensors on the GPU
            places = {self.place(x) for x in tensors if x.dim() or self.place(x) == GPU} - {None}
            mixed = GPU in places and len(places) > 1
            if mixed and name not in ("__getitem__", "__setitem__", "copy_", "__set__"):
                raise RuntimeError(f"Expected all tensors to be on the same device ({name})")
            place = GPU if GPU in places else HOST if places or not tensors else None
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor not in self.where:
                self.put(tensor, place)
        return out

    def put(self, tensor, place):
        if place:
            self.where[tensor] = place
        return tensor

    def place(self, tensor):
        if tensor.is_meta:
            return None
        return self.where.get(tensor, HOST if isinstance(tensor, torch.nn.Parameter) else None)

    def to(self, tensor, *args, non_blocking=False, **kwargs):
        device = kwargs.get("device", next(iter(args), None))
        if not isinstance(device, str | torch.device):
            return self.put(torch.Tensor.to(tensor, *args, **kwargs), self.place(tensor))
        place = HOST if device == "cpu" else GPU
        if non_blocking and self.current is None:
            raise RuntimeError("a copy to or from a GPU before set_device")
        if non_blocking and place == GPU and self.place(tensor) != PINNED:
            raise RuntimeError("a non-blocking copy from memory that is not pinned")
        copy = torch.Tensor.to(tensor, *args, **kwargs)
        copy = copy.clone() if copy is tensor and self.place(tensor) != place else copy
        if non_blocking and place == HOST:
            self.copies.append((copy, copy.clone()))
            copy.fill_(FLOAT_GARBAGE if copy.is_floating_point() else INT_GARBAGE)
        return self.put(copy, place)

    @torch.inference_mode()
    def finish(self, copies):
        for host, tensor in copies:
            host.copy_(tensor)
        self.copies = [c for c in self.copies if not any(c is done for done in copies)]


class Event:
    """torch.cuda.Event: `synchronize` completes only the copies queued before `record`."""

    def __init__(
        self, gpu, enable_timing=False, blocking=False, interprocess=False, external=False
    ):
        self.gpu, self.timing, self.copies = gpu, enable_timing, None

    def record(self, stream=None):
        if stream is None:
            raise RuntimeError("the current device of this thread may be another GPU")
        self.copies = list(self.gpu.copies)
        self.gpu.waiting.append(self)
        self.gpu.most_in_flight = max(self.gpu.most_in_flight, len(self.gpu.waiting))

    def synchronize(self):
        if self.copies is None:
            return  # as in CUDA, an event that was never recorded waits for nothing
        self.gpu.finish(self.copies)
        self.gpu.waiting.remove(self)

    def query(self):
        return self not in self.gpu.waiting

    def elapsed_time(self, end):
        if not (self.timing and end.timing):
            raise RuntimeError("Both events must be created with enable_timing=True")
        return 1.0
