"""Files: converted models, bounded memories, and the published adapter checkpoints."""

import dataclasses
import json
import struct

import pytest
import torch
import transformers
from hf_models import PAPER, SMALL, coda_model, plain_model, token_ids

import coda_attn
from coda_attn.modeling import coda_layers
from coda_attn.state import FIELDS


@pytest.mark.parametrize("config", [SMALL, PAPER, dataclasses.replace(SMALL, differential=False, head_norm="rms")])
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path, family, config):
    model = coda_model(config, mode="full", family=family).float()
    model.save_pretrained(tmp_path)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(loaded) is type(model) and loaded.config.coda_mode == "full" and loaded.config.model_type == f"coda_{family.lower()}"
    assert coda_attn.CodaConfig.from_dict(loaded.config.coda) == config
    saved, read = model.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys() and all(torch.equal(saved[name], read[name]) for name in saved)
    ids = token_ids(1, 50)
    with torch.no_grad():
        assert torch.equal(coda_attn.set_mode(loaded, "bounded")(ids).logits, coda_attn.set_mode(model, "bounded")(ids).logits)
        text = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert text.shape == (1, 53)


def test_a_saved_base_model_is_loaded(tmp_path):
    model = coda_attn.convert(plain_model(causal=False), SMALL)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_parameters_missing_from_a_file_start_as_the_semantics_say(tmp_path):
    model = coda_model()
    kept = {k: v for k, v in model.state_dict().items() if "lambda_proj" not in k and "theta" not in k and "write_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for layer in coda_layers(loaded):
        assert (layer.lambda_proj.bias == -6).all() and not layer.lambda_proj.weight.any()
        assert not layer.theta.any() and not layer.write_proj.weight.any() and not layer.write_proj.bias.any()


def test_a_model_built_from_its_config_starts_like_a_converted_one():
    config = coda_attn.convert(plain_model(), SMALL).config
    model = transformers.AutoModelForCausalLM.from_config(config)
    layer = coda_layers(model)[0]
    assert (layer.lambda_proj.bias == -6).all() and not layer.theta.any() and layer.q_proj.weight.std() > 0.1


@pytest.fixture
def memory():
    model = coda_model(PAPER)
    cache = coda_attn.CodaCache(model.config)
    with torch.no_grad():
        model(token_ids(2, 60), past_key_values=cache)
    return cache.states


def test_states_are_read_as_written(tmp_path, memory):
    path = tmp_path / "memory.safetensors"
    coda_attn.save_state(path, memory, PAPER)
    states, config = coda_attn.load_state(path)
    assert config == PAPER and len(states) == 2 and [p.name for p in tmp_path.iterdir()] == ["memory.safetensors"]
    for a, b in zip(memory, states):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors()))


