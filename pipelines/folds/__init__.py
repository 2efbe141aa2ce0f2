"""Cross-validation: folds of the training videos, each held out once, as a study."""
