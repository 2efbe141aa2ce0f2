"""The verbs of ``posmlp``: a module for each group, with the arguments of each verb beside its handler.

Each module has ``add_verbs(verbs)``. Heavy imports are inside the handlers, so that ``posmlp --help`` answers at once.
"""
