"""Studies: search a space of architectures, and find the Pareto front."""
