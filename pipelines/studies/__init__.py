"""Studies (searches of a space): their records, their Pareto fronts, and what they show."""
