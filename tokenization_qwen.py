"""Tokenizers of QWen-1: `QWenTokenizer` (tiktoken) and `QWenTokenizerFast` (tokenizers), with identical ids.

Both are built from one file, `qwen.tiktoken`, whose lines are `base64(token bytes) rank`. The special tokens follow the
last rank: `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, `<|extra_0|>` ... `<|extra_204|>`. An optional second file,
`qwen_extra.tiktoken` (see `qwen1-extend-vocabulary`), adds tokens after the special ones.

How text becomes ids, in both classes:
1. lone surrogates become U+FFFD and surrogate pairs one character (as tiktoken does);
2. the text is split at the special tokens that are allowed;
3. each piece between them is normalised to NFC on its own, so that a combining character right after `<|im_end|>`
   cannot compose with its ">" and destroy the control token;
4. each piece is split by `PAT_STR` and byte-pair encoded.

Text encoded with `allowed_special=set()` never gives a control token; `apply_chat_template` treats every string that
the caller passes in that way.

Here are the two classes, how they are loaded and saved. The rest is in three rooms: vocabulary files and what makes ids
with them (`vocabulary_qwen.py`, `backends_qwen.py`, `native_tokens_qwen.py`), text to ids and back (`pieces_qwen.py`,
`tokens_qwen.py`, `encoding_qwen.py`), chat templates and their safety (`templates_qwen.py`).
"""

import os

if not __package__:  # imported from a folder that is no package, as programs of 2023 do: the other files lie beside it
    __path__ = __spec__.submodule_search_locations = [os.path.dirname(os.path.abspath(__file__))]
    __package__ = __spec__.name

from .versions_qwen import check_versions as check_versions  # before the others: older versions lack what they need

# isort: split

import codecs
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import tiktoken
from tokenizers import Encoding, Tokenizer
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers import PreTrainedTokenizerFast as TokenizersBackend
from transformers.utils import logging

from .backends_qwen import (
    GROUPED_PAT_STR,
    BackendOfCall,
    Shortcut,
    TiktokenBackend,
    TiktokenTwin,
    build_backend,
    bytes_of_name,
    copy_backend,
    learn_ranks,
    ranks_of_backend,
    read_backend,
    refuse_tokens_around,
    special_added_token,
)
from .chat_template_qwen import CHAT_TEMPLATE
from .encoding_qwen import is_plain_batch, map_texts
from .native_tokens_qwen import NativeTokens as NativeTokens
from .offsets_qwen import LazyEncodings, locate
from .pieces_qwen import repair_surrogates, split_pattern
from .properties_qwen import kept
from .saving_qwen import saved_as_published
from .templates_qwen import TemplatesMixin
from .tokens_qwen import ID_SUFFIX, SortedBytes
from .translating_qwen import library_of as library_of
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

# isort: split
# Importable from here as well.
from .backends_qwen import PAT_STR as PAT_STR
from .backends_qwen import byte_level_name as byte_level_name
from .pieces_qwen import CHUNK as CHUNK
from .pieces_qwen import CUT as CUT
from .pieces_qwen import LONG_BLANK as LONG_BLANK
from .pieces_qwen import NFC as NFC
from .pieces_qwen import UNSTABLE as UNSTABLE
from .pieces_qwen import cut_text as cut_text
from .pieces_qwen import has_long_blank as has_long_blank
from .pieces_qwen import normalise as normalise
from .pieces_qwen import split_long_blanks as split_long_blanks
from .templates_qwen import UNSAFE_TEXT as UNSAFE_TEXT
from .vocabulary_qwen import IMEND as IMEND
from .vocabulary_qwen import IMSTART as IMSTART
from .vocabulary_qwen import POINTER as POINTER
from .vocabulary_qwen import SPECIAL_TOKENS as SPECIAL_TOKENS
from .vocabulary_qwen import load_base_ranks as load_base_ranks
from .vocabulary_qwen import load_extra_ranks as load_extra_ranks
from .vocabulary_qwen import load_ranks as load_ranks

logger = logging.get_logger(__name__)


