"""Tokenizers of QWen-1: `QWenTokenizer` (tiktoken) and `QWenTokenizerFast` (tokenizers), with identical ids.

Both are built from one file, `qwen.tiktoken`, whose lines are `base64(token bytes) rank`. The special tokens follow the
last rank: `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, `<|extra_0|>` ... `<|extra_204|>`. An optional second file,
`qwen_extra.tiktoken` (see `extend_vocabulary.py`), adds tokens after the special ones.

How text becomes ids, in both classes:
1. lone surrogates become U+FFFD and surrogate pairs one character (as tiktoken does);
2. the text is split at the special tokens that are allowed;
3. each piece between them is normalised to NFC on its own, so that a combining character right after `<|im_end|>`
   cannot compose with its ">" and destroy the control token;
4. each piece is split by `PAT_STR` and byte-pair encoded.

Text encoded with `allowed_special=set()` never gives a control token; `apply_chat_template` treats every string that
the caller passes in that way.
"""

import os

if not __package__:  # imported from a folder that is no package, as programs of 2023 do: the other files lie beside it
    __path__ = __spec__.submodule_search_locations = [os.path.dirname(os.path.abspath(__file__))]
    __package__ = __spec__.name

from .versions_qwen import check_versions as check_versions  # before the others: older versions lack what they need

# isort: split

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import tiktoken
from tokenizers import (
    Encoding,
    PreTokenizedString,
    Token,
    Tokenizer,
)
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers import PreTrainedTokenizerFast as TokenizersBackend
from transformers.utils import get_json_schema, logging
from transformers.utils.chat_template_utils import render_jinja_template

from .backends_qwen import (
    GROUPED_PAT_STR,
    BackendOfCall,
    TiktokenBackend,
    build_backend,
    byte_level_name,
    bytes_of_name,
    copy_backend,
    learn_ranks,
    ranks_of_backend,
    read_backend,
    special_added_token,
)

# Published here too.
from .backends_qwen import PAT_STR as PAT_STR
from .encoding_qwen import EncodingMixin, is_plain_batch, map_texts
from .pieces_qwen import CHUNK as CHUNK
from .pieces_qwen import CUT as CUT
from .pieces_qwen import LONG_BLANK as LONG_BLANK
from .pieces_qwen import NFC, repair_surrogates, split_pattern
from .pieces_qwen import UNSTABLE as UNSTABLE
from .pieces_qwen import cut_text as cut_text
from .pieces_qwen import has_long_blank as has_long_blank
from .pieces_qwen import normalise as normalise
from .pieces_qwen import split_long_blanks as split_long_blanks
from .properties_qwen import kept
from .tokens_qwen import ID_SUFFIX, SortedBytes
from .vocabulary_qwen import (
    ENDOFTEXT,
    EXTRA_VOCAB_FILES_NAMES,
    EXTRAS,
    SETTINGS_FILES,
    VOCAB_FILES_NAMES,
    fits_vocabulary_files,
    load_vocabulary,
    name_damaged_json,
    require_file,
    require_files,
    write_vocabulary,
)
from .vocabulary_qwen import IMEND as IMEND
from .vocabulary_qwen import IMSTART as IMSTART
from .vocabulary_qwen import POINTER as POINTER
from .vocabulary_qwen import SPECIAL_TOKENS as SPECIAL_TOKENS
from .vocabulary_qwen import load_base_ranks as load_base_ranks
from .vocabulary_qwen import load_extra_ranks as load_extra_ranks
from .vocabulary_qwen import load_ranks as load_ranks

logger = logging.get_logger(__name__)

