"""Folders that other engines are given, and their environments."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen1 import QWenLMHeadModel, QWenTokenizerFast, make_context
from qwen1.conversion.commands import app

LLAMA_CPP = """
import { readFileSync } from "node:fs";
import { getLlama } from "node-llama-cpp";

const [path, asked] = process.argv.slice(2);
const { prompts, texts, special, measured } = JSON.parse(readFileSync(asked));
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 1 });
const model = await llama.loadModel({ modelPath: path });
const context = await model.createContext({ contextSize: 512 });
const replies = [], likely = [];
for (const prompt of prompts) {
  const sequence = context.getSequence(), reply = [];
  for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    if (model.isEogToken(token) || reply.length >= 64) break;
    reply.push(token);
  }
  replies.push(reply);
  sequence.dispose();
}
await context.dispose();
const exact = { experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false };
for (const ids of measured) {
  const context = await model.createContext({ contextSize: 512, ...exact });
  const sequence = context.getSequence();
  const wanted = { generateNext: { probabilities: true } };
  const after = await sequence.controlledEvaluate(ids.map((id) => [id, wanted]));
  likely.push(after.map(({ next }) => [...next.probabilities.entries()].slice(0, 200)));
  await context.dispose();
}
const ids = texts.map((text) => model.tokenize(text, special));
process.stdout.write(JSON.stringify({ replies, ids, likely }) + "\\n", () => process.exit(0));
"""
"""llama.cpp as `node-llama-cpp` brings it: greedy replies to prompts of token ids, the ids of texts, and the most
likely tokens after each of some ids, with their probabilities."""

QUESTIONS = ["你好", "12+34=?", "What is the capital of France?", "法国的首都是哪里？"]


@pytest.fixture(scope="session")
def shipped(repository, tmp_path_factory) -> SimpleNamespace:
    """The model that ships: its folder, upgraded and as Qwen2, prompts of token ids, and what it says to them."""
    folder, work = repository / "qwen-tiny-chat", tmp_path_factory.mktemp("engines")
    app(["upgrade", str(folder), str(work / "upgraded"), "--copy"], standalone_mode=False)
    app(["convert", str(folder), str(work / "qwen2"), "--to", "qwen2"], standalone_mode=False)
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True).eval()
    tokenizer = QWenTokenizerFast.from_pretrained(folder)
    replies = {text: model.chat(tokenizer, text, do_sample=False)[0] for text in QUESTIONS}
    prompts = [make_context(tokenizer, text, [], "You are a helpful assistant.", 512)[1] for text in QUESTIONS]
    folders = {"folder": folder, "upgraded": work / "upgraded", "qwen2": work / "qwen2"}
    return SimpleNamespace(**folders, tokenizer=tokenizer, replies=replies, prompts=prompts)


@pytest.fixture
def published_folder(checkpoint_folder, published_vocabulary, tiny_model):
    """A tiny random chat checkpoint with the vocabulary of all published ones."""
    model = tiny_model(vocab_size=151936, eos_token_id=151643, pad_token_id=None)
    settings = {"chat_format": "chatml", "max_window_size": 6144, "eos_token_id": [151645, 151643]}
    model.generation_config.update(**settings, allow_custom_entries=True)
    model.save_pretrained(checkpoint_folder)
    shutil.copy(published_vocabulary, checkpoint_folder / "qwen.tiktoken")
    return checkpoint_folder


@pytest.fixture
def published_chat(published_folder):
    """The same as QWen and as Qwen2."""
    target = published_folder.parent / "published-qwen2"
    app(["convert", str(published_folder), str(target), "--to", "qwen2"], standalone_mode=False)
    return SimpleNamespace(qwen=published_folder, qwen2=target)


@pytest.fixture(scope="session")
def interpreter():
    """The Python of an environment that an environment variable names: (variable, what is in it) -> path."""

    def find(variable: str, contents: str) -> Path:
        path = os.environ.get(variable)
        if not path:
            pytest.skip(f"{variable} names no Python of an environment with {contents} (docs/serve.md)")
        assert Path(path).is_file(), f"{variable}={path} doesn't exist"
        return Path(path)

    return find


@pytest.fixture(scope="session")
def run_in(tmp_path_factory):
    """Run a script in another environment, offline: (program, arguments) -> the JSON object that it prints."""

    def run(command: Path | str, *arguments: Path | str, timeout: int = 1200):
        left_out = ("HF_", "COV_", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        path = f"{Path(command).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**kept, "HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "1", "PATH": path}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by itself it takes most of the memory
        done = subprocess.run(
            [str(command), *map(str, arguments)],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return next((json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), None)

    return run


@pytest.fixture(scope="session")
def llama_cpp(interpreter, run_in, tmp_path_factory):
    """Ask llama.cpp: (GGUF, prompts, texts, whether they name control tokens, ids to measure at) -> its answers."""
    environment = interpreter("QWEN_LLAMA_CPP", "node-llama-cpp beside it").parent.parent
    node = shutil.which("node", path=f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if node is None or not (environment / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip(f"{environment} has no node-llama-cpp, or there is no node (docs/gguf.md)")
    script = environment / "questions.mjs"  # beside its packages

    def ask(path: Path, prompts=(), texts=(), special=False, measured=()) -> SimpleNamespace:
        asked = tmp_path_factory.mktemp("questions") / "asked.json"
        questions = {"prompts": prompts, "texts": texts, "special": special, "measured": measured}
        asked.write_text(json.dumps(questions), encoding="utf-8")
        script.write_text(LLAMA_CPP)
        return SimpleNamespace(**run_in(node, script, path, asked))

    return ask
