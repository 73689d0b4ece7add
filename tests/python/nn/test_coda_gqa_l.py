"""coda_attn.CodaGqaL over random configurations: the invariants of the bounded memory, its gradients and its module life."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from coda_attn import CodaGqaL, State, functional as F, reference

SHAPES = [dict(embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=6), dict(embed_dim=8, num_heads=2, num_kv_heads=1),
          dict(embed_dim=9, num_heads=3, num_kv_heads=3, head_dim=2)]
examples = settings(max_examples=30, deadline=None)
few_examples = settings(max_examples=10, deadline=None)


@st.composite
def memories(draw, policy=st.sampled_from(["retention", "novelty_lru"])):
    """Keyword arguments of a small CodaGqaL."""
    chunk, exact = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(0, 6))
    fields = dict(
        chunk=chunk, window=chunk * draw(st.integers(1, 4)), exact_slots=exact, num_sinks=draw(st.integers(0, min(exact, 3))),
        policy=draw(policy), bank_distance=draw(st.sampled_from([None, 0, 7, 64])), differential=draw(st.booleans()),
        head_norm=draw(st.sampled_from(["identity", "rms"])), theta_pairs=draw(st.sampled_from(["half", "interleaved"])),
        rope_pairs=draw(st.sampled_from(["half", "interleaved"])), gate_bias=draw(st.sampled_from([None, True, False])),
        mass_bias=draw(st.booleans()), bias=draw(st.booleans()))
    if fields["policy"] == "retention":
        fields |= dict(gates=draw(st.sampled_from(["per_head", "shared"])), age_decay=draw(st.sampled_from([0.0, 1e-3, 0.2])))
    else:
        fields |= dict(gates="shared", exact_candidates=draw(st.integers(1, 4)), refresh_on_hit=draw(st.booleans()),
                       tau_novel=draw(st.sampled_from([0.3, 0.7])), tau_match=draw(st.sampled_from([0.3, 0.9])))
    if fields["gates"] == "shared":
        fields |= dict(summary_slots=draw(st.integers(0, 3)), summary_routing=draw(st.sampled_from(["value", "low_freq_key"])))
    return draw(st.sampled_from(SHAPES)) | fields


seeds = st.integers(0, 2 ** 32 - 1)
retention_memories = memories(policy=st.just("retention"))
# Both policies with every part of the layer in use.
FULL = dict(embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=6, window=8, chunk=4, exact_slots=5, head_norm="rms")
RETENTION = FULL | dict(num_sinks=2, bank_distance=16, gates="shared", summary_slots=2, mass_bias=True)
PAPER = FULL | dict(num_sinks=0, bank_distance=None, gates="shared", summary_slots=2, policy="novelty_lru", gate_bias=True)
both_policies = pytest.mark.parametrize("fields", [RETENTION, PAPER], ids=["retention", "novelty_lru"])


def make_layer(fields, seed=0, dtype=torch.float64):
    """A layer in which every parameter matters."""
    layer = CodaGqaL(**fields, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer.to(dtype)


def make_tokens(layer, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch, length, layer.embed_dim, generator=generator, dtype=torch.float64).to(layer.q_proj.weight.dtype)


def read(layer, x, sizes=None, state=None):
    """x in pieces of the given sizes: (y, state)."""
    state = layer.make_state(x.shape[0]) if state is None else state
    return torch.cat([layer.forward_bounded(piece, state) for piece in x.split(sizes or [x.shape[1]], 1)], 1), state


@st.composite
def splits(draw, longest=40):
    """A length and one way to cut it into calls, empty ones and single tokens included."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 13]), min_size=1, max_size=12))
    while sum(sizes) > longest:
        sizes.pop()
    return sizes if sum(sizes) else [*sizes, 1]


def contents(layer, state):
    """What the memory holds, whatever the order of the slots: per sequence and group {position: (k, v, gate)} of ring and bank."""
    c, held = layer.config, []
    for n, seen in enumerate(state.tokens_seen.tolist()):
        start = max(seen - 1, 0) // c.chunk * c.chunk
        for r, positions in enumerate(state.exact_pos[n].tolist()):
            heads = [r] if c.gates == "per_head" else slice(None)
            slots = {("ring", p): p % c.window for p in range(max(0, start - c.window + c.chunk), seen)}
            slots |= {("bank", p): c.window + j for j, p in enumerate(positions) if p >= 0}
            held.append({key: (state.k[n, heads, s], state.v[n, heads, s], state.gate[n, r, s]) for key, s in slots.items()})
    return held


