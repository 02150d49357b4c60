"""One run in several processes, as torchrun starts them; a process of its own is the case of one.

Every process runs the whole script and does its share. Rank 0 alone speaks and writes. What they
exchange: sums of gradients and of losses once a step, captions once an evaluation.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

PATIENCE = timedelta(days=1)  # the others wait while rank 0 scores or one reads slowly


def launched():
    """True in a process of torchrun. RANK alone may be some other launcher's."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    return int(os.environ["RANK"]) if launched() else 0


def count():
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_count():
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def local_rank():
    """The number among the processes of this machine: which GPU is ours."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


@contextmanager
def joined(backend="gloo"):
    """Let the processes communicate inside the block, through a backend of torch.distributed."""
    if count() == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        from runtime.cli import UserError

        why = str(error).splitlines()[0][:200]
        raise UserError(
            f"the processes lost touch; if another one has ended, see what it said ({why})", code=1
        ) from None
    dist.destroy_process_group()  # not after an error: it might wait for the others


def add_up(tensors):
    """Replace each tensor by its sum over the processes; every process then has the same bits."""
    if count() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)


def total(*numbers):
    """Each number's sum over the processes, in float64."""
    import torch

    sums = torch.tensor(numbers, dtype=torch.float64)
    add_up([sums])
    return sums.tolist()


def largest(number):
    return max(gather(number))


def gather(value):
    """Every process's value, in the order of the ranks, on every process."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def copy_from_first(tensors):
    """Overwrite tensors with those of rank 0."""
    if count() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, 0)


def share_of_shard(part, parts):
    """This process's part of a shard: (part, parts) of the finer cut. See `files.in_shard`."""
    return part * count() + rank(), parts * count()


def share(items):
    """This process's part of a list, dealt out in turn."""
    return items[rank() :: count()]
