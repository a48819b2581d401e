"""What a user's script does with a downloaded folder, in a process of its own."""

import json
import os
import shutil
import subprocess

import pytest

THREE_TURNS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="auto", trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)

response, history = model.chat(tokenizer, "你好", history=None)
response, history = model.chat(tokenizer, "给我讲一个年轻人奋斗创业最终取得成功的故事。", history=history)
response, history = model.chat(tokenizer, "给这个故事起一个标题", history=history)
assert len(history) == 3 and history[-1] == ("给这个故事起一个标题", response) and response, history

for text in model.chat_stream(tokenizer, "给这个故事起一个标题", history=history[:2]):
    pass
assert text == response, (text, response)
print("done")
"""

GOLDEN = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, expected = sys.argv[1], load_file(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
for name in expected:
    if name.startswith("prefill_"):
        prompt = expected[name.replace("prefill", "ids")][:, : expected[name].shape[1]]
        with torch.no_grad():
            torch.testing.assert_close(model(prompt).logits, expected[name], rtol=0, atol=5e-5)

model.resize_token_embeddings(len(tokenizer))
response, history = model.chat(tokenizer, "你好", history=None, do_sample=False, top_p=None, max_new_tokens=24)
assert response and history == [("你好", response)], history
stream = model.chat_stream(tokenizer, "你好", history=None, do_sample=False, top_p=None, max_new_tokens=24)
assert list(stream)[-1] == response
print("done")
"""

OPEN_STREAMS = """
import atexit, os, sys, threading, time

def check():  # behind what was registered later
    for thread in threading.enumerate():
        if thread.name == "qwen-chat-stream":
            thread.join(1)
            if thread.is_alive():
                os._exit(9)
    if time.monotonic() - began > 20:
        os._exit(10)

atexit.register(check)
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()

def start():
    return model.chat_stream(tokenizer, "q", min_new_tokens=100_000, max_new_tokens=100_000)

def read():
    for text in start():
        texts.append(text)

streams, texts = [start(), start()], []
for stream in streams:
    next(stream)
threading.Thread(target=read, daemon=True).start()
while not texts:
    time.sleep(0.01)
for text in start():
    break
began = time.monotonic()
print("done")
if sys.argv[2] == "error":
    raise ZeroDivisionError
sys.exit(0 if sys.argv[2] == "end" else 3)
"""

DEMO = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationConfig

folder = sys.argv[1]
AutoConfig.from_pretrained(folder, trust_remote_code=True, resume_download=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, resume_download=True)
model = AutoModelForCausalLM.from_pretrained(
    folder, device_map="cpu", trust_remote_code=True, resume_download=True
).eval()
model.generation_config = config = GenerationConfig.from_pretrained(
    folder, trust_remote_code=True, resume_download=True
)
history = []
for query in ("hello", "and"):
    for response in model.chat_stream(tokenizer, query, history=history, generation_config=config):
        pass
    history.append((query, response))
response, _ = model.chat(tokenizer, "q", history=history, stop_words_ids=[tokenizer.encode("x")], top_k=1, top_p=0.5)
for saved in (model, tokenizer):
    saved.save_pretrained("saved")
assert "resume_download" not in open("saved/tokenizer_config.json").read() + open("saved/config.json").read()
AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True).chat(tokenizer, "q", history=None)
print("done")
"""


@pytest.fixture
def run_script(tmp_path, warm_with):
    """Run a script in a process that knows neither this package nor the network: (source, *arguments)."""

    def run(source, *arguments, code=0):
        script = tmp_path / "script.py"
        script.write_text(source, encoding="utf-8")
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
        environment.pop("PYTHONPATH", None)
        command = [*warm_with(environment, "torch"), str(script), *map(str, arguments)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert result.returncode == code and result.stdout.endswith("done\n"), result.stdout + result.stderr
        return result.stderr

    return run


@pytest.mark.slow
@pytest.mark.no_cover
def test_three_turns_and_a_stream(checkpoint_folder, run_script):
    run_script(THREE_TURNS, checkpoint_folder)


@pytest.mark.slow
def test_three_turns_and_a_stream_of_the_shipped_model(repository, run_script):
    run_script(THREE_TURNS, repository / "qwen-tiny-chat")


@pytest.mark.slow
def test_the_first_lines_of_the_demos(checkpoint_folder, run_script):
    assert run_script(DEMO, checkpoint_folder).count("resume_download is left out") == 2, "of tokenizer and model"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("end", 0), ("exit", 3), ("error", 1)])
@pytest.mark.no_cover
def test_a_script_may_end_with_open_streams(checkpoint_folder, run_script, how, code):
    """In its globals and in a thread that the interpreter doesn't wait for; it ends soon, and says nothing of them."""
    said = run_script(OPEN_STREAMS, checkpoint_folder, how, code=code)
    assert "terminate" not in said and "SystemExit" not in said and "stream" not in said
    assert said.count("Traceback") == (how == "error")


@pytest.mark.slow
def test_golden_checkpoint_with_the_published_vocabulary(
    golden, published_vocabulary, repository, run_script, tmp_path
):
    """The published configuration of generation, real weights in the published layout, and the real vocabulary."""
    folder = tmp_path / "golden"
    shutil.copytree(golden / "model" / "aug_ntk_logn", folder)
    expected = (folder / "expected.safetensors").rename(tmp_path / "expected.safetensors")
    shutil.copy(published_vocabulary, folder / "qwen.tiktoken")
    code = [path for path in repository.glob("*.py") if "qwen" in path.name]
    names = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for path in [*code, *(repository / name for name in names)]:
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = json.loads((repository / "config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    run_script(GOLDEN, folder, expected)
