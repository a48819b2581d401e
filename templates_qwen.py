"""Chat templates: rendered so that no text of the caller's becomes a control token, then encoded part by part."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from transformers import BatchEncoding
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import render_jinja_template

from .encoding_qwen import EncodingMixin
from .pieces_qwen import NFC, repair_surrogates, split_pattern

# What a special token could be built from in callers' text, by itself or together with what a template writes around it
# or leaves of it: every "|", "<" at the end, ">" at the start, and the names between the bars, in whatever case.
# The letters behind them are those of ASCII in another case.
UNSAFE_TEXT = re.compile(
    r"\||<(?=\s*\Z)|\A\s*(?=>)|(?i:im_start|im_end|endoftext|extra_(?=[0-9]))|[\u0130\u0131\u017f\ufb00-\ufb06]"
)


# --- rendering ---


@dataclass(frozen=True)
class RenderedChats:
    """Chats that a template has rendered, in which `mask` still breaks special tokens in callers' text.

    Attributes:
        texts: one of each chat.
        spans: character ranges of each that the assistant wrote; none where nobody asked for them.
        mask: the character put into the caller's strings.
        edge: the one that marks the edges of contents.
    """

    texts: list[str]
    spans: list[list[tuple[int, int]]]
    mask: str
    edge: str

    def plain(self) -> list[str]:
        """The texts as the caller and the template wrote them."""
        return [unmask(text, self.mask) for text in self.texts]


def render_chats(
    template: str, caller: dict[str, Any], named: Mapping[str, Any], with_edges: bool, **options: Any
) -> RenderedChats:
    """Render conversations with the caller's strings masked.

    Args:
        template: a Jinja template.
        caller: all that the caller passes to it: conversations, tools, documents and other variables.
        named: the special tokens by the names that templates know them by.
        with_edges: whether to let the template mark the edges of contents, by its variable `edge`.
        **options: other arguments of `render_jinja_template`.
    """
    tools = caller["tools"]
    caller = {**caller, "tools": tools and [get_json_schema(tool) if callable(tool) else tool for tool in tools]}
    strings, mask = [template], ""
    try:
        # The copy holds plain lists: an iterator among the contents can be read once only.
        caller = _map_values(caller, lambda text: strings.append(text) or text)  # type: ignore[func-returns-value]
        mask, edge = unused_characters(strings, 2)
        masked = _map_values(caller, lambda text: mask_unsafe(text, mask))
        variables = {**named, **masked, "edge": edge if with_edges else ""}
        result: Any = render_jinja_template(chat_template=template, **variables, **options)
    except RecursionError as error:
        raise ValueError("Messages, tools and what else a template is given may not be nested so deep.") from error
    except Exception as error:  # what a template raises may quote the caller
        error.args = tuple(unmask(item, mask) if mask and isinstance(item, str) else item for item in error.args)
        raise
    texts, spans = result
    return RenderedChats(texts, spans or [[] for _ in texts], mask, edge)


def mask_unsafe(text: str, mask: str) -> str:
    """Put `mask` where a special token could begin, go on or end, so that none comes about in a template's hands."""

    def masked(match: re.Match[str]) -> str:
        found = match.group()
        if not found or found.isspace():  # before a ">", which trimming may bring to the start
            return found + mask
        return f"{mask}|{mask}" if found == "|" else found[:1] + mask + found[1:]

    return UNSAFE_TEXT.sub(masked, text)


def unmask(text: str, mask: str) -> str:
    """Take the mask out again, also where a template has escaped it as JSON does."""
    return text.replace(mask, "").replace(_escaped(mask), "")


@functools.lru_cache(maxsize=64)
def _escaped(character: str) -> str:
    """A character as JSON writes it, without quotes; asked for hundreds of thousands of times in a batch."""
    return json.dumps(character)[1:-1]


def _plain(value: Any) -> Any:
    """A dataclass or pydantic model as a dictionary, anything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) and not isinstance(value, (Mapping, type)) else value


def _map_values(variables: Mapping[str, Any], function: Callable[[str], str]) -> dict[str, Any]:
    """`_map_strings` of what variables hold; their names are those that the template knows them by."""
    return {name: _map_strings(value, function) for name, value in variables.items()}


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """Rebuild a template argument out of plain types, with `function` applied to each string, keys included.

    Objects that are neither data nor containers are replaced by their text, as rendering them would do.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):  # plain: one of a derived class may print as any text
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, function): _map_strings(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, function) for item in value]
    if (plain := _plain(value)) is not value:
        return _map_strings(plain, function)
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [_map_strings(item, function) for item in value]  # generators, sets, deques
    return function(str(value))


