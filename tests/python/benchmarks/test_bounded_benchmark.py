"""What the bounded benchmark counts, and the mask of its competitor."""

import pytest
import torch

from benchmarks.attention import FlexWindow
from benchmarks.bounded import _keys
from coda_attn import CodaConfig


@pytest.mark.parametrize("config", [CodaConfig(), CodaConfig.paper("medium"), CodaConfig(window=6, chunk=3, exact_slots=5)])
@pytest.mark.parametrize("length", [1, 7, 300, 1000])
def test_keys_of_a_sequence(config, length):
    expected = 0
    for t in range(length):
        start = t // config.chunk * config.chunk
        evicted = max(0, start - config.window + config.chunk)
        expected += t + 1 - evicted + min(evicted, config.exact_slots + config.summary_slots)
    assert _keys(length, config) == expected <= length * config.slots


@pytest.mark.parametrize("length", [100, 384, 828, 1024])
def test_blocks_of_the_sliding_window(length):
    mask = FlexWindow(384)._mask(length, torch.device("cpu"))
    token = torch.arange(128 * mask.kv_num_blocks.shape[-1])
    age = token[:, None] - token
    seen = ((age >= 0) & (age < 384)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    for row in range(seen.shape[0]):
        edges = mask.kv_indices[0, 0, row, :mask.kv_num_blocks[0, 0, row]].tolist()
        whole = mask.full_kv_indices[0, 0, row, :mask.full_kv_num_blocks[0, 0, row]].tolist()
        assert sorted(edges + whole) == seen[row].any(0).any(-1).nonzero()[:, 0].tolist()
        assert sorted(whole) == seen[row].all(0).all(-1).nonzero()[:, 0].tolist()
