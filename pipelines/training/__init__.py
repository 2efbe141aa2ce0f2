"""One training run: its driver, its workers, and the channel between them."""
