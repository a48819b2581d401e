"""Any damage to the files of a checkpoint: `inspect` reports it, and the commands refuse it by a CheckpointError."""

import base64
import io
import json
import shutil
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen1 import QWenConfig, QWenLMHeadModel, QWenTokenizerFast
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.files.weights import open_weights
from qwen1.conversion.formats.quantised import expect_packed, read_packing
from qwen1.conversion.formats.qwen import qwen_shapes, read_qwen
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.inspecting.rendering import render
from qwen1.conversion.opening.adapters import open_adapter
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.conversion import plan_conversion
from qwen1.conversion.planning.upgrade import plan_upgrade

from .conftest import changed, damaged, heavy, values

VOCABULARY = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
SHAPE = {"vocab_size": 464, "n_embd": 8, "n_layer": 1, "n_head": 2, "kv_channels": 4, "ffn_hidden_size": 64}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True}
KINDS = ["qwen", "qwen-2023", "qwen2", "llama-original", "gptq", "adapter"]
KEYS = st.sampled_from(
    [
        *(
            "model_type",
            "auto_map",
            "quantization_config",
            "rope_scaling",
            "rope_parameters",
            "n_layer",
            "num_hidden_layers",
        ),
        *(
            "eos_token_id",
            "weight_map",
            "metadata",
            "added_tokens",
            "chat_format",
            "layer_types",
            "hidden_act",
            "visual",
        ),
        *(
            "bits",
            "group_size",
            "dynamic",
            "desc_act",
            "sym",
            "modules_in_block_to_quantize",
            "checkpoint_format",
            "tokens",
        ),
        *(
            "multiple_of",
            "ffn_dim_multiplier",
            "n_kv_heads",
            "peft_type",
            "r",
            "target_modules",
            "architectures",
            "dtype",
        ),
    ]
)


def pickled(tensors):
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def llama_files():
    width, mlp, rows = 8, 32, 464
    layer = {f"attention.{name}.weight": (width, width) for name in ("wq", "wk", "wv", "wo")}
    layer |= {f"feed_forward.{name}.weight": (mlp, width) for name in ("w1", "w3")}
    layer |= {"feed_forward.w2.weight": (width, mlp), "attention_norm.weight": (width,), "ffn_norm.weight": (width,)}
    shapes = {"tok_embeddings.weight": (rows, width), "norm.weight": (width,), "output.weight": (rows, width)}
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    params = {"dim": width, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "multiple_of": 32, "vocab_size": rows}
    weights = pickled({name: torch.zeros(shape) for name, shape in shapes.items()})
    return {"params.json": json.dumps(params).encode(), "consolidated.00.pth": weights}


