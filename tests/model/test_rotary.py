"""RMSNorm, rotary embedding, LogN: the documented arithmetic, computed here in plain Python."""

import math

import pytest
import torch

from qwen1 import RMSNorm, RotaryEmbedding, apply_rotary_pos_emb
from qwen1.positions_qwen import positions_from_mask
from qwen1.rotary_qwen import _rotate_half, logn_scale


def documented_angles(position, dim, base, alpha):
    stretched = base * alpha ** (dim / (dim - 2))
    half = [position / stretched ** (2 * index / dim) for index in range(dim // 2)]
    return torch.tensor(half + half)


def test_norm_defaults_and_formula():
    norm = RMSNorm(8)
    assert norm.eps == 1e-6 and torch.equal(norm.weight, torch.ones(8))
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8)
    expected = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert repr(norm) == "RMSNorm(8, eps=1e-06)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_rounds_before_the_weight(dtype):
    norm = RMSNorm(64).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(5, 64) * 300).to(dtype)  # squares overflow float16
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)
    assert torch.equal(norm(x), normed.to(dtype) * norm.weight)
    assert norm(x).isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 3.0, 7.0, 1023.0])
@pytest.mark.parametrize(("dim", "base"), [(16, 10000), (8, 1000000)])
def test_angles_are_the_documented_ones(dim, base, alpha):
    table = RotaryEmbedding(dim, base)(10, ntk_alpha=alpha)
    assert table.shape == (1, 10, 1, dim) and table.dtype == torch.float32
    for position in range(10):
        expected = documented_angles(position, dim, base, alpha)
        torch.testing.assert_close(table[0, position, 0], expected, rtol=1e-6, atol=0)


def test_offset_and_default_base():
    rotary = RotaryEmbedding(16)
    assert rotary.base == 10000
    assert torch.equal(rotary(4, offset=6), rotary(10)[:, 6:])


def test_calls_leave_no_state():
    rotary = RotaryEmbedding(16)
    first = rotary(8)
    rotary(100, ntk_alpha=7.0)
    assert torch.equal(rotary(8), first)
    assert not list(rotary.buffers()) and not list(rotary.parameters())


def test_positions_far_beyond_any_table():
    far = RotaryEmbedding(16).angles(torch.tensor([[10**6]]))
    torch.testing.assert_close(far[0, 0, 0], documented_angles(10**6, 16, 10000, 1), rtol=1e-6, atol=0)


def test_each_row_has_its_own_alpha():
    rotary, positions = RotaryEmbedding(16), torch.arange(5).expand(2, -1)
    both = rotary.angles(positions, torch.tensor([[1.0], [7.0]]))
    assert torch.equal(both[:1], rotary(5)) and torch.equal(both[1:], rotary(5, ntk_alpha=7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_same_with_gradients_and_without(dtype):
    states = torch.randn(2, 9, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles, before = RotaryEmbedding(12)(9, offset=700), states.clone()
    quick = apply_rotary_pos_emb(states, angles)
    plain = apply_rotary_pos_emb(states.clone().requires_grad_(), angles).detach()
    assert quick.dtype == dtype and torch.equal(states, before) and torch.equal(quick, plain)


def test_rotate_half():
    assert _rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-3.0, -4.0, 1.0, 2.0]


def test_rotation_by_hand():
    position, x = 3, torch.tensor([1.0, 2.0, 3.0, 4.0])
    rotated = apply_rotary_pos_emb(x.view(1, 1, 1, 4), RotaryEmbedding(4)(4)[:, 3:])[0, 0, 0]
    for first, second, frequency in ((0, 2, 1.0), (1, 3, 0.01)):
        angle = position * frequency
        a = x[first] * math.cos(angle) - x[second] * math.sin(angle)
        b = x[second] * math.cos(angle) + x[first] * math.sin(angle)
        torch.testing.assert_close(rotated[[first, second]], torch.stack([a, b]))


def test_angles_or_their_cosine_and_sine():
    t, freqs = torch.randn(2, 5, 3, 8), RotaryEmbedding(8)(5)
    assert torch.equal(apply_rotary_pos_emb(t, freqs), apply_rotary_pos_emb(t, (freqs.cos(), freqs.sin())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_behind_the_rotated_ones_pass(dtype):
    t = torch.randn(1, 5, 2, 16).to(dtype)
    rotated = apply_rotary_pos_emb(t, RotaryEmbedding(8)(5))
    assert rotated.dtype == dtype
    assert torch.equal(rotated[..., 8:], t[..., 8:])
    assert not torch.equal(rotated[:, 1:, :, :8], t[:, 1:, :, :8])


def test_logn_begins_behind_the_training_length():
    positions = torch.tensor([[0, 30, 31, 32, 99]])
    scale = logn_scale(positions, 32)
    assert scale.shape == (1, 5, 1, 1)
    expected = [1.0, 1.0, 1.0, math.log(33, 32), math.log(100, 32)]
    torch.testing.assert_close(scale.flatten(), torch.tensor(expected))


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert positions_from_mask(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 2, 2]]
    assert positions_from_mask(mask, 2).tolist() == [[1, 2], [3, 4], [2, 2]]