# The text of chat_template.jinja. It is repeated here because folders in the 2023 layout have no such file, and because
# transformers copies nothing but .py files along with remote code.
CHAT_TEMPLATE = r"""{%- set cut = edge | default('') %}
{%- macro text(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is mapping %}
        {{- raise_exception('The content of a message is a text or a list of parts, not a mapping') }}
    {%- elif content is defined and content is not none and content is not iterable %}
        {{- raise_exception('The content of a message is a text or a list of parts, not ' ~ content) }}
    {%- elif content %}
        {%- for part in content %}
            {%- if part is string %}
                {{- part }}
            {%- elif part is not mapping or part.type != 'text' %}
                {%- set kind = part.type | default(part) %}
                {{- raise_exception('This model reads text only; got a content part of type ' ~ kind) }}
            {%- elif part.text is not string %}
                {{- raise_exception('The text of a content part is a text, not ' ~ (part.text | default('missing'))) }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- macro described(tool) %}
    {%- set human = tool.name_for_human or tool.name_for_model or tool.name %}
    {%- set use = tool.description_for_model or tool.description or '' %}
    {%- if use is not string %}
        {{- raise_exception('The description of the tool ' ~ human ~ ' is a text, not ' ~ use) }}
    {%- endif %}
    {{- ': Call this tool to interact with the ' ~ human ~ ' API. What is the ' ~ human ~ ' API useful for? ' ~ use }}
    {{- ' Parameters: ' }}
    {%- if tool.parameters is undefined or tool.parameters is none %}
        {{- '{"type": "object", "properties": {}}' }}
    {%- else %}
        {{- tool.parameters | tojson }}
    {%- endif %}
    {{- ' Format the arguments as a JSON object.' }}
{%- endmacro %}
{%- macro asked(query) %}
    {{- 'Answer the following questions as best you can. You have access to the following tools:' }}
    {%- set known = namespace(names=[]) %}
    {%- for given in tools %}
        {%- set tool = given.function if given.function is mapping else given %}
        {%- set name = tool.name_for_model or tool.name %}
        {%- if name is not string or not name %}
            {{- raise_exception('A tool has a name, which is a text: got ' ~ given) }}
        {%- elif name in known.names %}
            {{- raise_exception('Two tools have the name ' ~ name ~ '; rename one of them') }}
        {%- endif %}
        {%- set known.names = known.names + [name] %}
        {{- '\n\n' ~ name ~ described(tool) }}
    {%- endfor %}
    {{- '\n\nUse the following format:\n\nQuestion: the input question you must answer' }}
    {{- '\nThought: you should always think about what to do' }}
    {{- '\nAction: the action to take, should be one of [' ~ known.names | join(', ') ~ ']' }}
    {{- '\nAction Input: the input to the action\nObservation: the result of the action' }}
    {{- '\n... (this Thought/Action/Action Input/Observation can be repeated zero or more times)' }}
    {{- '\nThought: I now know the final answer\nFinal Answer: the final answer to the original input question' }}
    {{- '\n\nBegin!\n\nQuestion: ' ~ query }}
{%- endmacro %}
{%- macro action(message) %}
    {%- set calls = (message.tool_calls or []) + ([message.function_call] if message.function_call else []) %}
    {%- if calls | length > 1 %}
        {{- raise_exception('Several calls in one message, but this model makes one and waits for its result: give ' ~
            'each call a message of its own, with its result behind it') }}
    {%- endif %}
    {%- for given in calls %}
        {%- set call = given.function if given.function is mapping else given %}
        {%- if call.name is not string or not (call.arguments is string or call.arguments is mapping) %}
            {{- raise_exception('A call has a name, and arguments that are a mapping or JSON: got ' ~ given) }}
        {%- endif %}
        {{- '\nAction: ' ~ call.name ~ '\nAction Input: ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
    {%- endfor %}
{%- endmacro %}
{%- macro answered(message, thinks) %}
    {%- set content = text(message.content) %}
    {%- set call = action(message) %}
    {%- if call %}
        {{- (content if content.startswith('Thought:') else 'Thought: ' ~ content).rstrip() ~ call }}
    {%- elif thinks and not content.startswith('Thought:') %}
        {{- 'Thought: I now know the final answer.\nFinal Answer: ' ~ content }}
    {%- else %}
        {{- content }}
    {%- endif %}
{%- endmacro %}
{%- set state = namespace(question=-1, turn='') %}
{%- for message in messages if tools %}
    {%- if message.role == 'user' %}
        {%- set state.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools and state.question < 0 %}
    {{- raise_exception('tools= are described in the question of a user: give one, or no tools') }}
{%- endif %}
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\n' ~ cut ~ 'You are a helpful assistant.' ~ cut ~ '<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set is_result = message.role in ['tool', 'function'] %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool', 'function'] %}
        {{- raise_exception('Unknown role ' ~ message.role ~ '; use system, user, assistant or tool') }}
    {%- elif message.role == 'system' and not loop.first %}
        {{- raise_exception('Only the first message can have the role system') }}
    {%- elif is_result and state.turn != 'call' and (tools or state.turn == 'result' or message.role == 'function') %}
        {{- raise_exception('The result of a tool follows the message with its call in tool_calls; there is none') }}
    {%- endif %}
    {%- if is_result and state.turn == 'call' %}
        {{- ' ' ~ text(message.content).lstrip('\n').rstrip() }}
        {%- set state.turn = 'result' %}
    {%- elif message.role == 'assistant' %}
        {%- set calls = message.tool_calls or message.function_call %}
        {%- set waits = calls and (loop.last or messages[loop.index].role in ['tool', 'function']) %}
        {%- set written = answered(message, tools or state.turn == 'result') %}
        {%- if state.turn == 'result' %}
            {{- '\nThought:' }}
            {%- set written = written[8:] %}
        {%- else %}
            {{- '\n<|im_start|>assistant\n' ~ cut }}
        {%- endif %}
        {%- generation %}
            {{- written.rstrip() ~ '\nObservation:' if waits else written ~ cut ~ '<|im_end|>' }}
        {%- endgeneration %}
        {%- set state.turn = 'call' if waits else '' %}
    {%- else %}
        {%- if state.turn == 'result' %}
            {{- cut ~ '<|im_end|>' }}
        {%- endif %}
        {%- set state.turn = '' %}
        {{- '' if message.role == 'system' else '\n' }}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ cut }}
        {{- asked(text(message.content)) if loop.index0 == state.question else text(message.content) }}
        {{- cut ~ '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and state.turn == 'call' %}
    {{- raise_exception('The last message is a call: there is nothing to answer before its result') }}
{%- elif add_generation_prompt and state.turn == 'result' and not tools %}
    {{- raise_exception('The last message is the result of a call: pass tools= too') }}
{%- elif add_generation_prompt and state.turn == 'result' %}
    {{- '\nThought:' }}
{%- elif add_generation_prompt %}
    {{- '\n<|im_start|>assistant\n' }}
{%- endif %}
"""

