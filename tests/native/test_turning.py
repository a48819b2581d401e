"""Rotation of a prompt by a kernel, beside the plain operations of torch."""

import pytest
import torch

from qwen1.native_qwen import wait
from qwen1.rotary_qwen import apply_rotary_pos_emb
from qwen1.translating_qwen import SWITCH
from qwen1.turning_qwen import turned

pytestmark = pytest.mark.skipif(wait() is None, reason="needs g++ or clang++")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def numbers(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * scale).to(dtype)


def in_one_pass(function, *arguments):
    """What a kernel gives, which must have been asked."""
    result = function(*arguments)
    assert result is not None
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("size", "rotated"), [(8, 8), (8, 4), (64, 64), (128, 32), (10, 6)])
def test_rotation(dtype, rows, size, rotated):
    packed = numbers(2, 5, 3 * 4 * size, dtype=dtype)
    heads = packed[..., 4 * size : 8 * size].view(2, 5, 4, size)  # as a part of the product of queries, keys, values
    angles = numbers(rows, 5, 1, rotated // 2, scale=50.0)
    angles = torch.cat((angles, angles), -1)
    cosine, sine = angles.cos(), angles.sin()
    first, second = heads[..., :rotated].float().chunk(2, -1)
    expected = torch.cat((first, second), -1) * cosine + torch.cat((-second, first), -1) * sine
    expected = torch.cat((expected.to(dtype), heads[..., rotated:]), -1)
    torch.testing.assert_close(in_one_pass(turned, heads, cosine, sine), expected, rtol=0, atol=0)
    torch.testing.assert_close(apply_rotary_pos_emb(heads, (cosine, sine)), expected, rtol=0, atol=0)


def test_rotation_of_heads_that_lie_otherwise():
    heads = numbers(2, 4, 5, 8).transpose(1, 2)
    angles = numbers(1, 5, 1, 8)
    expected = in_one_pass(turned, heads.contiguous(), angles.cos(), angles.sin())
    torch.testing.assert_close(in_one_pass(turned, heads, angles.cos(), angles.sin()), expected, rtol=0, atol=0)


HEADS, ANGLES = (2, 5, 4, 8), (1, 5, 1, 8)


@pytest.mark.parametrize(
    "heads, cosine, sine",
    [
        (numbers(*HEADS), numbers(*ANGLES).double(), numbers(*ANGLES)),
        (numbers(*HEADS), numbers(1, 4, 1, 8), numbers(1, 4, 1, 8)),
        (numbers(*HEADS), numbers(*ANGLES), numbers(1, 5, 1, 6)),
        (numbers(*HEADS), numbers(1, 5, 1, 10), numbers(1, 5, 1, 10)),
        (numbers(*HEADS), numbers(1, 5, 1, 7), numbers(1, 5, 1, 7)),
        (numbers(*HEADS), numbers(3, 5, 1, 8), numbers(3, 5, 1, 8)),
        (numbers(2, 5, 4, 16)[..., ::2], numbers(*ANGLES), numbers(*ANGLES)),
        (numbers(5, 4, 8), numbers(5, 1, 8), numbers(5, 1, 8)),
        (numbers(0, 5, 4, 8), numbers(*ANGLES), numbers(*ANGLES)),
    ],
    ids=["double", "fewer", "two-sizes", "wider", "odd", "rows", "stride", "flat", "empty"],
)
def test_heads_that_are_left_to_torch(heads, cosine, sine):
    assert turned(heads, cosine, sine) is None


def test_what_is_left_to_torch_altogether(monkeypatch):
    heads, angles = numbers(*HEADS), numbers(*ANGLES)
    with torch.autocast("cpu", torch.bfloat16):
        assert turned(heads, angles, angles) is None
    with torch.enable_grad():
        assert turned(heads, angles, angles) is None
    monkeypatch.setenv(SWITCH, "0")
    assert turned(heads, angles, angles) is None


def test_gradients_are_those_of_torch():
    heads, angles = numbers(*HEADS).requires_grad_(), numbers(*ANGLES)
    with torch.enable_grad():
        apply_rotary_pos_emb(heads, (angles.cos(), angles.sin())).sum().backward()
    assert heads.grad.abs().sum() > 0
