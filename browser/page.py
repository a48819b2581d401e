"""The page: what is where, and what happens on a click."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..qwen_generation_utils import DEFAULT_SYSTEM, ChatHistory
from .conversation import Chat, Message, Sampling, cut_at_query

EXAMPLES = ("My name is Lina.", "12+34=?", "法国的首都是哪里？", "你好，你是谁？")
# The visitor's own fonts: nothing is fetched from elsewhere.
FONTS = ("system-ui", "Segoe UI", "Roboto", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
MONOSPACED = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")
CSS = """
#buttons { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.5rem }
#buttons button { min-width: 0 }
@media (max-width: 640px) {
  #buttons { grid-template-columns: repeat(2, 1fr) }
  #buttons button { font-size: 0.9rem; padding-inline: 0 }
  #chat { height: 50vh !important }
}
#chat .top-panel { display: none } /* a second way to clear, over the first message */
/* Errors are told in full at the edge of the page; these marks would hide the conversation. */
#chat .wrap:has(> .error), #query .wrap:has(> .error) { display: none }
"""
LABELS = {
    "temperature": ("Temperature", "higher is bolder"),
    "top_p": ("Top p", "of the likeliest, up to this share"),
    "top_k": ("Top k", "this many of the likeliest; 0: all"),
    "repetition_penalty": ("Repetition penalty", "1: none"),
    "max_new_tokens": ("Longest reply", "in tokens"),
}
OUT_OF_MEMORY = "The device has no memory left for this conversation: clear it, or ask for a shorter reply."


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
            gr.Markdown(f"## {html.escape(self.name)}")
            self.chatbot = _chatbot()
            self.query = gr.Textbox(
                placeholder="Ask something (输入问题)",
                show_label=False,
                lines=1,
                max_lines=8,
                autofocus=True,
                elem_id="query",
            )
            with gr.Row(elem_id="buttons"):
                self.submit = gr.Button("Submit (发送)", variant="primary", elem_id="submit")
                self.stop = gr.Button("Stop (停止)", variant="stop", elem_id="stop")
                self.regenerate = gr.Button("Regenerate (重试)", elem_id="regenerate")
                self.clear = gr.Button("Clear (清除)", elem_id="clear")
            with gr.Accordion("Settings (设置)", open=False, elem_id="settings"):
                self.system = gr.Textbox(DEFAULT_SYSTEM, label="System message (系统提示)", lines=2, elem_id="system")
                self.settings = _sampling_controls(Sampling.of(self.chat.model.generation_config))
            # Of each visitor, and of each load of the page: Gradio copies the empty one.
            self.history = gr.State(ChatHistory())
            self._connect()
        page.queue(max_size=self.queue_size)
        return page

    def _connect(self) -> None:
        # One event for all that asks the model: while it is under way the page starts no second one.
        answering = gr.on(
            [
                self.submit.click,
                self.query.submit,
                self.regenerate.click,
                self.chatbot.edit,
                self.chatbot.example_select,
            ],
            self.answer,
            [self.query, self.chatbot, self.history, self.system, *self.settings],
            [self.query, self.chatbot],
            concurrency_limit=self.concurrency_limit,
            trigger_mode="once",
            show_progress="minimal",
            api_visibility="private",
        )
        self.stop.click(None, cancels=[answering])
        self.clear.click(
            lambda: ([], ChatHistory()),
            outputs=[self.chatbot, self.history],
            cancels=[answering],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        ).then(  # what the cancelled reply still had under way may have come behind it
            lambda: [], outputs=[self.chatbot], queue=False, show_progress="hidden", api_visibility="private"
        )

    def answer(
        self,
        event: gr.EventData,
        query: str,
        messages: list[Message],
        history: ChatHistory,
        system: str,
        *settings: Any,
    ) -> Iterator[tuple[Any, Any]]:
        """What the text field and the conversation become, until the reply is written.

        Args:
            event: what was clicked.
            query: the text field.
            messages: the conversation on the page.
            history: the visitor's own.
            system: system message.
            settings: of the fields of `Sampling`, in their order.

        Raises:
            gr.Error: what can't be answered, with what to do about it.
        """
        before, asked = self._asked(event, query, messages)
        if not asked or not asked.strip():
            yield gr.skip(), messages  # an event that yields nothing would empty the page
            return
        rest = "" if event.target in (self.submit, self.query) else gr.skip()
        try:
            for grown in self.chat.reply(asked, before, history, system, Sampling(*settings)):
                yield rest, grown
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            history.drop_cache()
            raise gr.Error(OUT_OF_MEMORY, duration=None) from error

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


def _chatbot() -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        height="60vh",
        editable="all",
        buttons=["copy"],
        examples=[{"text": text} for text in EXAMPLES],
        allow_tags=False,  # other tags than those of HTML are shown as written
        elem_id="chat",
    )


def _sampling_controls(chosen: Sampling) -> list[Any]:
    """A control for each field of `Sampling`, in their order."""
    controls: list[Any] = [gr.Checkbox(chosen.do_sample, label="Sample (采样)", info="Off: the likeliest token.")]
    for name in Sampling.numbers():
        bounds, value, (label, info) = Sampling.bounds(name), getattr(chosen, name), LABELS[name]
        whole = 0 if isinstance(bounds.step, int) else None
        controls.append(
            gr.Slider(bounds.low, bounds.high, value, step=bounds.step, precision=whole, label=label, info=info)
        )
    controls.append(gr.Number(chosen.seed, label="Seed", info="The same reply each time; -1: another.", precision=0))
    return controls


def look() -> dict[str, Any]:
    """Theme and style, as arguments of `launch`."""
    return {"theme": gr.themes.Default(font=FONTS, font_mono=MONOSPACED), "css": CSS}


def launch(page: gr.Blocks, **options: Any) -> None:
    """Serve a page until Ctrl-C, with options of Gradio's `launch`."""
    page.launch(
        **look(),
        ssr_mode=False,  # the same with and without Node
        max_file_size=1,  # nothing takes files, and Gradio's own address for them is open to everyone
        footer_links=[],
        **options,
    )
