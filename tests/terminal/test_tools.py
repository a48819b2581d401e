"""`qwen1-chat --tool`: functions found by name, calls shown with their results, the turn in the history."""

import threading

import pytest

from qwen1.programs.tools import SHIPPED, find_tools, texts_of
from qwen1.terminal.commands import main
from qwen1.tools_qwen import ToolCall, ToolLoopError, ToolReply, ToolRun, ToolStep, parse_reply

CALLED = '`calculator({"expression": "1234*5678"})` = `7006652`\n\n1234*5678 = 7006652'
MINE = '''
def calculator(expression: str) -> str:
    """
    Calculate a result

    Args:
        expression: Numbers with +, -, * and / between them
    """
    raise OverflowError("too much")


number = 4
'''


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def texts(conversation, query, stop=None):
    return list(conversation.reply(query, stop or threading.Event()))


def test_a_question_shows_the_call_and_the_answer(capsys):
    asked = ["What is 1234 times 5678?", "--tool", "calculator", "--tool", "clock", "--stats"]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert said.out == CALLED + "\n" and "tokens/s" in said.err


def test_the_text_grows_and_the_turn_is_kept(conversation):
    conversation.tools = [*SHIPPED.values()]
    seen = texts(conversation, "What is 1234 times 5678?")
    assert seen[-1] == CALLED
    assert all(after.startswith(before) for before, after in zip(seen, seen[1:], strict=False))
    ((query, reply),) = conversation.history
    assert query == "What is 1234 times 5678?" and "Observation: 7006652" in reply
    assert texts(conversation, "Who are you?")[-1] == "I am qwen-tiny-chat, a very small language model."
    assert len(conversation.history) == 2 and conversation.history.kept is not None


def test_what_a_function_raises_is_shown(conversation, mine):
    conversation.tools = find_tools([f"{mine}:calculator"])
    assert "`Error: OverflowError: too much`" in texts(conversation, "What is 1234 times 5678?")[-1]


def test_a_stopped_run_leaves_the_conversation_as_it_was(conversation):
    conversation.tools = [*SHIPPED.values()]
    stop = threading.Event()
    seen = []
    for text in conversation.reply("What is 1234 times 5678?", stop):
        seen.append(text)
        stop.set()
    assert len(seen) == 1 and conversation.history == []


def test_a_call_is_not_made_once_the_reply_is_stopped(conversation, monkeypatch):
    stop, made = threading.Event(), []

    def stopped_behind_the_call(tokenizer, query, history, tools, **settings):
        yield parse_reply('Thought: x\nAction: look\nAction Input: {"at": "it"}', tools)
        stop.set()

    def look(at: str) -> str:
        """
        Look at something

        Args:
            at: What
        """
        made.append(at)
        return "seen"

    conversation.tools = [look]
    monkeypatch.setattr(conversation.model, "chat_stream", stopped_behind_the_call)
    assert texts(conversation, "look", stop) == [] and made == [] and conversation.history == []


def test_calls_without_end_are_an_error_of_the_command(conversation, monkeypatch):
    def endless(*given, **settings):
        yield step("nothing", ToolCall("clock", {}))
        raise ToolLoopError("no end", ToolRun(None, [], [step("nothing")] * 4))

    conversation.tools = [*SHIPPED.values()]
    monkeypatch.setattr(conversation.model, "run_tools", endless)
    with pytest.raises(ValueError, match="no answer after 5 replies"):
        texts(conversation, "What is 1234 times 5678?")
    assert conversation.history == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("abacus", "There is no tool 'abacus': choose calculator, clock, or name a function as FILE.py:FUNCTION"),
        ("notes.txt:abacus", "There is no tool 'notes.txt:abacus'"),
        ("{folder}/none.py:abacus", "There is no file .*none.py with the tool 'abacus'"),
        ("{folder}/mine.py:abacus", "mine.py has no function 'abacus'"),
        ("{folder}/mine.py:number", "mine.py has no function 'number'"),
        ("{folder}/broken.py:f", "broken.py ends with SyntaxError"),
        ("{folder}/leaves.py:f", "leaves.py ends with SystemExit"),
    ],
)
def test_what_is_no_tool_is_refused_before_a_model_is_loaded(mine, capsys, name, said):
    (mine.parent / "broken.py").write_text("def f(:")
    (mine.parent / "leaves.py").write_text("raise SystemExit(3)")
    name = name.format(folder=mine.parent)
    with pytest.raises(ValueError, match=said):
        find_tools([name])
    assert main(["hi", "-c", str(mine.parent / "no-model"), "--tool", name]) == 1
    assert capsys.readouterr().err.startswith("qwen1-chat: ")


def test_two_tools_of_one_name_are_refused(mine):
    with pytest.raises(ValueError, match="Two tools have the name 'calculator'"):
        find_tools(["calculator", f"{mine}:calculator"])


def step(result, call=None, error=None):
    reply = ToolReply("")
    reply.call, reply.problem = call, error
    return ToolStep(reply, result, error)


def test_results_are_shown_as_code_in_a_line():
    call = ToolCall("look", {"what": "`x`"})
    long = "a\nb " + "c" * 300
    events = [step(long, call), step("Error: no JSON", error="no JSON"), ToolRun("done", [], [])]
    *_, last = texts_of(events)
    first, second, answer = last.split("\n\n")
    assert first == f'`` look({{"what": "`x`"}}) `` = `a b {"c" * 196} …`'
    assert second == "No call: no JSON" and answer == "done"
