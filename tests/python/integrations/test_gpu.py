"""Converted models in bounded mode on a GPU, in bfloat16 with head dimensions that tensor cores serve."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from hf_models import PAPER, SMALL, coda_model, padded, token_ids

import coda_attn
from coda_attn.modeling import GateProjection, coda_layers

pytestmark = pytest.mark.gpu
CONFIGS = {"retention": SMALL, "paper": PAPER, "everything": dataclasses.replace(SMALL, gates="shared", summary_slots=4, head_norm="rms")}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
SIZES = dict(hidden_size=128, head_dim=64, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05)


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda")


def on_gpu(config, device, dtype=torch.bfloat16):
    return coda_model(config, **SIZES).to(device, dtype)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True)


def distance(logits, exact):
    """Relative to the size of ``exact``."""
    return float((logits.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm())


@contextlib.contextmanager
def no_synchronisation():
    """Where the host waits for the GPU, torch raises an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@all_configs
def test_prefill_is_as_close_to_float64_as_on_the_cpu(device, config):
    exact_model, ids = coda_model(config, **SIZES), token_ids(2, 150)
    model, on_cpu = on_gpu(config, device), copy.deepcopy(exact_model).bfloat16()
    with torch.no_grad():
        exact = exact_model(ids).logits
        allowed = 2 * distance(on_cpu(ids).logits, exact)
        assert distance(model(ids.to(device)).logits, exact) <= allowed
        cache = coda_attn.CodaCache(model.config)
        pieces = [model(piece.to(device), past_key_values=cache).logits for piece in ids.split([100, 1, 1, 48], -1)]
        assert distance(torch.cat(pieces, 1), exact) <= allowed
        assert distance(compiled(model)(ids.to(device), use_cache=False).logits, exact) <= allowed


def test_a_row_of_a_padded_batch_is_the_row_alone(device):
    model = on_gpu(SMALL, device)
    lengths = [90, 12, 41]
    ids, mask = (t.to(device) for t in padded(lengths))
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            alone = model(ids[row:row + 1, -length:]).logits
            assert distance(batch[row, -length:], alone[0].cpu().double()) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_logits_are_sums_in_float32(device, dtype):
    gate, x = GateProjection(512, 8, -2.0).to(device, dtype), torch.randn(2, 33, 512, device=device, dtype=dtype, requires_grad=True)
    torch.nn.init.normal_(gate.weight)
    inputs, grad = (x, gate.weight, gate.bias), torch.randn(2, 33, 8, device=device)
    exact_inputs = [t.detach().cpu().double().requires_grad_() for t in inputs]
    exact = torch.nn.functional.linear(*exact_inputs)
    logits = gate(x)
    assert logits.dtype == torch.float32 and distance(logits, exact) < 1e-5
    for ours, right in zip(torch.autograd.grad(logits, inputs, grad), torch.autograd.grad(exact, exact_inputs, grad.cpu().double())):
        assert ours.dtype == dtype and distance(ours, right) < 2 * torch.finfo(dtype).eps
    assert gate(x[:, :0]).shape == (2, 0, 8) and gate(x[0, 0]).shape == (8,)


@all_configs
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_training(device, config, compile):
    model = on_gpu(config, device).train()
    ids = token_ids(2, 96).to(device)
    forward = compiled(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        loss = forward(ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(bool(g.isfinite().all()) for g in gradients.values())
        assert {f"model.layers.0.self_attn.{name}" for name in ("theta", "write_proj.weight", "lambda_proj.weight")} <= gradients.keys()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@all_configs
def test_compiled_gradients_are_those_of_eager(device, config):
    model, ids = on_gpu(config, device, torch.float32).train(), token_ids(1, 70).to(device)

    def gradients(forward):
        model.zero_grad()
        forward(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    eager = gradients(model)
    for name, grad in gradients(compiled(model)).items():
        torch.testing.assert_close(grad, eager[name], rtol=1e-3, atol=1e-4 * float(eager[name].abs().max()), msg=lambda m: f"{name}: {m}")


@all_configs
def test_nothing_waits_for_the_gpu(device, config):
    """Prefill, decode and a training step. transformers itself looks at the positions where neither a cache nor a mask is given."""
    model = on_gpu(config, device)
    ids = token_ids(2, 120).to(device)
    prompt, *tokens = ids.split([117, 1, 1, 1], -1)

    def read():
        cache = coda_attn.CodaCache(model.config)
        with torch.no_grad():
            for piece in (prompt, *tokens):
                model(piece, past_key_values=cache)

    def train():
        model(ids, past_key_values=coda_attn.CodaCache(model.config)).logits.square().mean().backward()
        model.zero_grad()

    for run in (read, train):
        run()
        with no_synchronisation():
            run()


@all_configs
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(device, config, use_reentrant):
    model = on_gpu(config, device).train()
    ids, mask = (t.to(device) for t in padded([80, 33]))

    def gradients():
        model.zero_grad()
        logits = model(ids, attention_mask=mask, use_cache=False).logits.float()
        logits[mask.bool()].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    again = gradients()
    assert again.keys() == plain.keys()
    for name, grad in again.items():
        torch.testing.assert_close(grad, plain[name], rtol=1.6e-2, atol=2e-3 * float(plain[name].abs().max()), msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_calibrate(device, dtype, rounding):
    exact_model, ids = coda_model(SMALL, **SIZES), token_ids(3, 200)
    model = on_gpu(SMALL, device, dtype)
    summary = coda_attn.calibrate(model, ids)
    expected = coda_attn.calibrate(exact_model, ids)
    for layer, exact, mine, theirs in zip(coda_layers(model), coda_layers(exact_model), summary, expected):
        assert layer.write_proj.weight.device.type == "cuda" and layer.write_proj.weight.dtype == dtype
        assert distance(layer.write_proj.weight, exact.write_proj.weight.detach()) < rounding
        assert mine["tokens"] == theirs["tokens"] and mine["r2"] == pytest.approx(theirs["r2"], abs=0.05)
