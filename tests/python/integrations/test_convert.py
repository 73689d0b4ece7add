"""Conversion: mode "full" with lambda = 0 is the untouched model, and what cannot work is refused."""

import copy
import dataclasses

import pytest
import torch
import transformers
from hf_models import PAPER, SMALL, coda_model, exact_phases, no_second_stream, padded, plain_model, randomize, token_ids

import coda_attn
from coda_attn.modeling import coda_layers

EXACT = dict(rtol=0, atol=1e-9)
# The untouched model rotates by float32 phases, so equality with it stops there.
PHASES = dict(rtol=1e-4, atol=1e-4)


def test_full_mode_without_second_stream_equals_the_untouched_model(family):
    model = plain_model(family)
    ids = token_ids(2, 40)
    left, left_mask = padded([40, 23])
    positions = (left_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids).logits
        expected_padded = model(left, attention_mask=left_mask, position_ids=positions).logits
        expected_text = model.generate(left, attention_mask=left_mask, max_new_tokens=8, do_sample=False)
        exact = exact_phases(copy.deepcopy(model))(ids).logits
        no_second_stream(coda_attn.convert(model, SMALL, "full"))
        got_padded = model(left, attention_mask=left_mask, position_ids=positions).logits
        torch.testing.assert_close(model(ids).logits, exact, **EXACT)
        torch.testing.assert_close(model(ids).logits, expected, **PHASES)
        torch.testing.assert_close(got_padded[left_mask.bool()], expected_padded[left_mask.bool()], **PHASES)
        assert torch.equal(model.generate(left, attention_mask=left_mask, max_new_tokens=8, do_sample=False), expected_text)


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}])
def test_rope_variants(rope):
    model = plain_model(rope_parameters=rope)
    ids = token_ids(1, 30)
    with torch.no_grad():
        expected = model(ids).logits
        exact = exact_phases(copy.deepcopy(model))(ids).logits
        no_second_stream(coda_attn.convert(model, dataclasses.replace(SMALL, window=32), "full"))
        torch.testing.assert_close(model(ids).logits, exact, **EXACT)
        torch.testing.assert_close(model(ids).logits, expected, **PHASES)
        coda_attn.set_mode(model, "bounded")
        torch.testing.assert_close(model(ids).logits, exact, **EXACT)
        torch.testing.assert_close(model(ids).logits, expected, **PHASES)


def test_phases_do_not_depend_on_the_models_dtype():
    model = coda_model().to(torch.bfloat16)
    expected = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(coda_layers(model)[0].inv_freq(torch.device("cpu")), expected, rtol=1e-12, atol=0)


def test_fresh_parameters_follow_the_semantics(family):
    layer = coda_layers(coda_attn.convert(plain_model(family), PAPER))[0]
    assert (layer.theta == 0).all() and (layer.lambda_proj.bias == -6).all() and (layer.write_proj.bias == -2).all()
    assert (layer.write_proj.weight == 0).all() and (layer.summary_eta_logit == -3).all()
    assert layer.write_proj.weight.shape == (1, 64) and layer.theta.shape == (4, 8)
    retention = coda_layers(coda_attn.convert(plain_model(family), SMALL))[0]
    assert retention.write_proj.weight.shape == (2, 64) and (retention.write_proj.bias == 0).all()
    assert retention.summary_eta_logit is None


def test_gate_logits_are_float32_in_a_bfloat16_model():
    layer = coda_layers(coda_model().to(torch.bfloat16))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.write_proj(torch.randn(2, 3, 64, dtype=torch.bfloat16)).dtype == torch.float32


def test_one_stream_and_head_norm():
    single = coda_model(dataclasses.replace(SMALL, differential=False))
    normed = coda_model(dataclasses.replace(SMALL, head_norm="rms"))
    assert not any("theta" in name or "lambda" in name for name in single.state_dict())
    assert normed.state_dict()["model.layers.0.self_attn.head_norm.weight"].shape == (16,)
    with torch.no_grad():
        for model in (single, normed):
            whole = model(token_ids(1, 50)).logits
            assert whole.isfinite().all()


def test_base_model():
    base = coda_attn.convert(plain_model(causal=False), SMALL)
    with torch.no_grad():
        out = base(token_ids(1, 40))
    assert type(base).__name__ == "CodaLlamaModel" and isinstance(out.past_key_values, coda_attn.CodaCache)


def test_hidden_states_are_still_recorded():
    model = coda_model()
    with torch.no_grad():
        assert len(model(token_ids(1, 20), output_hidden_states=True).hidden_states) == 3
    with pytest.raises(ValueError, match="output_attentions"):
        model(token_ids(1, 20), output_attentions=True)


