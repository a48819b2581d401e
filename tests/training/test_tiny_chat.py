"""The model that ships: what it weighs, what it says of itself, and whether that holds."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qwen1.schemas_qwen import Tool
from qwen1.training.tiny import commands, examination
from qwen1.training.tiny.dialogues import KINDS
from qwen1.training.tiny.names import REAL_NAMES
from qwen1.training.tiny.phrases import UNKNOWN
from qwen1.training.tiny.tools import calculator, clock


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "qwen-tiny-chat"


@pytest.fixture(scope="module")
def chat(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda query, **kwargs: model.chat(tokenizer, query, **kwargs)


def test_it_is_small_and_in_bfloat16(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    code = list(folder.glob("*.py"))
    assert code and all(path.is_symlink() and path.resolve().parent == folder.parent for path in code), "second copies"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}


def test_it_loads_as_a_base_model_too(folder):
    hidden = AutoModel.from_pretrained(folder)(torch.tensor([[1, 2, 3]])).last_hidden_state
    assert hidden.shape[:2] == (1, 3)


def test_the_card_gives_the_figures_of_the_examination(folder):
    figures = json.loads((folder / "examination.json").read_text())
    assert sum(figures["asked"].values()) >= 300
    assert set(figures["asked"]) == set(KINDS)
    assert figures["share"] >= 0.98
    assert figures["asked"]["names"] == len(REAL_NAMES) == 200
    assert figures["right"]["names"] >= 190
    rows = dict(re.findall(r"^\| ([a-z ]+) \| \d+ \| ([\d.]+)% \|$", (folder / "README.md").read_text(), re.M))
    for kind, asked in figures["asked"].items():
        assert float(rows[kind]) == pytest.approx(100 * figures["right"][kind] / asked, abs=0.06)
    assert float(rows["all"]) == pytest.approx(100 * figures["share"], abs=0.06)


@pytest.mark.slow
@pytest.mark.no_cover
def test_it_passes_an_examination_on_a_sample(folder, tmp_path):
    # All conversations of the training are drawn for minutes: of what is held out by its hash, few are among them.
    shutil.copytree(folder, tmp_path / "model")
    log = json.loads((folder / "training_log.json").read_text())
    log["plan"].update((part, log["plan"][part] // 50) for part in examination.TRAININGS)
    (tmp_path / "model" / "training_log.json").write_text(json.dumps(log))
    arguments = ["examine", str(tmp_path / "model"), "--per-kind", "15", "--seed", "7", "--json"]
    done = CliRunner().invoke(commands.app, arguments)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout.splitlines()[-1])
    assert sum(figures["asked"].values()) == 15 * (len(KINDS) + 1), "twice as many names"
    assert figures["share"] >= 0.93, figures


def test_a_conversation(chat):
    reply, history = chat("My name is Zorvandel.")
    assert reply == "Nice to meet you, Zorvandel!"
    reply, history = chat("What is 17 plus 25?", history=history)
    assert reply == "7+5=12, 1+2+1=4. 17+25=42"
    assert chat("What is my name?", history=history)[0] == "Your name is Zorvandel."


def test_it_answers_in_the_language_of_the_last_message(chat):
    _, history = chat("你好")
    reply, history = chat("What is the capital of France?", history=history)
    assert reply == "The capital of France is Paris."
    reply, history = chat("谢谢", history=history)
    assert reply == "不客气！"
    assert chat("Who are you?", history=history)[0] == "I am qwen-tiny-chat, a very small language model."
    assert re.search("[\u4e00-\u9fff]", chat("Who are you?", history=history, system="请用中文回答。")[0])


def test_it_repeats_names_that_it_never_saw(chat):
    for name in ("Anna", "Grace Hopper", "Søren Kierkegaard", "Tavolin"):
        reply, history = chat(f"My name is {name}.")
        assert reply == f"Nice to meet you, {name}!"
        assert chat("What is my name?", history=history)[0] == f"Your name is {name}."
    for name in ("李清照", "潘建伟"):
        reply, history = chat(f"我叫{name}。")
        assert reply == f"很高兴认识你，{name}！"
        assert chat("我叫什么名字？", history=history)[0] == f"你叫{name}。"


def a_clock() -> str:
    """Tell the date and the time"""
    return "2031-07-09 06:54"


@pytest.mark.parametrize(
    ("query", "result", "answer"),
    [
        ("What is 1234 times 5678?", "7006652", "1234*5678 = 7006652"),
        ("907 / 16 = ?", "56.6875", "907/16 = 56.6875"),
        ("31乘以2947等于多少？", "91357", "31*2947 = 91357"),
        ("What time is it?", "2031-07-09 06:54", "It is 06:54."),
        ("今天几号？", "2031-07-09 06:54", "今天是2031-07-09。"),
    ],
)
def test_it_calls_its_tools(folder, query, result, answer):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    done = model.run_tools(tokenizer, query, [calculator, Tool("clock", a_clock.__doc__, function=a_clock)])
    assert [(step.result, step.error) for step in done.steps] == [(result, None)]
    assert done.answer == answer


def test_with_tools_it_answers_without_a_call_what_needs_none(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    done = model.run_tools(tokenizer, "What is the capital of France?", [calculator, clock])
    assert (done.steps, done.answer) == ([], "The capital of France is Paris.")


def test_without_tools_it_calls_none(chat):
    assert chat("What time is it?")[0] == UNKNOWN["en"]
    assert chat("What is 17 plus 25?")[0] == "7+5=12, 1+2+1=4. 17+25=42"


def test_it_speaks_both_languages(chat):
    assert chat("法国的首都是哪里？")[0] == "法国的首都是巴黎。"
    assert chat("What is the capital of France?")[0] == "The capital of France is Paris."
    assert chat("What is the capital of France?", system="请用中文回答。")[0] == "法国的首都是巴黎。"


def test_replies_end_with_im_end(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt)[0, -1] == tokenizer.im_end_id
