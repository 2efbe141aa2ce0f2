"""Trained models at work: evaluate, predict, export."""
