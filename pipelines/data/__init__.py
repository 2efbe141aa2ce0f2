"""Data sets on Ray Data: the data loader, check, shard, preview."""
