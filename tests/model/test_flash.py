"""FlashSelfAttention: its wiring on a CPU with a reference in the kernel's place, the kernel itself on a GPU."""

import functools
import inspect
import sys
import types

import pytest
import torch

import qwen1.attention_qwen as attention
import qwen1.modeling_qwen as modeling
from qwen1 import FlashSelfAttention
from qwen1.attention_qwen import FLASH_IMPLEMENTATION, varlen_attention
from qwen1.positions_qwen import packed_starts


def reference_kernel(q, k, v, starts_q, starts_k, longest_q, longest_k, dropout_p, softmax_scale, causal):
    """Attention text by text; with causal, queries are the last tokens of their text."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    groups = q.shape[1] // k.shape[1]
    output = torch.empty_like(q)
    for index in range(len(starts_q) - 1):
        queries = slice(starts_q[index], starts_q[index + 1])
        keys = slice(starts_k[index], starts_k[index + 1])
        key, value = (x[keys].repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[queries], key) * scale
        if causal:
            length, past = scores.shape[1], scores.shape[2] - scores.shape[1]
            visible = torch.ones(length, length + past).tril(past).bool().to(scores.device)
            scores = scores.masked_fill(~visible, -torch.inf)
        output[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    return output


@pytest.fixture
def kernel(monkeypatch):
    """Put the reference in the kernel's place and record what it is called with."""
    calls = []

    def record(*arguments, **options):
        names = ("q", "k", "v", "starts_q", "starts_k", "longest_q", "longest_k")
        calls.append(dict(zip(names, arguments, strict=True)) | options)
        return reference_kernel(*arguments, **options)

    for module in (modeling, attention):  # whole rows, padded ones
        monkeypatch.setattr(module, "varlen_attention", record)
    return calls


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return lambda rows, length, heads=4: torch.randn(rows, length, heads, 16, generator=generator)


def test_lengths_scale_and_causality(kernel, tensors):
    q, k, v = tensors(3, 2), tensors(3, 5), tensors(3, 5)
    output = FlashSelfAttention(causal=True, softmax_scale=0.5, attention_dropout=0.3).eval()(q, k, v)
    assert output.shape == (3, 2, 4, 16)
    (call,) = kernel
    assert call["q"].shape == (6, 4, 16) and call["k"].shape == call["v"].shape == (15, 4, 16)
    assert call["starts_q"].tolist() == [0, 2, 4, 6] and call["starts_k"].tolist() == [0, 5, 10, 15]
    assert call["starts_q"].dtype == call["starts_k"].dtype == torch.int32
    assert (call["longest_q"], call["longest_k"]) == (2, 5)
    assert (call["dropout_p"], call["softmax_scale"], call["causal"]) == (0.0, 0.5, True)
    assert torch.equal(call["q"].view_as(q), q)


def test_documented_defaults(kernel, tensors):
    module = FlashSelfAttention()
    assert (module.causal, module.softmax_scale, module.dropout_p) == (False, None, 0.0)
    module(tensors(1, 3), tensors(1, 3), tensors(1, 3))
    assert (kernel[0]["softmax_scale"], kernel[0]["causal"]) == (None, False)


def test_dropout_only_while_training(kernel, tensors):
    module, q = FlashSelfAttention(causal=True, attention_dropout=0.3), tensors(1, 3)
    module.train()(q, q, q)
    module.eval()(q, q, q)
    module.train()(q, q, q)
    assert [call["dropout_p"] for call in kernel] == [0.3, 0.0, 0.3]  # evaluation leaves no trace


def test_several_tokens_on_a_cache_stay_causal(kernel, tensors):
    q, k, v = tensors(2, 6), tensors(2, 6), tensors(2, 6)
    module = FlashSelfAttention(causal=True).eval()
    whole = module(q, k, v)
    torch.testing.assert_close(module(q[:, 4:], k, v), whole[:, 4:])


