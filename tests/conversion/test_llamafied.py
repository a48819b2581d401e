"""QWen under LLaMA's names: the tokenizer goes along by what its files hold, not by the architecture of the model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, LlamaForCausalLM

from qwen1 import QWenLMHeadModel, QWenTokenizer, QWenTokenizerFast
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.conversion import plan_conversion
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress

TEXT = "<|im_start|>user\nHello 你好  12345 don't\n\n<|im_end|>\n<|im_start|>assistant\n"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def converted(source, target, to):
    origin = open_source(source)
    plan = plan_conversion(origin, to)
    write_plan(plan, target, Progress())
    return target, plan.notes


def write(path, value):
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def tiny_chat(request):
    return request.config.rootpath / "qwen-tiny-chat"


@pytest.fixture
def llama(tiny_chat, tmp_path):
    """qwen-tiny-chat as a LLaMA model with biases, and no tokenizer."""
    qwen2, _ = converted(tiny_chat, tmp_path / "qwen2", "qwen2")
    folder = tmp_path / "llama"
    folder.mkdir()
    tensors = load_file(qwen2 / "model.safetensors")
    width = tensors["model.norm.weight"].shape[0]
    config = json.loads((qwen2 / "config.json").read_text())
    names = [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(config["num_hidden_layers"])]
    zeros = {name: torch.zeros(width, dtype=tensors["model.norm.weight"].dtype) for name in names}
    save_file({**tensors, **zeros}, folder / "model.safetensors")
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "mlp_bias": False}
    write(folder / "config.json", {**config, **llama})
    shutil.copyfile(qwen2 / "generation_config.json", folder / "generation_config.json")
    return folder


def tiktoken(folder, tiny_chat):
    shutil.copyfile(tiny_chat / "qwen.tiktoken", folder / "qwen.tiktoken")
    write(folder / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer", "model_max_length": 8192})


def tokenizer_json(folder, tiny_chat):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder.parent / "qwen2" / name, folder / name)


def split(folder, in_vocabulary):
    """vocab.json and merges.txt; gives the backend's control tokens."""
    backend = json.loads((folder.parent / "qwen2" / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in backend["added_tokens"]}
    write(folder / "vocab.json", {**backend["model"]["vocab"], **(added if in_vocabulary else {})})
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in backend["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return added


def control_tokens_in_vocab_json(folder, tiny_chat):
    split(folder, in_vocabulary=True)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})


def control_tokens_in_settings(folder, tiny_chat):
    added = split(folder, in_vocabulary=False)
    listed = {str(i): {"content": token, "special": True} for token, i in added.items()}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": listed})


FORMS = [tiktoken, tokenizer_json, control_tokens_in_vocab_json, control_tokens_in_settings]


@pytest.mark.parametrize("form", FORMS)
def test_the_tokenizer_comes_along_with_equal_ids(llama, tiny_chat, tmp_path, form):
    form(llama, tiny_chat)
    folder, notes = converted(llama, tmp_path / "qwen", "qwen")
    assert not any("tokenizer" in note for note in notes)
    expected = QWenTokenizer.from_pretrained(tiny_chat)
    found = AutoTokenizer.from_pretrained(folder)
    assert type(found) is QWenTokenizerFast
    assert found(TEXT).input_ids == expected(TEXT).input_ids
    assert [found.eod_id, found.im_start_id, found.im_end_id] == expected.convert_tokens_to_ids(CONTROL)
    assert QWenTokenizer.from_pretrained(folder)(TEXT).input_ids == expected(TEXT).input_ids


@pytest.mark.parametrize("form", [tiktoken, tokenizer_json])
def test_it_chats_as_before(llama, tiny_chat, tmp_path, form):
    form(llama, tiny_chat)
    folder, _ = converted(llama, tmp_path / "qwen", "qwen")
    replies = []
    for path in (tiny_chat, folder):
        model = QWenLMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        replies.append(model.chat(tokenizer, "Hello", history=None, do_sample=False, max_new_tokens=16)[0])
    assert replies[0] and replies[0] == replies[1]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()(ids).logits
        ours = model(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_damaged_vocabulary_is_refused(llama, tiny_chat):
    tiktoken(llama, tiny_chat)
    (llama / "qwen.tiktoken").write_text("no vocabulary")
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken"):
        plan_conversion(open_source(llama), "qwen")


def test_llamas_tokenizer_is_kept_even_if_it_was_given_control_tokens(llama, tmp_path):
    """It is made of characters, so QWen's class would read it wrong."""
    backend = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")], byte_fallback=True))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(CONTROL)
    backend.save(str(llama / "tokenizer.json"))
    folder, notes = converted(llama, tmp_path / "qwen", "qwen")
    assert (folder / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert any("kept as it is, and can't chat" in note for note in notes)


def test_qwen2_weights_with_other_tokenizers(tiny_chat, tmp_path):
    source, _ = converted(tiny_chat, tmp_path / "qwen2", "qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    folder, notes = converted(source, tmp_path / "first", "qwen")
    assert (folder / "tokenizer.model").read_bytes() == b"sentencepiece" and any("kept" in note for note in notes)
    shutil.copyfile(tiny_chat / "qwen.tiktoken", source / "qwen.tiktoken")
    folder, _ = converted(source, tmp_path / "second", "qwen")
    assert (
        AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
        == QWenTokenizer.from_pretrained(tiny_chat)(TEXT).input_ids
    )