def assert_same_memory(layer, mine, theirs, **tolerance):
    for a, b in zip(contents(layer, mine), contents(layer, theirs), strict=True):
        assert_close(a, b, **tolerance)
    for name in ("tokens_seen", "counts", "last_touch", "summary_k", "summary_v", "summary_mass"):
        assert_close(getattr(mine, name), getattr(theirs, name), **tolerance)


class TestInvariants:
    @examples
    @given(memories(), splits(), seeds)
    def test_any_split_into_calls_gives_the_same(self, fields, sizes, seed):
        layer = make_layer(fields, seed)
        x = make_tokens(layer, 2, sum(sizes), seed)
        with torch.no_grad():
            (y, state), (pieces, stepped) = read(layer, x), read(layer, x, sizes)
            singles, single = read(layer, x, [1] * x.shape[1])
        assert_close(pieces, y)
        assert_close(singles, y)
        assert_same_memory(layer, stepped, state)
        assert_same_memory(layer, single, state)

    @examples
    @given(memories(), splits(), seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def test_a_row_does_not_depend_on_the_rest_of_the_batch(self, fields, sizes, seed, dtype):
        layer = make_layer(fields, seed, dtype)
        x = make_tokens(layer, 3, sum(sizes), seed)
        order = torch.tensor([2, 0, 1])
        with torch.no_grad():
            (y, state), (permuted, _) = read(layer, x, sizes), read(layer, x[order], sizes)
            full = layer(x)
            assert torch.equal(permuted, y[order])
            for row in range(3):
                alone, own = read(layer, x[row:row + 1], sizes)
                assert torch.equal(alone[0], y[row])
                assert torch.equal(layer(x[row:row + 1])[0], full[row])
                assert all(torch.equal(mine[0], theirs[row]) for mine, theirs in zip(own.tensors(), state.tensors()))

    @both_policies
    def test_a_long_row_does_not_depend_on_the_rest_of_the_batch(self, fields):
        """Together these rows are longer than one internal segment, alone they are not."""
        layer = make_layer(fields, dtype=torch.float32)
        x = make_tokens(layer, 3, 3001)
        with torch.no_grad():
            y, _ = read(layer, x)
            for row in range(3):
                assert torch.equal(read(layer, x[row:row + 1])[0][0], y[row])

    @examples
    @given(memories(), st.integers(1, 24), seeds)
    def test_within_the_ring_bounded_equals_unbounded(self, fields, length, seed):
        layer = make_layer(fields | dict(window=fields["chunk"] * 24), seed)
        x = make_tokens(layer, 2, length, seed)
        assert_close(read(layer, x)[0], layer(x))

    @examples
    @given(memories(), splits(), seeds)
    def test_outputs_and_memory_are_those_of_the_specification(self, fields, sizes, seed):
        layer = make_layer(fields, seed)
        x = make_tokens(layer, 2, sum(sizes), seed)
        with torch.no_grad():
            (y, state), (expected, memory) = read(layer, x, sizes), by_the_specification(layer, x)
        assert_close(y, expected)
        assert_same_memory(layer, state, memory)

    @examples
    @given(memories(), seeds)
    def test_budget(self, fields, seed):
        layer = make_layer(fields, seed)
        x, state = make_tokens(layer, 2, 50, seed), layer.make_state(2)
        with torch.no_grad():
            for piece in x.split(7, 1):
                layer.forward_bounded(piece, state)
                metrics = layer.metrics(state)
                used = sum(metrics[f"{part}_slots_used"] for part in ("ring", "exact", "summary"))
                assert used <= 2 * layer.config.slots
                assert metrics["ring_slots_used"] <= 2 * layer.config.window
                assert state.nbytes() == layer.state_bytes(2)

    @examples
    @given(memories(), seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def test_exact_slots_hold_tokens_seen(self, fields, seed, dtype):
        layer = make_layer(fields, seed, dtype)
        x, state, c = make_tokens(layer, 1, 40, seed), layer.make_state(1), layer.config
        inv_freq = F.rope_inv_freq(layer.head_dim)
        keys, values, gates = [], [], []
        with torch.no_grad():
            for t, token in enumerate(x.split(1, 1)):
                layer.forward_bounded(token, state)
                slot = t % c.window
                for column, source in ((keys, state.k), (values, state.v), (gates, state.gate)):
                    column.append(source[0, :, slot].clone())
                for r, positions in enumerate(state.exact_pos[0].tolist()):
                    heads = [r] if c.gates == "per_head" else slice(None)
                    for j, p in enumerate(positions):
                        if p < 0:
                            continue
                        k = keys[p]
                        if c.bank_distance is not None:
                            k = F.apply_rope(k, torch.tensor(p), inv_freq, pairs=c.rope_pairs, inverse=True)
                        assert torch.equal(state.v[0, heads, c.window + j], values[p][heads])
                        assert torch.equal(state.k[0, heads, c.window + j], k[heads])
                        assert torch.equal(state.gate[0, r, c.window + j], gates[p][r])

    @examples
    @given(retention_memories, seeds, st.integers(1, 60))
    def test_the_retention_bank_is_the_top_k_from_scratch(self, fields, seed, length):
        layer = make_layer(fields, seed)
        x, c = make_tokens(layer, 1, length, seed), layer.config
        with torch.no_grad():
            _, state = read(layer, x)
            gate = layer.write_proj(x[0])
        evicted = layer.metrics(state)["evictions"]
        for r, positions in enumerate(state.exact_pos[0].tolist()):
            assert sorted(p for p in positions if p >= 0) == reference.retention_bank(gate[:, r], evicted, c)


class TestBeyondTheBank:
    def test_memory_reaches_beyond_the_window(self):
        """A token far out of the ring changes the output only through the bank."""
        layer = make_layer(FULL | dict(num_sinks=2, bank_distance=16, gates="per_head"))
        x = make_tokens(layer, 1, 40)
        changed = x.clone()
        changed[:, 0] += 1.0
        with torch.no_grad():
            assert not torch.allclose(read(layer, x)[0][:, -1], read(layer, changed)[0][:, -1])
            forgetful = make_layer(FULL | dict(exact_slots=0, num_sinks=0, gates="per_head"))
            assert torch.equal(read(forgetful, x)[0][:, -1], read(forgetful, changed)[0][:, -1])

    def test_with_bank_distance_nothing_depends_on_how_far_the_sequence_has_come(self):
        layer = make_layer(FULL | dict(num_sinks=0, bank_distance=16, age_decay=0.2))
        x = make_tokens(layer, 1, 64)
        far = torch.cat([make_tokens(layer, 1, 400, seed=5), x], 1)
        with torch.no_grad():
            # With this decay the bank holds none of the 400 tokens any more.
            assert_close(read(layer, far)[0][:, -8:], read(layer, x)[0][:, -8:])


class TestMetrics:
    def test_counts_by_hand(self):
        layer = make_layer(PAPER | dict(summary_slots=0, tau_exact=0.0, exact_candidates=4))
        # Three different tokens, again and again: 3 inserts, then hits.
        x = make_tokens(layer, 1, 3).repeat(1, 8, 1)
        with torch.no_grad():
            _, state = read(layer, x)
        # 24 tokens read: the chunk that starts at 20 left the ring with 16 to 23.
        assert layer.metrics(state) == {"tokens_seen": 24, "evictions": 16, "inserts": 3, "hits": 13, "ring_slots_used": 8,
                                        "exact_slots_used": 3, "summary_slots_used": 0}

    def test_a_fresh_state(self):
        layer = CodaGqaL(**RETENTION)
        assert set(layer.metrics(layer.make_state(2)).values()) == {0}

    def test_the_paper_s_medium_layer_by_the_documented_formula(self):
        layer = CodaGqaL(4096, 32, 8, device="meta", dtype=torch.bfloat16)
        assert layer.config.slots == 384
        assert 1.5e6 < layer.state_bytes() < 1.7e6
        assert layer.state_bytes(3) == 3 * layer.state_bytes()


def by_the_specification(layer, x):
    """(y, state) of a fresh sequence through coda_attn.reference."""
    c, w = layer.config, layer
    inv_freq = F.rope_inv_freq(layer.head_dim, layer.rope_base)
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in (w.q_proj, w.k_proj, w.v_proj))
    q, k = (reference.apply_rope(t, positions, inv_freq, pairs=c.rope_pairs) for t in (q, k))
    lam = None if w.lambda_proj is None else w.lambda_proj(x).sigmoid()
    y, state = reference.bounded_attention(
        q, k, v, lam, w.theta, w.write_proj(x), layer.make_state(x.shape[0]), inv_freq=inv_freq, config=c,
        norm_weight=None if w.head_norm is None else w.head_norm.weight, eta_logit=w.summary_eta_logit)
    return w.o_proj(y.flatten(-2)), state


def gradients(layer, x, y):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    names, parameters = zip(*layer.named_parameters())
    return dict(zip(("x", *names), torch.autograd.grad((y * weight).sum(), (x, *parameters), materialize_grads=True)))


class TestGradients:
    @few_examples
    @given(memories(), splits(), seeds)
    def test_whatever_the_segmentation_they_are_those_of_the_specification(self, fields, sizes, seed):
        layer = make_layer(fields, seed)
        x = make_tokens(layer, 2, sum(sizes), seed).requires_grad_()
        expected = gradients(layer, x, by_the_specification(layer, x)[0])
        assert_close(gradients(layer, x, read(layer, x)[0]), expected)
        assert_close(gradients(layer, x, read(layer, x, sizes)[0]), expected)

    @both_policies
    def test_they_reach_every_parameter(self, fields):
        layer = make_layer(fields)
        y, _ = read(layer, make_tokens(layer, 2, 30), [30])
        y.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())

    def test_unbounded(self):
        layer = make_layer(RETENTION)
        x = make_tokens(layer, 2, 9).requires_grad_()
        assert torch.autograd.gradcheck(layer, x, fast_mode=True)

    def test_detaching_the_state_cuts_them(self):
        layer = make_layer(RETENTION)
        x = make_tokens(layer, 1, 20).requires_grad_()
        _, state = read(layer, x[:, :12])
        y = layer.forward_bounded(x[:, 12:], state.detach())
        grad, = torch.autograd.grad(y.sum(), x)
        assert bool(grad[:, 12:].any()) and not bool(grad[:, :12].any())

    def test_without_autograd_the_state_stays_where_it_is(self):
        layer = make_layer(RETENTION)
        x, state = make_tokens(layer, 2, 20), layer.make_state(2)
        where = [t.data_ptr() for t in state.tensors()]
        with torch.no_grad():
            read(layer, x, [18, 1, 1], state)
        assert [t.data_ptr() for t in state.tensors()] == where
        layer.requires_grad_(False)
        read(layer, x, [18, 1, 1], state)
        assert [t.data_ptr() for t in state.tensors()] == where
        layer.requires_grad_(True)
        before = state.clone()
        held = State.from_tensors(state.tensors())
        layer.forward_bounded(x, state)
        assert state.k.requires_grad and state.tokens_seen.tolist() == [60, 60]
        assert all(torch.equal(a, b) for a, b in zip(held.tensors(), before.tensors()))


