"""Memory is counted."""

import numpy as np

from infra.memory import MemoryWatch


def test_memory_is_counted():
    with MemoryWatch(0.01) as small:
        pass
    block = np.ones(50_000_000)  # 400 MB
    with MemoryWatch(0.01) as large:
        pass
    assert 0.35 < large.peak_gb - small.peak_gb < 0.45
    assert block[-1] == 1