def unused_characters(texts: list[str], count: int) -> list[str]:
    """Characters of which neither they nor their JSON escapes are in any of the texts.

    Rare ideographs: printable, so that `repr` leaves them as they are, and the same in every case and normal form.

    Raises:
        ValueError: the texts hold (almost) all 42,000 of them.
    """
    used, joined = set().union(*texts), "\n".join(texts)
    rare = (chr(code) for code in range(0x20000, 0x2A6D7))
    unused = (c for c in rare if c not in used and json.dumps(c)[1:-1] not in joined)
    found = list(itertools.islice(unused, count))
    if len(found) < count:
        raise ValueError("The messages use every ideograph of CJK Extension B; remove some to apply a chat template.")
    return found


def _conversations(conversation: Any) -> tuple[bool, list[list[Any]]]:
    """(whether it is a batch, list of conversations), without the keys whose value is None.

    Raises:
        ValueError: a conversation is empty.
        TypeError: it is no list, but a message, say.
    """
    items = getattr(conversation, "messages", conversation)
    if isinstance(items, Mapping):
        raise TypeError(f"A conversation is a list of messages, not {items!r:.80}: put a message into a list.")
    batched = len(items) > 0 and (isinstance(items[0], (list, tuple)) or hasattr(items[0], "messages"))
    conversations = [list(getattr(chat, "messages", chat)) for chat in (items if batched else [items])]
    if not all(conversations):
        raise ValueError("Cannot apply the chat template to an empty conversation; provide at least one message.")
    # OpenAI-style messages have `content: None` beside tool calls; templates expect the key to be absent.
    return batched, [
        [{k: v for k, v in m.items() if v is not None} if isinstance(m, Mapping) else m for m in map(_plain, chat)]
        for chat in conversations
    ]


def _check_wanted(
    add_generation_prompt: bool,
    continue_final_message: bool | str,
    return_assistant_tokens_mask: bool,
    gives_rows: bool,
) -> None:
    """Raise ValueError for arguments of `apply_chat_template` that exclude each other."""
    if return_assistant_tokens_mask and not gives_rows:
        raise ValueError("`return_assistant_tokens_mask=True` requires `return_dict=True` and `tokenize=True`")
    if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
        raise ValueError(
            "`continue_final_message` cannot be used with `add_generation_prompt` or `return_assistant_tokens_mask`"
        )


# --- encoding ---


