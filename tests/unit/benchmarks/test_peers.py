"""The models in ``benchmarks/peer_models.py`` are those of their papers."""

import pytest
import torch

from benchmarks.peer_models import R2Plus1D, VideoSwin, WindowAttention, count_torch_macs, join_windows, split_windows
from posmlp.model.cost import count_params


@pytest.mark.parametrize(
    ("model", "size", "params", "gmacs"),
    [(VideoSwin, 224, 28_158_070, 43.88), (R2Plus1D, 112, 31_505_325, 40.52)],
)
def test_parameters_and_work_are_the_published_ones(model, size, params, gmacs):
    with torch.device("meta"):
        peer = model()
        macs = count_torch_macs(peer, torch.empty(1, 3, 16, size, size))
        assert peer(torch.empty(2, 3, 16, size, size)).shape == (2, 400)
    assert count_params(peer) == params
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_joining_windows_inverts_splitting():
    x = torch.randn(2, 4, 6, 6, 5)
    torch.testing.assert_close(join_windows(split_windows(x, (2, 3, 2)), (2, 3, 2), x.shape), x)


@pytest.mark.parametrize("shift", [False, True])
def test_window_attention_against_loops_over_tokens(shift):
    torch.manual_seed(0)
    full, grid, dim, heads = (2, 3, 3), (2, 6, 6), 8, 2
    attention = WindowAttention(dim, heads, full, grid, shift)
    x = torch.randn(2, *grid, dim)
    move = 1 if shift else 0  # half a window of 3; the axis of frames is filled by one window and stays
    q, k, v = attention.qkv(x).flatten(1, 3).unflatten(-1, (3, heads, dim // heads)).permute(2, 0, 3, 1, 4)
    places = [(t, y, z) for t in range(2) for y in range(6) for z in range(6)]
    scores = torch.full((2, heads, len(places), len(places)), float("-inf"))
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            # Windows start `move` later, so windows at the border are smaller; no token attends across a border.
            if all((a[n] - move + 3) // 3 == (b[n] - move + 3) // 3 for n in (1, 2)):
                row = ((a[0] - b[0] + 1) * 5 + a[1] - b[1] + 2) * 5 + a[2] - b[2] + 2
                scores[:, :, i, j] = (q[:, :, i] * k[:, :, j]).sum(-1) / (dim // heads) ** 0.5 + attention.table[row]
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(mixed).view(x.shape), rtol=1e-4, atol=1e-5)
