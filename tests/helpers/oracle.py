"""The gates straight from their formula, one token pair and one channel at a time, in fp64.

    gate(u, v)[m, c] = (sum_n table[group(c)][m - n] u[n, c] + b[m]) v[m, c]

Windows are anchored at the first frame and the top-left corner. Tokens outside the input are not summed over.
"""

import itertools

import numpy as np


def gate(u, v, table, bias, window):
    """PoTGU (t, 1, 1), PoSGU (1, h, w) or PoSTGU (t, h, w).

    Args:
        u, v: ``[B, C, T, H, W]``.
        table: ``[S, (2t-1)(2h-1)(2w-1)]``; channels c of group s are the s-th contiguous block.
        bias: ``[t*h*w]``.
        window: (t, h, w).
    """
    u, v, table, bias = (np.asarray(a, np.float64) for a in (u, v, table, bias))
    size, channels = u.shape[2:], u.shape[1]
    table = table.reshape(-1, *(2 * side - 1 for side in window))
    bias = bias.reshape(window)
    out = np.zeros_like(u)
    for m in itertools.product(*map(range, size)):
        start = [i // side * side for i, side in zip(m, window, strict=True)]
        ends = [min(s + side, n) for s, side, n in zip(start, window, size, strict=True)]
        place = tuple(i - s for i, s in zip(m, start, strict=True))
        for c in range(channels):
            group = c // (channels // len(table))
            mixed = np.zeros(len(u))
            for n in itertools.product(*map(range, start, ends)):
                offset = tuple(i - j + side - 1 for i, j, side in zip(m, n, window, strict=True))
                mixed += table[(group, *offset)] * u[(slice(None), c, *n)]
            at = (slice(None), c, *m)
            out[at] = (mixed + bias[place]) * v[at]
    return out
