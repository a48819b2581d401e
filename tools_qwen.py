"""Tools: the ReAct prompt of the family, reading what the model writes in it, making the calls.

One user message is one turn of the history, however many calls it takes: its response is the whole exchange of
Thought, Action, Action Input, Observation and Final Answer, and a tool's result is appended to it. Only what the model
itself has just written is ever read as a call, never a user's text, a result or a history.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from .qwen_generation_utils import ChatHistory, HistoryType, checked_history
from .schemas_qwen import Tool, as_tools

OBSERVATION = "Observation:"
"""What a reply ends at: the tool speaks from there on."""

# The checkpoints were trained on these words, line breaks and spaces.
_PROMPT = """\
Answer the following questions as best you can. You have access to the following tools:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {query}"""
ANSWERED_WITHOUT_TOOLS = "Thought: I now know the final answer.\nFinal Answer: {}"

FIRST_STEP = re.compile(r"^(Final Answer|Action Input|Action):", re.MULTILINE)
_INPUT = re.compile(r"^Action Input:", re.MULTILINE)
_TOOL_ROLES = ("tool", "function")


# --- what the model writes, and what it reads ---


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for, by a tool's name and with arguments that fit its schema."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolResult:
    """What a tool gave, passed to `chat` in place of a query; it continues the last turn of the history.

    Args:
        content: a text as it is; anything else is written as JSON.
    """

    content: Any

    @classmethod
    def of_message(cls, message: Mapping[str, Any]) -> ToolResult:
        """That of a message with the role `tool` or `function`.

        Raises:
            ValueError: a message of another role.
        """
        if message.get("role") not in _TOOL_ROLES or "content" not in message:
            raise ValueError(f"query={dict(message)!r:.80} must be a text, or {{'role': 'tool', 'content': …}}.")
        return cls(message["content"])

    def text(self) -> str:
        """What the model reads behind `Observation:`."""
        if not isinstance(self.content, str):
            return _encodable(json.dumps(self.content, ensure_ascii=False, default=str))
        return _encodable(self.content).lstrip("\n").rstrip()


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # halves of surrogate pairs, which JSON can carry


class ToolReply(str):
    """A reply, a text, with what it says: a call, an answer, or a problem; exactly one of these isn't None.

    Attributes:
        thought: what the model wrote before it.
        call: a call, checked against the tools.
        answer: the final answer; the whole text where the model didn't keep to the format.
        problem: why what looks like a call is none.
    """

    thought: str = ""
    call: ToolCall | None = None
    answer: str | None = None
    problem: str | None = None

    @property
    def finish_reason(self) -> str:
        """`"tool_calls"` or `"stop"`, as servers in OpenAI's manner say."""
        return "stop" if self.call is None else "tool_calls"

    def message(self) -> dict[str, Any]:
        """The reply as a message in OpenAI's form; one that is neither call nor answer is its whole text."""
        if self.call is None:
            return {"role": "assistant", "content": str(self) if self.answer is None else self.answer}
        arguments = json.dumps(self.call.arguments, ensure_ascii=False)
        function = {"name": self.call.name, "arguments": arguments}
        calls = [{"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}]
        return {"role": "assistant", "content": self.thought, "tool_calls": calls}


def parse_reply(text: str, tools: Iterable[Any]) -> ToolReply:
    """Read a reply. Nothing that a model can write makes it raise.

    What comes first counts, a call or a final answer; `Observation:` and what follows it is left out.

    Args:
        text: what the model wrote.
        tools: as `as_tools` takes them.

    Raises:
        ValueError: as `as_tools`.
    """
    return _parse(text, as_tools(tools))


def _parse(text: str, tools: Mapping[str, Tool]) -> ToolReply:
    text = text.partition(OBSERVATION)[0].strip()
    reply = ToolReply(text)
    step = FIRST_STEP.search(text)
    before = text[: step.start() if step else None].strip()
    reply.thought = before.removeprefix("Thought:").strip()
    if step is None:
        reply.answer, reply.thought = reply.thought, ""
    elif step[1] == "Final Answer":
        reply.answer = text[step.end() :].strip()
    else:
        try:
            reply.call = _read_call(text[step.start() :], tools)
        except _NoCall as problem:
            reply.problem = str(problem)
    return reply


class _NoCall(Exception):
    """Why a text is no call."""


def _read_call(text: str, tools: Mapping[str, Tool]) -> ToolCall:
    """The call that a text consists of, from `Action:` on."""
    split = _INPUT.search(text)
    if split is None:
        raise _NoCall("Action: without Action Input: behind it")
    name = text[: split.start()].removeprefix("Action:").strip()
    if not name:
        raise _NoCall("Action Input: without the name of a tool in Action: before it")
    if name not in tools:
        raise _NoCall(f"there is no tool {name!r:.80}; the tools are [{', '.join(tools)}]")
    arguments = _read_json(text[split.end() :].strip())
    faults = tools[name].faults(arguments)
    if faults:
        raise _NoCall(f"{name} can't be called: {'; '.join(faults[:5])}")
    return ToolCall(name, arguments)


def _read_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("a name stands in it twice")
        return values

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is no number of JSON")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise _NoCall(f"Action Input is no JSON object ({error}): {text!r:.200}") from None


def react_prompt(query: str, tools: Iterable[Any]) -> str:
    """The user's message that tells the model of its tools and asks the question.

    Args:
        query: the question.
        tools: as `as_tools` takes them.

    Raises:
        ValueError: as `as_tools`.
    """
    return _react_prompt(query, as_tools(tools))


def _react_prompt(query: str, tools: Mapping[str, Tool]) -> str:
    described = "\n\n".join(tool.describe() for tool in tools.values())
    return _PROMPT.format(tools=described, names=", ".join(tools), query=query)


def _is_plain(response: str) -> bool:
    """Whether a response is none of these exchanges."""
    return not response.startswith("Thought:")


@dataclass(frozen=True)
class Exchange:
    """A turn to be answered: what the history keeps of it, and what the model reads.

    Attributes:
        turns: the turns before, as the history keeps them.
        query: what the user said in this one.
        begun: what the reply begins with, which the model goes on from.
        tools: by their names; empty without tools.
    """

    turns: HistoryType
    query: str
    begun: str = ""
    tools: Mapping[str, Tool] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        query: str | ToolResult | Mapping[str, Any],
        history: Iterable[Sequence[str]] | None,
        tools: Iterable[Any] | None,
    ) -> Exchange:
        """Take up a query, or the result of the call that the history ends with.

        Raises:
            ValueError: a result without tools or without a turn that it belongs to; or as `as_tools`.
        """
        turns = checked_history(history)
        named = {} if tools is None else as_tools(tools)
        if isinstance(query, Mapping):
            query = ToolResult.of_message(query)
        if not isinstance(query, ToolResult):
            return cls(turns, query, tools=named)
        if not turns or tools is None:
            missing = "tools=" if tools is None else "the history= that the call came with"
            raise ValueError(f"query={query!r:.80} is the result of a call: pass {missing} too.")
        asked, response = turns.pop()
        return cls(turns, asked, f"{response.rstrip()}\n{OBSERVATION} {query.text()}\nThought:", named)

    @property
    def prompt(self) -> str:
        """The user's message that the model reads."""
        if not self.tools or not isinstance(self.query, str):  # what is no text is reported where it is encoded
            return self.query
        return _react_prompt(self.query, self.tools)

    @property
    def earlier(self) -> HistoryType:
        """The turns before as the model reads them: with tools, every response has the form of a final answer."""
        if not self.tools:
            return self.turns
        return [
            (asked, ANSWERED_WITHOUT_TOOLS.format(answered) if _is_plain(answered) else answered)
            for asked, answered in self.turns
        ]

    def written(self, text: str) -> str:
        """The reply so far, with the `Thought:` that it may have begun with."""
        return f"Thought: {text}".rstrip() if self.begun else text

    def reply(self, text: str) -> str:
        """The reply that `chat` returns, a `ToolReply` where there are tools."""
        return _parse(self.written(text), self.tools) if self.tools else text

    def history(self, text: str) -> HistoryType:
        """The turns with this one."""
        return [*self.turns, (self.query, f"{self.begun} {text}".rstrip() if self.begun else text)]

    def stream(self, texts: Generator[str, None, None]) -> Generator[str, None, None]:
        """Pass on the reply so far; the last one is a `ToolReply`."""
        text = ""
        with closing(texts):
            for text in texts:
                yield self.written(text)
        yield self.reply(text)


_FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "call": _TOOL_ROLES,
    "tool": ("assistant",),
    "answer": ("user",),
}
"""What may come behind what in a list of messages."""


