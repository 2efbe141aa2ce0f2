"""A share of the training videos for validation: the same videos for the same seed, also when the list grows."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence


def choose_held_out(groups: Sequence[str], labels: Sequence[int], share: float, seed: int) -> list[bool]:
    """Choose the videos of a list that are held out for validation. Videos of a group stay together.

    A group is held out if the hash of its name and the seed is below ``share``. So each class loses about its share,
    the order of the list has no effect, and adding videos leaves all others where they are. Small classes need more:

    - a class whose groups would all be held out keeps the one with the largest hash, so every class is learned;
    - a class of at least two groups of which none is held out gives the one with the smallest hash, if no class loses
      its last group by that.

    Only for a class in such a state can an added video move one of the others.

    Args:
        groups: the group of each video, its own id if it has none.
        labels: the label of each video.
        share: between 0 and 1.

    Returns:
        Whether each video is held out.
    """
    place = {group: hash_place(group, seed) for group in dict.fromkeys(groups)}
    held_out = {group: place[group] < share for group in place}
    of_class: dict[int, set[str]] = defaultdict(set)
    classes: dict[str, set[int]] = defaultdict(set)
    for group, label in zip(groups, labels, strict=True):
        of_class[label].add(group)
        classes[group].add(label)

    def learned(label: int) -> list[str]:
        return [group for group in of_class[label] if not held_out[group]]

    for label in sorted(of_class):
        if not learned(label):
            held_out[max(of_class[label], key=place.__getitem__)] = False
    for label in sorted(of_class):
        if any(held_out[group] for group in of_class[label]):
            continue
        for group in sorted(of_class[label], key=place.__getitem__):
            if all(len(learned(each)) > 1 for each in classes[group]):
                held_out[group] = True
                break
    return [held_out[group] for group in groups]


def hash_place(group: str, seed: int) -> float:
    """A number from 0 to 1 that follows from a name and a seed, as if it were random."""
    digest = hashlib.sha256(f"{seed}/{group}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