def test_lora():
    peft = pytest.importorskip("peft")
    plain = plain_model()
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    coda_attn.convert(model, SMALL)
    model.train()
    model(token_ids(2, 40), labels=token_ids(2, 40)).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(grads) == 4 and all(g is not None and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("mode", ["bounded", "full"])
@pytest.mark.parametrize("config", [SMALL, PAPER])
def test_gradient_checkpointing(config, mode):
    model = coda_model(config, mode).train()
    ids, mask = padded([48, 31])

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    gate = "model.layers.0.self_attn.write_proj.weight"
    assert (gate in expected and bool(expected[gate].any())) == (mode == "bounded")
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        got = gradients()
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12)


def test_autocast_and_bfloat16():
    model = coda_model(family="Qwen3").float()
    ids = token_ids(2, 40)
    with torch.no_grad():
        expected = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids).logits
        half = model.to(torch.bfloat16)(ids).logits
    for got in (mixed, half):
        assert (got.float() - expected).norm() / expected.norm() < 0.05


def test_reconfigure():
    model = coda_model()
    window = coda_attn.CodaConfig(window=20, chunk=4, exact_slots=2, num_sinks=2, bank_distance=24)
    fresh = coda_model(window)
    coda_attn.reconfigure(model, window)
    ids = token_ids(1, 60)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)
    with pytest.raises(ValueError, match="differential"):
        coda_attn.reconfigure(model, dataclasses.replace(window, differential=False))
    with pytest.raises(ValueError, match="summary_slots"):
        coda_attn.reconfigure(model, dataclasses.replace(PAPER))


def test_refusals_leave_the_model_as_it_was():
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported.*Mistral.*Qwen3"):
        coda_attn.convert(gpt)
    with pytest.raises(ValueError, match="converted already"):
        coda_attn.convert(coda_model())
    with pytest.raises(ValueError, match="mode='half'"):
        coda_attn.convert(plain_model(), SMALL, "half")
    with pytest.raises(ValueError, match="has not been converted"):
        coda_attn.set_mode(plain_model(), "full")
    dynamic = plain_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    before = copy.deepcopy(dynamic.state_dict())
    with pytest.raises(ValueError, match="dynamic.*not fixed.*llama3"):
        coda_attn.convert(dynamic, SMALL)
    assert type(dynamic) is transformers.LlamaForCausalLM and dynamic.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="rope_pairs"):
        coda_attn.convert(plain_model(), dataclasses.replace(SMALL, rope_pairs="interleaved"))


def test_refusals_of_inputs():
    model = coda_model()
    ids = token_ids(2, 20)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 20\).*20 columns and get 1 more.*\(2, 21\)"):
        cache = coda_attn.CodaCache(model.config)
        model(ids, past_key_values=cache)
        model(ids[:, :1], attention_mask=torch.ones_like(ids), past_key_values=cache)
    with pytest.raises(ValueError, match="padding mask"):
        model(ids, attention_mask=torch.ones(2, 1, 20, 20))
    with pytest.raises(ValueError, match="one sequence per row"):
        model(ids, position_ids=torch.arange(20).remainder(10).expand(2, 20), use_cache=False)
    with pytest.raises(ValueError, match="DynamicCache.*CodaCache"):
        model(ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="3 rows.*2 sequences"):
        model(token_ids(3, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        type(model)._from_config(model.config, attn_implementation="sdpa")
    coda_attn.set_mode(model, "full")
    with pytest.raises(ValueError, match="CodaCache was given in mode 'full'"):
        model(ids, past_key_values=coda_attn.CodaCache(model.config))
    with pytest.raises(ValueError, match="StaticCache"):
        model(ids, past_key_values=transformers.StaticCache(model.config, max_cache_len=32))


@pytest.mark.parametrize("family, extra", [("Mistral", {}), ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1})])
def test_sliding_window_models(family, extra):
    model = plain_model(family, sliding_window=24, **extra)
    ids = token_ids(1, 40)
    with torch.no_grad():
        expected = model(ids[:, :24]).logits
        no_second_stream(coda_attn.convert(model, SMALL, "full"))
        torch.testing.assert_close(model(ids[:, :24]).logits, expected, **PHASES)
        with pytest.raises(ValueError, match="sliding_window=24"):
            model(ids)
        coda_attn.set_mode(model, "bounded")
        assert model(ids).logits.isfinite().all()


def test_randomized_models_use_both_streams():
    model = coda_model(mode="full")
    ids = token_ids(1, 20)
    with torch.no_grad():
        both = model(ids).logits
        assert (both - no_second_stream(model)(ids).logits).abs().max() > 1e-3
    assert randomize(model) is model
