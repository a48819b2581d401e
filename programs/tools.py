"""Tools of the programs: two that ship, those of a user's file, and what is shown of their calls."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import operator
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..schemas_qwen import as_tools
from ..tools_qwen import ToolRun, ToolStep

_OPERATIONS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculator(expression: str) -> str:
    """
    Calculate a result

    Args:
        expression: Numbers with +, -, * and / between them
    """
    return f"{_value(ast.parse(expression, mode='eval').body):.12g}"


def _value(node: ast.expr) -> float:
    """The value of an expression; nothing in it is run but the four operations."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=sign, operand=inner) if type(sign) in _OPERATIONS:
            return _OPERATIONS[type(sign)](_value(inner))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
            return _OPERATIONS[type(sign)](_value(left), _value(right))
    raise ValueError(f"{ast.unparse(node)} is no number, and none of +, -, * and /")


def clock() -> str:
    """Tell the date and the time"""
    return datetime.now().strftime("%Y-%m-%d %H:%M")


SHIPPED: dict[str, Callable[..., str]] = {"calculator": calculator, "clock": clock}
"""Those that the model that ships has learnt to call."""
ANSWER = "Final Answer:"
_SHOWN = 200  # characters of a result


def find_tools(names: Sequence[str]) -> list[Callable[..., Any]]:
    """Functions by their names.

    Args:
        names: each that of one of `SHIPPED`, or `FILE.py:FUNCTION`, for which the file is run.

    Raises:
        ValueError: there is no such function, it can't be a tool, or two have one name.
    """
    found = [SHIPPED[name] if name in SHIPPED else _of_file(name) for name in names]
    if found:
        as_tools(found)  # says what is wrong before a model is loaded
    return found


def _of_file(name: str) -> Callable[..., Any]:
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        choices = ", ".join(SHIPPED)
        raise ValueError(f"There is no tool {name!r}: choose {choices}, or name a function as FILE.py:FUNCTION.")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"There is no file {file} with the tool {function!r}: check its path.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ValueError(
            f"{file} ends with {type(error).__name__}: {error}. Mend it, or leave the tool out."
        ) from error
    tool = getattr(module, function, None)
    if not callable(tool):
        raise ValueError(f"{file} has no function {function!r}: check its name.")
    return tool


def unless(stop: threading.Event, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that isn't run any more once the user has stopped the reply that calls it."""

    @functools.wraps(function)
    def run(*args: Any, **arguments: Any) -> Any:
        if stop.is_set():
            raise RuntimeError("stopped by the user")
        return function(*args, **arguments)

    return run


def texts_of(events: Iterable[Any]) -> Generator[str, None, ToolRun | None]:
    """What the user sees of `run_tools` while it goes on: the calls with their results, a line each, then the answer.

    Yields:
        the text so far, which begins with the one before.

    Returns:
        the end of the run, None if it was ended before.
    """
    calls = ""
    for event in events:
        if isinstance(event, ToolRun):
            yield calls + (event.answer or "")
            return event
        if isinstance(event, ToolStep):
            calls += f"{_line(event)}\n\n"
            yield calls
        elif answer := event.partition(ANSWER)[2].strip():
            yield calls + answer
    return None


def _line(step: ToolStep) -> str:
    if step.reply.call is None:
        return f"No call: {step.error}"
    arguments = json.dumps(step.reply.call.arguments, ensure_ascii=False)
    result = " ".join(step.result.split())
    shown = result if len(result) <= _SHOWN else f"{result[:_SHOWN]} …"
    return f"{_code(f'{step.reply.call.name}({arguments})')} = {_code(shown)}"


def _code(text: str) -> str:
    """As Markdown's code, in which nothing means anything else."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"
