"""`convert --to gguf`: tensors, settings, tokenizer and refusals, judged by the weights, `gguf` and transformers."""

import base64
import json
import random
import shutil
import struct
import subprocess
from collections import namedtuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from typer.testing import CliRunner

from qwen1 import QWenLMHeadModel, QWenTokenizerFast
from qwen1.conversion.commands import app
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.gguf import Encoding, gguf_name
from qwen1.conversion.formats.names import TABLE
from qwen1.conversion.formats.qwen2 import RopeScaling
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.companions import plain_template
from qwen1.conversion.planning.conversion import plan_conversion
from qwen1.conversion.planning.gguf_tokenizer import gguf_tokenizer
from qwen1.conversion.planning.to_gguf import plan_gguf
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress
from qwen1.tokenization_qwen import SPECIAL_TOKENS, build_backend

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

HALF_STEP = 0.5 + 127 * 2**-11
"""Of a block of q8_0: rounded values, and a scale that is rounded to float16."""

SHAPES = {"plain": {}, "grouped heads": {"num_key_value_heads": 2}, "tied": {"tie_word_embeddings": True}}


@pytest.fixture
def written(tmp_path):
    """Write a GGUF: (folder, outtype or None, **options) -> its path; `notes` are those of the last."""
    counter = iter(range(100))

    def run(folder, outtype=None, **options):
        plan = plan_gguf(open_source(folder), outtype and Encoding(outtype), **options)
        run.notes = plan.notes
        path = tmp_path / f"written-{next(counter)}.gguf"
        assert write_plan(plan, path, Progress())
        assert path.stat().st_size == plan.files[0].file_size
        return path

    return run


@pytest.fixture
def save(tmp_path, tiny_model, byte_vocabulary, repository):
    """Save a tiny random model as a chat checkpoint: (**configuration) -> folder."""

    def make(dtype=torch.float32, **changes):
        folder = tmp_path / "source"
        model = tiny_model(**{"bos_token_id": 256, "pad_token_id": 256, **changes}).to(dtype)
        model.generation_config.update(chat_format="chatml", eos_token_id=[258, 256], allow_custom_entries=True)
        model.save_pretrained(folder)
        for path in (byte_vocabulary, repository / "tokenizer_config.json", repository / "chat_template.jinja"):
            shutil.copy(path, folder)
        return folder

    return make


