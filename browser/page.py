"""The page: what is where, and what happens on a click."""

from __future__ import annotations

import html
import time
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from ..qwen_generation_utils import DEFAULT_SYSTEM, ChatHistory
from ..tools_qwen import ToolLoopError
from .conversation import Chat, Sampling
from .mathematics import DELIMITERS
from .messages import Message, cut_at_query, message, state_of
from .rendering import behind, shown
from .words import translated, word

EXAMPLES = ("My name is Lina.", "12+34=?", "法国的首都是哪里？", "你好，你是谁？")
EXAMPLES_OF_TOOLS = {"calculator": "What is 1234 times 5678?", "clock": "现在几点？"}
"""Those that ship; the first examples of a page that has them."""
SHARE_OF_DRAWING = 0.2
"""Of the time of a reply at most this goes into its HTML; a long one grows by several words at a time."""
STOPPABLE = "() => ({__type__: 'update', interactive: true, variant: 'stop'})"
NOTHING_TO_STOP = "() => ({__type__: 'update', interactive: false, variant: 'secondary'})"
# What was in the field when it was sent, see `look.SCRIPT`. The outputs come behind the inputs, and stay here.
ASK = """(query, ...values) => {
  const asked = window.qwenAsked;
  delete window.qwenAsked;
  const sent = asked !== undefined && query.startsWith(asked) ? asked : query;
  return [sent, ...values.slice(0, %d)];
}"""
# The field keeps what was typed since the question was sent.
TAKE_QUESTION = """(sent, field) => {
  const question = sent.slice(sent.indexOf(" ") + 1);
  return field.startsWith(question) ? field.slice(question.length) : field;
}"""


class ChatPage:
    """The page of one model.

    Args:
        chat: answers, for all visitors.
        name: of the model, for the heading.
        concurrency_limit: replies that are written at a time.
        queue_size: visitors that may wait; who comes then is told to try again.
    """

    def __init__(self, chat: Chat, name: str, concurrency_limit: int = 1, queue_size: int = 16):
        self.chat = chat
        self.name = name
        self.concurrency_limit = concurrency_limit
        self.queue_size = queue_size

    def blocks(self) -> gr.Blocks:
        """The page with all that happens on it, to be launched."""
        with gr.Blocks(title=self.name, analytics_enabled=False, fill_height=True) as page:
            gr.Markdown(f"## {_literal(self.name)}")
            self.chatbot = _chatbot(self.chat.tools)
            self.query = gr.Textbox(
                label=translated("query"),
                placeholder=translated("ask"),
                show_label=False,
                lines=1,
                max_lines=8,
                autofocus=True,
                elem_id="query",
            )
            with gr.Row(elem_id="buttons"):
                self.submit = gr.Button(translated("submit"), variant="primary", elem_id="submit")
                self.stop = gr.Button(translated("stop"), interactive=False, elem_id="stop")
                self.regenerate = gr.Button(translated("regenerate"), elem_id="regenerate")
                self.clear = gr.Button(translated("clear"), elem_id="clear")
            with gr.Accordion(translated("settings"), open=False, elem_id="settings"):
                self.system = gr.Textbox(DEFAULT_SYSTEM, label=translated("system"), lines=2, elem_id="system")
                self.with_tools = _tools_control(self.chat.tools)
                self.settings = _sampling_controls(Sampling.of(self.chat.model.generation_config))
            # Of each visitor, and of each load of the page: Gradio copies the empty one.
            self.history = gr.State(ChatHistory())
            self.sent = gr.Textbox(visible="hidden", elem_id="asked", show_label=False)
            self._connect()
        page.queue(max_size=self.queue_size)
        return page

    def _connect(self) -> None:
        asking = [
            self.submit.click,
            self.query.submit,
            self.regenerate.click,
            self.chatbot.edit,
            self.chatbot.example_select,
        ]
        in_the_browser: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on(asking, None, None, self.stop, js=STOPPABLE, **in_the_browser)
        # One event for all that asks the model: while it is under way the page starts no second one.
        inputs = [self.query, self.chatbot, self.history, self.system, self.with_tools, *self.settings]
        answering = gr.on(
            asking,
            self.answer,
            inputs,
            [self.sent, self.chatbot],
            js=ASK % (len(inputs) - 1),
            concurrency_limit=self.concurrency_limit,
            trigger_mode="once",
            show_progress="minimal",
            api_visibility="private",
        )
        for ended in (answering.then, answering.failure):
            ended(None, None, self.stop, js=NOTHING_TO_STOP, **in_the_browser)
        self.sent.change(None, [self.sent, self.query], self.query, js=TAKE_QUESTION, **in_the_browser)
        stopped = self.stop.click(None, None, self.stop, js=NOTHING_TO_STOP, cancels=[answering], **in_the_browser)
        if self.chat.tools:
            for ended in (stopped.then, answering.failure):
                ended(redrawn, self.chatbot, self.chatbot, **in_the_browser)
        self.clear.click(
            lambda: ([], ChatHistory()), outputs=[self.chatbot, self.history], cancels=[answering], **in_the_browser
        ).then(  # what the cancelled reply still had under way may have come behind it
            lambda: [], outputs=[self.chatbot], **in_the_browser
        ).then(None, None, self.stop, js=NOTHING_TO_STOP, **in_the_browser)

    def answer(
        self,
        event: gr.EventData,
        request: gr.Request,
        query: str,
        messages: list[Message],
        history: ChatHistory,
        system: str,
        with_tools: bool,
        *settings: Any,
    ) -> Iterator[tuple[Any, Any]]:
        """The question that the text field may drop, and what the conversation becomes, until the reply is written.

        Args:
            event: what was clicked.
            request: of the visitor's browser.
            query: the text field.
            messages: the conversation on the page, as `shown` makes it.
            history: the visitor's own.
            system: system message.
            with_tools: whether the model may call the tools that there are.
            settings: of the fields of `Sampling`, in their order.

        Raises:
            gr.Error: what can't be answered, with what to do about it.
        """
        before, asked = self._asked(event, query, [behind(held) for held in messages])
        if not asked or not asked.strip():
            yield gr.skip(), drawn(before, request)  # an event that yields nothing would empty the page
            return
        sent = f"{time.monotonic_ns()} {asked}" if event.target in (self.submit, self.query) else gr.skip()
        above = drawn([*before, message("user", asked)], request)
        try:
            grown = self.chat.reply(asked, before, history, system, Sampling(*settings), with_tools)
            with closing(grown):
                for reply in drawn_in_time((messages[len(above) :] for messages in grown), request):
                    yield sent, [*above, *reply]
                    sent = gr.skip()
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        except ToolLoopError as error:
            raise gr.Error(word("endless", request), duration=None, print_exception=False) from error
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            history.drop_cache()
            raise gr.Error(word("memory", request), duration=None) from error

    def _asked(self, event: gr.EventData, query: str, messages: list[Message]) -> tuple[list[Message], str | None]:
        """The messages that stay and the question to answer after them; None where there is none."""
        if event.target is self.regenerate:
            return cut_at_query(messages)
        if event.target is not self.chatbot:
            return messages, query
        if isinstance(event.value, dict):  # an example
            return messages, event.value["text"]
        if messages[event.index]["role"] == "assistant":  # edited: the page holds it already
            return messages, None
        return messages[: event.index], event.value


