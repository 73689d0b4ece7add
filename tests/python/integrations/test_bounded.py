"""Bounded mode inside a model: the result depends on a row's tokens only, and memory does not grow."""

import copy
import dataclasses

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from hf_models import PAPER, SMALL, coda_model, padded, token_ids

import coda_attn


few = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
ROUNDING = dict(rtol=1e-8, atol=1e-8)


def in_pieces(model, ids, sizes):
    """Logits and states of one row read in calls of these sizes."""
    cache, logits = coda_attn.CodaCache(model.config), []
    with torch.no_grad():
        for piece in ids.split(sizes, -1):
            logits.append(model(piece, past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


def by_position(state, config):
    """The contents of a state, exact slots in the order of their positions."""
    w, seen = config.window, state.tokens_seen[:, None]
    # A ring slot whose token has left holds anything.
    start = (seen - 1) // config.chunk * config.chunk - (w - config.chunk)
    last = seen - 1 - (seen - 1 - torch.arange(w)) % w
    live = (last >= start.clamp(min=0))[:, None, :, None]
    order = state.exact_pos.argsort(-1)
    contents = {"pos": state.exact_pos.gather(-1, order), "seen": state.tokens_seen, "counts": state.counts,
                "mass": state.summary_mass, "summary_v": state.summary_v}
    groups = order.shape[1]
    for name in ("k", "v"):
        ring, bank = getattr(state, name).split([w, config.exact_slots], 2)
        index = order.expand(-1, ring.shape[1], -1) if groups == 1 else order
        bank = bank.gather(2, index[..., None].expand(bank.shape))
        used = contents["pos"].expand(index.shape)[..., None] >= 0
        contents[name], contents[name + "_bank"] = ring * live, bank * used
    return contents


@given(sizes=st.lists(st.sampled_from([1, 2, 3, 4, 7, 13, 20]), min_size=2, max_size=9), name=st.sampled_from(["retention", "paper"]))
@few
def test_any_split_into_calls_gives_the_same_result(converted, sizes, name):
    model, config = converted(name), {"retention": SMALL, "paper": PAPER}[name]
    ids = token_ids(1, sum(sizes))
    whole, cache = in_pieces(model, ids, [ids.shape[1]])
    pieces, cache_pieces = in_pieces(model, ids, sizes)
    torch.testing.assert_close(pieces, whole, **ROUNDING)
    for a, b in zip(cache.states, cache_pieces.states):
        for (field, x), y in zip(by_position(a, config).items(), by_position(b, config).values()):
            torch.testing.assert_close(y, x, **ROUNDING, msg=lambda m: f"{field}: {m}")


def test_a_window_as_long_as_the_text_is_full_attention(family):
    config = dataclasses.replace(SMALL, window=64)
    model = coda_model(config, family=family)
    ids, mask = padded([50, 33])
    with torch.no_grad():
        bounded = model(ids, attention_mask=mask).logits
        full = coda_attn.set_mode(model, "full")(ids, attention_mask=mask).logits
    torch.testing.assert_close(bounded[mask.bool()], full[mask.bool()], rtol=1e-6, atol=1e-7)


@given(lengths=st.lists(st.integers(1, 45), min_size=2, max_size=4), side=st.sampled_from(["left", "right"]),
       name=st.sampled_from(["retention", "paper"]))
@few
def test_a_row_of_a_padded_batch_equals_the_row_alone(converted, lengths, side, name):
    model = converted(name)
    ids, mask = padded(lengths, side=side)
    after = token_ids(len(lengths), 6, seed=5)
    cache = coda_attn.CodaCache(model.config)
    with torch.no_grad():
        prefill = model(ids, attention_mask=mask, past_key_values=cache).logits
        decoded = []
        for column in after.split(1, -1):
            mask = torch.cat([mask, torch.ones_like(column)], -1)
            decoded.append(model(column, attention_mask=mask, past_key_values=cache).logits)
    assert cache.states[0].tokens_seen.tolist() == [n + 6 for n in lengths]
    for row, length in enumerate(lengths):
        real = mask[row, :ids.shape[1]].bool()
        alone, _ = in_pieces(model, torch.cat([ids[row, real], after[row]])[None], [length] + [1] * 6)
        torch.testing.assert_close(prefill[row, real], alone[0, :length], **ROUNDING)
        torch.testing.assert_close(torch.cat(decoded, 1)[row], alone[0, length:], **ROUNDING)


def test_padding_in_the_middle_does_not_exist_and_its_output_is_0():
    model = coda_model()
    ids, mask = token_ids(1, 30), torch.ones(1, 30, dtype=torch.long)
    mask[0, [3, 4, 17]] = 0
    outputs = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    with torch.no_grad():
        holes = model(ids, attention_mask=mask).logits
        dense = model(ids[mask.bool()][None]).logits
    handle.remove()
    torch.testing.assert_close(holes[mask.bool()], dense[0], **ROUNDING)
    assert (outputs[0][mask == 0] == 0).all() and (outputs[0][mask == 1] != 0).any(-1).all()


@pytest.mark.parametrize("mode", ["bounded", "full"])
def test_generate_greedy_gives_each_row_what_it_gets_alone(mode):
    model = coda_model(mode=mode)
    lengths = [70, 12, 41]
    ids, mask = padded(lengths)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row:row + 1, -length:], attention_mask=torch.ones(1, length, dtype=torch.long),
                               max_new_tokens=12, do_sample=False)
        assert torch.equal(batch[row, -12:], alone[0, -12:])


