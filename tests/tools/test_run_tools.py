"""The loop: what is run, what isn't, what the model is told, and when it ends."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen1 import Tool, ToolLoopError, ToolReply, ToolResult, ToolRun, ToolStep, run_tools

ANSWER = " I know.\nFinal Answer: 42"


def call(name, arguments):
    return f"Thought: I use it.\nAction: {name}\nAction Input: {arguments}\nObservation: made up"


@pytest.fixture
def run(model, byte_tokenizer, script, multiply, fail):
    """Run `multiply` and `fail` for a model that writes the given replies: (*replies, **arguments)."""

    def run(*replies, **arguments):
        return run_tools(model, byte_tokenizer, "q", [multiply, fail], logits_processor=script(*replies), **arguments)

    return run


def test_calls_until_there_is_an_answer(run, calls):
    done = run(call("multiply", '{"a": 6, "b": 7}'), call("multiply", '{"a": 2, "b": 3}')[8:], ANSWER)
    assert calls == [(6, 7), (2, 3)]
    assert done.answer == "42" and [step.result for step in done.steps] == ["42", "6"]
    assert not any(step.error for step in done.steps)
    use = 'Thought: I use it.\nAction: multiply\nAction Input: {"a": %d, "b": %d}\nObservation: %d\n'
    assert done.history == [("q", use % (6, 7, 42) + use % (2, 3, 6) + "Thought: I know.\nFinal Answer: 42")]


def test_an_answer_at_once(run, calls):
    done = run("Thought: I know.\nFinal Answer: 42")
    assert (done.answer, done.steps, calls) == ("42", [], [])


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (call("multiply", '{"a": 6, "b": "7"}'), "multiply can't be called: 'b' must be of type integer, got '7'"),
        (call("multiply", '{"a": 6}'), "multiply can't be called: the arguments lack 'b'"),
        (call("multiply", '{"a": 6, "b": 7, "c": 8}'), "unknown name 'c'"),
        (call("multiply", "6, 7"), "Action Input is no JSON object"),
        (call("divide", '{"a": 6, "b": 7}'), "there is no tool 'divide'; the tools are [multiply, fail]"),
        ("Action: multiply", "Action: without Action Input:"),
    ],
)
@pytest.mark.no_cover
def test_a_bad_call_is_reported_and_never_run(run, calls, written, problem):
    done = run(written, ANSWER)
    assert calls == [] and done.answer == "42"
    (step,) = done.steps
    assert problem in step.error and step.result == f"Error: {step.error}" and step.reply.call is None
    assert f"\nObservation: Error: {step.error}\nThought: I know." in done.history[0][1]


def test_what_a_tool_raises_is_told(run, calls):
    done = run(call("fail", '{"reason": "no net"}'), ANSWER)
    assert calls == ["no net"] and done.answer == "42"
    assert done.steps[0].error == "LookupError: no net" and done.steps[0].result == "Error: LookupError: no net"


def test_an_interruption_is_no_error_of_a_tool(model, byte_tokenizer, script):
    def interrupt():
        raise KeyboardInterrupt

    tool = Tool("stop", function=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_tools(model, byte_tokenizer, "q", [tool], logits_processor=script(call("stop", "{}")))


@pytest.mark.parametrize("stream", [False, True])
def test_the_limit_of_rounds(run, calls, stream, model, byte_tokenizer, script, multiply):
    replies = [call("multiply", '{"a": 6, "b": 7}')] * 3
    with pytest.raises(ToolLoopError, match="max_rounds=2 replies.*Action: multiply.*larger max_rounds") as error:
        list(run(*replies, max_rounds=2, stream=stream))
    stopped = error.value.run
    assert calls == [(6, 7)] and len(stopped.steps) == 1 and stopped.answer is None
    lines = script(ANSWER)
    reply, _ = model.chat(byte_tokenizer, ToolResult("42"), stopped.history, tools=[multiply], logits_processor=lines)
    assert reply.answer == "42"


def test_a_stream_shows_all_that_happens(run):
    replies = (call("multiply", '{"a": 6, "b": 7}'), ANSWER)
    events = list(run(*replies, stream=True))
    kinds = [type(event) for event in events]
    assert kinds.count(ToolStep) == kinds.count(ToolRun) == 1 and set(kinds) == {str, ToolReply, ToolStep, ToolRun}
    place = kinds.index(ToolStep)
    assert [at for at, kind in enumerate(kinds) if kind is ToolReply] == [place - 1, len(kinds) - 2]
    assert events[place].result == "42" and place > 10
    assert events[place - 1] == events[place].reply and not any("Observation" in text for text in events[:place])
    assert events[-1] == run(*replies)


def test_a_stream_that_is_closed_behind_a_reply_makes_no_call(model, byte_tokenizer, script):
    made = []
    tool = Tool("note", function=lambda: made.append(1))
    events = run_tools(model, byte_tokenizer, "q", [tool], stream=True, logits_processor=script(call("note", "{}")))
    assert next(event for event in events if isinstance(event, ToolReply)).call is not None
    events.close()
    assert made == []


@pytest.mark.parametrize("stream", [False, True])
def test_settings_and_history_reach_the_model(model, byte_tokenizer, script, multiply, stream):
    lines = script("Final Answer: 1")
    given = [("a", "b")]
    arguments = {"history": given, "system": "Be brief.", "stream": stream, "logits_processor": lines}
    done = run_tools(model, byte_tokenizer, "q", [multiply], **arguments)
    done = list(done)[-1] if stream else done
    assert given == [("a", "b")] and done.history == [("a", "b"), ("q", "Final Answer: 1")]
    assert "Be brief." in byte_tokenizer.decode(lines[0].prompts[0])


@pytest.mark.parametrize("stream", [False, True])
def test_each_round_reads_only_what_is_new(model, byte_tokenizer, script, multiply, stream, each_read):
    counted = each_read(model)
    lines = script(call("multiply", '{"a": 6, "b": 7}'), ANSWER)
    history = model.new_history()
    done = run_tools(model, byte_tokenizer, "q", [multiply], history, stream=stream, logits_processor=lines)
    done = list(done)[-1] if stream else done
    assert done.history.kept is not None and history == [] and history.kept is None
    assert [count for count in counted if count > 1] == [len(lines[0].prompts[0]), len(" 42\nThought:") + 1]


@pytest.mark.parametrize("stream", [False, True])
def test_it_goes_on_from_what_a_history_carries(model, byte_tokenizer, script, multiply, stream, each_read):
    lines = script(call("multiply", '{"a": 6, "b": 7}'), ANSWER)
    _, history = model.chat(byte_tokenizer, "q", tools=[multiply], logits_processor=lines)
    counted = each_read(model)
    result = {"role": "tool", "content": "42"}
    done = run_tools(model, byte_tokenizer, result, [multiply], history, stream=stream, logits_processor=lines)
    done = list(done)[-1] if stream else done
    assert done.answer == "42" and len(done.history) == 1
    assert counted[0] == len(" 42\nThought:") + 1


def test_results_of_any_kind(model, byte_tokenizer, script):
    for result, told in [
        ({"你": [1, None]}, '{"你": [1, null]}'),
        (None, "null"),
        ("a\n", "a"),
        (
            {
                1,
            },
            '"{1}"',
        ),
    ]:
        lines = script(call("give", "{}"), ANSWER)
        tool = Tool("give", function=lambda result=result: result)
        assert run_tools(model, byte_tokenizer, "q", [tool], logits_processor=lines).steps[0].result == told


def test_a_result_that_is_no_text_at_all_is_an_error_of_the_tool(model, byte_tokenizer, script):
    ring = []
    ring.append(ring)
    lines = script(call("give", "{}"), ANSWER)
    done = run_tools(model, byte_tokenizer, "q", [Tool("give", function=lambda: ring)], logits_processor=lines)
    assert "Circular reference" in done.steps[0].error


@pytest.mark.parametrize(
    ("functions", "arguments", "message"),
    [
        ([{"name": "t"}], {}, "'t' has no function to run"),
        ([Tool("t", "", {"properties": {"a": {"oneOf": []}}}, print)], {}, "'t' use oneOf, which isn't checked"),
        ([Tool("t", function=print)], {"max_rounds": 0}, "max_rounds=0 must be"),
        ([Tool("t", function=print)], {"max_rounds": 1.5}, "max_rounds=1.5 must be"),
        ([Tool("t", function=print)], {"history": 5}, "history=5 must be"),
        ([Tool("t", function=print)], {"tools": []}, "give all that can be called as functions="),
        ([], {}, "has no tool in it"),
    ],
)
def test_bad_input_is_said_before_anything_runs(model, byte_tokenizer, functions, arguments, message):
    for stream in (False, True):
        with pytest.raises(ValueError, match=message):
            run_tools(model, byte_tokenizer, "q", functions, stream=stream, **arguments)


def test_the_model_that_ships_with_its_own_tokenizer(repository, script, multiply, calls):
    """Real merges, the fast tokenizer, and the method of the model, as remote code has it."""
    folder = Path(repository, "qwen-tiny-chat")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    replies = (call("multiply", '{"a": 6, "b": 7}'), " I now know the final answer\nFinal Answer: 6 × 7 = 42")
    for stream in (False, True):
        lines = script(*replies, tokenizer=tokenizer)
        arguments = {"stream": stream, "logits_processor": lines, "max_new_tokens": 200, "max_window_size": 2000}
        done = model.run_tools(tokenizer, "What is 6 times 7?", [multiply], **arguments)
        done = list(done)[-1] if stream else done
        assert done.answer == "6 × 7 = 42" and done.steps[0].result == "42"
        assert "made up" not in done.history[0][1]
    assert calls == [(6, 7)] * 2
