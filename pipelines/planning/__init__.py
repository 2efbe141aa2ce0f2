"""Before a run: find what would stop it, and estimate what it takes."""
