"""The PosMLP-Video backbone: gates, blocks, variants, checkpoints and cost."""