@pytest.mark.parametrize("real", [[[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]])
def test_padding_is_taken_out(kernel, tensors, real):
    mask = torch.tensor(real)
    q, k, v = tensors(2, 5), tensors(2, 5, 2), tensors(2, 5, 2)
    module = FlashSelfAttention(causal=True).eval()
    output = module(q, k, v, mask)
    assert kernel[0]["starts_q"].tolist() == kernel[0]["starts_k"].tolist() == [0, 3, 8]
    for row in range(2):
        kept = mask[row].bool()
        alone = module(*(x[row : row + 1, kept] for x in (q, k, v)))
        torch.testing.assert_close(output[row, kept], alone[0])
        assert (output[row, ~kept] == 0).all()


def test_padded_decoding_counts_each_row(kernel, tensors):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    FlashSelfAttention(causal=True).eval()(tensors(2, 1), tensors(2, 5), tensors(2, 5), mask)
    assert kernel[0]["starts_q"].tolist() == [0, 1, 2]
    assert kernel[0]["starts_k"].tolist() == [0, 3, 8]


def test_packed_documents_do_not_see_each_other(kernel, tensors):
    q, k, v = tensors(1, 7), tensors(1, 7), tensors(1, 7)
    starts = packed_starts(torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    assert starts.tolist() == [0, 3, 7] and starts.dtype == torch.int32
    module = FlashSelfAttention(causal=True).eval()
    output = module(q, k, v, cu_seqlens=starts)
    assert (kernel[0]["longest_q"], kernel[0]["longest_k"]) == (4, 4)
    for part in (slice(0, 3), slice(3, 7)):
        torch.testing.assert_close(output[:, part], module(q[:, part], k[:, part], v[:, part]))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Torch's attention says that it has a kernel for what it is given."""
    monkeypatch.setattr(attention, "_is_flash_input", lambda q: True)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda given: True)


@pytest.mark.parametrize(("length", "keys", "causal"), [(6, 6, True), (6, 6, False), (4, 6, False)])
def test_whole_rows_are_left_to_torch_on_a_gpu(kernel, monkeypatch, tensors, length, keys, causal, as_on_a_gpu):
    mixed = tensors(2, length, 3 * 4).requires_grad_()  # its parts aren't contiguous
    k, v = (tensors(2, keys, 2).requires_grad_() for _ in range(2))
    module = FlashSelfAttention(causal=causal, softmax_scale=0.4).eval()
    output = module(mixed[:, :, 4:8], k, v)
    found = torch.autograd.grad(output.sum(), (mixed, k, v))
    assert not kernel and output.is_contiguous()
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda given: False)
    expected = module(mixed[:, :, 4:8], k, v)
    assert len(kernel) == 1, "what torch would do by its plain products needs too much memory"
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), (mixed, k, v)))


def test_what_torch_cannot_do_for_whole_rows_is_left_to_the_other_kernel(kernel, monkeypatch, tensors, as_on_a_gpu):
    q, k = tensors(1, 3), tensors(1, 6)
    FlashSelfAttention(causal=True).eval()(q, k, k)
    FlashSelfAttention(causal=True, attention_dropout=0.1).train()(k, k, k)
    assert [call["dropout_p"] for call in kernel] == [0.0, 0.1]
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    FlashSelfAttention(causal=True).eval()(k, k, k)
    assert len(kernel) == 3, "flash-attn is asked for itself where it is installed"


@pytest.mark.parametrize(
    ("positions", "starts"),
    [
        ([[0, 1, 2]], None),
        ([[0, 1], [0, 1]], None),
        ([[5]], None),
        ([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]], [0, 2, 5, 10]),
        ([[5, 6, 7, 0, 1, 2, 0, 1]], [0, 3, 6, 8]),
        ([[0, 1, 2, 7, 8, 9]], [0, 3, 6]),
    ],
)
def test_where_packed_texts_start(positions, starts):
    found = packed_starts(torch.tensor(positions))
    assert starts == (None if found is None else found.tolist())


@pytest.fixture
def flash_model(kernel, tiny_model):
    """A model on our implementation and the same weights on eager."""
    return tiny_model(FLASH_IMPLEMENTATION), tiny_model("eager")


