"""What the page says, in English and in Chinese; it follows the language of the visitor's browser."""

from __future__ import annotations

from typing import Any

import gradio as gr

# key: English, Chinese
WORDS = {
    "query": ("Question", "问题"),
    "ask": ("Ask something", "输入问题"),
    "conversation": ("Conversation", "对话"),
    "submit": ("Submit", "发送"),
    "stop": ("Stop", "停止"),
    "regenerate": ("Regenerate", "重试"),
    "clear": ("Clear", "清除"),
    "settings": ("Settings", "设置"),
    "system": ("System message", "系统提示"),
    "do_sample": ("Sample", "采样"),
    "do_sample_info": ("Off: the likeliest token.", "关：总是取最可能的词元。"),
    "temperature": ("Temperature", "温度"),
    "temperature_info": ("Higher is bolder.", "越高越大胆。"),
    "top_p": ("Top p", "Top p（核采样）"),
    "top_p_info": ("Of the likeliest, up to this share.", "只取概率之和达到此值的最可能词元。"),
    "top_k": ("Top k", "Top k（候选数）"),
    "top_k_info": ("This many of the likeliest; 0: all.", "只取这么多个最可能的词元；0：全部。"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "repetition_penalty_info": ("1: none.", "1：不惩罚。"),
    "max_new_tokens": ("Longest reply", "回复的最大长度"),
    "max_new_tokens_info": ("In tokens.", "以词元计。"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("The same reply each time; -1: another.", "每次得到相同的回复；-1：每次不同。"),
    "tools": ("Tools", "工具"),
    "thinking": ("Thinking", "思考"),
    "arguments": ("Arguments", "参数"),
    "result": ("Result", "结果"),
    "failed": ("error", "出错"),
    "stopped": ("stopped", "已停止"),
    "endless": (
        "There is no answer after several calls of tools: ask in other words, or switch the tools off in the settings.",
        "多次调用工具后仍没有得到答案：请换一种问法，或在设置中关闭工具。",
    ),
    "memory": (
        "The device has no memory left for this conversation: clear it, or ask for a shorter reply.",
        "设备内存不足，无法继续此对话：请清除对话，或缩短回复的最大长度。",
    ),
}
LANGUAGES = ("en", "zh-CN", "zh-TW")
"""Those of Gradio's own texts that the words above go with."""

TRANSLATIONS = gr.I18n(
    **{language: {f"qwen_{key}": pair[language != "en"] for key, pair in WORDS.items()} for language in LANGUAGES}
)


def translated(key: str) -> Any:
    """A text that Gradio puts into the language of the browser, there."""
    return TRANSLATIONS(f"qwen_{key}")  # a prefix, for some keys are Gradio's own


def word(key: str, request: gr.Request | None) -> str:
    """A text in the language that a request asks for first."""
    accepted = request.headers.get("accept-language", "") if request is not None else ""
    return WORDS[key][accepted.strip().lower().startswith("zh")]
