"""GPTQ and AWQ through the commands: bits kept on the way to other names, or full weights that are the same numbers."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen1.conversion.checking.logits import compare
from qwen1.conversion.checking.models import load_model
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.dequantised import unpack
from qwen1.conversion.formats.packed import packed_hf_to_qwen, packed_qwen_to_hf, pieces
from qwen1.conversion.formats.packed_settings import settings_for_hf, settings_for_qwen
from qwen1.conversion.formats.quantised import read_packing
from qwen1.conversion.formats.qwen import read_qwen
from qwen1.conversion.formats.qwen2 import RopeScaling
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.conversion import plan_conversion
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
METHODS = {
    "gptq, 4 bits": GPTQ,
    "gptq, 8 bits": {**GPTQ, "bits": 8},
    "gptq, 3 bits": {**GPTQ, "bits": 3},
    "gptq, 2 bits": {**GPTQ, "bits": 2},
    "gptq, zeros of its own": {**GPTQ, "sym": False},
    "gptq, 8 bits, zeros of its own": {**GPTQ, "bits": 8, "sym": False},
    "gptq, act order": {**GPTQ, "desc_act": True},
    "gptq, one group": {**GPTQ, "group_size": -1},
    "gptq, group wider than a layer": {**GPTQ, "group_size": 128},
    "gptq v2": {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
    "awq": AWQ,
    "awq, one group": {**AWQ, "group_size": -1},
}
NATIVE = ("native/qwen2_gqa_tied", "native/qwen2_mha_untied", "native/llama_gqa")
LAYER = "transformer.h.1.mlp.w1"


def tensors(folder):
    return load_file(folder / "model.safetensors")


def config(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, change):
    values = tensors(folder)
    change(values)
    (folder / "model.safetensors").unlink()
    save_file(values, folder / "model.safetensors")


def convert(source, target, to, **options):
    plan = plan_conversion(open_source(source), to, **options)
    write_plan(plan, target, Progress())
    return SimpleNamespace(folder=target, notes=plan.notes)


def refusal(source, to="qwen2", **options):
    with pytest.raises(CheckpointError) as error:
        plan_conversion(open_source(source), to, **options)
    return str(error.value)


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# --- full weights ---


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
@pytest.mark.no_cover
def test_dequantised_weights_are_exact(rounded, tmp_path, settings):
    folder = rounded(settings)
    made = convert(folder / "packed", tmp_path / "made", "qwen", dequantize=True, dtype=torch.float32)
    wanted = {name: tensor.float() for name, tensor in tensors(folder / "full").items()}
    assert same(tensors(made.folder), wanted)
    assert "quantization_config" not in config(made.folder) and config(made.folder)["dtype"] == "float32"
    assert inspect(made.folder, scan=True).problems == []
    assert not any("uantised" in note or "sym" in note or "desc_act" in note for note in made.notes)


@pytest.mark.parametrize(
    "settings", [GPTQ, {**GPTQ, "bits": 8, "desc_act": True}, AWQ], ids=["4 bits", "8 bits", "awq"]
)
@pytest.mark.parametrize("case", NATIVE)
def test_dequantised_weights_of_qwen2_and_llama(rounded, tmp_path, case, settings):
    folder = rounded(settings, case)
    packed = convert(folder / "packed", tmp_path / "packed", "qwen", dequantize=True, dtype=torch.float32)
    full = convert(folder / "full", tmp_path / "full", "qwen", dtype=torch.float32)
    assert same(tensors(packed.folder), tensors(full.folder)) and config(packed.folder) == config(full.folder)


def test_dequantised_weights_are_bfloat16_unless_asked_otherwise(rounded, tmp_path):
    folder = rounded()
    made = tensors(convert(folder / "packed", tmp_path / "made", "qwen2", dequantize=True).folder)
    wanted = tensors(convert(folder / "full", tmp_path / "full", "qwen2", dtype=torch.bfloat16).folder)
    assert same(made, wanted) and {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    half = convert(folder / "packed", tmp_path / "half", "qwen2", dequantize=True, dtype=torch.float16).folder
    assert config(half)["torch_dtype"] == "float16" and tensors(half)["lm_head.weight"].dtype == torch.float16


def test_a_stored_zero_of_all_ones_is_none(rounded):
    """AutoGPTQ stores a zero of 0 as -1."""
    settings = {**GPTQ, "sym": False}
    folder = rounded(settings)
    before = load_model(folder / "packed").get_parameter(f"{LAYER}.weight")
    edit(folder / "packed", lambda values: values[f"{LAYER}.qzeros"].fill_(-1))
    after, scales = load_model(folder / "packed").get_parameter(f"{LAYER}.weight"), tensors(folder / "packed")
    codes = after / scales[f"{LAYER}.scales"].float().T.repeat_interleave(32, 1)
    assert codes.min() == 0 and codes.max() <= 15 and not torch.equal(before, after)


@pytest.mark.parametrize("word", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_come_out_of_words_of_every_width(word, bits):
    width = 8 * word.itemsize
    count = 8 * width
    numbers = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = sum(number << (bits * place) for place, number in enumerate(numbers))
    words = [(whole >> (width * place)) % 2**width for place in range(count * bits // width)]
    signed = [value - 2**width if value >= 2 ** (width - 1) else value for value in words]
    packed = torch.tensor(signed, dtype=word)
    assert unpack(packed, bits, 0).tolist() == numbers
    assert unpack(packed[None], bits, 1).tolist() == [numbers]


# --- bits kept ---


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
@pytest.mark.no_cover
def test_the_way_to_qwen2_and_back_keeps_every_bit(rounded, tmp_path, settings):
    folder = rounded(settings)
    there = convert(folder / "packed", tmp_path / "there", "qwen2")
    back = convert(there.folder, tmp_path / "back", "qwen")
    assert same(tensors(back.folder), tensors(folder / "packed"))
    assert config(there.folder)["quantization_config"] == settings == config(back.folder)["quantization_config"]
    assert config(there.folder)["torch_dtype"] == "float16"
    assert inspect(there.folder, scan=True).problems == inspect(back.folder, scan=True).problems == []
    assert not any("desc_act" in note or "sym" in note for note in there.notes)


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
@pytest.mark.no_cover
def test_cut_weights_are_the_same_numbers(rounded, tmp_path, settings):
    folder = rounded(settings)
    packed = convert(folder / "packed", tmp_path / "packed", "qwen2").folder
    full = tensors(convert(folder / "full", tmp_path / "full", "qwen2").folder)
    model = load_model(packed)
    assert all(torch.equal(model.get_parameter(name), tensor.float()) for name, tensor in full.items())


@pytest.mark.parametrize("settings", [GPTQ, {**GPTQ, "bits": 8}, AWQ], ids=["4 bits", "8 bits", "awq"])
@pytest.mark.parametrize("case", NATIVE)
def test_qwen2_and_llama_keep_their_bits_as_qwen(rounded, tmp_path, case, settings):
    """And on the way back, where Qwen2 is what they come from."""
    folder = rounded(settings, case)
    there = convert(folder / "packed", tmp_path / "there", "qwen")
    assert compare(folder / "packed", there.folder, tolerance=1e-4).passed
    assert config(there.folder)["quantization_config"] == settings
    if "qwen2" in case:
        back = convert(there.folder, tmp_path / "back", "qwen2")
        assert same(tensors(back.folder), tensors(folder / "packed"))


@pytest.mark.parametrize("settings", [GPTQ, {**GPTQ, "bits": 8}, AWQ], ids=["4 bits", "8 bits", "awq"])
def test_logits_equal_those_of_the_unconverted_and_of_full_weights(rounded, tmp_path, settings):
    folder = rounded(settings)
    converted = convert(folder / "packed", tmp_path / "converted", "qwen2").folder
    assert compare(folder / "packed", converted, tolerance=1e-5).passed
    assert compare(folder / "packed", folder / "full", tolerance=0.0).passed
    assert compare(folder / "packed", folder / "packed", rounded=torch.bfloat16).largest > 1e-3


def test_a_dtype_would_change_kept_bits(rounded):
    folder = rounded()
    assert "round the scales" in refusal(folder / "packed", dtype=torch.bfloat16)
    assert "full weights already" in refusal(folder / "full", dequantize=True)
    assert "--rope-scaling" in refusal(folder / "packed", "qwen", dequantize=True, scaling=RopeScaling("dynamic", 2.0))
    assert "--seq-length" in refusal(folder / "packed", "qwen", dequantize=True, length=64)


def test_zero_biases_of_autogptq_are_left_out_and_others_refused(rounded, tmp_path):
    folder = rounded() / "packed"
    edit(folder, lambda values: values.update({f"{LAYER}.bias": torch.zeros(96).half()}))
    converted = convert(folder, tmp_path / "converted", "qwen2").folder
    assert not any(name.endswith("up_proj.bias") for name in tensors(converted))
    assert f"{LAYER}.bias" not in tensors(convert(folder, tmp_path / "full", "qwen", dequantize=True).folder)
    edit(folder, lambda values: values.update({f"{LAYER}.bias": torch.ones(96).half()}))
    for text in (refusal(folder), refusal(folder, "qwen", dequantize=True), verify_refusal(folder)):
        assert f"'{LAYER}.bias'" in text and "not zero" in text


# --- which layers are packed ---


def rewrite(folder, settings, full):
    """Change the settings, and put full weights in the place of some."""
    for kind in ("packed",):
        values, originals = tensors(folder / kind), tensors(folder / "full")
        for name in [name for name in originals if re.fullmatch(full, name)]:
            stem = name.removesuffix("weight")
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                values.pop(stem + part, None)
            values[name] = originals[name].half()
        (folder / kind / "model.safetensors").unlink()
        save_file(values, folder / kind / "model.safetensors")
        (folder / kind / "config.json").write_text(
            json.dumps({**config(folder / kind), "quantization_config": settings})
        )
    return folder / "packed"


@pytest.mark.parametrize(
    ("settings", "full", "changed"),
    [
        (
            {**GPTQ, "modules_in_block_to_quantize": [["attn.c_attn"], ["mlp.w1", "mlp.w2"]]},
            r".*(attn|mlp)\.c_proj\.weight",
            {
                "modules_in_block_to_quantize": [
                    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                    ["mlp.up_proj", "mlp.gate_proj"],
                ]
            },
        ),
        (
            {**GPTQ, "dynamic": {r"-:.*\.1\.attn\.": {}}},
            r".*\.1\.attn\.c_(attn|proj)\.weight",
            {"dynamic": {r"-:model\.layers\.1\.self_attn\.(?:q_proj|k_proj|v_proj|o_proj|qkv_proj)$": {}}},
        ),
        (
            {**AWQ, "modules_to_not_convert": ["transformer.h.0", "mlp.w1"]},
            r"transformer\.h\.0\.(attn|mlp)\.\w+\.weight|.*mlp\.w1\.weight",
            {
                "modules_to_not_convert": [
                    *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
                    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
                    "model.layers.1.mlp.up_proj",
                    "model.embed_tokens",
                    "lm_head",
                ]
            },
        ),
    ],
)
def test_the_choice_of_layers_goes_by_the_new_names(rounded, tmp_path, settings, full, changed):
    folder = rewrite(rounded({name: settings[name] for name in settings if name in {**GPTQ, **AWQ}}), settings, full)
    there = convert(folder, tmp_path / "there", "qwen2").folder
    found = config(there)["quantization_config"]
    if "modules_to_not_convert" in changed:
        found["modules_to_not_convert"], changed["modules_to_not_convert"] = (
            sorted(values["modules_to_not_convert"]) for values in (found, changed)
        )
    assert found == {**settings, **changed}
    assert inspect(there).problems == []
    back = convert(there, tmp_path / "back", "qwen").folder
    assert inspect(back).problems == [] and same(tensors(back), tensors(folder))


def size(packing):
    return packing and (packing.bits, packing.group)


def test_rules_keep_what_they_change(golden):
    architecture = read_qwen(config(golden / "model" / "aug_plain"))
    rules = {r"+:transformer\.h\.0\.mlp\.w[12]": {"bits": 8, "group_size": 16}, r"transformer\.h\.1": {"bits": 8}}
    packing = read_packing({**GPTQ, "dynamic": rules, "block_name_to_quantize": "transformer.h"})
    translated = settings_for_hf(packing, pieces(architecture))
    assert translated["block_name_to_quantize"] == "model.layers"
    there = read_packing(translated)
    before = [size(packing.of(piece.qwen)) for piece in pieces(architecture)]
    assert [size(there.of(piece.hf)) for piece in pieces(architecture)] == before
    assert {(4, 32), (8, 16), (8, 32), None} == set(before)
    fused = there.rule("model.layers.0.mlp.gate_up_proj")
    assert fused == ("+:", {"bits": 8, "group_size": 16}) and there.rule("model.layers.10.mlp.up_proj") is None
    again = read_packing(settings_for_qwen(there, pieces(architecture)))
    assert [size(again.of(piece.qwen)) for piece in pieces(architecture)] == before


# --- bits that can't be kept ---


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (GPTQ, "transformer.h.0.attn.c_attn.qzeros packs 8 outputs into a word"),
        (AWQ, "transformer.h.0.attn.c_attn.qweight packs 8 outputs into a word"),
    ],
)
def test_cuts_within_a_word_are_refused(golden, settings, named):
    changes = {"kv_channels": 6, "n_head": 2, "num_attention_heads": 2}
    architecture = read_qwen({**config(golden / "model" / "aug_plain"), **changes})
    for way in (packed_qwen_to_hf, lambda *arguments: packed_hf_to_qwen(*arguments, torch.float16)):
        with pytest.raises(CheckpointError) as error:
            list(way(architecture, read_packing(settings)))
        assert "at output 12" in str(error.value) and "--dequantize" in str(error.value)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        packed_qwen_to_hf(architecture, read_packing(settings))


def test_query_key_and_value_in_different_bits_are_no_layer_of_qwen(rounded, tmp_path):
    folder = rewrite(
        rounded(GPTQ, NATIVE[1]), {**GPTQ, "dynamic": {r"-:.*\.0\.self_attn\.k_proj": {}}}, r".*\.0\..*k_proj\.weight"
    )
    assert "packed in different ways" in refusal(folder, "qwen") and "--dequantize" in refusal(folder, "qwen")
    assert inspect(convert(folder, tmp_path / "full", "qwen", dequantize=True).folder).problems == []


def test_query_key_and_value_in_different_orders_are_no_layer_of_qwen(rounded, tmp_path):
    folder = rounded({**GPTQ, "desc_act": True}, NATIVE[1]) / "packed"
    name = "model.layers.0.self_attn.k_proj.g_idx"
    edit(folder, lambda values: values.update({name: values[name].flip(0)}))
    with pytest.raises(CheckpointError, match=f"'{name}' differs .*--dequantize"):
        convert(folder, tmp_path / "made", "qwen")
    assert not (tmp_path / "made").exists()
    assert inspect(convert(folder, tmp_path / "full", "qwen", dequantize=True).folder).problems == []


@pytest.mark.parametrize("settings", [{**GPTQ, "bits": 5}, {**AWQ, "bits": 8}], ids=["gptq, 5 bits", "awq, 8 bits"])
def test_layouts_whose_numbers_are_unknown_are_not_dequantised(golden, settings):
    from qwen1.conversion.formats.dequantised import dequantising

    with pytest.raises(CheckpointError, match=f"{settings['bits']} bits, of which the layout is unknown"):
        dequantising({f"{LAYER}.weight": (96, 64)}, read_packing(settings), torch.float32)


@pytest.mark.parametrize("method", ["aqlm", "bitsandbytes"])
def test_other_quantisations_are_refused_by_name(rounded, method):
    folder = rounded() / "packed"
    (folder / "config.json").write_text(json.dumps({**config(folder), "quantization_config": {"quant_method": method}}))
    for options in ({}, {"dequantize": True}, {"to": "qwen", "dequantize": True}):
        assert f"quantised ({method})" in refusal(folder, **options)
    assert f"quantised ({method})" in verify_refusal(folder)


# --- damage ---


def verify_refusal(folder):
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    return str(error.value)


def everywhere(folder):
    """What each command says that reads the weights."""
    return [
        refusal(folder),
        refusal(folder, dequantize=True),
        refusal(folder, "qwen", dequantize=True),
        verify_refusal(folder),
    ]


@pytest.mark.parametrize("settings", [GPTQ, {**GPTQ, "bits": 8}, AWQ], ids=["4 bits", "8 bits", "awq"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_missing_and_truncated_parts_are_named(rounded, settings, part):
    if settings is AWQ and part == "g_idx":
        return
    folder = rounded(settings) / "packed"
    name = f"{LAYER}.{part}"
    whole = tensors(folder)[name]
    for kind, value in {"missing": None, "truncated": whole[:-1].clone(), "dtype": whole.to(torch.int16)}.items():
        edit(
            folder,
            lambda values, value=value: values.pop(name, None) if value is None else values.update({name: value}),
        )
        for text in everywhere(folder):
            assert f"'{name}'" in text, (kind, text)


def test_full_weights_under_settings_of_packed_ones_are_told(rounded):
    folder = rounded() / "full"
    (folder / "config.json").write_text(json.dumps({**config(folder), "quantization_config": GPTQ}))
    for text in everywhere(folder):
        assert "quantised (gptq) according to config.json, but none of them is stored so" in text


@pytest.mark.parametrize("value", [-1, 2, 10**6])
def test_groups_that_are_not_there_are_named(rounded, value):
    folder = rounded() / "packed"
    edit(folder, lambda values: values[f"{LAYER}.g_idx"].__setitem__(5, value))
    (problem,) = inspect(folder, scan=True).problems
    for text in (problem, *everywhere(folder)):
        assert f"'{LAYER}.g_idx'" in text and str(value) in text and "0 to 1 only" in text


@pytest.mark.parametrize(
    "change", [{"bits": 8}, {"bits": 2}, {"group_size": 16}, {"group_size": 64}, {"group_size": -1}]
)
def test_settings_of_another_checkpoint_are_found_out(rounded, change):
    folder = rounded() / "packed"
    (folder / "config.json").write_text(json.dumps({**config(folder), "quantization_config": {**GPTQ, **change}}))
    for text in everywhere(folder):
        assert "transformer.h.0" in text and "has shape" in text


def test_scales_that_are_not_finite_are_named(rounded, tmp_path):
    folder = rounded() / "packed"
    edit(folder, lambda values: values[f"{LAYER}.scales"].__setitem__((0, 0), float("nan")))
    for options in ({"to": "qwen2"}, {"to": "qwen", "dequantize": True}):
        with pytest.raises(CheckpointError, match=f"NaN or infinite.*'{LAYER}.scales'"):
            convert(folder, tmp_path / "made", **options)
    assert not compare(folder, folder).passed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda values: values[f"{LAYER}.g_idx"].zero_(), f"{LAYER}.g_idx is not in order, though desc_act is false"),
        (lambda values: values[f"{LAYER}.qzeros"].zero_(), f"{LAYER}.qzeros is not the middle, though sym is true"),
    ],
)
@pytest.mark.no_cover
def test_settings_that_the_tensors_contradict_are_remarked_on(rounded, tmp_path, change, named):
    """Engines that believe the settings read neither tensor."""
    folder = rounded() / "packed"
    edit(folder, change)
    report = inspect(folder, scan=True)
    assert report.problems == [] and any(named in text for text in report.remarks)
    for name, options in {"kept": {}, "full": {"dequantize": True}}.items():
        assert any(named in text for text in convert(folder, tmp_path / name, "qwen2", **options).notes)
