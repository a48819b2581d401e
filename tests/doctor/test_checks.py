"""Each check passes on a model that is well, and finds the illness that it is for."""

import copy
import inspect
import math
import types
from functools import partial

import pytest
import torch
from transformers import GenerationMixin
from transformers.cache_utils import StaticLayer

import qwen1.modeling_qwen as modeling
import qwen1.ntk_qwen as ntk_qwen
from qwen1 import QWenInt8Cache, QWenLMHeadModel, QWenModel
from qwen1.cache_qwen import QWenGrowingLayer
from qwen1.doctor import backend_checks, model_checks, tokenizer_checks
from qwen1.doctor.findings import Check, State, perform
from qwen1.doctor.patient import open_patient
from qwen1.doctor.plain_model import plain_alpha, plain_logits
from qwen1.ntk_qwen import ntk_alpha
from qwen1.programs.shipped import TINY_CHAT

MODEL = {check.name for check in model_checks.model_checks(None)}
TOKENIZERS = {check.name for check in tokenizer_checks.tokenizer_checks(None)}


def results(patient, *names):
    """The findings of the checks of model and tokenizers, all or those named, by their names."""
    checks = [*model_checks.model_checks(patient), *tokenizer_checks.tokenizer_checks(patient)]
    return {check.name: perform(check) for check in checks if not names or check.name in names}


def failed(patient, *names):
    return {name: finding.outcome.detail for name, finding in results(patient, *names).items() if finding.failed}


def test_all_pass_on_a_model_that_is_well(patient):
    found = results(patient)
    assert set(found) == MODEL | TOKENIZERS
    assert {name: f.outcome.detail for name, f in found.items() if f.outcome.state is not State.OK} == {}


def test_attention_and_bitsandbytes_pass(patient):
    checks = {check.name: check for check in backend_checks.backend_checks(patient)}
    assert perform(checks["eager"]).outcome.state is State.OK
    assert perform(checks["sdpa"]).outcome.figures["largest"] > 0
    pytest.importorskip("bitsandbytes")
    for name in ("bitsandbytes, 8 bits", "bitsandbytes, 4 bits"):
        outcome = perform(checks[name]).outcome
        assert outcome.state is State.OK and outcome.figures["largest"] > 1e-3  # it was quantised, indeed


# --- the cache ---


def swallow(forward, cached_only):
    """A forward that ignores the cache, as one does that knows it by another name."""

    @torch.no_grad()
    def broken(self, input_ids=None, past_key_values=None, cache=None, **kwargs):
        if cached_only and past_key_values is None and cache is None:
            return forward(self, input_ids=input_ids, **kwargs)
        kwargs.pop("attention_mask", None)
        return forward(self, input_ids=input_ids, **kwargs)

    broken.__signature__ = inspect.signature(forward)
    return broken


