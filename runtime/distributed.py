"""One run in several processes, as torchrun starts them; one process is the case of one.

Every process runs the whole script and does its share; rank 0 alone prints and writes. The processes
exchange sums of gradients and losses once a step, and captions once an evaluation.
"""

from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime import ranks
from runtime.errors import UserError

TIMEOUT = timedelta(days=1)  # the others wait while rank 0 scores or one reads slowly


@contextmanager
def joined(backend="gloo"):
    """Let the processes communicate inside the block, through a backend of torch.distributed."""
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
            f"the processes lost touch; if another one has ended, see what it said ({why})", code=1
        ) from None
    dist.destroy_process_group()  # not after an error: it might wait for the others


def all_reduce(tensors):
    """Replace each tensor by its sum over the processes; every process then has the same bits."""
    if ranks.world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sums(*numbers):
    """Each number's sum over the processes, in float64."""
    values = torch.tensor(numbers, dtype=torch.float64)
    all_reduce([values])
    return values.tolist()


def maximum(number):
    return max(all_gather(number))


def all_gather(value):
    """Every process's value, in the order of the ranks, on every process."""
    if ranks.world_size() == 1:
        return [value]
    values = [None] * ranks.world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(tensors):
    """Overwrite tensors with those of rank 0."""
    if ranks.world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