def gptq_files(qwen):
    config = {**json.loads(qwen["config.json"]), "quantization_config": GPTQ}
    packing = read_packing(GPTQ)
    expected = expect_packed(qwen_shapes(read_qwen(json.loads(qwen["config.json"]))), packing)
    tensors = {
        name: torch.zeros(shape, dtype=expected.words.get(name, torch.float16))
        for name, shape in expected.required.items()
    }
    return {**qwen, "config.json": json.dumps(config).encode(), "model.safetensors": save(tensors)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Kind -> file -> content."""
    folder = tmp_path_factory.mktemp("qwen")
    model = QWenLMHeadModel(QWenConfig(**SHAPE, seq_length=32, n_positions=64, use_flash_attn=False))
    model.generation_config.update(chat_format="chatml", max_window_size=64)
    model.save_pretrained(folder)
    (folder / "qwen.tiktoken").write_bytes(VOCABULARY)
    QWenTokenizerFast(folder / "qwen.tiktoken").save_pretrained(folder)
    qwen = {name: content for name, content in files_in(folder).items() if not name.endswith(".py")}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = sorted(state)
    halves = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in range(2)}
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, own in halves.items() for name in own}}
    old = {
        name: content
        for name, content in qwen.items()
        if name in ("config.json", "qwen.tiktoken", "generation_config.json")
    }
    old |= {file: pickled({name: state[name] for name in own}) for file, own in halves.items()}
    old["pytorch_model.bin.index.json"] = json.dumps(index).encode()
    folder = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(
        vocab_size=464,
        hidden_size=8,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="16KB")
    qwen2 = {**files_in(folder), "tokenizer.json": qwen["tokenizer.json"]}
    lora = {
        f"base_model.model.transformer.h.0.attn.c_attn.lora_{name}.weight": torch.zeros(shape)
        for name, shape in (("A", (2, 8)), ("B", (24, 2)))
    }
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["c_attn"],
        "base_model_name_or_path": "x",
    }
    adapter = {"adapter_config.json": json.dumps(settings).encode(), "adapter_model.safetensors": save(lora)}
    made = (qwen, old, qwen2, llama_files(), gptq_files(qwen), adapter)
    return dict(zip(KINDS, made, strict=True))


def put(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def try_commands(folder, dequantize=False):
    """Whatever they find, they say."""
    report = inspect(folder, scan=True)
    json.dumps(report.to_json())
    render(report)
    commands = (
        lambda: open_adapter(folder),
        lambda: plan_upgrade(open_source(folder)),
        lambda: plan_conversion(open_source(folder), "qwen2", dequantize=dequantize),
        lambda: plan_conversion(open_source(folder), "qwen", dequantize=dequantize),
    )
    done = []
    for command in commands:
        try:
            command()
            done.append(True)
        except CheckpointError as error:
            assert str(error)
            done.append(False)
    return report, done


@pytest.mark.parametrize("kind", KINDS)
def test_undamaged(checkpoints, tmp_path, kind):
    report, done = try_commands(put(tmp_path / "whole", checkpoints[kind]), dequantize=kind == "gptq")
    assert any(done) and (kind == "adapter" or not report.problems), report.problems


@heavy
@given(st.data(), st.sampled_from(KINDS), st.booleans())
def test_damaged_settings(checkpoints, tmp_path_factory, data, kind, dequantize):
    """Anything under any key of the JSON files."""
    files = checkpoints[kind]
    name = data.draw(
        st.sampled_from(sorted(name for name in files if name.endswith(".json") and name != "tokenizer.json"))
    )
    content = json.dumps(data.draw(changed(json.loads(files[name]), KEYS))).encode()
    try_commands(put(tmp_path_factory.getbasetemp() / "settings", {**files, name: content}), dequantize)


@heavy
@given(st.data(), st.sampled_from(KINDS), st.booleans())
def test_damaged_bytes(checkpoints, tmp_path_factory, data, kind, dequantize):
    """Any file cut or overwritten, weights included."""
    files = checkpoints[kind]
    name = data.draw(st.sampled_from(sorted(files)))
    content = data.draw(damaged(files[name]))
    try_commands(put(tmp_path_factory.getbasetemp() / "bytes", {**files, name: content}), dequantize)


@heavy
@given(st.data(), st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]))
@pytest.mark.no_cover
def test_other_companions(checkpoints, tmp_path_factory, data, name):
    """JSON of any kind in place of the files beside the weights."""
    content = json.dumps(data.draw(values | st.dictionaries(KEYS, values, max_size=3))).encode()
    kind = data.draw(st.sampled_from(["qwen", "qwen2"]))
    try_commands(put(tmp_path_factory.getbasetemp() / "companions", {**checkpoints[kind], name: content}))


@pytest.mark.parametrize(
    "kind, name, change",
    [
        ("qwen-2023", "pytorch_model.bin.index.json", {"metadata": {"total_size": []}}),
        ("qwen2", "model.safetensors.index.json", {"weight_map": {"a": "\ud83d"}}),  # no name of a file
        ("qwen", "tokenizer_config.json", {"auto_map": 1}),
        ("qwen", "config.json", {"auto_map": [1]}),
        ("llama-original", "params.json", {"vocab_size": [1]}),
    ],
)
def test_what_was_found(checkpoints, tmp_path, kind, name, change):
    files = checkpoints[kind]
    content = json.dumps({**json.loads(files[name]), **change}).encode()
    try_commands(put(tmp_path / "found", {**files, name: content}))


ENTRIES = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}
entry_keys = st.sampled_from(["dtype", "shape", "data_offsets", "a", "b", "__metadata__"])


@given(st.data())
def test_headers_of_safetensors(tmp_path_factory, data):
    """Tensors of the announced shapes, whose values are all there; or an error."""
    header = data.draw(
        changed(ENTRIES, entry_keys).map(lambda value: json.dumps(value).encode())
        | damaged(json.dumps(ENTRIES).encode())
    )
    length = data.draw(st.sampled_from([len(header)] * 5 + [0, 1, len(header) - 1, 2**31, 2**63, 2**64 - 1]))
    body = bytes(data.draw(st.sampled_from([24, 24, 24, 0, 23, 25])))
    folder = put(
        tmp_path_factory.getbasetemp() / "header",
        {"model.safetensors": struct.pack("<Q", max(length, 0)) + header + body},
    )
    try:
        weights = open_weights(folder)
        for name, info in weights.infos.items():
            assert tuple(weights.read(name).shape) == info.shape
    except CheckpointError as error:
        assert str(folder) in str(error)


@given(st.data())
def test_indices(tmp_path_factory, data):
    whole = {"metadata": {"total_size": 24}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    names = st.sampled_from(["a", "b", "c", "weight_map", "metadata", "../a", ""])
    files = st.sampled_from(
        ["one.safetensors", "two.safetensors", "../one.safetensors", "/etc/passwd", "three", "", "a\0"]
    )
    index = data.draw(
        changed(whole, names) | st.fixed_dictionaries({"weight_map": st.dictionaries(names, files | values)})
    )
    stored = {"one.safetensors": save({"a": torch.zeros(2)}), "two.safetensors": save({"b": torch.ones(3)})}
    folder = put(
        tmp_path_factory.getbasetemp() / "index", {**stored, "model.safetensors.index.json": json.dumps(index).encode()}
    )
    try:
        weights = open_weights(folder)
    except CheckpointError as error:
        assert str(error)
    else:
        assert index["weight_map"] == {name: info.file.name for name, info in weights.infos.items()}
