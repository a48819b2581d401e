"""llama.cpp: its own converter on our folders, and its replies. The environment is made as in docs/serve.md."""

import json
import shutil

import pytest

from qwen1 import make_context

pytestmark = pytest.mark.slow

REPLIES = """
import { readFileSync } from "node:fs";
import { getLlama } from "node-llama-cpp";

const [path, questions] = process.argv.slice(2);
const { prompts, texts } = JSON.parse(readFileSync(questions));
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 1 });
const model = await llama.loadModel({ modelPath: path });
const context = await model.createContext({ contextSize: 512 });
const replies = [];
for (const prompt of prompts) {
  const sequence = context.getSequence();
  const reply = [];
  for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    if (model.isEogToken(token) || reply.length >= 64) break;
    reply.push(token);
  }
  replies.push(reply);
  sequence.dispose();
}
console.log(JSON.stringify({ replies, ids: texts.map((text) => model.tokenize(text, false)) }));
process.exit(0);
"""
"""Greedy replies to prompts of token ids, and the ids of texts, by llama.cpp as `node-llama-cpp` brings it."""

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
    node, environment = shutil.which("node"), python.parent.parent
    if node is None or not (environment / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip(f"{environment} has no node-llama-cpp, or there is no node")
    path = to_gguf(getattr(shipped, form), known=False)
    tokenizer = shipped.tokenizer
    prompts = [make_context(tokenizer, text, [], "You are a helpful assistant.", 512)[1] for text in shipped.replies]
    questions, script = path.with_name("questions.json"), environment / "replies.mjs"  # beside its packages
    questions.write_text(json.dumps({"prompts": prompts, "texts": TEXTS}))
    script.write_text(REPLIES)
    found = run_in(node, script, path, questions)
    assert [tokenizer.decode(ids) for ids in found["replies"]] == list(shipped.replies.values())
    assert found["ids"] == [tokenizer.encode(text, allowed_special=set()) for text in TEXTS]


@pytest.mark.parametrize("form", ["qwen", "qwen2"])
def test_the_published_vocabulary_is_known(to_gguf, published_chat, form):
    """By its fingerprint, of the ids that our tokenizer gives and of those of the converted one."""
    assert to_gguf(getattr(published_chat, form), known=True).stat().st_size > 2**20