def test_generate_equals_reading_its_own_output():
    model = coda_model()
    ids = token_ids(1, 90)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    with torch.no_grad():
        greedy = model(text[:, :-1]).logits.argmax(-1)[:, -20:]
    assert torch.equal(text[:, -20:], greedy)


def test_generate_sampling_is_reproducible():
    model = coda_model()
    ids, mask = padded([30, 50])
    texts = []
    for _ in range(2):
        torch.manual_seed(7)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=True, num_return_sequences=2))
    assert texts[0].shape == (4, 60) and torch.equal(*texts) and not torch.equal(texts[0][0], texts[0][1])


def test_beam_search_in_a_window_that_holds_all_equals_full_mode():
    model = coda_model(dataclasses.replace(SMALL, window=64))
    ids, mask = padded([40, 25])
    beams = {}
    for mode in ("bounded", "full"):
        coda_attn.set_mode(model, mode)
        beams[mode] = model.generate(ids, attention_mask=mask, max_new_tokens=12, num_beams=4, do_sample=False)
    assert torch.equal(beams["bounded"], beams["full"])


def test_beam_scores_are_those_of_the_text():
    model = coda_model()
    ids = token_ids(1, 45)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, num_beams=3, do_sample=False,
                         return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    with torch.no_grad():
        log_probs = model(out.sequences[:, :-1]).logits.log_softmax(-1)[0, -14:]
    torch.testing.assert_close(out.sequences_scores[0].double(), log_probs.gather(-1, out.sequences[0, -14:, None]).sum(),
                               rtol=1e-5, atol=1e-5)


