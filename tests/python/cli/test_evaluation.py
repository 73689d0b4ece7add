"""Perplexity and memory against what is computed another way."""

from __future__ import annotations

import math

import pytest
import torch

from coda_attn import CodaConfig, convert
from coda_attn.cache import CodaCache
from coda_attn.evaluation import (ModelShape, default_text, full_bytes, perplexity_rows, reading, state_bytes, stream_perplexity,
                                  token_losses, window_config)
from coda_attn.modeling import coda_layers
from coda_attn.models import random_mistral_tiny

MEMORY = CodaConfig(window=64, chunk=16, exact_slots=32)


@pytest.fixture
def model():
    model, _ = random_mistral_tiny()
    return convert(model, MEMORY)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 256, (1200,), generator=torch.Generator().manual_seed(1))


def test_full_is_the_untouched_model(model, tokens):
    plain, _ = random_mistral_tiny()
    sequences = tokens.view(4, 300)
    with torch.inference_mode():
        expected = plain(sequences, labels=sequences).loss.item()
    row, = perplexity_rows(model, tokens, [300], ["full"])
    assert row["ppl"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert row["tokens"] == 4 * 299


def test_full_keeps_a_trained_second_stream(model, tokens):
    before, = perplexity_rows(model, tokens, [300], ["full"])
    with torch.no_grad():
        for layer in coda_layers(model):
            layer.theta.fill_(0.5)
            layer.lambda_proj.bias.fill_(0.0)
    after, = perplexity_rows(model, tokens, [300], ["full"])
    assert after["ppl"] != pytest.approx(before["ppl"], rel=1e-5)


@pytest.mark.parametrize("policy", ["full", "window", "bounded"])
def test_pieces_do_not_matter(model, tokens, policy):
    with reading(model, policy):
        whole = token_losses(model, tokens[None])
        pieces = token_losses(model, tokens[None], piece=171)
    torch.testing.assert_close(pieces, whole, atol=2e-4, rtol=0)


def test_pieces_may_end_with_one_token(model, tokens):
    with reading(model, "bounded"):
        torch.testing.assert_close(token_losses(model, tokens[None, :101], piece=50), token_losses(model, tokens[None, :101]),
                                   atol=2e-4, rtol=0)


def test_losses_are_those_of_the_models_own_forward(model, tokens):
    batch = tokens[:600].view(2, 300)
    with reading(model, "bounded"), torch.inference_mode():
        logits = model(batch, use_cache=False).logits
        expected = -logits[:, :-1].log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
        torch.testing.assert_close(token_losses(model, batch), expected, atol=2e-4, rtol=0)


def test_stream_perplexity_buckets(model, tokens):
    rows = stream_perplexity(model, tokens, bucket=500, piece=128)
    assert [(row["start"], row["stop"], row["tokens"]) for row in rows] == [(0, 500, 499), (500, 1000, 500), (1000, 1200, 200)]
    with reading(model, "bounded"):
        losses = token_losses(model, tokens[None])[0]
    assert rows[1]["loss"] == pytest.approx(losses[499:999].mean().item(), abs=1e-4)
    assert rows[1]["ppl"] == pytest.approx(math.exp(rows[1]["loss"]))


def test_progress_counts_every_token(model, tokens):
    seen = []
    perplexity_rows(model, tokens, [100, 300], ["full", "bounded"], max_tokens=700, progress=seen.append)
    assert sum(seen) == 2 * (700 + 600)


@pytest.mark.parametrize("memory, window, chunk", [(CodaConfig(), 380, 4), (MEMORY, 92, 4), (CodaConfig(window=6, chunk=2, exact_slots=5), 7, 1)])
def test_window_has_the_slots_of_the_memory(memory, window, chunk):
    config = window_config(memory)
    assert (config.window, config.chunk, config.exact_slots, config.num_sinks) == (window, chunk, 4, 4)
    assert config.slots == memory.slots


def test_window_refuses_summaries():
    with pytest.raises(ValueError, match="summary_slots=64"):
        window_config(CodaConfig.paper())


def test_reading_leaves_the_model_as_it_was(model):
    model.train()
    for policy in ("full", "window", "bounded"):
        with pytest.raises(KeyError):
            with reading(model, policy) as memory:
                assert not model.training
                assert memory.slots == MEMORY.slots
                raise KeyError
        assert model.training
        assert model.config.coda_mode == "bounded"
        assert all(layer.coda == MEMORY and not layer.single_stream for layer in coda_layers(model))


def test_reading_refuses_other_policies(model):
    with pytest.raises(ValueError, match="'ring' is not known"):
        with reading(model, "ring"):
            pass


def test_state_bytes_are_those_of_a_real_cache(model, tokens):
    cache = CodaCache(model.config)
    with torch.inference_mode():
        model(tokens[None, :200], past_key_values=cache)
    assert state_bytes(ModelShape.of(model.config), MEMORY) == cache.nbytes()


def test_full_bytes_are_those_of_a_real_cache(tokens):
    plain, _ = random_mistral_tiny()
    with torch.inference_mode():
        cache = plain(tokens[None, :200], use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert full_bytes(ModelShape.of(plain.config), 200) == held


def test_default_text_is_long_and_fixed():
    assert len(default_text()) > 200_000
    assert default_text() == default_text()
