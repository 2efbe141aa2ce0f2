"""The commands of ``posmlp``: a module for each group, with the arguments of each command beside its handler.

Each module has ``add_commands(commands)``. Heavy imports are inside the handlers, so ``posmlp --help`` answers at once.
"""