# What a special token could be built from in callers' text, by itself or together with what a template writes around it
# or leaves of it: every "|", "<" at the end, ">" at the start, and the names between the bars.
UNSAFE_TEXT = re.compile(r"\||<(?=\s*\Z)|\A\s*(?=>)|im_start|im_end|endoftext|extra_(?=[0-9])")


# --- text for chat templates ---


def _mask_unsafe(text: str, mask: str) -> str:
    """Put `mask` where a special token could begin, go on or end, so that none comes about in a template's hands."""

    def masked(match: re.Match[str]) -> str:
        found = match.group()
        if not found or found.isspace():  # before a ">", which trimming may bring to the start
            return found + mask
        return f"{mask}|{mask}" if found == "|" else found[:1] + mask + found[1:]

    return UNSAFE_TEXT.sub(masked, text)


def _unmask(text: str, mask: str) -> str:
    """Take the mask out again, also where a template has escaped it as JSON does."""
    return text.replace(mask, "").replace(json.dumps(mask)[1:-1], "")


def _plain(value: Any) -> Any:
    """A dataclass or pydantic model as a dictionary, anything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) and not isinstance(value, (Mapping, type)) else value


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """Rebuild a template argument out of plain types, with `function` applied to each string, keys included.

    Objects that are neither data nor containers are replaced by their text, as rendering them would do.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
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


def _unused_characters(texts: list[str], count: int) -> list[str]:
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


