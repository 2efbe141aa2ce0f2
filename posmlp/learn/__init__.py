"""Training in plain PyTorch: optimizer, learning-rate schedule, training and evaluation steps. Needs no Ray."""