def fields(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def values(path):
    """Name -> values in float32, read by the package's own reader."""
    read = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        read[tensor.name] = torch.from_numpy(array.copy()).view([int(size) for size in reversed(tensor.shape)])
    return read


def types(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def expected_values(folder):
    """The weights of a QWen folder under the names of a GGUF: c_attn in three parts, w2 as the gate, w1 as up."""
    state, found = load_file(folder / "model.safetensors"), {}
    keys = json.loads((folder / "config.json").read_text())["num_key_value_heads"] * 16
    plain = {"attn.c_proj": "attn_output", "mlp.w1": "ffn_up", "mlp.w2": "ffn_gate", "mlp.c_proj": "ffn_down"}
    plain |= {"ln_1": "attn_norm", "ln_2": "ffn_norm"}
    outside = {"transformer.wte": "token_embd", "transformer.ln_f": "output_norm", "lm_head": "output"}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in outside:
            found[f"{outside[module]}.{kind}"] = tensor
            continue
        _, _, layer, inside = module.split(".", 3)
        if inside == "attn.c_attn":
            parts = tensor.split([64, keys, keys])
            found |= {f"blk.{layer}.attn_{part}.{kind}": rows for part, rows in zip("qkv", parts, strict=True)}
        else:
            found[f"blk.{layer}.{plain[inside]}.{kind}"] = tensor
    return found


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def refused(folder, *args, **options):
    with pytest.raises(CheckpointError) as error:
        plan_gguf(open_source(folder), *args, **options)
    return str(error.value)


def change(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# --- weights ---


def test_names_are_those_of_the_package():
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    for row in TABLE:
        if row.when in (None, "qkv_bias"):
            name = row.hf.format(1)
            assert gguf_name(name) == table.get_name(name, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_kept_to_the_bit(save, written, stored, shape):
    folder = save(stored, **SHAPES[shape])
    path = written(folder)
    expected, found = expected_values(folder), values(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)
    word = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[stored]
    assert types(path) == {name: word if tensor.dim() > 1 else "F32" for name, tensor in expected.items()}


@pytest.mark.parametrize("outtype, dtype", [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_values_are_rounded_to_what_is_chosen(save, written, outtype, dtype):
    folder = save()
    found = values(written(folder, outtype))
    for name, tensor in expected_values(folder).items():
        assert torch.equal(found[name], tensor.to(dtype).float() if tensor.dim() > 1 else tensor)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_q8_0_is_within_half_a_step(save, written, stored):
    folder = save(stored)
    path = written(folder, "q8_0")
    found = values(path)
    for name, tensor in expected_values(folder).items():
        if tensor.dim() == 1:
            assert torch.equal(found[name], tensor.float())
            continue
        blocks = tensor.float().view(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        assert ((found[name].view(-1, 32) - blocks).abs() <= HALF_STEP * step).all()
        assert not torch.equal(found[name], tensor.float())
    assert set(types(path).values()) == {"Q8_0", "F32"}


def test_a_large_tensor_is_quantised_in_parts(save, written, monkeypatch):
    folder = save()
    whole = written(folder, "q8_0")
    monkeypatch.setattr("qwen1.conversion.writing.gguf._AT_ONCE", 200)
    assert written(folder, "q8_0").read_bytes() == whole.read_bytes()


def test_rows_that_are_no_whole_blocks_are_stored_as_f16(save, written):
    folder = save(ffn_hidden_size=80)  # 40 a row in c_proj
    path = written(folder, "q8_0")
    downs = {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert {name for name, kind in types(path).items() if kind == "F16"} == downs
    assert any("blk.0.ffn_down.weight" in note and "f16" in note and "40" in note for note in written.notes)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_the_file_and_gives_our_logits(save, written, shape):
    folder = save(**SHAPES[shape])
    path = written(folder)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert isinstance(model, Qwen2ForCausalLM)
    ids = torch.randint(464, (2, 32), generator=torch.Generator().manual_seed(0))
    ours = logits(QWenLMHeadModel.from_pretrained(folder), ids)
    assert (logits(model, ids) - ours).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("case", ["qwen2_gqa_tied", "qwen2_mha_untied"])
def test_qwen2_with_golden_logits(golden, tmp_path, written, case):
    folder = tmp_path / case
    shutil.copytree(golden / "native" / case, folder)
    special = {token: 256 + n for n, token in enumerate(SPECIAL_TOKENS[:3])}
    build_backend({bytes([byte]): byte for byte in range(256)}, special).save(str(folder / "tokenizer.json"))
    path = written(folder)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = load_file(folder / "expected.safetensors")
    assert (logits(model, expected["ids"]) - expected["logits"]).abs().max() < 1e-4


def test_every_release_of_a_folder_gives_the_same_file(save, written, tmp_path):
    folder = save()
    plain = fields(written(folder))
    old = tmp_path / "release" / "source"
    shutil.copytree(folder, old)
    config = json.loads((old / "config.json").read_text())
    config.pop("auto_map", None)
    config = {name: value for name, value in config.items() if name not in ("n_embd", "n_layer", "n_head")}
    (old / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert "2023-12" in open_source(old).kind.value
    assert fields(written(old)) == plain
    form = tmp_path / "form" / "source"
    write_plan(plan_conversion(open_source(folder), "qwen2"), form, Progress())
    path = written(form)
    assert fields(path) == plain
    expected = expected_values(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in values(path).items())


# --- settings ---


def test_settings_of_the_model(save, written):
    folder = save(torch.bfloat16, num_key_value_heads=2)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tongyi\nlanguage:\n- zh\n---\n# Model\n")
    change(folder, "generation_config.json", top_p=0.8, top_k=0)
    found = fields(written(folder, "q8_0"))
    assert {name: value for name, value in found.items() if name.startswith(("qwen2.", "general."))} == {
        "general.architecture": "qwen2",
        "general.file_type": 7,
        "general.languages": ["zh"],
        "general.license": "other",
        "general.license.name": "tongyi",
        "general.name": "Source",
        "general.quantization_version": 2,
        "general.sampling.top_k": 0,
        "general.sampling.top_p": pytest.approx(0.8),
        "general.size_label": "121K",
        "general.type": "model",
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "qwen2.block_count": 2,
        "qwen2.context_length": 32,
        "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 96,
        "qwen2.rope.freq_base": 10000.0,
    }


def test_what_long_texts_lose_is_said(save, written):
    written(save())
    (note,) = written.notes
    assert "no NTK and no LogN" in note and "-c 32" in note and "num_ctx 32" in note


def test_nothing_is_said_where_nothing_is_lost(save, written):
    written(save(use_dynamic_ntk=False, use_logn_attn=False))
    assert written.notes == []


def test_yarn_is_written_where_it_is_wanted(save, written):
    found = fields(written(save(), scaling=RopeScaling("yarn", 4.0)))
    assert found["qwen2.context_length"] == 128
    assert found["qwen2.rope.scaling.type"] == "yarn" and found["qwen2.rope.scaling.factor"] == 4.0
    assert found["qwen2.rope.scaling.original_context_length"] == 32
    assert written.notes == []


@pytest.mark.parametrize(
    "rope, length, kept",
    [
        ({"rope_type": "linear", "factor": 2.0}, 2048, {"type": "linear", "factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
            2048,
            {"type": "yarn", "factor": 2.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
        ),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048, {}),
    ],
    ids=["linear", "yarn", "dynamic"],
)
def test_rotary_scaling_of_a_checkpoint_is_kept(save, written, rope, length, kept):
    folder = save(rope_parameters={**rope, "rope_theta": 10000.0}, use_dynamic_ntk=False, use_logn_attn=False)
    found = fields(written(folder))
    assert found["qwen2.context_length"] == length
    scaling = {name.rpartition("qwen2.rope.scaling.")[2]: value for name, value in found.items() if "scaling" in name}
    assert scaling == kept
    assert [("dynamic" in note) for note in written.notes] == [True] * (rope["rope_type"] == "dynamic")


def test_licences_are_named(save, written):
    folder = save(use_dynamic_ntk=False, use_logn_attn=False)
    (folder / "NOTICE").write_text("who made it")
    written(folder)
    (note,) = written.notes
    assert "NOTICE" in note


# --- tokenizer ---


def test_settings_of_the_tokenizer(save, written):
    found = fields(written(save()))
    told = {name: value for name, value in found.items() if name.startswith("tokenizer.")}
    tokens, kinds = told.pop("tokenizer.ggml.tokens"), told.pop("tokenizer.ggml.token_type")
    assert told == {
        "tokenizer.chat_template": plain_template(),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.merges": ["<|endoftext|> <|endoftext|>"],  # of no use, but llama.cpp refuses an empty list
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.padding_token_id": 256,
        "tokenizer.ggml.pre": "qwen2",
    }
    assert len(tokens) == len(kinds) == 464
    assert tokens[32] == "Ġ" and tokens[256:259] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert kinds == [1] * 256 + [3] * 208


def test_rows_without_a_token_are_unused(save, written):
    found = fields(written(save(vocab_size=480)))
    assert found["tokenizer.ggml.tokens"][464:] == [f"[PAD{row}]" for row in range(464, 480)]
    assert found["tokenizer.ggml.token_type"][463:466] == [3, 5, 5]


@pytest.mark.parametrize(
    "settings, end", [({"chat_format": "raw", "eos_token_id": 256}, 256), ({"eos_token_id": [258]}, 258)]
)
def test_a_base_model_ends_at_the_end_of_text(save, written, settings, end):
    folder = save()
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert fields(written(folder))["tokenizer.ggml.eos_token_id"] == end


def test_a_template_of_ones_own_goes_along(save, written):
    folder = save()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert fields(written(folder))["tokenizer.chat_template"] == "{{ messages }}"


def joined(text, merges, vocabulary):
    """Byte-pair encoding as llama.cpp does it: the earliest merge of the list first, of equal ones the leftmost."""
    parts = list(text)
    while pairs := [(merges[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in merges]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [vocabulary[part] for part in parts]


@pytest.mark.slow
@pytest.mark.no_cover
def test_merges_give_the_ids_of_tiktoken(save, published_vocabulary):
    """And lead to every token of the published vocabulary, as llama.cpp looks no piece up as a whole."""
    folder = save(vocab_size=151936, eos_token_id=151643, bos_token_id=None, pad_token_id=None)
    shutil.copy(published_vocabulary, folder / "qwen.tiktoken")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    source = open_source(folder)
    found = gguf_tokenizer(source, source.contents())
    assert found.ids == {"bos": 151643, "eos": 151645, "pad": 151643}
    merges = {tuple(merge.split(" ")): n for n, merge in enumerate(found.merges)}
    vocabulary = {token: n for n, token in enumerate(found.tokens)}
    assert [n for n in range(0, 151643, 7) if joined(found.tokens[n], merges, vocabulary) != [n]] == []
    tokenizer, words = QWenTokenizerFast.from_pretrained(folder), random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 20 + "ABCDEFGHIJéüßñ你好世界我们的是不了在人有他这中大来上国" * 5
    for text in ("".join(words.choices(alphabet, k=words.randrange(1, 16))) for _ in range(1000)):
        pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert [n for piece in pieces for n in joined(piece, merges, vocabulary)] == tokenizer.encode(text)


def test_extra_words_go_along(save, written):
    folder = save(vocab_size=466)
    lines = [base64.b64encode(word) + b" %d\n" % rank for word, rank in ((b"ab", 464), (b"abc", 465))]
    (folder / "qwen_extra.tiktoken").write_bytes(b"".join(lines))
    found = fields(written(folder))
    assert found["tokenizer.ggml.tokens"][464:] == ["ab", "abc"]
    assert found["tokenizer.ggml.token_type"][464:] == [1, 1]
    assert found["tokenizer.ggml.merges"] == ["a b", "ab c"]


def test_qwen2_names_control_tokens_by_their_looks(save, written, tmp_path):
    """Qwen2.5's tokenizer calls some of them not special; llama.cpp's converter goes by their looks."""
    form = tmp_path / "form"
    write_plan(plan_conversion(open_source(save()), "qwen2"), form, Progress())
    content = json.loads((form / "tokenizer.json").read_text())
    for token in content["added_tokens"][3:5]:
        token["special"] = False
    renamed = content["added_tokens"][4]
    content["model"]["vocab"]["<tool_call>"] = content["model"]["vocab"].pop(renamed["content"])
    renamed["content"] = "<tool_call>"
    (form / "tokenizer.json").write_text(json.dumps(content))
    found = fields(written(form))
    assert found["tokenizer.ggml.tokens"][259:261] == ["<|extra_0|>", "<tool_call>"]
    assert found["tokenizer.ggml.token_type"][258:262] == [3, 3, 4, 3]


# --- refusals ---


def test_a_folder_without_vocabulary_is_refused(save):
    folder = save()
    (folder / "qwen.tiktoken").unlink()
    message = refused(folder)
    assert "qwen.tiktoken" in message and "without its tokenizer" in message


def test_quantised_weights_are_refused(save):
    folder = change(save(), quantization_config={"quant_method": "gptq", "bits": 4})
    message = refused(folder)
    assert "gptq" in message and "--dequantize" in message


def test_llama_is_refused(golden):
    message = refused(golden / "native" / "llama_gqa")
    assert "LLaMA" in message and "--to qwen" in message and "llama.cpp's own converter" in message


def test_heads_that_are_not_as_wide_as_the_model_are_refused(save):
    message = refused(save(kv_channels=32))
    assert "4 heads of 32" in message and "128" in message and "64" in message and "--to qwen2" in message


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ({"rotary_pct": 0.5}, "rotary_pct"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
    ],
)
def test_other_arithmetic_is_refused(save, changes, named):
    assert named in refused(save(**changes))


def test_biases_that_are_not_zero_are_refused(save, written):
    folder = save(no_bias=False)
    state = load_file(folder / "model.safetensors")
    biases = [name for name in state if name.endswith("c_proj.bias")]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items() if name.endswith(("w1.bias", "w2.bias"))}
    zeros |= {name: torch.zeros_like(state[name]) for name in biases}
    save_file({**state, **zeros}, folder / "model.safetensors", metadata={"format": "pt"})
    assert not any("output.bias" in name for name in types(written(folder)))
    save_file({**state, **zeros, biases[0]: state[biases[0]] + 1}, folder / "model.safetensors", {"format": "pt"})
    assert biases[0] in refused(folder) and "no_bias" in refused(folder)


def test_dynamic_scaling_is_refused(save):
    assert "yarn" in refused(save(), scaling=RopeScaling("dynamic", 2.0))


def test_scaling_that_a_gguf_has_no_place_for_is_refused(save):
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 1.5}
    folder = save(rope_parameters={**rope, "rope_theta": 10000.0}, use_dynamic_ntk=False)
    assert "attention_factor=1.5" in refused(folder)


def test_a_tokenizer_that_cuts_otherwise_is_refused(save, tmp_path):
    form = tmp_path / "form"
    write_plan(plan_conversion(open_source(save()), "qwen2"), form, Progress())
    content = json.loads((form / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}|\p{L}+|."
    (form / "tokenizer.json").write_text(json.dumps(content))
    assert "doesn't cut texts as QWen's" in refused(form)


def test_a_tokenizer_of_another_model_is_refused(save):
    message = refused(save(vocab_size=460))
    assert "463" in message and "460 rows" in message


def test_ids_beyond_the_embedding_are_refused(save):
    folder = change(save(), bos_token_id=500)
    assert "bos_token_id=500" in refused(folder)


@pytest.mark.parametrize("head", ["license: [", "license: {a: 1}"])
def test_a_damaged_model_card_is_named(save, head):
    folder = save()
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    assert "README.md" in refused(folder)


def test_settings_of_sampling_that_are_no_numbers_are_named(save):
    assert "generation_config.json" in refused(change(save(), "generation_config.json", top_k="many"))


@pytest.mark.parametrize("outtype, value, named", [("f16", 1e5, "--outtype"), ("q8_0", 1e7, "--outtype bf16")])
def test_values_beyond_a_type_are_refused(save, tmp_path, outtype, value, named):
    folder = save()
    state = load_file(folder / "model.safetensors")
    state["transformer.h.1.mlp.w1.weight"][3, 5] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    plan = plan_gguf(open_source(folder), Encoding(outtype))
    with pytest.raises(CheckpointError, match="blk.1.ffn_up.weight") as error:
        write_plan(plan, tmp_path / "a.gguf", Progress())
    assert named in str(error.value)
    assert not list(tmp_path.glob("a.gguf*"))


@pytest.mark.slow
def test_the_package_is_named_where_it_is_missing(save, warm):
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from qwen1.conversion.commands import main\n"
        f"sys.argv = ['', 'convert', {str(save())!r}, 'a.gguf', '--to', 'gguf']; main()"
    )
    done = subprocess.run([*warm, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install gguf" in done.stderr and "Traceback" not in done.stderr


# --- the file ---


class Interruption(Progress):
    def __init__(self, after):
        self.left = after

    def advance(self, name, nbytes, tensors=1):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_the_same_again_does_nothing_and_another_is_refused(save, tmp_path):
    folder, path = save(), tmp_path / "a.gguf"
    assert write_plan(plan_gguf(open_source(folder)), path, Progress())
    before = path.read_bytes()
    assert not write_plan(plan_gguf(open_source(folder)), path, Progress())
    for outtype in ("f16", "q8_0"):
        with pytest.raises(CheckpointError, match="holds something else"):
            write_plan(plan_gguf(open_source(folder), Encoding(outtype)), path, Progress())
    damaged = bytearray(before)
    damaged[-40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="holds something else"):
        write_plan(plan_gguf(open_source(folder)), path, Progress())
    assert list(tmp_path.glob("a.gguf*")) == [path]


def test_an_interrupted_run_leaves_no_file_and_is_repeated(save, tmp_path):
    folder, path = save(), tmp_path / "a.gguf"
    with pytest.raises(KeyboardInterrupt):
        write_plan(plan_gguf(open_source(folder)), path, Interruption(5))
    assert not path.exists()
    assert write_plan(plan_gguf(open_source(folder)), path, Progress())
    assert list(tmp_path.glob("a.gguf*")) == [path] and len(values(path)) == 27


def test_a_file_that_was_complete_but_not_renamed_is_taken_over(save, tmp_path, monkeypatch):
    folder, path = save(), tmp_path / "a.gguf"
    plan, steps = plan_gguf(open_source(folder)), []
    monkeypatch.setattr("qwen1.conversion.writing.folders.remove_work_folder", lambda folder: None)
    assert write_plan(plan, path, Progress())
    monkeypatch.undo()
    partial = tmp_path / "a.gguf.partial"
    shutil.copy(path, partial / plan.files[0].name)
    path.unlink()

    class Counted(Progress):
        def advance(self, name, nbytes, tensors=1):
            steps.append(tensors)

    assert write_plan(plan_gguf(open_source(folder)), path, Counted())
    assert steps == [27] and not partial.exists() and len(values(path)) == 27


def test_what_is_left_behind_a_renamed_file_goes(save, tmp_path, monkeypatch):
    folder, path = save(), tmp_path / "a.gguf"
    monkeypatch.setattr("qwen1.conversion.writing.folders.remove_work_folder", lambda folder: None)
    assert write_plan(plan_gguf(open_source(folder)), path, Progress())
    assert (tmp_path / "a.gguf.partial").exists()
    monkeypatch.undo()
    assert not write_plan(plan_gguf(open_source(folder)), path, Progress())
    assert list(tmp_path.glob("a.gguf*")) == [path]


def test_a_full_disk_is_told_before_anything_is_written(save, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**50, 2**50 - 2**20, 2**20)
    plan = plan_gguf(open_source(save()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="are needed"):
        write_plan(plan, tmp_path / "a.gguf", Progress())


@pytest.mark.parametrize("place", ["inside", "folder"])
def test_places_that_are_no_target(save, tmp_path, place):
    folder = save()
    path = folder / "a.gguf" if place == "inside" else tmp_path / "a.gguf"
    if place == "folder":
        path.mkdir()
    with pytest.raises(CheckpointError, match="inside the source|is a folder"):
        write_plan(plan_gguf(open_source(folder)), path, Progress())


def test_alignment(save, written):
    path = written(save(ffn_hidden_size=40), "f16")
    reader = gguf.GGUFReader(path)
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    last = max(reader.tensors, key=lambda tensor: tensor.data_offset)
    assert path.stat().st_size == -(-(last.data_offset + last.n_bytes) // 32) * 32
    assert struct.unpack("<4sI", path.read_bytes()[:8]) == (b"GGUF", 3)
    assert all(np.isfinite(tensor.data).all() for tensor in reader.tensors)


# --- the command ---


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_command_names_the_file(save, tmp_path):
    command = ["convert", save(), tmp_path / "new" / "a.gguf", "--to", "gguf", "--outtype", "q8_0"]
    done = run(*command)
    assert done.exit_code == 0 and "a.gguf: " in done.stdout and "kB written" in done.stdout
    assert "up to date" in run(*command).stdout


def test_another_name_is_that_of_a_folder(save, tmp_path):
    done = run("convert", save(torch.bfloat16), tmp_path / "models", "--to", "gguf")
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["source-BF16.gguf"]


@pytest.mark.parametrize(
    "options, remedy",
    [
        (["--dtype", "float16"], "--outtype"),
        (["--verify"], "docs/gguf.md"),
        (["--max-shard-size", "1GB"], "--max-shard-size"),
        (["--seq-length", "64"], "--seq-length"),
    ],
)
def test_options_for_folders_are_refused(save, tmp_path, options, remedy):
    done = run("convert", save(), tmp_path / "a.gguf", "--to", "gguf", *options)
    assert done.exit_code == 2 and remedy in done.stderr


def test_outtype_is_for_a_gguf_only(save, tmp_path):
    done = run("convert", save(), tmp_path / "new", "--to", "qwen2", "--outtype", "f16")
    assert done.exit_code == 2 and "--dtype" in done.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_a_gguf_is_told_apart_from_damage(save, written, command, tmp_path):
    folder = save()
    path = written(folder)
    rest = {"inspect": [], "verify": [folder], "convert": [tmp_path / "new", "--to", "qwen"]}[command]
    done = run(command, path, *rest)
    assert done.exit_code == (3 if command == "inspect" else 1)
    text = " ".join((done.stdout + done.stderr).split())
    assert "is a GGUF" in text and "name the folder" in text
    assert "damaged" not in text and "config.json" not in text
