"""apply_rope: rotary embeddings whose phases do not suffer from the dtype of the model."""

import pytest
import torch
from cases import SHAPES, compiled, examples, seeds
from hypothesis import given, strategies as st
from torch.testing import assert_close

from coda_attn import functional as F, reference

MILLION = 1_000_000
pairings = pytest.mark.parametrize("pairs", ["half", "interleaved"])
positions_of = st.one_of(st.integers(-64, 64), st.integers(0, 2 * MILLION))


def make(device, tokens=(2, 5), heads=3, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*tokens, heads, dim, generator=generator, dtype=torch.float64)
    positions = torch.randint(0, 2 * MILLION, tokens, generator=generator)
    return x.to(device, dtype), positions.to(device), F.rope_inv_freq(dim, device=device)


class TestForward:
    @examples
    @given(st.sampled_from(SHAPES), st.lists(positions_of, max_size=6), st.sampled_from(["half", "interleaved"]), st.booleans(),
           st.sampled_from([1.0, 1.3]), seeds)
    def test_is_the_reference(self, device, shape, positions, pairs, inverse, scaling, seed):
        x, _, inv_freq = make(device, (len(positions),), shape.heads, shape.dim, seed=seed)
        options = dict(attention_scaling=scaling, pairs=pairs, inverse=inverse)
        positions = torch.tensor(positions, dtype=torch.int64)
        y = F.apply_rope(x, positions.to(device), inv_freq, **options)
        assert_close(y.cpu(), reference.apply_rope(x.cpu(), positions, inv_freq.cpu(), **options))

    @pairings
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_million_tokens_in(self, device, pairs, dtype):
        """As exact as rotating by float64 phases and rounding once; float32 phases are off by 0.06 there."""
        x, positions, inv_freq = make(device, (4, 64), dim=64, dtype=dtype)
        exact = reference.apply_rope(x.cpu().double(), positions.cpu(), inv_freq.cpu(), pairs=pairs)
        plain = reference.apply_rope(x.cpu(), positions.cpu(), inv_freq.cpu(), pairs=pairs)
        y = F.apply_rope(x, positions, inv_freq, pairs=pairs)
        assert y.dtype == dtype
        assert (y.cpu().double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()

    @pairings
    def test_inverse_turns_back(self, device, pairs):
        x, positions, inv_freq = make(device)
        y = F.apply_rope(x, positions, inv_freq, pairs=pairs)
        assert_close(F.apply_rope(y, positions, inv_freq, pairs=pairs, inverse=True), x)
        assert_close(F.apply_rope(x, -positions, inv_freq, pairs=pairs), F.apply_rope(x, positions, inv_freq, pairs=pairs, inverse=True))

    def test_position_zero_is_the_identity_bit_for_bit(self, device):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x, positions, inv_freq = make(device, dtype=dtype)
            assert torch.equal(F.apply_rope(x, positions * 0, inv_freq), x)

    @pytest.mark.parametrize("tokens", [(), (0,), (3, 0), (1, 2, 3)])
    def test_any_number_of_token_dimensions(self, device, tokens):
        x, positions, inv_freq = make(device, tokens)
        assert_close(F.apply_rope(x, positions, inv_freq).cpu(), reference.apply_rope(x.cpu(), positions.cpu(), inv_freq.cpu()))

    def test_non_contiguous(self, device):
        x, positions, inv_freq = make(device, (4, 6))
        expected = F.apply_rope(x, positions, inv_freq)
        strided = torch.stack([inv_freq, inv_freq], -1)[:, 0]
        assert torch.equal(F.apply_rope(x.mT.contiguous().mT, positions.T.contiguous().T, strided), expected)
        assert torch.equal(F.apply_rope(x.transpose(0, 1), positions.T, inv_freq), expected.transpose(0, 1))

    @pairings
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dim", [64, 80, 6])
    @pytest.mark.parametrize("heads", [1, 8, 130])
    def test_slices_of_a_wider_projection(self, device, pairs, dtype, dim, heads):
        _, positions, inv_freq = make(device, (3, 7), dim=dim)
        wide = make(device, (3, 7), 1, heads * dim + 16, dtype)[0].squeeze(-2)
        for skipped in (0, 8, 3):
            x = wide[..., skipped:skipped + heads * dim].unflatten(-1, (heads, dim))
            y = F.apply_rope(x, positions, inv_freq, pairs=pairs)
            assert torch.equal(y, F.apply_rope(x.clone(), positions, inv_freq, pairs=pairs)) and y.is_contiguous()
            swapped = x.transpose(-3, -2).contiguous().transpose(-3, -2)
            assert torch.equal(y, F.apply_rope(swapped, positions, inv_freq, pairs=pairs))
            for h in range(0, heads, 50):
                assert torch.equal(y[..., h, :], F.apply_rope(x[..., h:h + 1, :], positions, inv_freq, pairs=pairs)[..., 0, :])

    def test_one_position_for_all(self, device):
        x, _, inv_freq = make(device)
        one = torch.tensor(77, device=device)
        assert torch.equal(F.apply_rope(x, one.expand(2, 5), inv_freq), F.apply_rope(x, one.repeat(2, 5), inv_freq))

    def test_a_row_does_not_depend_on_the_others(self, device):
        x, positions, inv_freq = make(device, (300,), dtype=torch.float32)
        y = F.apply_rope(x, positions, inv_freq)
        for n in (0, 1, 150, 299):
            assert torch.equal(F.apply_rope(x[n:n + 1], positions[n:n + 1], inv_freq)[0], y[n])


class TestRegistration:
    @pairings
    @pytest.mark.parametrize("inverse", [False, True])
    def test_gradients(self, device, pairs, inverse):
        x, positions, inv_freq = make(device, (3,))

        def rope(x):
            return F.apply_rope(x, positions, inv_freq, attention_scaling=1.3, pairs=pairs, inverse=inverse)

        assert torch.autograd.gradcheck(rope, x.requires_grad_())
        assert torch.autograd.gradgradcheck(rope, x)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_opcheck(self, device, dtype):
        x, positions, inv_freq = make(device, dtype=dtype)
        for leaf in (x, x.requires_grad_(), x.detach().mT.contiguous().mT):
            torch.library.opcheck(torch.ops.coda.apply_rope.default, (leaf, positions, inv_freq, 1.3, "interleaved", True))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, device, dynamic):
        rope = compiled(F.apply_rope, dynamic=dynamic)
        for tokens in ((2, 5), (2, 9)):
            x, positions, inv_freq = make(device, tokens)
            y = rope(x.requires_grad_(), positions, inv_freq)
            assert torch.equal(y, F.apply_rope(x, positions, inv_freq))
            grad, = torch.autograd.grad(y, x, torch.ones_like(y))
            assert torch.equal(grad, F.apply_rope(torch.ones_like(y), positions, inv_freq, inverse=True))
