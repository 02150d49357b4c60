"""Rank and world size from torchrun's environment variables; without torchrun, rank 0 of 1.

Standard library only. Communication between the processes is in distributed.py.
"""

import os


def launched():
    """Return True in a process of torchrun. RANK is not enough, because other launchers set it too."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    return int(os.environ["RANK"]) if launched() else 0


def world_size():
    """Return the number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank():
    """Return the rank among the processes on this machine, which is also the index of the GPU to use."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def local_world_size():
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def share(items):
    """Return this process's share of a list: every world_size-th item, starting at its rank."""
    return items[rank() :: world_size()]


def share_of_shard(part, parts):
    """Return this process's share of shard `part` of `parts`, as (part, parts) for `files.in_shard`."""
    return part * world_size() + rank(), parts * world_size()
