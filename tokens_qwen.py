"""Tokens, their ids and their names: what both tokenizers know of the vocabulary once it is there."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from .backends_qwen import byte_level_name
from .pieces_qwen import repair_surrogates
from .properties_qwen import kept
from .vocabulary_qwen import ENDOFTEXT, EXTRAS, IMEND, IMSTART

ID_SUFFIX = re.compile(r"_ids?\Z")  # `pad_token_id` is the id of `pad_token`


class TokensMixin(PreTrainedTokenizerBase):
    """Special tokens by name and id, and tokens of the vocabulary that are named as `pad_token` and the like.

    Subclasses set `mergeable_ranks` and `special_tokens` before they call `PreTrainedTokenizerBase.__init__`.
    """

    mergeable_ranks: Any  # dict[bytes, int]: token bytes -> id, extra vocabulary included
    special_tokens: dict[str, int]

    def _id_of(self, name: str) -> int | None:
        """Id of a special token, or of the token with this `byte_level_name`; None if there is none."""
        raise NotImplementedError

    def _token_of(self, index: int) -> str | bytes | None:
        """The token with this id, as this class has it; None if there is none."""
        raise NotImplementedError

    @property
    def eod_id(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.special_tokens[ENDOFTEXT]

    @property
    def im_start_id(self) -> int:
        """Id of `<|im_start|>`."""
        return self.special_tokens[IMSTART]

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`."""
        return self.special_tokens[IMEND]

    @kept
    def _n_vocab(self) -> int:
        return max(*self.mergeable_ranks.values(), *self.special_tokens.values()) + 1

    @property
    def vocab_size(self) -> int:
        """Largest id plus one: special tokens and extra vocabulary included."""
        return self._n_vocab

    def __len__(self) -> int:
        return self._n_vocab

    @property
    def all_special_tokens(self) -> list[str]:
        """`eos_token` and the like, then all special tokens of this model by id."""
        return list(dict.fromkeys([*super().all_special_tokens, *self.special_tokens]))

    @kept
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @kept
    def _token_bytes(self) -> dict[int, bytes]:
        """Id -> bytes that the token stands for; special tokens stand for their text."""
        ordinary = {i: token for token, i in self.mergeable_ranks.items()}
        return ordinary | {i: token.encode() for token, i in self.special_tokens.items()}

    def _named(self, token: Any) -> str | AddedToken:
        """A token as a value of `pad_token` and the like: a special token as it is, else its `byte_level_name`.

        That is what both classes save and read. A token of the vocabulary stays ordinary: no text is cut at it, and
        decoding leaves none out.

        Args:
            token: a special token, or a token of the vocabulary by its `byte_level_name`, text or bytes.

        Raises:
            ValueError: the vocabulary has no such token, or it is of another type.
        """
        if not isinstance(token, (str, bytes, AddedToken)):
            raise ValueError(f"A token is a str, bytes or AddedToken, got {token!r}; assign an id to `..._token_id`")
        if isinstance(token, bytes):
            names = [byte_level_name(token)]
        else:
            text = repair_surrogates(str(token))
            names = [text, byte_level_name(text.encode())]
        name = next((name for name in names if self._id_of(name) is not None), None)
        if name is None:
            raise ValueError(
                f"Token {token if isinstance(token, bytes) else str(token)!r} cannot be added: it is not in the "
                f"vocabulary. Use a token that is, or one of the {len(EXTRAS)} spare control tokens ({EXTRAS[0]} ... "
                f"{EXTRAS[-1]}), or learn new words with qwen1-extend-vocabulary and load the result with "
                "`extra_vocab_file`."
            )
        return token if isinstance(token, AddedToken) and name in self.special_tokens else name

    def _name_of_id(self, index: Any) -> str | AddedToken:
        """`_named` of the token with this id.

        Raises:
            ValueError: no token has this id.
        """
        token = self._token_of(operator.index(index))
        if token is None:
            raise ValueError(f"No token has the id {index}; ids go from 0 to {len(self) - 1}")
        return self._named(token)

    def _add_tokens(self, new_tokens: Iterable[str | AddedToken], special_tokens: bool = False) -> int:
        """Accept tokens of the vocabulary (so 0 are added) and refuse all others.

        Raises:
            ValueError: a token is not in the vocabulary.
        """
        for token in new_tokens:
            if str(token):
                self._named(token)
        return 0

    def __setattr__(self, key: str, value: Any) -> None:
        # Checked before anything changes: a name without an id would be saved, and pad with None.
        attribute = ID_SUFFIX.sub("", key)
        to_name = self._named if key == attribute else self._name_of_id
        if attribute in self.SPECIAL_TOKENS_ATTRIBUTES and value is not None:
            key, value = attribute, to_name(value)
        elif attribute == "extra_special_tokens" and isinstance(value, (list, tuple)):
            key, value = attribute, [to_name(item) for item in value]
        super().__setattr__(key, value)


class SortedBytes(bytes):
    """Bytes that come before any str: transformers sorts the vocabulary for its stop strings (5.24)."""

    __slots__ = ()

    def __lt__(self, other: Any) -> bool:
        return True if isinstance(other, str) else super().__lt__(other)

    def __gt__(self, other: Any) -> bool:
        return False if isinstance(other, str) else super().__gt__(other)
