"""Frame mAP in plain loops, as the rule says it."""

import math

import numpy as np


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def plain_map(truth, scored, num_classes, evaluated, most, by_score):
    """Average precision of each class: one key frame, class and box at a time, and the whole curve of precision."""
    evaluated = set(range(num_classes)) if evaluated is None else set(evaluated)
    outcomes = {label: [] for label in range(num_classes)}  # of each labelled box: score, true positive?
    for key in sorted(set(scored.key.tolist())):
        labelled = []
        for number in np.flatnonzero(scored.key == key):
            for label in sorted(evaluated):
                score = float(scored.scores[number, label])
                labelled.append((-math.inf if math.isnan(score) else score, int(number), label))
        labelled.sort(key=lambda item: (-item[0], item[1], item[2]))
        labelled = labelled[:most]
        if not by_score:
            labelled.sort(key=lambda item: item[1])
        found = set()
        for score, number, label in labelled:
            box = scored.boxes[number].tolist()
            if box[0] >= box[2] or box[1] >= box[3]:
                continue
            best, best_overlap = None, -1.0
            for m in range(len(truth.key)):
                if truth.key[m] == key and truth.action[m] == label:
                    value = overlap(box, truth.boxes[m].tolist())
                    if value > best_overlap:
                        best, best_overlap = m, value
            hit = best_overlap >= 0.5 and best not in found
            if hit:
                found.add(best)
            outcomes[label].append((score, key, number, hit))
    result = []
    for label in range(num_classes):
        boxes = int((truth.action == label).sum())
        if not boxes or label not in evaluated:
            result.append(math.nan)
            continue
        outcomes[label].sort(key=lambda item: (-item[0], item[1], item[2]))
        precision, recall, hits = [], [], 0
        for rank, item in enumerate(outcomes[label], 1):
            hits += item[3]
            precision.append(hits / rank)
            recall.append(hits / boxes)
        area, before = 0.0, 0.0
        for i, value in enumerate(recall):
            area += (value - before) * max(precision[i:])
            before = value
        result.append(area)
    return result
