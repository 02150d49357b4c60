"""Rank and world size from torchrun's environment variables; without torchrun, rank 0 of 1.

Standard library only. Communication between the processes is in distributed.py.
"""

import os


def launched():
    """True in a process that torchrun started. RANK alone could be set by another launcher."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    return int(os.environ["RANK"]) if launched() else 0


def world_size():
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank():
    """The rank among the processes on this machine, which is also the index of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def local_world_size():
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def share(items):
    """Every world_size-th item of a list, starting at this process's rank."""
    return items[rank() :: world_size()]


def share_of_shard(part, parts):
    """This process's share of shard `part` of `parts`, as (part, parts) for `files.in_shard`."""
    return part * world_size() + rank(), parts * world_size()
