"""Quantised folders: every tensor of GPTQ and AWQ is compared with what the configuration asks for."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.quantised import expect_packed, read_packing
from qwen1.conversion.formats.qwen import qwen_shapes, read_qwen
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.upgrade import plan_upgrade
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
METHODS = {
    "gptq": GPTQ,
    "gptq 8 bits, one group, act order": {**GPTQ, "bits": 8, "group_size": -1, "desc_act": True},
    "gptq 3 bits": {**GPTQ, "bits": 3},
    "gptq, group wider than a layer": {**GPTQ, "group_size": 128},
    "awq": AWQ,
    "awq one group": {**AWQ, "group_size": -1},
}
LINEAR = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.w1|mlp\.w2|mlp\.c_proj)\.weight")
HF_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
MLP = 96
LAYER = "transformer.h.1.mlp.w1"


def pack(tensors, settings, linear=LINEAR):
    """Tensors as AutoGPTQ or AutoAWQ lays them out, each layer's values being nothing but zeros."""
    bits, packed = settings["bits"], {}
    for name, tensor in tensors.items():
        if not linear.fullmatch(name):
            packed[name] = tensor
            continue
        stem = name.removesuffix("weight")
        outputs, inputs = tensor.shape
        size = inputs if settings["group_size"] == -1 else settings["group_size"]
        groups = len(range(0, inputs, size))
        shapes = {"qzeros": (groups, outputs * bits // 32), "scales": (groups, outputs)}
        if settings["quant_method"] == "gptq":
            shapes |= {"qweight": (inputs * bits // 32, outputs), "g_idx": (inputs,)}
        else:
            shapes |= {"qweight": (inputs, outputs * bits // 32)}
        for part, shape in shapes.items():
            packed[stem + part] = torch.zeros(shape, dtype=torch.float16 if part == "scales" else torch.int32)
    return packed


def narrowed(tensors):
    """Golden tensors with an MLP of a width that fills whole words."""
    up = re.compile(r".*\.(w1|w2|gate_proj|up_proj)\.weight")
    down = re.compile(r".*\.mlp\.(c_proj|down_proj)\.weight")
    cut = {name: tensor[:MLP].clone() if up.fullmatch(name) else tensor for name, tensor in tensors.items()}
    return {name: tensor[:, :MLP].clone() if down.fullmatch(name) else tensor for name, tensor in cut.items()}


def write(folder, tensors, **changes):
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture
def quantised(golden, tmp_path):
    """Make a folder: (settings, golden case, names of the layers that are packed) -> folder."""

    def make(settings=GPTQ, case="model/aug_plain", linear=LINEAR):
        folder = shutil.copytree(golden / case, tmp_path / "quantised", copy_function=shutil.copyfile)
        (folder / "expected.safetensors").unlink(missing_ok=True)
        tensors = narrowed(load_file(folder / "model.safetensors"))
        size = {"ffn_hidden_size": 2 * MLP} if linear is LINEAR else {"intermediate_size": MLP}
        return write(folder, pack(tensors, settings, linear), quantization_config=settings, **size)

    return make


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder):
    """What `upgrade` says."""
    with pytest.raises(CheckpointError) as error:
        plan_upgrade(open_source(folder))
    return str(error.value)


def problem(folder, **options):
    (only,) = inspect(folder, **options).problems
    return only


# --- what is to be there ---


def test_shapes_of_the_published_int4_folder(golden):
    """As the headers of the published 7B-Chat-Int4 say: only the layers of the blocks are packed."""
    config = json.loads((golden / "published_configs" / "2023-08-chat.config.json").read_text())
    packing = read_packing({**GPTQ, "group_size": 128})
    expected = expect_packed(qwen_shapes(read_qwen(config)), packing)
    block = {
        name.removeprefix("transformer.h.31."): shape
        for name, shape in expected.shapes.items()
        if name.startswith("transformer.h.31.")
    }
    assert block == {
        "ln_1.weight": (4096,),
        "ln_2.weight": (4096,),
        "attn.c_attn.qweight": (512, 12288),
        "attn.c_attn.qzeros": (32, 1536),
        "attn.c_attn.scales": (32, 12288),
        "attn.c_attn.g_idx": (4096,),
        "attn.c_attn.bias": (12288,),
        "attn.c_proj.qweight": (512, 4096),
        "attn.c_proj.qzeros": (32, 512),
        "attn.c_proj.scales": (32, 4096),
        "attn.c_proj.g_idx": (4096,),
        "attn.c_proj.bias": (4096,),
        **{
            f"mlp.{name}.{part}": shape
            for name in ("w1", "w2")
            for part, shape in dict(
                qweight=(512, 11008), qzeros=(32, 1376), scales=(32, 11008), g_idx=(4096,), bias=(11008,)
            ).items()
        },
        "mlp.c_proj.qweight": (1376, 4096),
        "mlp.c_proj.qzeros": (86, 512),
        "mlp.c_proj.scales": (86, 4096),
        "mlp.c_proj.g_idx": (11008,),
        "mlp.c_proj.bias": (4096,),
    }
    assert "transformer.h.31.attn.c_attn.bias" in expected.required
    assert "transformer.h.31.mlp.w1.bias" in expected.optional
    assert {"transformer.wte.weight", "lm_head.weight", "transformer.ln_f.weight"} < expected.required.keys()


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_sound_folder_passes(quantised, tmp_path, settings):
    folder = quantised(settings)
    report = inspect(folder, scan=True)
    assert report.problems == [] and report.quantization == f"{settings['quant_method']}, {settings['bits']} bits"
    assert not any("not checked" in text for text in report.remarks)
    source = open_source(folder)
    plan = plan_upgrade(source)
    assert write_plan(plan, tmp_path / "new", Progress())
    assert (tmp_path / "new" / "model.safetensors").samefile(folder / "model.safetensors")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"] == settings


@pytest.mark.parametrize("case", ["qwen2_gqa_tied", "llama_gqa"])
@pytest.mark.parametrize("settings", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_qwen2_and_llama(quantised, case, settings):
    folder = quantised(settings, f"native/{case}", HF_LINEAR)
    assert inspect(folder, scan=True).problems == []
    edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.scales"))
    assert "'model.layers.1.self_attn.k_proj.scales'" in problem(folder)


def test_pickles_become_safetensors_as_they_are(quantised, tmp_path):
    folder = quantised()
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert inspect(folder, scan=True).problems == []
    source = open_source(folder)
    write_plan(plan_upgrade(source), tmp_path / "new", Progress())
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)
    del tensors[f"{LAYER}.scales"]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert f"{LAYER}.scales" in problem(folder) and f"{LAYER}.scales" in refusal(folder)


def test_biases_of_autogptq_may_be_there_as_zeros(quantised):
    folder = quantised()
    edit(folder, lambda tensors: tensors.update({f"{LAYER}.bias": torch.zeros(MLP).half()}))
    assert inspect(folder, scan=True).problems == [] and plan_upgrade(open_source(folder))
    edit(folder, lambda tensors: tensors.update({f"{LAYER}.bias": torch.ones(MLP).half()}))
    assert f"not zero: '{LAYER}.bias'" in problem(folder, scan=True)
    edit(folder, lambda tensors: tensors.update({f"{LAYER}.bias": torch.zeros(MLP + 1).half()}))
    assert f"{LAYER}.bias" in problem(folder) and f"{LAYER}.bias" in refusal(folder)


# --- damage ---


@pytest.mark.parametrize(
    ("settings", "part"),
    [(settings, part) for settings in (GPTQ, AWQ) for part in ("qweight", "qzeros", "scales", "")] + [(GPTQ, "g_idx")],
)
def test_what_is_missing_is_named(quantised, settings, part):
    folder = quantised(settings)
    gone = [name for name in load_file(folder / "model.safetensors") if name.startswith(f"{LAYER}.{part}")]
    edit(folder, lambda tensors: [tensors.pop(name) for name in gone])
    for text in (problem(folder), problem(folder, scan=True), refusal(folder)):
        assert f"'{LAYER}.{part or 'qweight'}'" in text and "missing" in text


@pytest.mark.parametrize("name", ["transformer.ln_f.weight", "transformer.h.0.attn.c_attn.bias", "lm_head.weight"])
def test_missing_weights_that_are_not_packed_are_named(quantised, name):
    folder = quantised()
    edit(folder, lambda tensors: tensors.pop(name))
    assert f"'{name}'" in problem(folder) and f"'{name}'" in refusal(folder)


@pytest.mark.parametrize("settings", [GPTQ, AWQ], ids=["gptq", "awq"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_wrong_shapes_and_dtypes_are_named(quantised, settings, part):
    folder = quantised(settings)
    name = f"{LAYER}.{part}"
    tensor = load_file(folder / "model.safetensors")[name]
    wrong = {"rows": tensor[:-1], "columns": tensor[:, :-1], "flat": tensor.flatten(), "dtype": tensor.to(torch.int16)}
    for kind, value in wrong.items():
        edit(folder, lambda tensors, value=value: tensors.update({name: value.contiguous()}))
        assert f"'{name}'" in problem(folder) and f"'{name}'" in refusal(folder), kind


@pytest.mark.parametrize("name", [f"{LAYER}.weight", f"{LAYER}.g_index", "transformer.h.2.mlp.w1.qweight"])
def test_what_has_no_place_is_named(quantised, name):
    folder = quantised()
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    assert f"'{name}'" in problem(folder) and f"'{name}'" in refusal(folder)


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 16}, {"group_size": -1}, {"quant_method": "awq"}])
def test_settings_of_another_checkpoint_are_found_out(quantised, change):
    folder = quantised()
    write(folder, load_file(folder / "model.safetensors"), quantization_config={**GPTQ, **change})
    assert inspect(folder).problems and "transformer.h.0" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": None},
        {"bits": 0},
        {"bits": 64},
        {"bits": "4"},
        {"bits": True},
        {"group_size": 0},
        {"group_size": 1.5},
        {"pack_dtype": "float"},
        {"modules_in_block_to_quantize": 3},
        {"dynamic": {"(": {}}},
    ],
)
def test_impossible_settings_are_named(quantised, change):
    folder = quantised()
    write(folder, load_file(folder / "model.safetensors"), quantization_config={**GPTQ, **change})
    assert "quantization_config" in problem(folder) and "quantization_config" in refusal(folder)


# --- which layers are packed ---


@pytest.mark.parametrize(
    ("settings", "full"),
    [
        ({**GPTQ, "modules_in_block_to_quantize": [["attn.c_attn"], ["mlp.w1", "mlp.w2"]]}, r".*c_proj\.weight"),
        ({**GPTQ, "dynamic": {r"-:.*\.attn\.": {}}}, r".*\.attn\..*"),
        ({**AWQ, "modules_to_not_convert": ["transformer.h.0", "mlp.w1"]}, r"transformer\.h\.0\..*|.*mlp\.w1\.weight"),
    ],
)
def test_layers_that_are_left_out(golden, quantised, settings, full):
    folder = quantised(settings)
    original = narrowed(load_file(golden / "model" / "aug_plain" / "model.safetensors"))
    kept = {name: tensor for name, tensor in original.items() if re.fullmatch(full, name)}
    packed = pack({name: tensor for name, tensor in original.items() if name not in kept}, settings)
    assert inspect(folder).problems
    write(folder, {**packed, **kept})
    assert inspect(folder).problems == [] and plan_upgrade(open_source(folder))


def test_layers_with_other_bits(quantised):
    folder = quantised(GPTQ)
    tensors = load_file(folder / "model.safetensors")
    changed = {**GPTQ, "bits": 8, "group_size": -1}
    wide = {f"{LAYER}.weight": torch.zeros(tensors[f"{LAYER}.scales"].shape[1], tensors[f"{LAYER}.g_idx"].shape[0])}
    dynamic = {f"+:{re.escape(LAYER)}": {"bits": 8, "group_size": -1}}
    write(folder, {**tensors, **pack(wide, changed)}, quantization_config={**GPTQ, "dynamic": dynamic})
    assert inspect(folder).problems == []


@pytest.mark.parametrize("layout", [{"checkpoint_format": "marlin"}, {"quant_method": "awq", "version": "gemv_fast"}])
def test_layouts_that_are_unknown_are_said_to_be_unchecked(quantised, layout):
    folder = quantised()
    write(folder, {"transformer.h.0.attn.c_attn.B": torch.zeros(2)}, quantization_config={**GPTQ, **layout})
    report = inspect(folder)
    assert report.problems == [] and any("not checked" in text for text in report.remarks)
    assert any("without a check" in note for note in plan_upgrade(open_source(folder)).notes)


# --- where the settings are ---


@pytest.mark.parametrize(
    ("file", "settings", "written"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, GPTQ),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}, AWQ),
    ],
)
def test_settings_in_a_file_of_their_own(quantised, tmp_path, file, settings, written):
    """transformers reads config.json only, and so would fill all layers at random."""
    folder = quantised(written)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "is a quantised weight, but config.json has no quantization_config" in refusal(folder)
    assert inspect(folder).problems
    (folder / file).write_text(json.dumps(settings))
    assert f"which is in {file}" in problem(folder) and "upgrade copies it" in problem(folder)
    source = open_source(folder)
    plan = plan_upgrade(source)
    assert any(file in note for note in plan.notes)
    write_plan(plan, tmp_path / "new", Progress())
    assert inspect(tmp_path / "new").problems == []
    taken = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert {name: taken[name] for name in ("quant_method", "bits", "group_size")} == {
        name: written[name] for name in ("quant_method", "bits", "group_size")
    }
    edit(folder, lambda tensors: tensors.pop(f"{LAYER}.scales"))
    assert f"{LAYER}.scales" in refusal(folder)
    assert any(f"{LAYER}.scales" in text for text in inspect(folder).problems)


def test_a_stray_file_of_settings_beside_full_weights_means_nothing(quantised, golden):
    folder = quantised()
    shutil.copyfile(golden / "model" / "aug_plain" / "config.json", folder / "config.json")
    shutil.copyfile(golden / "model" / "aug_plain" / "model.safetensors", folder / "model.safetensors")
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    assert inspect(folder).problems == []
    assert not any("uantis" in note for note in plan_upgrade(open_source(folder)).notes)
