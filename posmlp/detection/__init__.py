"""Action detection: clips around key frames, the boxes of people in them, and frame-level mean average precision."""
