"""Hyper-parameters of training: learning rate, weight decay, warm-up, label smoothing and drop path."""

from posmlp.config import Config
from tune_spaces import Range, Space


def space(base: Config) -> Space:
    """Learning rates around the recipe's own, fixed values for the others; the architecture does not change."""
    lr = base.optim.lr
    return Space(
        {
            "lr": Range(lr / 10, lr * 10, log=True),
            "weight_decay": Range(1e-3, 0.5, log=True),
            "warmup_epochs": tuple(round(base.train.epochs * share, 3) for share in (0.0, 0.05, 0.1, 0.2)),
            "label_smoothing": (0.0, 0.1, 0.2),
            "drop_path": (0.0, 0.1, 0.2, 0.3),
        },
        lambda member: {
            "optim.lr": member["lr"],
            "optim.weight_decay": member["weight_decay"],
            "optim.warmup_epochs": member["warmup_epochs"],
            "optim.label_smoothing": member["label_smoothing"],
            "model.drop_path": member["drop_path"],
        },
    )
