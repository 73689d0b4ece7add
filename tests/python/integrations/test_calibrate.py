"""The closed-form gate against its definition, written out with L x L matrices."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hf_models import SMALL, VOCABULARY, coda_model, plain_model, token_ids

import coda_attn
from coda_attn.calibrate import key_attention
from coda_attn.modeling import coda_layers


def probabilities(q, k, scale):
    """Causal attention, (B, Hkv, G, L, L)."""
    rows, length, heads, dim = q.shape
    query = q.view(rows, length, k.shape[2], -1, dim)
    logits = torch.einsum("bihgd,bjhd->bhgij", query, k) * scale
    return logits.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf")).softmax(-1)


@given(length=st.integers(6, 40), window=st.integers(1, 5), block=st.sampled_from([1, 3, 8, 64]), shared=st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_blocks_of_queries_give_the_statistics_of_the_whole_matrix(length, window, block, shared):
    torch.manual_seed(length)
    q, k = 3 * torch.randn(2, length, 4, 8, dtype=torch.float64), torch.randn(2, length, 2, 8, dtype=torch.float64)
    p = probabilities(q, k, 0.5).sum(2)
    p = p.sum(1, keepdim=True) if shared else p
    mean, peak = key_attention(q, k, window, scale=0.5, block=block, shared=shared)
    for j in range(length - window):
        torch.testing.assert_close(mean[..., j], p[:, :, j + window:, j].mean(-1))
        torch.testing.assert_close(peak[..., j], p[:, :, j + window:, j].amax(-1))
    assert mean.shape[-1] == length - window


def expected_gate(model, layer, ids):
    """Semantics 3.9 for one layer, from the plain model's own eager attention."""
    seen = {}
    hook = layer.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    x, w = seen["hidden_states"].double(), layer.config.coda_window
    q, k = (p(x).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    cos, sin = (t[:, None] for t in seen["position_embeddings"])
    q, k = (t * cos + torch.cat([-t[..., 8:], t[..., :8]], -1) * sin for t in (q, k))
    p = probabilities(q.transpose(1, 2), k.transpose(1, 2), 0.25).sum(2)
    far = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1]) >= w
    count = ids.shape[1] - w
    mean = ((p * far).sum(-2)[..., :count] / far.sum(0)[:count]).transpose(0, 1).flatten(1)
    peak = (p * far).amax(-2)[..., :count].transpose(0, 1).flatten(1)
    x = x[:, :count].flatten(0, 1)
    gates = []
    for m, top in zip(mean, peak):
        weight, y = 1 + 50 * top, (m + 0.1 * top + 1e-6).log()
        root = weight.sqrt()[:, None]
        xc, yc = x - (weight @ x) / weight.sum(), y - (weight @ y) / weight.sum()
        ridge = 1e-3 * (xc * root).square().sum(0).mean()
        # Ridge as least squares with extra rows.
        a = torch.cat([xc * root, ridge.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
        b = torch.cat([yc * root[:, 0], torch.zeros(x.shape[1], dtype=x.dtype)])
        gates.append(torch.linalg.lstsq(a, b[:, None]).solution[:, 0])
    gates = torch.stack(gates)
    return gates, -(gates @ x.mean(0))


@pytest.mark.parametrize("batch_size, max_bytes", [(1, 1 << 30), (3, 1)])
def test_the_gate_is_the_weighted_ridge_regression(batch_size, max_bytes):
    plain = plain_model()
    model = coda_attn.convert(copy.deepcopy(plain), SMALL)
    ids = token_ids(3, 80)
    summary = coda_attn.calibrate(model, ids, batch_size=batch_size, max_bytes=max_bytes, block=13)
    plain.config.coda_window = SMALL.window
    for i, layer in enumerate(coda_layers(model)):
        weight, bias = expected_gate(plain, plain.model.layers[i].self_attn, ids)
        torch.testing.assert_close(layer.write_proj.weight, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.write_proj.bias, bias, rtol=1e-4, atol=1e-4)
        assert summary[i]["layer"] == i and summary[i]["tokens"] == 3 * 64 and len(summary[i]["r2"]) == 2
        assert all(0 < r2 <= 1 for r2 in summary[i]["r2"])


def test_calibration_changes_nothing_but_the_gates():
    model = coda_model().train()
    before = copy.deepcopy(model.state_dict())
    coda_attn.calibrate(model, token_ids(2, 60))
    assert model.training and model.config.coda_mode == "bounded" and not any(layer.single_stream for layer in coda_layers(model))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{i}.self_attn.write_proj.{kind}" for i in range(2) for kind in ("weight", "bias")}


def planted_model():
    """One layer in which every query attends to tokens of the kind that dimension 0 marks, however far."""
    model = plain_model(num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(2)
    embedding = torch.randn(VOCABULARY, 64, generator=generator, dtype=torch.float64) * 0.3
    embedding[:, 0], embedding[:, 1] = 0.0, 1.0
    embedding[:8, 0] = 3.0
    model.model.embed_tokens.weight.data.copy_(embedding)
    for projection, source in ((attention.q_proj, 1), (attention.k_proj, 0)):
        projection.weight.data.mul_(0.02)
        # The slowest pair, so that position hardly matters.
        projection.weight.data[7::16, source] = 4.0
    return model


@pytest.mark.parametrize("gates", ["per_head", "shared"])
def test_calibration_finds_planted_tokens_and_brings_the_memory_closer_to_full_attention(gates):
    config = dataclasses.replace(SMALL, gates=gates, differential=False, bank_distance=None)
    model = coda_attn.convert(planted_model(), config)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(8, VOCABULARY, (6, 200), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.03] = 5
    with torch.no_grad():
        full = coda_attn.set_mode(model, "full")(ids[:2]).logits
        coda_attn.set_mode(model, "bounded")
        before = (model(ids[:2]).logits - full).norm()
        coda_attn.calibrate(model, ids[2:])
        after = (model(ids[:2]).logits - full).norm()
        gate = coda_layers(model)[0].write_proj(model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.arange(VOCABULARY))))
    assert (gate[:8].amin(0) > gate[8:].amax(0)).all()
    assert after < 0.5 * before


class Words:
    """A tokenizer of the letters a to z."""

    def __call__(self, text):
        return {"input_ids": [ord(c) - ord("a") + 2 for c in text]}


def test_inputs():
    model = coda_model()
    tokens = [i % 26 + 2 for i in range(70)]
    text = "".join(chr(ord("a") + t - 2) for t in tokens)
    results = []
    for data, options in ((text, {"tokenizer": Words()}), ([text], {"tokenizer": Words()}), (tokens, {}), ([tokens], {}),
                          (torch.tensor(tokens), {}), ([tokens, tokens[:10]], {})):
        coda_attn.calibrate(model, data, **options)
        results.append(coda_layers(model)[0].write_proj.weight.clone())
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert coda_attn.calibrate(model, tokens, row_length=30)[0]["tokens"] == 2 * 14
    with pytest.raises(ValueError, match="tokenizer"):
        coda_attn.calibrate(model, text)
    with pytest.raises(ValueError, match="no row has more than window=16"):
        coda_attn.calibrate(model, tokens[:16])
    with pytest.raises(ValueError, match="vocabulary is 0 to 96"):
        coda_attn.calibrate(model, [97] * 40)
    with pytest.raises(ValueError, match="row_length=16"):
        coda_attn.calibrate(model, tokens, row_length=16)
    with pytest.raises(ValueError, match="batch_size=0"):
        coda_attn.calibrate(model, tokens, batch_size=0)
    with pytest.raises(ValueError, match="has not been converted"):
        coda_attn.calibrate(plain_model(), tokens)
