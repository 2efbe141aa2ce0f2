"""Hypothesis draws the same examples on every machine, and no example fails for being slow on a busy one."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")
