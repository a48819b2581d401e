"""How the page looks, and what it does in the browser by itself."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from .rendering import SOURCE

# The visitor's own fonts: nothing is fetched from elsewhere.
FONTS = ("system-ui", "Segoe UI", "Roboto", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
MONOSPACED = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")
# Colours of code, each with a contrast of at least 4.5 : 1 to the background behind it, in light and in dark.
CODE = {
    ".k .kc .kd .kn .kp .kr .kt .nt .ow": ("#7c1fa0", "#d8a6f0"),
    ".s .s1 .s2 .sa .sb .sc .sd .se .sh .si .sx .sr .ss .dl": ("#1b6b2a", "#9ad7a4"),
    ".m .mb .mf .mh .mi .mo .il .no .bp": ("#8a3c00", "#f2b27a"),
    ".nf .fm .nc .nd .ne .nb .na": ("#1a4fb0", "#9dc2ff"),
    ".c .c1 .cm .cp .cs .ch .cpf": ("#595959", "#b0b0b0"),
}
CSS = """
#chat { height: max(18rem, calc(100dvh - 18rem)) !important }
#buttons { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.5rem }
#buttons button { min-width: 0 }
@media (max-width: 640px) {
  #buttons { grid-template-columns: repeat(2, 1fr) }
  #buttons button { font-size: 0.9rem; padding-inline: 0 }
  .gradio-container main { padding: var(--spacing-xl) !important }
  #chat { height: max(18rem, calc(100dvh - 20rem)) !important }
  #chat .bubble, #chat .bubble .icon-button-wrapper { margin-inline: var(--spacing-lg) }
  #chat .bubble.message-buttons { margin-inline: 0 }
  #chat .bubble.user-row, #chat .bubble.bot-row { max-width: calc(100% - var(--spacing-lg) * 2) }
}
#chat .top-panel { display: none } /* a second way to clear, over the first message */
/* Errors are told in full at the edge of the page; these marks would hide the conversation. */
#chat .wrap:has(> .error), #query .wrap:has(> .error) { display: none }
#asked { display: none }

#chat .message-markdown-disabled { white-space: normal }
#chat .source { display: none }
#chat .md { color: var(--body-text-color); overflow-wrap: break-word }
#chat .prose { font-size: var(--chatbot-text-size) }
#chat .prose > :first-child { margin-top: 0 }
#chat .prose > :last-child { margin-bottom: 0 }
#chat .flex-wrap, #chat .message { min-width: 0 }
/* What is wider than a message scrolls in it, by words and not by letters. */
#chat .table, #chat .formula, #chat .prose pre { overflow-x: auto; max-width: 100% }
#chat .table { margin-block: var(--spacing-lg) }
#chat .table table { margin: 0; width: auto; word-break: normal; overflow-wrap: normal }
#chat .table :is(th, td) { min-width: 4.5em; overflow-wrap: normal; word-break: normal; text-align: start;
  padding: var(--spacing-sm) var(--spacing-md); border: 1px solid var(--border-color-primary) }
#chat .prose pre { margin: 0; padding: var(--spacing-lg); padding-inline-end: 2.5rem; border-radius: var(--radius-md);
  background: var(--code-background-fill); white-space: pre }
#chat .prose pre code { padding: 0; border: 0; background: none; white-space: pre; color: var(--body-text-color) }
#chat .prose code { font-family: var(--font-mono); color: var(--body-text-color) }
#chat .code_wrap { position: relative; margin-block: var(--spacing-lg) }
#chat .copy_code_button { position: absolute; inset-block-start: 0; inset-inline-end: 0; padding: var(--spacing-md);
  z-index: 1; color: var(--body-text-color); background: var(--code-background-fill); border-radius: var(--radius-md) }
#chat .copy_code_button .check { position: absolute; inset: var(--spacing-md); opacity: 0;
  background: var(--code-background-fill) }
