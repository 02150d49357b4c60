"""What torchrun tells each of its processes; a process without torchrun is rank 0 of one.

Standard library only. What the processes exchange is in distributed.py.
"""

import os


def launched():
    """True in a process of torchrun. RANK alone may come from another launcher."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    return int(os.environ["RANK"]) if launched() else 0


def world_size():
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank():
    """The rank among the processes of this machine, which is also the index of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def local_world_size():
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def share(items):
    """This process's items of a list, dealt out in turn."""
    return items[rank() :: world_size()]


def share_of_shard(part, parts):
    """This process's part of a shard: (part, parts) of the finer cut. See `files.in_shard`."""
    return part * world_size() + rank(), parts * world_size()