@torch.no_grad()
def test_model_prefill_and_decoding(flash_model, kernel):
    model, eager = flash_model
    ids = torch.arange(1, 44)[None]
    output, expected = model(ids[:, :40], use_cache=True), eager(ids[:, :40], use_cache=True)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    more = model(ids[:, 40:], past_key_values=output.past_key_values).logits
    torch.testing.assert_close(
        more, eager(ids[:, 40:], past_key_values=expected.past_key_values).logits, atol=1e-4, rtol=0
    )
    assert all(call["causal"] and call["softmax_scale"] == 0.25 for call in kernel)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}])
def test_model_generates_in_a_padded_batch(flash_model, settings):
    model, eager = flash_model
    ids = torch.arange(1, 81).view(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    settings = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=256, **settings)
    assert model.generate(ids, **settings).tolist() == eager.generate(ids, **settings).tolist()


@torch.no_grad()
def test_model_with_a_static_cache_and_no_mask(flash_model, tiny_config):
    from transformers import StaticCache

    model, eager = flash_model
    ids = torch.arange(1, 43)[None]
    cache = StaticCache(config=model.config, max_cache_len=64)
    logits = [model(part, past_key_values=cache).logits for part in (ids[:, :40], ids[:, 40:41], ids[:, 41:])]
    expected_cache = eager(ids[:, :40], use_cache=True)
    expected = [expected_cache.logits]
    for index in (40, 41):
        step = eager(ids[:, index : index + 1], past_key_values=expected_cache.past_key_values)
        expected.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), torch.cat(expected, dim=1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", FLASH_IMPLEMENTATION])
@torch.no_grad()
def test_model_reads_packed_documents_apart(kernel, tiny_model, implementation, use_cache):
    model = tiny_model(implementation)
    first, second = torch.arange(1, 11)[None], torch.arange(20, 60)[None]
    positions = torch.cat([torch.arange(10), torch.arange(40)])[None]
    ids = torch.cat([first, second], dim=1)
    ids, positions = torch.cat([ids, ids]), positions  # one row of positions for both
    packed = model(ids, position_ids=positions, use_cache=use_cache).logits
    for row in range(2):
        torch.testing.assert_close(packed[row, :10], model(first).logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(packed[row, 10:], model(second).logits[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_starts_counted_by_a_collator_are_used(flash_model, kernel):
    model, _ = flash_model
    ids = torch.arange(1, 31)[None]
    starts = torch.tensor([0, 10, 30], dtype=torch.int32)
    counted = model(ids, use_cache=False, cu_seq_lens_q=starts).logits  # positions alone would say one text
    assert all(call["starts_q"] is starts for call in kernel)
    assert not torch.allclose(counted, model(ids, use_cache=False).logits, atol=1e-2)


@torch.no_grad()
def test_packing_is_looked_for_once_a_call(flash_model, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "packed_starts", lambda positions: calls.append(positions))
    flash_model[0](torch.arange(5)[None], use_cache=False)
    assert len(calls) == 1


def test_the_kernel_is_left_out_of_full_graphs(flash_model):
    model, eager = flash_model
    assert not model._can_compile_fullgraph and eager._can_compile_fullgraph


@pytest.mark.parametrize("training", [True, False])
def test_model_passes_its_dropout_on(kernel, tiny_model, training):
    tiny_model(FLASH_IMPLEMENTATION, attn_pdrop=0.25).train(training)(torch.arange(5)[None])
    assert {call["dropout_p"] for call in kernel} == {0.25 if training else 0.0}


def test_no_kernel_for_a_cpu_or_float32(tensors):
    q = tensors(1, 3)
    with pytest.raises(ValueError, match=r"torch.float32 on cpu.*attn_implementation='sdpa'"):
        FlashSelfAttention()(q, q, q)


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU, to see which kernel would be called and how."""

    is_cuda = True


@pytest.fixture
def half():
    return [torch.randn(4, heads, 16, dtype=torch.bfloat16).as_subclass(OnCuda) for heads in (4, 2, 2)]


STARTS = torch.tensor([0, 4], dtype=torch.int32)


def test_flash_attn_is_called_where_it_is_installed(half, monkeypatch):
    calls = []

    def flash_attn_varlen_func(*arguments, softmax_scale, causal):
        calls.append((arguments, softmax_scale, causal))
        return "output"

    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    module = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert varlen_attention(*half, STARTS, STARTS, 4, 4, 0.1, 0.5, True) == "output"
    ((arguments, scale, causal),) = calls
    assert all(given is tensor for given, tensor in zip(arguments, [*half, STARTS, STARTS], strict=False))
    assert arguments[5:] == (4, 4, 0.1) and scale == 0.5 and causal is True


def torchs_kernel(calls, shares_heads):
    """Stands for torch's kernel, with its signature of 2.13 or, where query heads can't share key heads, of 2.11."""
    kinds = {"q k v cu_seq_q cu_seq_k max_q max_k": inspect.Parameter.POSITIONAL_OR_KEYWORD}
    kinds["scale window_size" + " enable_gqa" * shares_heads] = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.Signature([inspect.Parameter(n, kind) for names, kind in kinds.items() for n in names.split()])

    def kernel(*arguments, **options):
        calls.append(signature.bind(*arguments, **options).arguments)
        return "output"

    kernel.__signature__ = signature
    return kernel


@pytest.mark.parametrize("shares_heads", [True, False])
@pytest.mark.parametrize(("causal", "window"), [(True, (-1, 0)), (False, (-1, -1))])
def test_torch_is_called_otherwise(half, monkeypatch, causal, window, shares_heads):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls = []
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(varlen, "varlen_attn", torchs_kernel(calls, shares_heads))
    assert varlen_attention(*half, STARTS, STARTS, 4, 4, 0.0, 0.5, causal) == "output"
    (call,) = calls
    assert (call["scale"], call["window_size"]) == (0.5, window)
    assert (call["max_q"], call["max_k"]) == (4, 4) and call["cu_seq_q"] is STARTS
    assert call.get("enable_gqa", False) is shares_heads
    assert torch.equal(call["k"], half[1] if shares_heads else half[1].repeat_interleave(2, dim=1))


def test_the_arguments_are_those_of_the_torch_installed(half, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature, calls = inspect.signature(varlen.varlen_attn), []
    if "window_size" not in signature.parameters:
        pytest.skip("before torch 2.11 it can't be causal")

    @functools.wraps(varlen.varlen_attn)
    def varlen_attn(*arguments, **options):
        calls.append(signature.bind(*arguments, **options).arguments)
        return "output"

    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    varlen_attention(*half, STARTS, STARTS, 4, 4, 0.0, 0.5, True)
    (call,) = calls
    assert (call["max_q"], call["max_k"]) == (4, 4) and call["cu_seq_q"] is STARTS and call["window_size"] == (-1, 0)


def test_what_torch_cannot_do_is_said(half, monkeypatch):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="attn_pdrop=0.1 needs flash-attn"):
        varlen_attention(*half, STARTS, STARTS, 4, 4, 0.1, None, True)
    without_window = types.SimpleNamespace(varlen_attn=lambda q, k, v: None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", without_window)
    with pytest.raises(ImportError, match="torch >= 2.11") as caught:
        varlen_attention(*half, STARTS, STARTS, 4, 4, 0.0, None, True)
    assert "no window_size" in str(caught.value.__cause__)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ImportError, match="flash-attn >= 2.1 or torch >= 2.11"):
        varlen_attention(*half, STARTS, STARTS, 4, 4, 0.0, None, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_kernel_on_a_gpu(tensors, dtype, causal):
    q, k, v = (tensors(2, length, heads).cuda().to(dtype) for length, heads in ((5, 4), (9, 2), (9, 2)))
    mask = torch.ones(2, 9, device="cuda", dtype=torch.long)
    mask[0, :4] = 0
    module = FlashSelfAttention(causal=causal).eval()
    output = module(q, k, v, mask)
    kept_q, kept_k = mask[:, 4:].bool(), mask.bool()
    starts = [torch.tensor(values, device="cuda", dtype=torch.int32) for values in ([0, 5, 10], [0, 5, 14])]
    arguments = (q[kept_q].float(), k[kept_k].float(), v[kept_k].float(), *starts, 5, 9, 0.0, None, causal)
    torch.testing.assert_close(output[kept_q].float(), reference_kernel(*arguments), atol=2e-2, rtol=0)