def read_messages(messages: Iterable[Mapping[str, Any]]) -> tuple[str | ToolResult, HistoryType, str | None]:
    """A conversation in OpenAI's form as `chat` takes it: query, history, and system message or None.

    Args:
        messages: of the roles system (only the first), user, assistant (with `content`, or a call in `tool_calls` or
            `function_call`), and tool or function for what it gave. The last one is a user's or a tool's.

    Raises:
        ValueError: messages of another form or order, or several calls at once.
    """
    system: str | None = None
    history = ChatHistory()
    query: str | ToolResult = ""
    last = ""
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _FOLLOWS[last]:
            raise ValueError(
                f"messages[{index}]={message!r:.120} must be of the role {' or '.join(_FOLLOWS[last])} here."
            )
        try:
            call = _call_in(message) if role == "assistant" else None
            content = _content(message, optional=call is not None)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"messages[{index}]={message!r:.120} can't be read: {error!r}.") from None
        if role == "assistant":
            add_turn(history, query, _as_written(content, call, isinstance(query, ToolResult)))
            last = "answer" if call is None else "call"
        elif role == "system":
            system, last = content, "system"
        else:
            last = "user" if role == "user" else "tool"
            query = content if role == "user" else ToolResult(content)
    if last not in ("user", "tool"):
        raise ValueError("The last of the messages must be a user's, or what a tool gave: there is nothing to answer.")
    return query, history, system


