"""CodaGqaL against the paper's own package, with its weights."""

import pytest
import torch
from torch.testing import assert_close

from coda_attn import CodaGqaL

peer = pytest.importorskip("coda_gqa_l")

EMBED, HEADS, KV_HEADS = 32, 4, 2
EXACT_SLOTS = 3
layouts = pytest.mark.parametrize("rope_interleaved, head_norm", [(True, "full"), (True, "identity"), (False, "full"), (False, "identity")])


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # A gate that opens for some tokens only, and a second stream that matters.
            shift = {"write_proj.bias": -2.0, "lambda_proj.bias": -1.0}.get(name, 1.0 if name == "head_norm.weight" else 0.0)
            parameter.copy_(shift + 0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def ours(theirs, rope_interleaved, head_norm, **memory):
    layer = CodaGqaL(EMBED, HEADS, KV_HEADS, exact_slots=EXACT_SLOTS, policy="novelty_lru", gates="shared", num_sinks=0,
                     bank_distance=None, theta_pairs="interleaved", rope_pairs="interleaved" if rope_interleaved else "half",
                     head_norm="rms" if head_norm == "full" else "identity", **memory)
    missing, unexpected = layer.load_state_dict(theirs.state_dict(), strict=False)
    # Their unbounded layer has no memory, so it has none of these.
    assert not unexpected and set(missing) <= {"write_proj.weight", "write_proj.bias", "summary_eta_logit"}
    return layer


def landmark_layer(window, rope_interleaved, head_norm):
    return randomize(peer.CoDAGQALandmarkPerf2(
        embed_dim=EMBED, num_heads=HEADS, num_kv_heads=KV_HEADS, window=window, num_landmarks_exact=EXACT_SLOTS,
        num_landmarks_summary=0, exact_candidates_per_block=1, mem_init="zeros", head_norm_mode=head_norm,
        rope_interleaved=rope_interleaved))


def tokens(batch, length):
    """A few themes with variations, so that the bank meets both known and new values."""
    generator = torch.Generator().manual_seed(1)
    themes = torch.randn(12, EMBED, generator=generator)
    chosen = themes[torch.randint(12, (batch, length), generator=generator)]
    return chosen + 0.1 * torch.randn(batch, length, EMBED, generator=generator)


def fresh(theirs, batch):
    return theirs.init_state(batch_size=batch, device=torch.device("cpu"), dtype=torch.float32)


def assert_same_bank(mine, theirs, window, their_window):
    """Same keys, values and times of last touch, slot order apart."""
    for n in range(mine.sequences):
        used = theirs.allowed[n, their_window:]
        held = mine.exact_pos[n, 0] >= 0
        assert int(held.sum()) == int(used.sum())
        a, b = mine.last_touch[n][held].argsort(), theirs.mem_last_exact[n][used].argsort()
        assert torch.equal(mine.last_touch[n][held][a], theirs.mem_last_exact[n][used][b])
        for name, buffer in (("k", theirs.k_buf), ("v", theirs.v_buf)):
            assert_close(getattr(mine, name)[n, :, window:][:, held][:, a], buffer[n, :, their_window:][:, used][:, b],
                         rtol=0.0, atol=1e-5)


@torch.no_grad()
@layouts
def test_unbounded(rope_interleaved, head_norm):
    theirs = randomize(peer.CoDAGQA(embed_dim=EMBED, num_heads=HEADS, num_kv_heads=KV_HEADS, head_norm_mode=head_norm,
                                    rope_interleaved=rope_interleaved))
    x = tokens(2, 70)
    assert_close(ours(theirs, rope_interleaved, head_norm)(x), theirs(x)[0], rtol=0.0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window, chunk", [(16, 4), (8, 4), (12, 6)])
@layouts
def test_prefill_is_theirs_with_a_window_shorter_by_one_chunk(rope_interleaved, head_norm, window, chunk):
    theirs = landmark_layer(window - chunk, rope_interleaved, head_norm)
    layer = ours(theirs, rope_interleaved, head_norm, window=window, chunk=chunk, exact_candidates=1)
    x = tokens(2, 20 * chunk)
    their_state, state = fresh(theirs, 2), layer.make_state(2)
    outputs = []
    for block in x.split(chunk, 1):
        before = fresh(theirs, 2)
        before.k_buf, before.v_buf, before.allowed = (t.clone() for t in (their_state.k_buf, their_state.v_buf, their_state.allowed))
        before.mem_last_exact = their_state.mem_last_exact.clone()
        expected, _ = theirs.prefill_chunked(block, their_state, block_size=chunk)
        outputs.append(expected)
        assert_close(layer.forward_bounded(block, state), expected, rtol=0.0, atol=1e-4)
        assert_same_bank(state, before, window, window - chunk)
    assert_close(layer.forward_bounded(x, layer.make_state(2)), torch.cat(outputs, 1), rtol=0.0, atol=1e-4)
    metrics = layer.metrics(state)
    assert metrics["hits"] > 0 and metrics["inserts"] > 2 * EXACT_SLOTS


@torch.no_grad()
@layouts
def test_their_decode_is_a_chunk_of_one(rope_interleaved, head_norm):
    window = 10
    theirs = landmark_layer(window, rope_interleaved, head_norm)
    layer = ours(theirs, rope_interleaved, head_norm, window=window, chunk=1)
    x = tokens(2, 60)
    their_state, state = fresh(theirs, 2), layer.make_state(2)
    outputs = []
    for token in x.split(1, 1):
        outputs.append(theirs.step(token, their_state)[0])
        assert_close(layer.forward_bounded(token, state), outputs[-1], rtol=0.0, atol=1e-4)
        assert_same_bank(state, their_state, window, window)
    assert_close(layer.forward_bounded(x, layer.make_state(2)), torch.cat(outputs, 1), rtol=0.0, atol=1e-4)
    metrics = layer.metrics(state)
    assert metrics["hits"] > 0 and metrics["inserts"] > 2 * EXACT_SLOTS