def test_generate_continues_from_a_cache_and_in_chunks_of_the_prompt():
    model = coda_model()
    ids = token_ids(1, 60)
    ones = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=ones, max_new_tokens=8, do_sample=False)
    cache = coda_attn.CodaCache(model.config)
    with torch.no_grad():
        model(ids[:, :33], past_key_values=cache)
    kept = copy.deepcopy(cache)
    assert torch.equal(model.generate(ids, attention_mask=ones, past_key_values=cache, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(model.generate(ids, attention_mask=ones, past_key_values=kept, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(model.generate(ids, attention_mask=ones, max_new_tokens=8, do_sample=False, use_cache=False), expected)
    assert torch.equal(model.generate(ids, attention_mask=ones, max_new_tokens=8, do_sample=False, prefill_chunk_size=7), expected)


def test_memory_does_not_grow_and_stays_where_it_is():
    model = coda_model()
    cache = coda_attn.CodaCache(model.config)
    sizes, addresses = set(), set()
    with torch.no_grad():
        for piece in token_ids(2, 400).split([100, 1, 1, 98, 200], -1):
            model(piece, past_key_values=cache)
            sizes.add(cache.nbytes())
            addresses.add(tuple(t.data_ptr() for state in cache.states for t in state.tensors()))
    per_layer = 2 * (2 * 2 * 24 * 16 * 8 + 2 * 24 * 8 + 2 * 8 * 8 + 8 + 2 * 8)
    assert sizes == {2 * per_layer} and len(addresses) == 1
    assert cache.get_seq_length() == 400 and (cache.states[0].exact_pos >= 0).sum(-1).max() <= SMALL.exact_slots


def test_cache_operations():
    model = coda_model()
    ids = token_ids(2, 50)

    def read(rows, cache):
        with torch.no_grad():
            return model(rows, past_key_values=cache).logits[:, -1]

    cache = coda_attn.CodaCache(model.config)
    assert cache.nbytes() == 0 and cache.get_seq_length() == 0 and not cache.is_croppable
    with pytest.raises(ValueError, match="not read any token"):
        cache.states
    read(ids[:, :40], cache)
    first = read(ids[:, 40:], copy.deepcopy(cache))
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(read(ids[[1, 0], 40:], swapped), first[[1, 0]], **ROUNDING)
    wide = copy.deepcopy(cache)
    wide.batch_repeat_interleave(2)
    torch.testing.assert_close(read(ids[[0, 0, 1, 1], 40:], wide), first[[0, 0, 1, 1]], **ROUNDING)
    wide.batch_select_indices(torch.tensor([3]))
    assert wide.batch_size == 1 and wide.states[0].tokens_seen.tolist() == [50]
    cache.offload(0, only_non_sliding=False)
    cache.layers[0].prefetch()
    torch.testing.assert_close(read(ids[:, 40:], cache), first, **ROUNDING)
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="cannot take back"):
        cache.crop(-1)
    with pytest.raises(TypeError, match="bounded memory"):
        cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(read(ids, cache), first, **ROUNDING)


def test_cache_of_another_configuration_is_refused():
    model = coda_model()
    cache = coda_attn.CodaCache(model.config)
    with torch.no_grad():
        model(token_ids(1, 10), past_key_values=cache)
    coda_attn.reconfigure(model, dataclasses.replace(SMALL, window=32))
    with pytest.raises(ValueError, match="another CodaConfig"):
        model(token_ids(1, 1), past_key_values=cache)


def test_gradients_run_through_a_carried_state():
    model = coda_model().train()
    ids = token_ids(1, 48)

    def gradients(sizes):
        model.zero_grad()
        cache, logits = coda_attn.CodaCache(model.config), []
        for piece in ids.split(sizes, -1):
            logits.append(model(piece, past_key_values=cache).logits)
        torch.cat(logits, 1).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradients([20, 1, 27]), gradients([48]), rtol=1e-7, atol=1e-8)


def test_generation_that_a_bounded_memory_cannot_do_is_refused():
    model = coda_model()
    ids = token_ids(1, 20)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(ids, assistant_model=coda_model(), max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=4)
    with pytest.raises(NotImplementedError, match="padded batch"):
        model.generate_batch([ids[0].tolist()], generation_config=transformers.GenerationConfig(max_new_tokens=4))


@pytest.mark.parametrize("mode", ["bounded", "full"])
def test_compiles_into_one_graph(mode):
    model = coda_model(mode=mode)
    ids = token_ids(1, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **ROUNDING)
