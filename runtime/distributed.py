"""Communication between the processes of one run, as started by torchrun.

Every process runs the same script on its share of the clips. Only rank 0 prints and writes files. The
processes exchange gradients and losses once per step and captions once per evaluation. All functions also
work with a single process.
"""

from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime import ranks
from runtime.errors import FAILED, UserError

TIMEOUT = timedelta(days=1)  # others wait while rank 0 computes scores or a process reads slowly


@contextmanager
def joined(backend="gloo"):
    """Set up the torch.distributed process group for the duration of the block.

    Raises UserError if communication fails, for example because another process has ended.
    """
    if ranks.world_size() == 1:
        yield
        return
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        why = str(error).splitlines()[0][:200]
        raise UserError(
            f"lost the connection to the other processes ({why}); if one of them has failed, see its"
            " message",
            code=FAILED,
        ) from None
    dist.destroy_process_group()  # not after an error, when it might wait for the other processes


def all_reduce(tensors):
    """Replace each tensor by its sum over the processes. The result is bit-identical on all of them."""
    if ranks.world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sums(*numbers):
    """Return the sum of each number over the processes, in float64."""
    values = torch.tensor(numbers, dtype=torch.float64)
    all_reduce([values])
    return values.tolist()


def maximum(number):
    return max(all_gather(number))


def all_gather(value):
    """Return the values of all processes as a list in rank order, on every process."""
    if ranks.world_size() == 1:
        return [value]
    values = [None] * ranks.world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(tensors):
    """Overwrite the tensors with those of rank 0."""
    if ranks.world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