def test_a_cache_that_generate_hands_over_under_another_name_is_found(patient, monkeypatch):
    """As on transformers 5.24 with code for 5.23: forward itself is right, what generate passes doesn't reach it."""
    prepare = GenerationMixin.prepare_inputs_for_generation

    def renamed(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        for name in ("cache", "past_key_values"):
            inputs.pop(name, None)
        inputs.pop("attention_mask", None)
        return inputs

    monkeypatch.setattr(QWenLMHeadModel, "prepare_inputs_for_generation", renamed)
    found = failed(patient)
    assert set(found) >= {"greedy replies", "generate against one pass", "generate beyond the length", "static cache"}
    for name in ("generate against one pass", "generate beyond the length", "static cache"):
        assert "each step sees a single token: the cache of generate is lost on the way" in found[name]
    well = {"plain arithmetic", "long texts (NTK, LogN)", "cache, token by token", "cache, in chunks"}
    assert not set(found) & (well | TOKENIZERS)


def test_a_forward_that_ignores_its_cache_is_found(patient, monkeypatch):
    monkeypatch.setattr(QWenLMHeadModel, "forward", swallow(QWenLMHeadModel.forward, cached_only=True))
    found = failed(patient)
    assert "each step sees a single token: the cache that forward is given" in found["cache, token by token"]
    assert "each step sees" in found["cache, in chunks"] and "generate against one pass" in found
    assert not set(found) & ({"plain arithmetic", "long texts (NTK, LogN)"} | TOKENIZERS)


def test_a_cache_that_forgets_its_first_token_is_found(patient, monkeypatch):
    update = QWenGrowingLayer.update

    def forgetful(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        return (
            (keys, torch.cat([values[..., :1, :] * 0, values[..., 1:, :]], dim=-2))
            if keys.shape[-2] > 8
            else (keys, values)
        )

    monkeypatch.setattr(QWenGrowingLayer, "update", forgetful)
    found = failed(patient)
    assert {"cache, token by token", "cache, in chunks", "generate against one pass"} <= set(found)
    assert "plain arithmetic" not in found and "sees" not in found["cache, token by token"]


def test_an_int8_cache_with_wrong_scales_is_found(patient, monkeypatch):
    quantize = QWenInt8Cache.__init__.__globals__["quantize_chunk"]

    def broken(states):
        codes, scale, zero = quantize(states)
        return codes, scale * 2, zero

    monkeypatch.setitem(QWenInt8Cache.__init__.__globals__, "quantize_chunk", broken)
    assert set(failed(patient)) == {"int8 cache"}


def test_a_static_cache_that_goes_wrong_is_found(patient, monkeypatch):
    update = StaticLayer.update
    monkeypatch.setattr(
        StaticLayer, "update", lambda self, k, v, *args, **kwargs: update(self, k, v * 0, *args, **kwargs)
    )
    assert set(failed(patient)) == {"static cache"}


# --- arithmetic ---


def test_a_wrong_logn_is_found(patient, monkeypatch):
    """In every way alike, so that no comparison of two of them could find it."""
    scale = modeling.logn_scale
    monkeypatch.setattr(modeling, "logn_scale", lambda positions, length: scale(positions, length) ** 0.5)
    assert set(failed(patient)) == {"long texts (NTK, LogN)"}


def test_a_logn_that_counts_from_the_chunk_is_found(patient, monkeypatch):
    scale = modeling.logn_scale
    monkeypatch.setattr(modeling, "logn_scale", lambda positions, length: scale(positions - positions[:, :1], length))
    assert {"cache, token by token", "cache, in chunks", "generate beyond the length"} <= set(failed(patient))


def test_a_wrong_alpha_is_found(patient, monkeypatch):
    monkeypatch.setattr(ntk_qwen, "ntk_alpha", lambda lengths, length: ntk_alpha(lengths, length) * 2 - 1)
    found = set(failed(patient))
    assert {"long texts (NTK, LogN)", "generate beyond the length"} <= found and "plain arithmetic" not in found


def test_an_alpha_that_changes_while_decoding_is_found(patient, monkeypatch):
    def chosen_anew(cache, rows, choose, program_alpha):
        return choose().expand(rows, -1)

    monkeypatch.setattr(ntk_qwen, "resolve_ntk_alpha", chosen_anew)
    assert "cache, token by token" in failed(patient)


def test_wrong_rotation_is_found(patient, monkeypatch):
    rotate = modeling.apply_rotary_pos_emb
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda t, freqs: rotate(t, (freqs[0], freqs[1] * 0.99)))
    assert {"plain arithmetic", "long texts (NTK, LogN)"} <= set(failed(patient))


def test_a_weight_that_is_not_finite_is_found(patient):
    weight = patient.model.transformer.h[3].ln_1.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[5] = torch.nan
        found = failed(patient)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert {"greedy replies", "plain arithmetic", "cache, token by token", "batch against single"} <= set(found)
    assert "NaN" in found["plain arithmetic"]


# --- batches and streams ---


def test_padding_that_is_attended_to_is_found(patient, monkeypatch):
    forward = QWenModel.forward

    def unmasked(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, attention_mask=None, **kwargs)

    monkeypatch.setattr(QWenModel, "forward", unmasked)
    assert {"batch against single"} <= set(failed(patient)) <= {"batch against single", "static cache"}


def test_positions_that_count_padding_are_found(patient, monkeypatch):
    forward = QWenModel.forward

    def shifted(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, position_ids=None if position_ids is None else position_ids * 2, **kwargs)

    monkeypatch.setattr(QWenModel, "forward", shifted)
    assert "batch against single" in failed(patient, "batch against single")


@pytest.mark.parametrize("change", ["shorter", "taken back", "none"])
def test_a_stream_that_differs_from_chat_is_found(patient, monkeypatch, change):
    stream = QWenLMHeadModel.chat_stream

    def broken(self, *args, **kwargs):
        texts = list(stream(self, *args, **kwargs))
        return {"shorter": texts[:-1], "taken back": [texts[-1], *texts], "none": []}[change]

    monkeypatch.setattr(QWenLMHeadModel, "chat_stream", broken)
    assert set(failed(patient)) == {"stream against chat"}


def test_another_reply_is_found_and_shown(patient, monkeypatch):
    monkeypatch.setattr(QWenLMHeadModel, "chat", lambda *args, **kwargs: ("Something else", []))
    detail = failed(patient)["greedy replies"]
    assert "'Something else'" in detail and model_checks.KNOWN_REPLIES[0][1] in detail


# --- tokenizers ---


def shifted(tokenizer, monkeypatch, method, change):
    original = getattr(tokenizer, method)
    monkeypatch.setattr(tokenizer, method, lambda *args, **kwargs: change(original(*args, **kwargs), *args, **kwargs))


@pytest.mark.parametrize("name", ["slow", "fast"])
def test_shifted_ids_are_found(patient, monkeypatch, name):
    shifted(getattr(patient, name), monkeypatch, "encode", lambda ids, *args, **kwargs: [i + 1 for i in ids])
    found = failed(patient, *TOKENIZERS)
    assert {"both give the same ids", "decoding gives the text"} <= set(found)
    assert "tiktoken gives" in found["both give the same ids"]


@pytest.mark.parametrize("text", ["  two\n\n\n   three\t\ttabs   \r\n \u3000 \u00a0 ", tokenizer_checks.TEXTS[4]])
def test_one_text_that_differs_is_found_and_named(patient, monkeypatch, text):
    shifted(patient.fast, monkeypatch, "encode", lambda ids, got, **kwargs: ids[:-1] if got == text else ids)
    assert f"{text!r:.20}" in failed(patient, *TOKENIZERS)["both give the same ids"]


def test_text_that_becomes_a_control_token_is_found(patient, monkeypatch):
    encode = patient.slow.encode
    monkeypatch.setattr(patient.slow, "encode", lambda text, **kwargs: encode(text))
    found = failed(patient, *TOKENIZERS)
    assert "becomes control token" in found["text is no control token"]
    assert "both give the same ids" in found


def test_a_template_that_differs_from_chat_is_found(patient, monkeypatch):
    monkeypatch.setattr(
        patient.fast, "chat_template", patient.fast.chat_template.replace("<|im_start|>", "<|im_start|> ")
    )
    assert set(failed(patient, *TOKENIZERS)) == {"chat template is the prompt"}
    monkeypatch.setattr(patient.fast, "chat_template", None)
    assert "upgrade adds it" in failed(patient, *TOKENIZERS)["chat template is the prompt"]


def test_a_tokenizer_that_cannot_be_loaded_fails_only_what_needs_it(patient, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("no such\nvocabulary")

    vars(patient).pop("fast", None)
    monkeypatch.setattr("qwen1.doctor.patient.QWenTokenizerFast.from_pretrained", broken)
    found = failed(patient)
    assert set(found) == TOKENIZERS and set(found.values()) == {"OSError: no such vocabulary"}


# --- attention and quantisation ---


def test_kernels_for_half_precision_are_tried_on_a_copy(patient, monkeypatch):
    """Here with sdpa in their place, which takes bfloat16 on a CPU too."""
    monkeypatch.setattr(backend_checks, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(backend_checks, "version_of", lambda name: "2.8")
    monkeypatch.setattr(type(patient.model), "device", types.SimpleNamespace(type="cuda"))
    tried = []
    monkeypatch.setattr(
        backend_checks, "check_attention", lambda patient, name, model: tried.append((name, model.dtype))
    )
    for name in ("qwen_varlen", "flash_attention_2"):
        backend_checks.check_flash(patient, name)
    assert tried == [("qwen_varlen", torch.bfloat16), ("flash_attention_2", torch.bfloat16)]
    assert patient.model.dtype == torch.float32
    monkeypatch.setattr(backend_checks, "is_flash_attn_2_available", lambda: False)
    assert backend_checks.check_flash(patient, "flash_attention_2").state is State.FAILED
    monkeypatch.undo()
    outcome = backend_checks.check_attention(patient, "sdpa", copy.deepcopy(patient.model).to(torch.bfloat16))
    assert outcome.state is State.OK and outcome.detail.startswith("bfloat16") and outcome.figures["largest"] > 1e-3
    assert "needs a CUDA device" in backend_checks.check_flash(patient, "qwen_varlen").detail


def test_attention_that_ignores_padding_is_found(patient, monkeypatch):
    functions = modeling.ALL_ATTENTION_FUNCTIONS
    sdpa = functions["sdpa"]

    def unmasked(module, query, key, value, attention_mask, **kwargs):
        if query.shape[2] == 1:
            attention_mask = None
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    get = type(functions).get_interface
    monkeypatch.setattr(
        type(functions),
        "get_interface",
        lambda self, name, default: unmasked if name == "sdpa" else get(self, name, default),
    )
    checks = {check.name: check for check in backend_checks.backend_checks(patient)}
    assert perform(checks["sdpa"]).failed and not perform(checks["eager"]).failed


def test_a_quantisation_that_goes_wrong_is_found(monkeypatch):
    monkeypatch.setattr(backend_checks, "version_of", lambda name: "1.0")
    load = QWenLMHeadModel.from_pretrained

    def worse(*args, quantization_config=None, **kwargs):
        model = load(*args, **kwargs)
        if quantization_config is not None:
            model.lm_head.weight.data = model.lm_head.weight.data.roll(1, 0)
        return model

    monkeypatch.setattr(QWenLMHeadModel, "from_pretrained", worse)
    run = partial(backend_checks.check_quantised, "anything", lambda: "asked for", backend_checks.FOUR_BITS)
    assert perform(Check("quantisation", "anything", run)).failed


def test_a_quantisation_that_transformers_lacks_is_absent(monkeypatch):
    def lacking():
        raise NotImplementedError("not available yet")

    monkeypatch.setattr(backend_checks, "version_of", lambda name: "1.0")
    outcome = backend_checks.check_quantised("hqq", lacking, backend_checks.EIGHT_BITS)
    assert outcome.state is State.ABSENT and "hqq 1.0" in outcome.detail and "not available yet" in outcome.detail


def test_what_is_not_installed_is_absent_and_names_the_command(patient, monkeypatch):
    monkeypatch.setattr(backend_checks, "version_of", lambda name: None)
    checks = [
        c for c in backend_checks.backend_checks(patient) if c.group == "quantisation" or c.name == "flash_attention_2"
    ]
    for check in checks:
        outcome = perform(check).outcome
        assert outcome.state is State.ABSENT and "pip install" in outcome.detail


def test_a_package_that_cannot_be_imported_has_failed(monkeypatch):
    monkeypatch.setattr(backend_checks, "version_of", lambda name: "1.0")
    run = partial(backend_checks.check_importable, "gptqmodel", "no_module_of_this_name", "GPTQ")
    finding = perform(Check("quantisation", "gptqmodel", run))
    assert finding.failed and "no_module_of_this_name" in finding.outcome.detail
    assert backend_checks.check_importable("json", "json", "JSON").state is State.OK


def test_flex_attention_is_compiled_only_if_asked_to(patient, monkeypatch):
    monkeypatch.setattr(backend_checks.shutil, "which", lambda name: f"/bin/{name}")
    outcome = backend_checks.check_flex(patient, slow=False)
    assert outcome.state is State.ABSENT and "--slow" in outcome.detail
    monkeypatch.setattr(backend_checks.shutil, "which", lambda name: None)
    assert "C++ compiler" in backend_checks.check_flex(patient, slow=True).detail


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "qwen_varlen"])
def test_attention_on_a_gpu(name):
    checks = {check.name: check for check in backend_checks.backend_checks(open_patient(TINY_CHAT, "cuda"))}
    finding = perform(checks[name])
    assert finding.outcome.state is State.OK, finding.outcome.detail


# --- what it is compared with ---


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 128, 129, 1000])
def test_plain_alpha_is_the_published_formula(length):
    expected = max(2 ** (math.ceil(math.log(length / 32, 2)) + 1) - 1, 1)
    assert plain_alpha(length, 32) == expected == float(ntk_alpha(torch.tensor([length]), 32))


@pytest.mark.parametrize(
    "case",
    ["aug_ntk_logn", "aug_plain", "aug_partial_rotary", "aug_residual_post_ln", "aug_rotary_base", "dec_ntk_logn"],
)
def test_plain_logits_are_those_of_the_published_code(case, golden_model, golden_tensors):
    """Prompts and, behind them under their alpha, decoded tokens."""
    model, tensors = golden_model(case), golden_tensors(case)
    lengths = [int(name.removeprefix("ids_")) for name in tensors if name.startswith("ids_")]
    assert len(lengths) >= 2
    for length in lengths:
        expected = torch.cat([tensors[f"prefill_{length}"], tensors[f"decode_{length}"]], dim=1)[0]
        got = plain_logits(model, tensors[f"ids_{length}"][0], prompt=length)
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
