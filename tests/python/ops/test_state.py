"""An empty memory."""

import pytest
import torch

from coda_attn import CodaConfig, State

ODD = CodaConfig(window=6, chunk=3, exact_slots=5, summary_slots=3, gates="shared")
CONFIGS = {"default": CodaConfig(), "paper": CodaConfig.paper(), "odd": ODD, "no slots": CodaConfig(exact_slots=0, num_sinks=0)}


def make(config, sequences, dtype, device):
    return State.empty(sequences, 3, 10, config, dtype=dtype, device=device)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("sequences", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_left_of_what_was_there(device, config, sequences, dtype):
    used = make(config, sequences, dtype, device)
    for t in used.tensors():
        t.fill_(7)
    del used  # its storage is likely to serve the next
    state = make(config, sequences, dtype, device)
    for name, t in vars(state).items():
        assert bool((t == (-1 if name == "exact_pos" else 0)).all()), name
    assert len({t.data_ptr() for t in state.tensors() if t.numel()}) == sum(t.numel() > 0 for t in state.tensors())


def test_on_meta():
    assert all(t.is_meta for t in make(ODD, 2, torch.bfloat16, "meta").tensors())
