"""llama.cpp: its own converter on our folders, and its replies. The environment is made as in docs/serve.md."""

import json

import pytest

pytestmark = pytest.mark.slow

REPLIES = """
import json, sys
from llama_cpp import Llama

path, chat_format, questions, texts = sys.argv[1], sys.argv[2] or None, *map(json.loads, sys.argv[3:])
llama = Llama(path, n_ctx=512, n_threads=2, chat_format=chat_format, verbose=False)
replies = {}
for question in questions:
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": question}]
    answer = llama.create_chat_completion(messages, temperature=0, max_tokens=64)
    replies[question] = answer["choices"][0]["message"]["content"]
ids = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
print(json.dumps({"replies": replies, "ids": ids}))
"""
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
    return interpreter("QWEN_LLAMA_CPP", "llama-cpp-python, and llama.cpp's source in its folder `llama.cpp`")


@pytest.fixture(scope="module")
def to_gguf(python, run_in, tmp_path_factory):
    """Convert a folder with llama.cpp's script: (folder, whether it knows the vocabulary) -> GGUF file in float32."""
    script = python.parent.parent / "llama.cpp" / "convert_hf_to_gguf.py"
    assert script.is_file(), f"{script} doesn't exist: put llama.cpp's source there"

    def convert(folder, known):
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        options = (script, folder, "--outfile", path, "--outtype", "f32")
        run_in(python, *(() if known else ("-c", KNOWN)), *options)
        return path

    return convert


@pytest.mark.parametrize("form", ["upgraded", "qwen2"])
def test_the_shipped_model_replies_as_here(to_gguf, python, run_in, shipped, form):
    path = to_gguf(getattr(shipped, form), known=False)
    found = run_in(python, "-c", REPLIES, path, "chatml", json.dumps(list(shipped.replies)), json.dumps(TEXTS))
    assert found["replies"] == shipped.replies
    assert found["ids"] == [shipped.tokenizer.encode(text, allowed_special=set()) for text in TEXTS]


@pytest.mark.parametrize("form", ["qwen", "qwen2"])
def test_the_published_vocabulary_is_known(to_gguf, published_chat, form):
    """By its fingerprint, of the ids that our tokenizer gives and of those of the converted one."""
    assert to_gguf(getattr(published_chat, form), known=True).stat().st_size > 2**20