def _content(message: Mapping[str, Any], optional: bool) -> str:
    content = message.get("content")
    if content is None and not optional:
        raise ValueError("no content: give it a text")
    if content is None or isinstance(content, str):
        return content or ""
    if any(part["type"] != "text" for part in content):
        raise ValueError("the model reads text only")
    return "".join(part["text"] for part in content)


def _call_in(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name and arguments of the call in an assistant's message, as texts."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    if message.get("function_call"):
        calls.append(message["function_call"])
    if len(calls) > 1:
        raise ValueError("several calls at once; this model makes one and waits for its result")
    if not calls:
        return None
    name, arguments = calls[0]["name"], calls[0]["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, (str, Mapping)):
        raise ValueError("a call has a name, and arguments that are a mapping or JSON")
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_written(content: str, call: tuple[str, str] | None, after_result: bool) -> str:
    """An assistant's message as the model would have written it."""
    if call is None:
        return ANSWERED_WITHOUT_TOOLS.format(content) if after_result and _is_plain(content) else content
    thought = content if content.startswith("Thought:") else f"Thought: {content}"
    return f"{thought.rstrip()}\nAction: {call[0]}\nAction Input: {call[1]}"


# --- running them ---


@dataclass(frozen=True)
class ToolStep:
    """What became of one reply that was no answer.

    Attributes:
        reply: what the model wrote.
        result: what it was told in return.
        error: why nothing was run, or what the tool raised; None where it ran.
    """

    reply: ToolReply
    result: str
    error: str | None = None


@dataclass(frozen=True)
class ToolRun:
    """A question with all its calls.

    Attributes:
        answer: the final answer; None where there is none.
        history: with this turn.
        steps: in order.
    """

    answer: str | None
    history: HistoryType
    steps: list[ToolStep]


class ToolLoopError(RuntimeError):
    """No final answer within the rounds allowed.

    Attributes:
        run: what has been done so far, a `ToolRun`; its history ends with the last reply, of which nothing was run.
    """

    def __init__(self, message: str, run: ToolRun):
        super().__init__(message)
        self.run = run


def run_tools(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    query: str | ToolResult | Mapping[str, Any],
    functions: Iterable[Any],
    history: Iterable[Sequence[str]] | None = None,
    max_rounds: int = 5,
    stream: bool = False,
    **chat_kwargs: Any,
) -> ToolRun | Generator[str | ToolStep | ToolRun, None, None]:
    """Ask a question and run the tools that the model calls until it answers.

    Only functions given here are run, with arguments that fit their schemas. Everything else (no JSON, an unknown tool,
    arguments of another form) is told to the model, as what a function raises is, and can be read in the steps.

    Args:
        model: a `QWenLMHeadModel` that chats.
        tokenizer: the tokenizer of the checkpoint.
        query: what the user says now, or the result of the call that the history ends with.
        functions: functions with type hints and docstrings, or `Tool`s with a function.
        history: earlier turns as returned by `chat` or in a `ToolRun`, or None; never changed.
        max_rounds: replies that the model may write; a call in the last one isn't run.
        stream: yield what happens while it does, instead of returning the last of it: the text of each reply so far,
            of which the last one is a `ToolReply`; a `ToolStep` after each call, in the end the `ToolRun`. No call is
            made of a reply behind which the generator is closed.
        chat_kwargs: anything else that `chat` takes.

    Returns:
        a `ToolRun`, or a generator.

    Raises:
        ValueError: functions that can't be run or have schemas that can't be checked, `tools`, or as `chat`.
        ToolLoopError: no answer within `max_rounds`.
    """
    if "tools" in chat_kwargs:
        raise ValueError("tools= is what run_tools makes of the functions: give all that can be called as functions=.")
    tools = as_tools(functions)
    runnable = {name: _runnable(tool) for name, tool in tools.items()}
    if not isinstance(max_rounds, int) or max_rounds < 1:
        raise ValueError(f"max_rounds={max_rounds!r} must be a whole number of at least 1.")
    kept = history.copy() if isinstance(history, ChatHistory) else ChatHistory(checked_history(history))
    arguments = {**chat_kwargs, "tools": list(tools.values())}
    events = _events(model, tokenizer, query, runnable, kept, max_rounds, stream, arguments)
    if stream:
        return events
    *_, last = events
    return cast(ToolRun, last)


def _runnable(tool: Tool) -> Callable[..., Any]:
    """The function of a tool, of which every call can be checked."""
    if tool.function is None:
        raise ValueError(f"The tool {tool.name!r} has no function to run: pass the function itself, or a Tool.")
    if unchecked := tool.unchecked():
        raise ValueError(
            f"The parameters of {tool.name!r} use {', '.join(unchecked)}, which isn't checked here: leave it "
            "out and check it in the function."
        )
    return tool.function


def _events(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    query: str | ToolResult | Mapping[str, Any],
    functions: Mapping[str, Callable[..., Any]],
    history: ChatHistory,
    max_rounds: int,
    stream: bool,
    arguments: dict[str, Any],
) -> Generator[str | ToolStep | ToolRun, None, None]:
    steps: list[ToolStep] = []
    for left in reversed(range(max_rounds)):
        if stream:
            reply: Any = ""
            with closing(model.chat_stream(tokenizer, query, history, **arguments)) as texts:
                for reply in texts:
                    yield reply
            add_turn(history, query, reply)
        else:
            reply, history = model.chat(tokenizer, query, history, **arguments)
        if reply.answer is not None:
            yield ToolRun(reply.answer, history, steps)
            return
        if left:
            steps.append(_run(reply, functions))
            yield steps[-1]
            query = ToolResult(steps[-1].result)
    raise ToolLoopError(
        f"No final answer in max_rounds={max_rounds} replies; the last one, of which nothing was run: "
        f"{str(reply)!r:.200}. Pass a larger max_rounds, or go on from `run.history` of this error.",
        ToolRun(None, history, steps),
    )


def _run(reply: ToolReply, functions: Mapping[str, Callable[..., Any]]) -> ToolStep:
    if reply.call is None:
        return ToolStep(reply, f"Error: {reply.problem}", reply.problem)
    try:
        return ToolStep(reply, ToolResult(functions[reply.call.name](**reply.call.arguments)).text())
    except Exception as error:  # whatever a tool raises: the model may try something else
        problem = f"{type(error).__name__}: {error}"
        return ToolStep(reply, f"Error: {problem}", problem)


def add_turn(history: HistoryType, query: str | ToolResult | Mapping[str, Any], reply: str) -> None:
    """Add what a stream has told to the history that it was given; the reply to a result continues the last turn."""
    if isinstance(query, Mapping):
        query = ToolResult.of_message(query)
    if isinstance(query, ToolResult):
        asked, response = history.pop()
        history.append((asked, f"{response.rstrip()}\n{OBSERVATION} {query.text()}\n{reply}"))
    else:
        history.append((query, str(reply)))