def drawn(messages: Iterable[Message], request: gr.Request) -> list[Message]:
    """Messages as the page shows them."""
    return [shown(spoken, request) for spoken in messages]


def redrawn(request: gr.Request, messages: list[Message]) -> list[Message]:
    """The conversation on the page once nothing is written any more: the step under way is over."""
    return drawn(map(behind, messages), request)


def drawn_in_time(growing: Iterable[list[Message]], request: gr.Request) -> Generator[list[Message], None, None]:
    """The messages as the page shows them: the last ones surely, those before while there is time.

    Surely too where a step begins, is called or is over, for at what is shown a Stop is heeded.
    """
    pause_until, waiting, place = 0.0, None, None
    for messages in growing:
        began, before = time.monotonic(), place
        place = [state_of(spoken) for spoken in messages]
        if began < pause_until and place == before:
            waiting = messages
            continue
        html = drawn(messages, request)
        ended = time.monotonic()
        pause_until, waiting = ended + (ended - began) * (1 / SHARE_OF_DRAWING - 1), None
        yield html
    if waiting is not None:
        yield drawn(waiting, request)


def _literal(name: str) -> str:
    """A name in Markdown of Gradio's, in which no character means anything."""
    return "".join(c if c.isalnum() or c in " -." else f"&#{ord(c)};" for c in name)


def _chatbot(tools: Collection[str]) -> gr.Chatbot:
    called = [text for name, text in EXAMPLES_OF_TOOLS.items() if name in tools]
    return gr.Chatbot(
        label=translated("conversation"),
        show_label=False,
        editable="all",
        buttons=["copy"],
        examples=[{"text": text} for text in [*called, *EXAMPLES[len(called) :]]],
        render_markdown=False,  # messages come as HTML, see `rendering`
        latex_delimiters=DELIMITERS,
        group_consecutive_messages=False,
        elem_id="chat",
    )


def _tools_control(tools: Collection[str]) -> gr.Checkbox:
    names = ", ".join(tools)
    return gr.Checkbox(True, label=translated("tools"), info=names, visible=bool(tools), elem_id="tools")


def _sampling_controls(chosen: Sampling) -> list[Any]:
    """A control for each field of `Sampling`, in their order."""
    controls: list[Any] = [gr.Checkbox(chosen.do_sample, **_labels("do_sample"))]
    for name in Sampling.numbers():
        bounds, value = Sampling.bounds(name), getattr(chosen, name)
        whole = 0 if isinstance(bounds.step, int) else None
        controls.append(gr.Slider(bounds.low, bounds.high, value, step=bounds.step, precision=whole, **_labels(name)))
    controls.append(gr.Number(chosen.seed, precision=0, **_labels("seed")))
    return controls


def _labels(name: str) -> dict[str, Any]:
    return {"label": translated(name), "info": translated(f"{name}_info"), "elem_id": name}