def rewritten(path, change):
    """The file with its JSON header changed."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size:])


@pytest.mark.parametrize("change, message", [
    (lambda h: h["__metadata__"].update(version="2"), "version 2"),
    (lambda h: h["__metadata__"].update(format="other"), "not a saved CoDA state"),
    (lambda h: h["__metadata__"].update(layers="3"), "2.*missing"),
    (lambda h: h["__metadata__"].update(layers="-1"), "damaged"),
    (lambda h: h["__metadata__"].update(config="{"), "damaged"),
    (lambda h: h["__metadata__"].update(config=json.dumps(SMALL.to_dict())), "needs"),
    (lambda h: h.update({"0.extra": {**h["0.gate"], "data_offsets": h["0.gate"]["data_offsets"]}}), "safetensors|unknown"),
    (lambda h: h["0.k"].update(shape=[2, 2, 16, 22]), "0.k|needs|even"),
    (lambda h: h["0.tokens_seen"].update(dtype="F64"), "tokens_seen"),
    (lambda h: h["0.k"].update(data_offsets=[0, 1 << 40]), "safetensors")])
def test_damaged_state_files_are_refused(tmp_path, memory, change, message):
    path = tmp_path / "memory.safetensors"
    coda_attn.save_state(path, memory, PAPER)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        coda_attn.load_state(path)


def test_truncated_files_and_impossible_counters_are_refused(tmp_path, memory):
    path = tmp_path / "memory.safetensors"
    coda_attn.save_state(path, memory, PAPER)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        coda_attn.load_state(path)
    for field, value in (("exact_pos", 60), ("exact_pos", -2), ("tokens_seen", -1), ("last_touch", 1000), ("summary_mass", float("nan"))):
        broken = memory[1].clone()
        getattr(broken, field).view(-1)[0] = value
        coda_attn.save_state(path, [memory[0], broken], PAPER)
        with pytest.raises(ValueError, match="layer 1: (tokens_seen is negative|.*position that was never read|summary_mass)"):
            coda_attn.load_state(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, memory):
    path = tmp_path / "memory.safetensors"
    coda_attn.save_state(path, memory, PAPER)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="needs"):
        coda_attn.save_state(path, memory, dataclasses.replace(PAPER, window=32))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- adapters -----------------------------------------------------------------------------------------------------------

SHAPES = {"q_proj.weight": (64, 64), "k_proj.weight": (32, 64), "v_proj.weight": (32, 64), "o_proj.weight": (64, 64),
          "theta": (4, 8), "lambda_proj.weight": (4, 64), "lambda_proj.bias": (4,), "write_proj.weight": (1, 64),
          "write_proj.bias": (1,), "summary_eta_logit": (2,)}


def published(layers=2):
    return {f"layer_{i}": {f"coda.{name}": torch.randn(shape) for name, shape in SHAPES.items()} for i in range(layers)}


def interleaved(config):
    return coda_model(dataclasses.replace(config, theta_pairs="interleaved"))


@pytest.mark.parametrize("wrapper", [None, "adapters"])
@pytest.mark.parametrize("config", [SMALL, PAPER])
def test_published_adapters_are_loaded(tmp_path, config, wrapper):
    checkpoint = published()
    torch.save(checkpoint if wrapper is None else {wrapper: checkpoint, "step": 100}, tmp_path / "adapters.pt")
    model = interleaved(config)
    assert coda_attn.load_adapters(model, tmp_path / "adapters.pt") is model
    for i, layer in enumerate(coda_layers(model)):
        own = layer.state_dict()
        for name, shape in SHAPES.items():
            if name == "summary_eta_logit" and not config.summary_slots:
                assert name not in own
                continue
            value = checkpoint[f"layer_{i}"][f"coda.{name}"].double()
            assert torch.equal(own[name], value.expand(own[name].shape))


def broken_adapters():
    def without(c):
        del c["layer_1"]["coda.theta"]

    def extra(c):
        c["layer_1"]["coda.other"] = torch.zeros(1)

    def shape(c):
        c["layer_1"]["coda.q_proj.weight"] = torch.zeros(64, 32)

    def nan(c):
        c["layer_1"]["coda.lambda_proj.bias"][0] = float("nan")

    def fewer(c):
        del c["layer_1"]

    def empty(c):
        c.clear()

    def text(c):
        c["layer_1"] = "weights"

    return [(without, "layer_1.*missing theta"), (extra, "layer_1.*unknown other"), (shape, r"q_proj.weight has shape \(64, 32\)"),
            (nan, "lambda_proj.bias.*finite"), (fewer, "holds 1 layers.*model has 2"), (empty, "not an adapter checkpoint"),
            (text, "layer_1 is not a dictionary")]


@pytest.mark.parametrize("change, message", broken_adapters())
def test_broken_adapters_change_nothing(tmp_path, change, message):
    checkpoint = published()
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "adapters.pt")
    model = interleaved(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        coda_attn.load_adapters(model, tmp_path / "adapters.pt")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_adapters_with_theta_need_interleaved_pairs(tmp_path):
    checkpoint = published()
    torch.save(checkpoint, tmp_path / "adapters.pt")
    with pytest.raises(ValueError, match="theta_pairs='interleaved'"):
        coda_attn.load_adapters(coda_model(), tmp_path / "adapters.pt")
    for layer in checkpoint.values():
        layer["coda.theta"].zero_()
    torch.save(checkpoint, tmp_path / "adapters.pt")
    coda_attn.load_adapters(coda_model(), tmp_path / "adapters.pt")


class _Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_adapters_are_read_without_executing_anything(tmp_path, capsys):
    torch.save({"layer_0": _Payload()}, tmp_path / "adapters.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        coda_attn.load_adapters(coda_model(), tmp_path / "adapters.pt")
    assert "executed" not in capsys.readouterr().out


def test_every_field_of_a_state_is_saved(tmp_path, memory):
    coda_attn.save_state(tmp_path / "one", memory[0], PAPER)
    (state,), _ = coda_attn.load_state(tmp_path / "one")
    assert [tuple(getattr(state, name).shape) for name in FIELDS] == [tuple(t.shape) for t in memory[0].tensors()]