class QWenTokenizerMixin(TemplatesMixin):
    """How both tokenizers are made, loaded and saved. What they do is in the classes below: chats, encoding, tokens.

    Subclasses set `special_tokens` before they call `PreTrainedTokenizerBase.__init__`, and implement `_encode_texts`.
    """

    # `tokenizer_file` is for the fast class; that it is named lets both load from the path of a single vocabulary file.
    vocab_files_names = {**VOCAB_FILES_NAMES, **EXTRA_VOCAB_FILES_NAMES, "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    add_prefix_space = False

    def _with_defaults(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for transformers' constructor: the defaults of this model where nothing is given.

        Raises:
            ValueError: a named token is not in the vocabulary; `add_prefix_space` is true; no such `errors`, no length.
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
        try:
            codecs.lookup_error(self.errors)
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"errors={self.errors!r:.80} is unknown: use 'replace', 'ignore' or 'strict'.") from None
        length = kwargs.get("model_max_length")
        if length is not None and (isinstance(length, bool) or not isinstance(length, (int, float)) or not length >= 0):
            raise ValueError(f"model_max_length={length!r} is impossible: it must be a number of tokens.")
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
        except (AttributeError, LookupError, TypeError) as error:
            backend = os.path.join(folder, "tokenizer.json")
            if "tokenizer.json" in names and os.path.isfile(backend):
                read_backend(backend)  # whose error, if it is the damaged one, says so
            # The other error is of an argument that has the name of a method, which may be the caller's own.
            if not os.path.isfile(os.path.join(folder, SETTINGS_FILES[0])) or "conflicts with the method" in str(error):
                raise
            raise ValueError(
                f"The settings of the tokenizer in {folder!r} can't be used ({type(error).__name__}: {error}): mend "
                f"its {SETTINGS_FILES[0]}, or download it again."
            ) from error

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `qwen.tiktoken`, and `qwen_extra.tiktoken` if there are extra tokens; return the paths.

        Raises:
            ValueError: `save_directory` is not a directory, or the special tokens are not those that these files imply.
        """
        return write_vocabulary(save_directory, self.mergeable_ranks, self.special_tokens, filename_prefix)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As in transformers; a class that an engine or a program derived is saved as the published one."""
        with saved_as_published(self, __name__):
            return super().save_pretrained(*args, **kwargs)


class QWenTokenizer(QWenTokenizerMixin, PreTrainedTokenizer):  # type: ignore[misc]
    """The tokenizer on top of tiktoken, with the interface published in December 2023.

    Tokens are bytes, and str for special tokens. `decoder` maps ids to tokens.

    Args:
        vocab_file: path of `qwen.tiktoken`.
        errors: what `decode` does with bytes that are not UTF-8: "replace", "ignore" or "strict".
        extra_vocab_file: path of a file of additional tokens, made by `qwen1-extend-vocabulary`.
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
        if kwargs.get("add_bos_token") or kwargs.get("add_eos_token"):
            raise ValueError("`add_bos_token` and `add_eos_token` need QWenTokenizerFast: leave them out.")
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

    def _joined_bytes(self, ids: list[int]) -> bytes:
        try:
            return self._bpe.decode_bytes(ids)
        except (KeyError, OverflowError):  # ids that no token has
            return super()._joined_bytes(ids)

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


_FOR_IDS = (  # what a call may have that wants ids only
    *("padding_strategy", "truncation_strategy", "max_length", "pad_to_multiple_of", "padding_side"),
    *("return_tensors", "return_attention_mask", "return_length", "verbose", "add_special_tokens"),
)
_CUTS_ONE = ("do_not_truncate", "longest_first", "only_first")  # what these do to single texts is the same


class _CheckedIds(TokenizersBackend):
    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """As in transformers: a token or tokens by id, None for an id that no token has.

        Raises:
            ValueError: a number that no id can be.
        """
        try:
            return super().convert_ids_to_tokens(ids, skip_special_tokens)
        except OverflowError as error:  # of the library, whose ids have 32 bits
            raise ValueError(
                f"ids={ids!r:.80} has a number that no id can be; they go from 0 to {len(self) - 1}"
            ) from error


class QWenTokenizerFast(QWenTokenizerMixin, _CheckedIds):  # type: ignore[misc]
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
        self._shortcut = Shortcut()  # of the backend as it is now
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

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The `tokenizers.Tokenizer`; whatever is changed in it counts from the next call on."""
        self._shortcut.shown = True
        return self._tokenizer

    @kept
    def _shortcut(self) -> Shortcut:
        return Shortcut()

    def _id_of(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def _token_of(self, index: int) -> str | bytes | None:
        return self._tokenizer.id_to_token(index) if index >= 0 else None

    @kept
    def mergeable_ranks(self) -> dict[bytes, int]:
        """Token bytes -> id, read back from the backend; extra vocabulary included."""
        return ranks_of_backend(self._tokenizer, self.special_tokens)

    def _encode_texts(self, texts: list[str], allowed: frozenset[str]) -> list[list[int]]:
        if twin := self._shortcut.twin(self._tokenizer, self.special_tokens, texts):
            return twin.tiktoken.encode(texts, allowed)
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
        **kwargs: Any,
    ) -> BatchEncoding:
        allowed = self._resolve_allowed(allowed_special, split_special_tokens)
        if len(allowed) < len(self.special_tokens) or disallowed_special or text == []:
            refuse_tokens_around(self._tokenizer, kwargs.pop("add_special_tokens", True) and bool(text))
            return self._encode_to_ids(
                text, text_pair, allowed_special=allowed, disallowed_special=disallowed_special, **kwargs
            )
        text, text_pair = (map_texts(item, repair_surrogates) for item in (text, text_pair))
        is_plain = text_pair is None and not kwargs.get("is_split_into_words") and is_plain_batch(text)
        if is_plain and self._wants_ids(kwargs):
            texts = [text] if isinstance(text, str) else list(text)
            if twin := self._shortcut.twin(self._tokenizer, self.special_tokens, texts):
                return self._encode_by_twin(twin, text, texts, kwargs)
        own = self._for_one_call(kwargs, is_plain)
        try:
            return TokenizersBackend._encode_plus(own, text, text_pair, split_special_tokens=False, **kwargs)
        except Exception as error:
            if type(error) is not Exception:  # the library has no kind of its own
                raise
            raise ValueError(
                f"{error}: raise max_length, or cut both texts with truncation='longest_first'."
            ) from error

    def _wants_ids(self, options: Mapping[str, Any]) -> bool:
        """Whether a call on plain texts asks for ids and for nothing that needs places, other tokens or more rows."""
        token_types = options.get("return_token_type_ids")
        return (
            not ("token_type_ids" in self.model_input_names if token_types is None else token_types)
            and options.get("truncation_strategy", "do_not_truncate") in _CUTS_ONE
            and not any(value for name, value in options.items() if name not in _FOR_IDS)
        )

    def _encode_by_twin(
        self, twin: TiktokenTwin, text: Any, texts: list[str], options: dict[str, Any]
    ) -> BatchEncoding:
        """What transformers makes of ids that tiktoken gives; places are looked for when somebody asks."""
        call = BackendOfCall(twin)
        own = object.__new__(type(self))
        vars(own).update(vars(self), _tokenizer=call)
        out = TokenizersBackend._encode_plus(own, text, split_special_tokens=False, **options)
        encodings = LazyEncodings(lambda: twin.locate(texts, call.truncation, call.padding), len(texts))
        return BatchEncoding(dict(out), encodings, n_sequences=1)

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

        encodings = LazyEncodings(lambda: list(map(make, pieces, lengths)), len(lengths))
        if with_offsets:
            offsets = [encoding.offsets for encoding in encodings]
            out["offset_mapping"] = offsets if batched else offsets[0]
        return BatchEncoding(dict(out), encodings, n_sequences=1)

    def _locate(self, pieces: list[tuple[str, bool]]) -> Encoding:
        return locate(pieces, self._tokenizer, self.special_tokens)

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
        for name in names:
            if name.endswith("tokenizer.json"):  # with a line for each word, it is more than twice as large
                self._tokenizer.save(name, pretty=False)
        if fits_vocabulary_files(self.mergeable_ranks, self.special_tokens):
            return names + self.save_vocabulary(os.fspath(save_directory), filename_prefix)
        return names
