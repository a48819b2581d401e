"""What users do with the Auto classes, in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REMOTE_CODE = """
import json, re, sys, torch
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering,
                          AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, pipeline)

folder, first, second = sys.argv[1:]
remote = dict(trust_remote_code=True)
assert "qwen1" not in sys.modules
config = AutoConfig.from_pretrained(folder, **remote)
assert AutoConfig.from_pretrained(folder, n_layer=1, **remote).num_hidden_layers == 1
base = AutoModel.from_pretrained(folder, **remote)
classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **remote)
assert classifier.score.out_features == 3 and type(base).__name__ == "QWenModel"
tagger = AutoModelForTokenClassification.from_pretrained(folder, num_labels=3, **remote)
assert tagger.score.out_features == 3 and type(tagger).__name__ == "QWenForTokenClassification"
finder = AutoModelForQuestionAnswering.from_pretrained(folder, **remote)
assert finder.qa_outputs.out_features == 2 and type(finder).__name__ == "QWenForQuestionAnswering"
tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
model = AutoModelForCausalLM.from_pretrained(folder, **remote).eval()
model.save_pretrained(first)
tokenizer.save_pretrained(first)
again = AutoModelForCausalLM.from_pretrained(first, **remote).eval()
again.save_pretrained(second)
AutoTokenizer.from_pretrained(first, **remote).save_pretrained(second)
final = AutoModelForCausalLM.from_pretrained(second, **remote).eval()
built = AutoModelForCausalLM.from_config(config, **remote)
assert built.state_dict().keys() == model.state_dict().keys()
for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, final.state_dict()[name])
assert all(tensor.device.type == "cpu" for tensor in (*final.parameters(), *final.buffers()))
settings = dict(max_new_tokens=8, do_sample=False)
reply, history = final.chat(AutoTokenizer.from_pretrained(second, **remote), "你好", None, **settings)
assert reply == model.chat(tokenizer, "你好", None, **settings)[0] and history == [("你好", reply)]
chat = pipeline("text-generation", model=final, tokenizer=tokenizer)
message = chat([{"role": "user", "content": "你好"}], **settings)[0]["generated_text"][-1]
plain = re.sub(r"<\\|[a-z0-9_]+\\|>", "", reply)  # which pipelines leave out
assert message["role"] == "assistant" and message["content"].strip() == plain.strip(), (message, reply)
print(json.dumps({"reply": reply}))
"""

INSTALLED = """
import sys, qwen1
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, saved = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
assert type(model) is qwen1.QWenLMHeadModel and type(tokenizer) is qwen1.QWenTokenizerFast
reply, _ = model.chat(tokenizer, "hello", history=None, max_new_tokens=8, do_sample=False)
assert list(model.chat_stream(tokenizer, "hello", max_new_tokens=8, do_sample=False))[-1] == reply
model.save_pretrained(saved)
tokenizer.save_pretrained(saved)
"""


@pytest.fixture
def run(tmp_path, warm_with):
    """Run a script in a new process that is offline and has nothing cached."""

    def run_script(script: str, *arguments) -> str:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "COV_"))},
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [*warm_with(environment, "torch"), "-c", script, *map(str, arguments)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run_script


HELPERS_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
from qwen_generation_utils import decode_tokens, get_stop_words_ids, make_context
from tokenization_qwen import QWenTokenizer

tokenizer = QWenTokenizer(sys.argv[2])
text, ids = make_context(tokenizer, "hi", history=[("a", "b")], system="s")
assert decode_tokens([*ids, *tokenizer.encode("reply<|im_end|>")], tokenizer, len(text), len(ids), "chatml") == "reply"
assert get_stop_words_ids("chatml", tokenizer) == [[tokenizer.im_end_id], [tokenizer.im_start_id]]
"""


def python_files(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*.py")}


@pytest.mark.slow
def test_every_auto_class_saves_and_loads_remote_code(run, checkpoint_folder, tmp_path, repository):
    run(REMOTE_CODE, checkpoint_folder, tmp_path / "first", tmp_path / "second")
    needed = {name for name in python_files(checkpoint_folder) if "_qwen" in name or name.startswith("qwen_")}
    for saved in ("first", "second"):
        files = python_files(tmp_path / saved)
        assert needed == files.keys()
        assert all(text == (repository / name).read_text() for name, text in files.items())
        ours = json.loads((repository / "config.json").read_text())["auto_map"]
        assert json.loads((tmp_path / saved / "config.json").read_text())["auto_map"] == ours


def test_helpers_can_be_imported_from_a_folder_that_is_no_package(run, repository, code_of, byte_vocabulary, tmp_path):
    for file in (repository / "qwen_generation_utils.py", *code_of("tokenization_qwen")):
        shutil.copy(file, tmp_path)
    run(HELPERS_ALONE, tmp_path, byte_vocabulary)


@pytest.mark.slow
def test_a_folder_of_2023_loads_with_the_installed_package(run, golden, checkpoint_folder, tmp_path):
    """The old .py files are still there and would fail; without trust_remote_code they are not run."""
    folder = tmp_path / "2023"
    shutil.copytree(checkpoint_folder, folder)
    for file in folder.glob("*.py"):
        file.write_text("raise ImportError('code of 2023')\n")
    (folder / "chat_template.jinja").unlink()
    published = golden / "published_configs"
    shutil.copy(published / "2023-08-chat.tokenizer_config.json", folder / "tokenizer_config.json")
    config = json.loads((folder / "config.json").read_text())
    old = json.loads((published / "2023-08-chat.config.json").read_text())
    shape = ("n_embd", "n_layer", "n_head", "kv_channels", "ffn_hidden_size", "vocab_size", "seq_length")
    old |= {name: config[name] for name in (*shape, "eos_token_id")} | {"padded_vocab_size": config["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(old))
    run(INSTALLED, folder, tmp_path / "saved")
    assert "modeling_qwen.py" in python_files(tmp_path / "saved")
    assert "code of 2023" not in "".join(python_files(tmp_path / "saved").values())


FEW_PACKAGES = """
import sys

sys.modules |= dict.fromkeys(sys.argv[2].split(","))  # nobody finds these
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
placed = {} if "accelerate" in sys.argv[2] else {"device_map": "auto"}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **placed).eval()
assert "transformers_modules" in type(model).__module__
print(model.chat(tokenizer, "12+34=?")[0])
"""
ASKED = {"accelerate", "tiktoken", "torch", "transformers"}
BROUGHT = {"filelock", "huggingface_hub", "psutil", "pyyaml", "rich", "safetensors", "typer"}
"""What README says that remote code needs, and what comes along with these."""


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["accelerate"]], ids=["device_map", "without-accelerate"])
def test_remote_code_needs_no_more_than_the_readme_says(repository, pyproject, tmp_path, more):
    names = {line.partition(">")[0] for line in pyproject["project"]["dependencies"]} - ASKED - BROUGHT
    assert {"markdown-it-py", "prompt_toolkit"} <= names
    hidden = ["qwen1", "einops", *more, *(name.removesuffix("-py").replace("-", "_") for name in sorted(names))]
    done = subprocess.run(
        [sys.executable, "-c", FEW_PACKAGES, str(repository / "qwen-tiny-chat"), ",".join(hidden)],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("12+34=46"), done.stderr
