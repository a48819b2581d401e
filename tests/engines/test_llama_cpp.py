"""llama.cpp: its own converter on our folders, and its replies. The environment is made as in docs/serve.md."""

import numpy as np
import pytest

from qwen1.conversion.commands import app

pytestmark = pytest.mark.slow

KNOWN = """
import runpy, sys
from pathlib import Path

folder = Path(sys.argv[1]).parent
sys.path[:0] = [str(folder), str(folder / "gguf-py")]
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda model, tokenizer: "qwen2"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The converter, told that a vocabulary of our own cuts texts as all QWen do, which it knows by a fingerprint only."""

TEXTS = ["Hello, world! 1234 + 56", "我叫小明。\n\n  tab\tand   spaces", "It's <|im_end|> as text"]


@pytest.fixture(scope="module")
def python(interpreter):
    return interpreter("QWEN_LLAMA_CPP", "llama.cpp's source in its folder `llama.cpp` and node-llama-cpp beside it")


@pytest.fixture(scope="module")
def to_gguf(python, run_in, tmp_path_factory):
    """Convert with llama.cpp's script: (folder, whether it knows the vocabulary, outtype) -> GGUF file."""
    script = python.parent.parent / "llama.cpp" / "convert_hf_to_gguf.py"
    if not script.is_file():
        pytest.skip(f"{script} doesn't exist: put llama.cpp's source there")

    def convert(folder, known, outtype="f32"):
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        options = (script, folder, "--outfile", path, "--outtype", outtype)
        run_in(python, *(() if known else ("-c", KNOWN)), *options)
        return path

    return convert


@pytest.mark.parametrize("form", ["upgraded", "qwen2"])
def test_the_shipped_model_replies_as_here(to_gguf, llama_cpp, shipped, form):
    tokenizer = shipped.tokenizer
    found = llama_cpp(to_gguf(getattr(shipped, form), known=False), shipped.prompts, TEXTS)
    assert [tokenizer.decode(ids) for ids in found.replies] == list(shipped.replies.values())
    assert found.ids == [tokenizer.encode(text, allowed_special=set()) for text in TEXTS]


@pytest.mark.parametrize("form", ["qwen", "qwen2"])
def test_the_published_vocabulary_is_known(to_gguf, published_chat, form):
    """By its fingerprint, of the ids that our tokenizer gives and of those of the converted one."""
    assert to_gguf(getattr(published_chat, form), known=True).stat().st_size > 2**20


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("form", ["shipped", "published"])
def test_our_file_is_the_one_of_its_converter(to_gguf, published_chat, shipped, tmp_path, form, outtype):
    """Every key and its type, every tensor to the bit, of the folder that --to qwen2 writes; but for what ours adds."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    folder = shipped.qwen2 if form == "shipped" else published_chat.qwen2
    app(["convert", str(folder), str(tmp_path / "a.gguf"), "--to", "gguf", "--outtype", outtype], standalone_mode=False)
    ours, theirs = (
        gguf.GGUFReader(path) for path in (tmp_path / "a.gguf", to_gguf(folder, form == "published", outtype))
    )
    found, wanted = (
        {name: (field.contents(), field.types) for name, field in reader.fields.items() if name != "GGUF.kv_count"}
        for reader in (ours, theirs)
    )
    added = {"tokenizer.ggml.bos_token_id"} - wanted.keys()  # else llama.cpp takes a comma
    assert found.keys() - added == wanted.keys()
    assert {name: value for name, value in wanted.items() if found[name] != value} == {}
    tensors, others = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.tensor_type == others[name].tensor_type and (tensor.shape == others[name].shape).all()
        assert np.array_equal(tensor.data.view(np.uint8), others[name].data.view(np.uint8))
