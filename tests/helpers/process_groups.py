"""Several processes that train together."""

import multiprocessing
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = timedelta(seconds=60)  # for a collective: a test of processes that wait for each other ends


def run_group(function, world, *args):
    """Run a function of the rank and the arguments in processes, which are forked from one that has PyTorch."""
    multiprocessing.set_forkserver_preload(["pytest", "posmlp.learn.learner"])
    mp.start_processes(function, args, nprocs=world, start_method="forkserver")


def join_group(folder, rank, world):
    """Make this process one of a group on gloo, which meets in a folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=LIMIT)