class TemplatesMixin(EncodingMixin):
    """`apply_chat_template`, with the arguments and results of transformers'."""

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages with a chat template; arguments and results are those of transformers' method.

        Text that the caller passes (messages, tools, documents, other template arguments; values and keys) can never
        become a control token: only special tokens that the template itself writes are encoded as such. With the
        shipped template, contents are also encoded apart from what surrounds them, which gives the tokens of
        `make_context`. That holds also where a template of the caller's removes, splits or joins text; only one that
        takes single characters or names apart and glues control tokens out of them is beyond this protection.

        The result of the fast class knows where its tokens are in the text that `tokenize=False` gives (in which lone
        surrogates are one character each, and pairs too): `char_to_token`, `encodings` and the like.

        Raises:
            ValueError: for combinations of arguments that transformers refuses too, and for endless nesting.
            jinja2.TemplateError: whatever the template refuses; the shipped one says what and why.
        """
        kwargs.pop("sanitize_control_tokens", None)  # an option of newer transformers; here it is always on
        wanted: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "return_assistant_tokens_mask": return_assistant_tokens_mask,
        }
        _check_wanted(**wanted, gives_rows=return_dict and tokenize)
        batched, chats = _conversations(conversation)
        caller = {"conversations": chats, "tools": tools, "documents": documents, **kwargs}
        template = self.get_chat_template(chat_template, tools)
        rendered = render_chats(template, caller, self.special_tokens_map, with_edges=tokenize, **wanted)
        if not tokenize:
            return rendered.plain() if batched else rendered.plain()[0]
        options = self._chat_options(padding, truncation, max_length, tokenizer_kwargs)
        out = self._encode_chats(rendered, batched or bool(return_tensors), options, return_assistant_tokens_mask)
        out.convert_to_tensors(return_tensors)
        return out if return_dict else out["input_ids"]

    def _chat_options(
        self, padding: Any, truncation: Any, max_length: int | None, tokenizer_kwargs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Options for `_from_ids` out of those of `apply_chat_template`."""
        options = dict(tokenizer_kwargs or {})
        padding_strategy, truncation_strategy, max_length, options = self._get_padding_truncation_strategies(
            padding=padding, truncation=truncation, max_length=max_length, **options
        )
        options.pop("add_special_tokens", None)
        return options | {
            "padding_strategy": padding_strategy.value,
            "truncation_strategy": truncation_strategy.value,
            "max_length": max_length,
            "pad_to_multiple_of": (tokenizer_kwargs or {}).get("pad_to_multiple_of"),
        }

    def _encode_chats(
        self, rendered: RenderedChats, batched: bool, options: dict[str, Any], with_masks: bool
    ) -> BatchEncoding:
        """Ids of chats, cut and padded; with `assistant_masks` if wanted."""
        split = split_pattern(frozenset(self.special_tokens) | {rendered.edge}).split
        chats = [split(text) for text in rendered.texts]  # text, mark, text, ..., text
        pieces = [
            [(unmask(part, rendered.mask), n % 2 == 1) for n, part in enumerate(chat) if part != rendered.edge]
            for chat in chats
        ]
        ids = self._encode_parts(chats, rendered.mask)
        joined = [list(itertools.chain.from_iterable(chat_ids)) for chat_ids in ids]
        out = self._chat_encoding(pieces, joined, batched, options)
        if with_masks:
            rows = zip(chats, ids, rendered.spans, strict=True)
            flags = [self._flag_parts(chat, chat_ids, sorted(spans), rendered.mask) for chat, chat_ids, spans in rows]
            self._add_assistant_masks(out, flags, options)
        return out

    def _encode_parts(self, chats: list[list[str]], mask: str) -> list[list[list[int]]]:
        """Ids of each part of each chat (text, mark, text, ..., text); edges have none."""
        encoded = iter(self._encode_texts([unmask(part, mask) for chat in chats for part in chat[::2]], frozenset()))
        marks = {token: [i] for token, i in self.special_tokens.items()}
        return [[marks.get(part, []) if n % 2 else next(encoded) for n, part in enumerate(chat)] for chat in chats]

    def _chat_encoding(
        self, pieces: list[list[tuple[str, bool]]], ids: list[list[int]], batched: bool, options: dict[str, Any]
    ) -> BatchEncoding:
        """Truncate, pad and pack chats.

        Args:
            pieces: (text, whether it is a control token) of each chat; what `tokenize=False` gives, when joined.
            ids: those of each chat.
            options: for `_from_ids`.
        """
        return self._from_ids([(row, None) for row in ids], batched, return_tensors=None, **options)

    def _flag_parts(self, parts: list[str], ids: list[list[int]], spans: list[tuple[int, int]], mask: str) -> list[int]:
        """1 for each token of a chat that overlaps one of `spans`, sorted ranges of characters.

        Args:
            parts: text, mark, text, ..., text.
            ids: those of each part.
        """
        flags: list[int] = []
        position, first = 0, 0
        for n, (part, part_ids) in enumerate(zip(parts, ids, strict=True)):
            end = position + len(part)
            while first < len(spans) and spans[first][1] <= position:
                first += 1
            last = first
            while last < len(spans) and spans[last][0] < end:
                last += 1
            inside = [(start - position, stop - position) for start, stop in spans[first:last]]
            flags += [int(bool(inside))] * len(part_ids) if n % 2 else self._flag_tokens(part_ids, part, inside, mask)
            position = end
        return flags

    def _flag_tokens(self, ids: list[int], part: str, spans: Collection[tuple[int, int]], mask: str) -> list[int]:
        """1 for each token of `part` that overlaps one of `spans`, character ranges that all reach into the part."""

        def byte_offset(character: int) -> int:
            return len(NFC.normalize_str(repair_surrogates(unmask(part[: max(character, 0)], mask))).encode())

        if not spans:
            return [0] * len(ids)
        byte_spans = [(byte_offset(start), byte_offset(end)) for start, end in spans]
        ends = list(itertools.accumulate((len(self._token_bytes[i]) for i in ids), initial=0))
        return [int(_overlaps(start, end, byte_spans)) for start, end in itertools.pairwise(ends)]

    def _add_assistant_masks(self, out: BatchEncoding, flags: list[list[int]], options: dict[str, Any]) -> None:
        """Set `out["assistant_masks"]`, cut and padded (with 0) like `out["input_ids"]`."""
        batched = len(out["input_ids"]) > 0 and isinstance(out["input_ids"][0], list)
        limit = options["max_length"] if options["truncation_strategy"] != "do_not_truncate" else None
        masks = []
        for row, length in zip(flags, map(len, out["input_ids"] if batched else [out["input_ids"]]), strict=True):
            if limit is not None and len(row) > limit:
                row = row[len(row) - limit :] if self.truncation_side == "left" else row[:limit]
            padding = [0] * (length - len(row))
            masks.append(
                padding + row if (options.get("padding_side") or self.padding_side) == "left" else row + padding
            )
        out["assistant_masks"] = masks if batched else masks[0]


def _overlaps(start: int, end: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(start < span_end and span_start < end for span_start, span_end in spans)