class TestModule:
    @both_policies
    @pytest.mark.parametrize("copied", [
        copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: torch.load(_saved(layer), weights_only=False)], ids=["deepcopy", "pickle", "torch.save"])
    def test_copies(self, fields, copied):
        layer = make_layer(fields)
        x = make_tokens(layer, 2, 20)
        twin = copied(layer)
        with torch.no_grad():
            y, _ = read(layer, x)
            assert torch.equal(read(twin, x)[0], y)
            twin.q_proj.weight.zero_()
            assert torch.equal(read(layer, x)[0], y) and not torch.equal(read(twin, x)[0], y)

    @both_policies
    @pytest.mark.parametrize("assign", [False, True])
    def test_state_dict(self, fields, assign):
        layer, other = make_layer(fields), make_layer(fields, seed=1)
        other.load_state_dict(layer.state_dict(), assign=assign)
        x = make_tokens(layer, 2, 20)
        assert torch.equal(read(other, x)[0], read(layer, x)[0])

    def test_names_are_those_of_the_checkpoints(self):
        core = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "write_proj.weight", "write_proj.bias",
                "summary_eta_logit"}
        second = {"theta", "lambda_proj.weight", "lambda_proj.bias"}
        assert set(CodaGqaL(16, 4, 2).state_dict()) == core | second
        assert set(CodaGqaL(16, 4, 2, head_norm="rms").state_dict()) == core | second | {"head_norm.weight"}
        assert set(CodaGqaL(16, 4, 2, differential=False).state_dict()) == core

    def test_fresh_parameters(self):
        layer = CodaGqaL(16, 4, 2)
        assert_close(layer.theta, torch.full((4, 2), torch.pi / 2))
        assert bool((layer.lambda_proj.bias == -6).all()) and bool((layer.summary_eta_logit == -3).all())
        assert not bool(layer.write_proj.weight.any()) and not bool(layer.write_proj.bias.any())
        assert layer.write_proj.weight.shape == (2, 16)
        paper = CodaGqaL(16, 4, 2, policy="novelty_lru", gates="shared")
        assert paper.write_proj.bias.tolist() == [-2.0]

    def test_double_keeps_the_parameters_an_optimizer_knows(self):
        layer = CodaGqaL(**RETENTION)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer.double()
        x = make_tokens(layer, 1, 20)
        before, _ = read(layer, x)
        assert before.dtype == torch.float64
        before.sum().backward()
        optimizer.step()
        assert not torch.allclose(read(layer, x)[0], before)

    def test_functional_call(self):
        layer, other = make_layer(RETENTION), make_layer(RETENTION, seed=1)
        x = make_tokens(layer, 1, 9)
        assert torch.equal(torch.func.functional_call(layer, dict(other.named_parameters()), x), other(x))

    def test_bfloat16_stays_near_float64(self):
        layer = make_layer(RETENTION)
        x = make_tokens(layer, 2, 30)
        with torch.no_grad():
            exact = layer(x)
            y = copy.deepcopy(layer).bfloat16()(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert_close(y.double(), exact, rtol=0.0, atol=0.05 * float(exact.abs().max()))

    def test_bfloat16_is_as_close_to_float64_on_any_device(self, device):
        """At most twice as far as on the CPU, gradients too. Every token is kept, so that no rounding decides what is."""
        layer = make_layer(dict(embed_dim=48, num_heads=4, num_kv_heads=2, head_dim=64, window=8, chunk=4, exact_slots=32))
        x = make_tokens(layer, 2, 30)

        def outputs(device, dtype):
            own, leaf = copy.deepcopy(layer).to(device, dtype), x.to(device, dtype).requires_grad_()
            y, _ = read(own, leaf)
            leaves = [leaf, own.write_proj.weight, own.q_proj.weight]
            return [t.detach().cpu().double() for t in (y, *torch.autograd.grad(y.sum(), leaves))]

        exact, rounded = outputs("cpu", torch.float64), outputs("cpu", torch.bfloat16)
        for ours, right, plain in zip(outputs(device, torch.bfloat16), exact, rounded):
            assert (ours - right).norm() <= 2 * (plain - right).norm()

    def test_autocast(self):
        layer = CodaGqaL(**RETENTION)
        x, state = make_tokens(layer, 1, 20), layer.make_state(1, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            bounded, _ = read(layer, x, [19, 1], state)
        assert y.dtype == bounded.dtype == torch.bfloat16 and state.gate.dtype == torch.float32
        assert_close(y.float(), layer(x), rtol=0.0, atol=0.05)

    def test_on_meta_then_materialised(self):
        layer = CodaGqaL(16, 4, 2, device="meta").to_empty(device="cpu")
        layer.reset_parameters()
        assert bool(layer(torch.randn(1, 5, 16)).isfinite().all())

    def test_non_contiguous_input(self):
        layer = make_layer(RETENTION)
        x = make_tokens(layer, 20, 3).transpose(0, 1)
        assert torch.equal(layer(x), layer(x.contiguous()))

    def test_no_tokens(self):
        layer = make_layer(RETENTION)
        state, x = layer.make_state(2), make_tokens(layer, 2, 0)
        assert layer(x).shape == layer.forward_bounded(x, state).shape == (2, 0, 12)
        assert state.tokens_seen.tolist() == [0, 0]

    def test_repr(self):
        assert "window=256, chunk=32, exact_slots=128" in repr(CodaGqaL(16, 4, 2))


def _saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return buffer


class TestErrors:
    @pytest.mark.parametrize("fields, message", [
        (dict(embed_dim=12), r"head_dim=3 is not supported; rotary embeddings need an even head_dim"),
        (dict(head_dim=0), r"head_dim=0 is not supported"),
        (dict(num_kv_heads=3), r"num_kv_heads=3 does not divide num_heads=4"),
        (dict(num_heads=0), r"num_heads=0 is not supported; it must be an integer of at least 1"),
        (dict(embed_dim=18), r"num_heads=4 does not divide embed_dim=18"),
        (dict(window=100, chunk=32), r"chunk=32 does not divide window=100"),
        (dict(summary_slots=4), r"summary_slots=4 .* needs gates='shared'"),
        (dict(policy="novelty_lru"), r"policy='novelty_lru' .* needs gates='shared'"),
        (dict(num_sinks=200), r"num_sinks=200 needs as many exact slots, but exact_slots=128"),
        (dict(policy="fifo"), r"policy='fifo' is not supported; choose one of 'retention', 'novelty_lru'"),
        (dict(rope_base=0.0), r"rope_base=0 is not supported"),
    ])
    def test_options(self, fields, message):
        with pytest.raises(ValueError, match=message):
            CodaGqaL(**dict(embed_dim=16, num_heads=4, num_kv_heads=2) | fields)

    @pytest.mark.parametrize("change, message", [
        (lambda x: x[..., :5], r"x has shape \[2, 7, 5\]; the layer takes \(batch, tokens, embed_dim\) with embed_dim=12"),
        (lambda x: x[0], r"x has shape \[7, 12\]"),
        (lambda x: x[:0], r"an empty batch; give at least one sequence"),
        (lambda x: x.float(), r"x is of Float but the layer's parameters are of Double"),
        (lambda x: x.to("meta"), r"x is on meta but the layer's parameters are on cpu"),
        (lambda x: x.long(), r"x is of Long; the layer takes floating-point embeddings"),
    ])
    def test_input(self, change, message):
        layer = make_layer(RETENTION)
        x = change(make_tokens(layer, 2, 7))
        with pytest.raises(ValueError, match=message):
            layer(x)
        with pytest.raises(ValueError, match=message):
            layer.forward_bounded(x, layer.make_state(2))

    @pytest.mark.parametrize("state, message", [
        (lambda layer: layer.make_state(3), r"the state holds 3 sequences but x has 2"),
        (lambda layer: layer.make_state(2, dtype=torch.float32), r"the state is of Float but .* of Double"),
        (lambda layer: layer.make_state(2, device="meta"), r"the state is on meta but x is on cpu"),
        (lambda layer: make_layer(RETENTION | dict(window=16)).make_state(2), r"window=16, exact_slots=5.* window=8, exact_slots=5"),
        (lambda layer: make_layer(FULL).make_state(2), r"gate groups=2.* gate groups=1"),
        (lambda layer: make_layer(PAPER).make_state(2), r"last-touch times=5.* last-touch times=0"),
    ])
    def test_a_foreign_state(self, state, message):
        layer = make_layer(RETENTION)
        foreign = state(layer)
        before = foreign.clone()
        with pytest.raises(ValueError, match=message):
            layer.forward_bounded(make_tokens(layer, 2, 7), foreign)
        assert foreign.k.is_meta or all(torch.equal(a, b) for a, b in zip(foreign.tensors(), before.tensors()))

    def test_something_else_than_a_state(self):
        layer = make_layer(RETENTION)
        with pytest.raises(TypeError, match="state is a list; give a coda_attn.state.State"):
            layer.forward_bounded(make_tokens(layer, 2, 7), layer.make_state(2).tensors())

    def test_an_empty_batch(self):
        with pytest.raises(ValueError, match="at least one sequence; got 0"):
            CodaGqaL(16, 4, 2).make_state(0)

    def test_a_replaced_projection(self):
        layer = make_layer(RETENTION)
        x = make_tokens(layer, 1, 3)
        layer.q_proj = torch.nn.Sequential(layer.q_proj)
        with pytest.raises(TypeError, match="q_proj was replaced by a Sequential"):
            layer(x)