#chat :is(.table, .formula, pre):focus-visible { outline: 2px solid var(--color-accent) }
#chat .katex { font-size: 1.1em }
#chat .katex-display { margin: 0.4em 0 }
#chat .katex-error { color: inherit !important }
/* A step is a message that folds. Gradio shows dots below all that are over while something is written. */
#chat .thought-group { margin: 0; padding: 0; border: 0; background: none }
#chat .thought-group .message-content { opacity: 1; padding: var(--spacing-md) }
#chat .thought-group .title { overflow-wrap: anywhere }
#chat .thought-group .title:focus-visible { outline: 2px solid var(--color-accent) }
#chat .thought-group .arrow { flex-shrink: 0; opacity: 1; pointer-events: none }
#chat .thought-group .arrow button { opacity: 1; color: var(--body-text-color) !important }
#chat .thought-group .loading-spinner { flex-shrink: 0 }
#chat .message-wrap > .container:not(:last-of-type) { display: none }
#chat .prose a { color: var(--link-text-color); text-decoration: underline }
"""
# Gradio shows and gives away what it holds of a message; the text that it was made of is what a visitor wants.
SCRIPT = """
(() => {
  const SOURCE = %(source)s;
  const chinese = ["zh-CN", "zh-TW"].includes(navigator.language);
  document.documentElement.lang = chinese ? navigator.language : "en";
  const [question, reply, step, copy] = chinese
    ? ["问题", "回复", "步骤", "复制"]
    : ["Question", "Reply", "Step", "Copy"];
  const behind = text => {
    const from = text.indexOf(SOURCE);  // of a step it comes behind the title
    return from < 0 ? text : JSON.parse(text.slice(from + SOURCE.length).split("</pre>")[0]);
  };

  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(behind(text));
  }
  document.addEventListener("copy", event => {  // of Gradio's own field, where a page has no clipboard
    const text = event.target.value;
    if (typeof text === "string" && text.includes(SOURCE)) {
      event.clipboardData.setData("text/plain", behind(text));
      event.preventDefault();
    }
  });

  // Gradio reads the field a moment after Enter or a click, when more may have been typed.
  const keep = () => { window.qwenAsked = document.querySelector("#query textarea").value; };
  document.addEventListener("keydown", event => {
    const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
    if (sends && event.target.closest("#query")) keep();
  }, true);
  document.addEventListener("click", event => { if (event.target.closest("#submit")) keep(); }, true);

  document.addEventListener("keydown", event => {
    if (event.key !== " " || !event.target.matches("#chat .thought-group .title")) return;
    event.preventDefault();  // as of any button
    event.target.click();
  });

  const set = (element, name, value) => {  // another mutation only where there is something to change
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
  };

  const mend = () => {
    for (const field of document.querySelectorAll("#chat textarea")) {
      set(field, "aria-label", field.closest(".user-row") ? question : reply);
      if (!field.value.startsWith(SOURCE)) continue;
      field.value = behind(field.value);
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    for (const said of document.querySelectorAll("#chat [data-testid][aria-label]")) {
      set(said, "role", "group");
      const assistant = said.querySelector(".thought-group") ? step : reply;
      set(said, "aria-label", said.dataset.testid === "user" ? question : assistant);
    }
    for (const title of document.querySelectorAll("#chat .thought-group .title")) {
      set(title, "aria-expanded", `${title.classList.contains("expanded")}`);
      set(title.querySelector(".arrow"), "aria-hidden", "true");  // a button in the button that the title is
      title.querySelector("button").disabled = true;
    }
    for (const list of document.querySelectorAll("#chat .examples[role=list]")) set(list, "role", "group");
    for (const head of document.querySelectorAll(".toast-header")) set(head, "role", "group"); // it holds a button
    for (const button of document.querySelectorAll("#chat .copy_code_button")) set(button, "title", copy);
  };
  const watch = { subtree: true, childList: true, attributes: true, attributeFilter: ["aria-label"] };
  new MutationObserver(mend).observe(document.documentElement, watch);
})();
""".replace("%(source)s", json.dumps(SOURCE).replace("<", "\\u003c"))


def _theme() -> gr.themes.Base:
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONOSPACED)
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_hover_dark="#991b1b",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )


def _colours() -> str:
    rules = []
    for classes, (light, dark) in CODE.items():
        selector = f":is({', '.join(classes.split())})"
        rules.append(f"#chat pre {selector} {{ color: {light} }}\n.dark #chat pre {selector} {{ color: {dark} }}")
    return "\n".join(rules)


def look() -> dict[str, Any]:
    """Theme, style and script, as arguments of `launch`."""
    return {"theme": _theme(), "css": CSS + _colours(), "head": f"<script>{SCRIPT}</script>"}