def _overlaps(start: int, end: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(start < span_end and span_start < end for span_start, span_end in spans)


# --- the tokenizers ---


class QWenTokenizerMixin(EncodingMixin):
    """What the two tokenizers share: special tokens, the `allowed_special` interface, decoding, saving, chat.

    Subclasses set `special_tokens` before they call `PreTrainedTokenizerBase.__init__`, and implement `_encode_texts`.
    """

    # `tokenizer_file` is for the fast class; that it is named lets both load from the path of a single vocabulary file.
    vocab_files_names = {**VOCAB_FILES_NAMES, **EXTRA_VOCAB_FILES_NAMES, "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    add_prefix_space = False

    def _with_defaults(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for transformers' constructor: the defaults of this model where nothing is given.

        Raises:
            ValueError: a named token is not in the vocabulary; `add_prefix_space` is true.
        """
        # Files written by other tokenizers name a backend here, and `AutoTokenizer` reads `use_fast`; neither is ours.
        if "resume_download" in kwargs:  # passed by programs of 2023; it would be saved with the tokenizer
            logger.warning_once("resume_download is left out: downloads are always resumed. Remove the argument.")
        others = ("backend", "use_fast", "resume_download")
        kwargs = {key: value for key, value in kwargs.items() if key not in others}
        if kwargs.pop("add_prefix_space", False):
            raise ValueError(
                "`add_prefix_space=True` is not possible: this model was trained on text as it is. Leave the argument "
                "out, and begin the text with a space where you want one."
            )
        for key, default in (("eos_token", ENDOFTEXT), ("pad_token", ENDOFTEXT), ("chat_template", CHAT_TEMPLATE)):
            if kwargs.get(key) is None:
                kwargs[key] = default
        for key in self.SPECIAL_TOKENS_ATTRIBUTES:
            if kwargs.get(key) is not None:
                kwargs[key] = self._named(kwargs[key])
        for key in ("extra_special_tokens", "additional_special_tokens"):
            if isinstance(kwargs.get(key), (list, tuple)):
                kwargs[key] = [self._named(token) for token in kwargs[key]]
        return kwargs

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Check that there are files for the constructor to read.

        `from_pretrained` calls this before the constructor, whose OSErrors it replaces by one that says nothing.
        """
        extra = kwargs.get("extra_vocab_file")
        if extra is not None or not (issubclass(cls, TokenizersBackend) and kwargs.get("tokenizer_file") is not None):
            require_file(kwargs.get("vocab_file"))
        if extra is not None:
            require_file(extra, EXTRA_VOCAB_FILES_NAMES["extra_vocab_file"])
        return kwargs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        """As transformers'.

        Raises:
            OSError, ValueError: a file of the folder can't be read, is damaged, or is a pointer of Git LFS.
        """
        folder = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        names = (*cls.vocab_files_names.values(), *SETTINGS_FILES)
        require_files(folder, names)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # transformers doesn't say in which file
            name_damaged_json(folder, names)
            raise

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `qwen.tiktoken`, and `qwen_extra.tiktoken` if there are extra tokens; return the paths.

        Raises:
            ValueError: `save_directory` is not a directory, or the special tokens are not those that these files imply.
        """
        return write_vocabulary(save_directory, self.mergeable_ranks, self.special_tokens, filename_prefix)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As in transformers, with the code of the published class for one that an engine or a program derived from it.

        What `saving_qwen.py` does for models; this file has to work alone.
        """
        own = type(self)
        published = next(c for c in own.__mro__ if c.__module__ == __name__ or vars(c).get("_auto_class") is not None)
        if published is own:
            return super().save_pretrained(*args, **kwargs)
        name = {"__module__": published.__module__, "__qualname__": published.__qualname__}
        object.__setattr__(self, "__class__", type(published.__name__, (own,), name))
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            object.__setattr__(self, "__class__", own)

    # Chat

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
            ValueError: for combinations of arguments that transformers refuses too.
        """
        kwargs.pop("sanitize_control_tokens", None)  # an option of newer transformers; here it is always on
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError("`return_assistant_tokens_mask=True` requires `return_dict=True` and `tokenize=True`")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "`continue_final_message` cannot be used with `add_generation_prompt` or `return_assistant_tokens_mask`"
            )
        batched, conversations = _conversations(conversation)
        caller = {"conversations": conversations, "tools": tools, "documents": documents, **kwargs}
        rendered, spans, mask, edge = self._render(
            self.get_chat_template(chat_template, tools),
            caller,
            tokenize,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
        )
        if not tokenize:
            texts = [_unmask(text, mask) for text in rendered]
            return texts if batched else texts[0]
        chats = self._cut_rendered(rendered, edge)
        encoded, flags = self._encode_rendered(chats, spans, mask)
        options = self._chat_options(padding, truncation, max_length, tokenizer_kwargs)
        pieces = [[(_unmask(part, mask), n % 2 == 1) for n, part in enumerate(chat) if part != edge] for chat in chats]
        out = self._chat_encoding(pieces, encoded, batched or bool(return_tensors), options)
        if return_assistant_tokens_mask:
            self._add_assistant_masks(out, flags, options)
        out.convert_to_tensors(return_tensors)
        return out if return_dict else out["input_ids"]

    def _render(
        self, template: str, caller: dict[str, Any], with_edges: bool, **options: Any
    ) -> tuple[list[str], list[list[tuple[int, int]]], str, str]:
        """Render conversations with the caller's strings masked.

        Args:
            template: a Jinja template.
            caller: all that the caller passes to it: conversations, tools, documents and other variables.
            with_edges: whether to let the template mark the edges of contents, by its variable `edge`.
            **options: other arguments of `render_jinja_template`.

        Returns:
            (texts, character ranges of each that the assistant wrote, mask, edge). `mask` is the character put into
            the caller's strings, `edge` the one that marks edges.
        """
        tools = caller["tools"]
        caller = {**caller, "tools": tools and [get_json_schema(tool) if callable(tool) else tool for tool in tools]}
        strings = [template]
        # The copy holds plain lists: an iterator among the contents can be read once only.
        caller = _map_strings(caller, lambda text: strings.append(text) or text)  # type: ignore[func-returns-value]
        mask, edge = _unused_characters(strings, 2)
        masked = _map_strings(caller, lambda text: _mask_unsafe(text, mask))
        variables = {**self.special_tokens_map, **masked, "edge": edge if with_edges else ""}
        result: Any = render_jinja_template(chat_template=template, **variables, **options)
        texts, spans = result
        return texts, spans or [[] for _ in texts], mask, edge

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

    def _cut_rendered(self, rendered: list[str], edge: str) -> list[list[str]]:
        """Cut rendered chats at special tokens and at `edge`: text, mark, text, ..., text."""
        split = split_pattern(frozenset(self.special_tokens) | {edge}).split
        return [split(text) for text in rendered]

    def _encode_rendered(
        self, chats: list[list[str]], spans: list[list[tuple[int, int]]], mask: str
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Encode rendered chats.

        Args:
            chats: text, mark, text, ..., text of each, in which `mask` breaks special tokens in callers' text.
            spans: character ranges of each that the assistant wrote.

        Returns:
            (ids, flags) of each chat: a flag is 1 if the assistant wrote any of the token.
        """
        texts = [_unmask(part, mask) for chat in chats for part in chat[::2]]
        encoded = iter(self._encode_texts(texts, frozenset()))
        marks = {token: [i] for token, i in self.special_tokens.items()}
        ids = [[marks.get(part, []) if n % 2 else next(encoded) for n, part in enumerate(chat)] for chat in chats]
        flags = [
            self._flag_parts(chat, chat_ids, sorted(chat_spans), mask) if chat_spans else [0] * sum(map(len, chat_ids))
            for chat, chat_ids, chat_spans in zip(chats, ids, spans, strict=True)
        ]
        return [list(itertools.chain.from_iterable(chat_ids)) for chat_ids in ids], flags

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
            return len(NFC.normalize_str(repair_surrogates(_unmask(part[: max(character, 0)], mask))).encode())

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


def _conversations(conversation: Any) -> tuple[bool, list[list[Any]]]:
    """(whether it is a batch, list of conversations), without the keys whose value is None.

    Raises:
        ValueError: a conversation is empty.
    """
    items = getattr(conversation, "messages", conversation)
    batched = len(items) > 0 and (isinstance(items[0], (list, tuple)) or hasattr(items[0], "messages"))
    conversations = [list(getattr(chat, "messages", chat)) for chat in (items if batched else [items])]
    if not all(conversations):
        raise ValueError("Cannot apply the chat template to an empty conversation; provide at least one message.")
    # OpenAI-style messages have `content: None` beside tool calls; templates expect the key to be absent.
    return batched, [
        [{k: v for k, v in m.items() if v is not None} if isinstance(m, Mapping) else m for m in map(_plain, chat)]
        for chat in conversations
    ]


class QWenTokenizer(QWenTokenizerMixin, PreTrainedTokenizer):
    """The tokenizer on top of tiktoken, with the interface published in December 2023.

    Tokens are bytes, and str for special tokens. `decoder` maps ids to tokens.

    Args:
        vocab_file: path of `qwen.tiktoken`.
        errors: what `decode` does with bytes that are not UTF-8: "replace", "ignore" or "strict".
        extra_vocab_file: path of a file of additional tokens, made by `extend_vocabulary.py`.
        **kwargs: as for transformers' tokenizers.

    Raises:
        FileNotFoundError, ValueError: see `load_vocabulary`; also for added tokens that this vocabulary lacks.
    """

    def __init__(
        self,
        vocab_file: str | os.PathLike | None,
        errors: str = "replace",
        extra_vocab_file: str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        self.mergeable_ranks, self.special_tokens = load_vocabulary(vocab_file, extra_vocab_file)
        self.errors = errors
        tokens: dict[int, bytes | str] = {i: token for token, i in self.mergeable_ranks.items()}
        self.decoder = tokens | {i: token for token, i in self.special_tokens.items()}
        self._bpe = tiktoken.Encoding(
            "qwen",
            pat_str=GROUPED_PAT_STR,
            mergeable_ranks=self.mergeable_ranks,
            special_tokens=self.special_tokens,
        )
        self._tiktoken = TiktokenBackend(self._bpe, self.mergeable_ranks, self.special_tokens)
        self._added_tokens_decoder = {i: special_added_token(token) for token, i in self.special_tokens.items()}
        self._add_tokens(kwargs.pop("added_tokens_decoder", {}).values())
        kwargs.pop("tokenizer_file", None)  # read by the fast class only
        super().__init__(
            errors=errors,
            extra_vocab_file=extra_vocab_file,
            special_tokens_pattern="none",
            **self._with_defaults(kwargs),
        )

    def __getattr__(self, key: str) -> Any:
        """`pad_token_id` and the like: ids of names, which `convert_tokens_to_ids` would take for text."""
        attribute = ID_SUFFIX.sub("", key)
        if attribute != key and attribute in self.SPECIAL_TOKENS_ATTRIBUTES:
            token = getattr(self, attribute)
            return None if token is None else self._id_of(token)
        if key == "extra_special_tokens_ids":
            return [self._id_of(token) for token in self.extra_special_tokens]
        return super().__getattr__(key)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return [self._id_of(token) for token in self.all_special_tokens]  # type: ignore[misc]

    def _id_of(self, name: str) -> int | None:
        if name in self.special_tokens:
            return self.special_tokens[name]
        token = bytes_of_name(name)
        return None if token is None else self.mergeable_ranks.get(token)

    def _token_of(self, index: int) -> str | bytes | None:
        return self.decoder.get(index)

    def _encode_texts(self, texts: list[str], allowed: frozenset[str]) -> list[list[int]]:
        return self._tiktoken.encode(texts, allowed)

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, **kwargs: Any
    ) -> BatchEncoding:
        kwargs.pop("add_special_tokens", None)
        return self._encode_to_ids(text, text_pair, **kwargs)

    def get_vocab(self) -> dict[Any, int]:
        """Token -> id: bytes for ordinary tokens, str for special ones; sorted, these come last."""
        return {SortedBytes(token): i for token, i in self.mergeable_ranks.items()} | self.special_tokens

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a token (bytes, or str), or the ids of a list of tokens; None for what is no token.

        A str that is not a special token stands for its UTF-8 bytes.
        """
        if tokens is None or isinstance(tokens, (str, bytes)):
            return None if tokens is None else self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def _convert_token_to_id(self, token: str | bytes) -> int | None:
        if isinstance(token, str):
            if token in self.special_tokens:
                return self.special_tokens[token]
            token = token.encode("utf-8", "replace")
        return self.mergeable_ranks.get(token)

    def _convert_id_to_token(self, index: int) -> Any:
        if index not in self.decoder:
            raise ValueError(f"No token has the id {index}; ids go from 0 to {len(self) - 1}")
        return self.decoder[index]

    def convert_tokens_to_string(self, tokens: Iterable[str | bytes]) -> str:
        """Join tokens and decode their bytes as UTF-8, with `self.errors` for invalid bytes."""
        joined = b"".join(token.encode() if isinstance(token, str) else token for token in tokens)
        return joined.decode("utf-8", self.errors)


_CUTS_ONE = ("do_not_truncate", "longest_first", "only_first")  # what these do to single texts is the same


class QWenTokenizerFast(QWenTokenizerMixin, TokenizersBackend):  # type: ignore[misc]
    """The tokenizer on top of the `tokenizers` library, built from the same file, with the same ids.

    Tokens are byte-level strings ("Ġhello" for b" hello"). Building from `qwen.tiktoken` takes about a second, loading
    from `tokenizer.json` (which `save_pretrained` writes) half of that. `tokenizer.json` is not read when there is an
    extra vocabulary, which may be newer.

    Args:
        vocab_file: path of `qwen.tiktoken`; may be None if `tokenizer_file` or `tokenizer_object` is given.
        errors, extra_vocab_file: as for `QWenTokenizer`.
        **kwargs: as for transformers' fast tokenizers; `tokenizer_file` is the path of a `tokenizer.json`.

    Raises:
        FileNotFoundError, ValueError: see `load_vocabulary`; also for added tokens that this vocabulary lacks.
    """

    slow_tokenizer_class = QWenTokenizer  # type: ignore[assignment]
    _tokenizer: Any

    # transformers keeps these two steps in its slow class; `_from_ids` uses them here too.
    truncate_sequences = PreTrainedTokenizer.truncate_sequences

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        errors: str = "replace",
        extra_vocab_file: str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        self.errors = errors
        tokenizer_file = kwargs.pop("tokenizer_file", None)
        if kwargs.get("tokenizer_object") is None:
            if tokenizer_file is not None and extra_vocab_file is None:
                self._tokenizer = read_backend(tokenizer_file)
            else:
                self._tokenizer = build_backend(*load_vocabulary(vocab_file, extra_vocab_file))
        else:
            self._tokenizer = kwargs["tokenizer_object"]
        self.special_tokens = {
            token.content: i for i, token in sorted(self._tokenizer.get_added_tokens_decoder().items()) if token.special
        }
        self._add_tokens(kwargs.get("added_tokens_decoder", {}).values())
        super().__init__(errors=errors, extra_vocab_file=extra_vocab_file, **self._with_defaults(kwargs))
        # `pad` advises against using it with fast tokenizers; chats and restricted special tokens come as ids.
        self.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        """As transformers'; `use_fast=False` or `backend="tiktoken"` gives a `QWenTokenizer`.

        `AutoTokenizer` of transformers 5 drops `use_fast` before it calls this method, but passes `backend` on.
        """
        if kwargs.pop("use_fast", None) is not False and kwargs.pop("backend", None) != "tiktoken":
            return super().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)
        if cls._auto_class is not None:  # so that saving copies this file, as for the fast class
            QWenTokenizer.register_for_auto_class(cls._auto_class)
        kwargs.pop("backend", None)
        return QWenTokenizer.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)

    def _id_of(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def _token_of(self, index: int) -> str | bytes | None:
        return self._tokenizer.id_to_token(index) if index >= 0 else None

    @kept
    def mergeable_ranks(self) -> dict[bytes, int]:
        """Token bytes -> id, read back from the backend; extra vocabulary included."""
        return ranks_of_backend(self._tokenizer, self.special_tokens)

    def _encode_texts(self, texts: list[str], allowed: frozenset[str]) -> list[list[int]]:
        split = split_pattern(allowed).split
        parts = [split(repair_surrogates(text)) for text in texts]  # text, special, text, ..., text
        # The backend's switch for special tokens is shared by all threads, so its model is used in one without any.
        backend = Tokenizer(self._tokenizer.model)
        backend.normalizer, backend.pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        ordinary = [part for line in parts for part in line[::2]]
        encoded = iter(backend.encode_batch_fast(ordinary, add_special_tokens=False))
        return [
            [i for n, part in enumerate(line) for i in ([self.special_tokens[part]] if n % 2 else next(encoded).ids)]
            for line in parts
        ]

    def _encode_plus(  # type: ignore[override]
        self,
        text: Any,
        text_pair: Any = None,
        *,
        allowed_special: str | Collection[str] = "all",
        disallowed_special: str | Collection[str] = (),
        split_special_tokens: bool | None = None,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        allowed = self._resolve_allowed(allowed_special, split_special_tokens)
        if len(allowed) < len(self.special_tokens) or disallowed_special or text == []:
            return self._encode_to_ids(
                text, text_pair, allowed_special=allowed, disallowed_special=disallowed_special, **kwargs
            )
        text, text_pair = (map_texts(item, repair_surrogates) for item in (text, text_pair))
        is_plain = text_pair is None and not kwargs.get("is_split_into_words") and is_plain_batch(text)
        own = self._for_one_call(kwargs, is_plain)
        return TokenizersBackend._encode_plus(own, text, text_pair, split_special_tokens=False, **kwargs)

    def _for_one_call(self, options: Mapping[str, Any], is_plain: bool) -> TokenizersBackend:
        """This tokenizer, or one that shares all but the backend where a call with these options would change that.

        transformers writes truncation and padding into the backend before it encodes, so threads would get each
        other's. A lock against that would outlive neither a pickle of the class, as dill makes, nor a fork.
        """
        backend = self._tokenizer
        wanted = (options.get("truncation_strategy", "do_not_truncate"), options.get("padding_strategy", "do_not_pad"))
        has_settings = backend.truncation or backend.padding or backend.encode_special_tokens
        if wanted == ("do_not_truncate", "do_not_pad") and not has_settings:
            return self
        is_plain = is_plain and wanted[0] in _CUTS_ONE and not options.get("stride") and not has_settings
        settled = is_plain and not backend.num_special_tokens_to_add(False)
        own = object.__new__(type(self))
        vars(own).update(vars(self), _tokenizer=BackendOfCall(backend) if settled else copy_backend(backend))
        return own

    def _chat_encoding(
        self, pieces: list[list[tuple[str, bool]]], ids: list[list[int]], batched: bool, options: dict[str, Any]
    ) -> BatchEncoding:
        options = dict(options)
        with_offsets = options.pop("return_offsets_mapping", False)
        out = super()._chat_encoding(pieces, ids, batched, options)
        lengths = [len(row) for row in (out["input_ids"] if batched else [out["input_ids"]])]
        limit = options["max_length"] if options["truncation_strategy"] != "do_not_truncate" else None
        cut_side, pad_side = self.truncation_side, options.get("padding_side") or self.padding_side
        pad_id, pad_token = self.pad_token_id, self.pad_token

        def make(chat: list[tuple[str, bool]], length: int) -> Encoding:
            encoding = self._locate(chat)
            if limit is not None and len(encoding) > limit:
                encoding.truncate(limit, direction=cut_side)
            encoding.set_sequence_id(0)
            encoding.pad(length, direction=pad_side, pad_id=pad_id, pad_token=pad_token)
            return encoding

        encodings = _LazyEncodings(make, list(zip(pieces, lengths, strict=True)))
        if with_offsets:
            offsets = [encoding.offsets for encoding in encodings]
            out["offset_mapping"] = offsets if batched else offsets[0]
        return BatchEncoding(dict(out), encodings, n_sequences=1)

    def _locate(self, pieces: list[tuple[str, bool]]) -> Encoding:
        """The `tokenizers.Encoding` of pieces (text, whether it is a control token), with their places in the whole."""
        pieces = [(repair_surrogates(text), is_control) for text, is_control in pieces if text]
        whole = "".join(text for text, _ in pieces)
        ends = itertools.accumulate((len(text) for text, _ in pieces), initial=0)
        # Control tokens go through the pre-tokenizer as runs of a letter that the text lacks, in NFC too.
        stand_in = _unused_characters([whole, NFC.normalize_str(whole)], 1)[0]
        disguised = byte_level_name(stand_in.encode())
        controls = iter([self.special_tokens[text] for text, is_control in pieces if is_control])

        def cut(_: int, text: Any) -> list[Any]:
            parts = [text[start:end] for start, end in itertools.pairwise(ends)]
            for part, piece in zip(parts, pieces, strict=True):
                if piece[1]:
                    part.map(lambda character: stand_in)
            return parts

        def tokens_of(word: str) -> list[Token]:
            if not word.startswith(disguised):
                return self._tokenizer.model.tokenize(word)
            control = next(controls)
            return [Token(control, self._tokenizer.id_to_token(control), (0, len(word.encode())))]

        prepared = PreTokenizedString(whole)
        prepared.split(cut)
        prepared.normalize(self._tokenizer.normalizer.normalize)
        self._tokenizer.pre_tokenizer.pre_tokenize(prepared)
        prepared.tokenize(tokens_of)
        return prepared.to_encoding()

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Iterable[str | AddedToken] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Learn a vocabulary from texts, and return a tokenizer of this class with it and the settings of this one.

        The ids of the special tokens follow those of the learnt tokens, as in `qwen.tiktoken`, so that both classes
        load what the new tokenizer saves, with the same ids. Learnt pairs are joined as tiktoken does. An extra
        vocabulary is left behind.

        Args:
            text_iterator: texts, or batches of texts.
            vocab_size: how many tokens there are to be, special tokens included; the 256 bytes are always there.
            length: how many items `text_iterator` has, for a progress bar.
            new_special_tokens, special_tokens_map: only special tokens that exist; the spare ones need neither.
            **kwargs: other arguments of `tokenizers.trainers.BpeTrainer`.

        Raises:
            ValueError: for other special tokens, a `pad_token` or the like that was not learnt, and an alphabet.
        """
        wanted = [*map(str, new_special_tokens or ()), *(special_tokens_map or {}).values()]
        if unknown := [token for token in wanted if token not in self.special_tokens]:
            raise ValueError(
                f"{unknown[0]!r} cannot be a special token: those of QWen have fixed names. Use one of the "
                f"{len(EXTRAS)} spare ones ({EXTRAS[0]} ... {EXTRAS[-1]}) in its place."
            )
        size = vocab_size - len(self.special_tokens)
        ranks = learn_ranks(text_iterator, size, self._tokenizer, length, **kwargs)
        special_tokens = {token: i for i, token in enumerate(self.special_tokens, start=len(ranks))}
        return type(self)(tokenizer_object=build_backend(ranks, special_tokens), **self._settings(special_tokens_map))

    def _settings(self, renamed: Mapping[str, str] | None) -> dict[str, Any]:
        """Arguments that make a tokenizer with another vocabulary like this one."""
        left_out = ("added_tokens_decoder", "name_or_path", *self.vocab_files_names)
        given = {key: value for key, value in self.init_kwargs.items() if key not in left_out}
        extra = self.extra_special_tokens
        now = ("errors", "chat_template", "model_max_length", "padding_side", "truncation_side", "model_input_names")
        named = {key: (renamed or {}).get(token, token) for key, token in self.special_tokens_map.items()}
        return {**given, **{key: getattr(self, key) for key in now}, "extra_special_tokens": extra, **named}

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Write `tokenizer.json`, and the files that `QWenTokenizer` reads if it has these control tokens."""
        names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        if fits_vocabulary_files(self.mergeable_ranks, self.special_tokens):
            return names + self.save_vocabulary(os.fspath(save_directory), filename_prefix)
        return names


class _LazyEncodings(Sequence[Encoding]):
    """The encodings of a batch of chats, which are made when they are first looked at, as few callers do.

    Args:
        make: (pieces of a chat, length of its row) -> encoding.
        chats: those arguments.
    """

    def __init__(
        self,
        make: Callable[[list[tuple[str, bool]], int], Encoding],
        chats: list[tuple[list[tuple[str, bool]], int]],
    ):
        self._make = make
        self._chats = chats

    @kept
    def _made(self) -> list[Encoding]:
        return [self._make(pieces, length) for pieces, length in self._chats]

    def __len__(self) -> int:
        return len(self._chats)

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self._made,)  # copies and pickles need no tokenizer
