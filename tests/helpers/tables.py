"""Tabular benchmarks that are made up."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BLOCKS = ("cascade_ts", "joint", "parallel")


def all_blocks(stages=4):
    """Every combination of three block types over the stages."""
    return [
        {f"block{stage}": block for stage, block in enumerate(blocks, start=1)}
        for blocks in itertools.product(BLOCKS, repeat=stages)
    ]


def write_table(path, members, top1, gmacs, loss=None):
    """Write a table with the columns that docs/tabular_benchmark.md lists, as far as a replay needs them.

    Args:
        top1: [members, seeds, epochs].
    """
    loss = 1 - top1 if loss is None else loss
    rows = [
        {"member": m, "seed": s, "epoch": e + 1}
        | members[m]
        | {"val/top1": float(top1[m, s, e]), "val/loss": float(loss[m, s, e]), "cost/gmacs": float(gmacs[m])}
        for m, s, e in np.ndindex(*top1.shape)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def made_up(members, value, seeds=3, epochs=9, noise=0.0, seed=0):
    """Curves of top-1, [members, seeds, epochs], that approach a value of each member, with noise of each seed."""
    rng = np.random.default_rng(seed)
    last = np.array([value(member) for member in members])[:, None] + noise * rng.normal(size=(len(members), seeds))
    return last[:, :, None] * (1 - 0.5 ** np.arange(1, epochs + 1))
