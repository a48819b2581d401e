"""Whether all texts of a call have ended, which on a GPU is asked about one token later, so that it never has to wait.

After each token `generate` has the processor wait for the GPU to say whether the texts go on, and only then prepare the
next token, for which the GPU waits in turn. Here the answer, and the token for a streamer, are copied while the next
token is already on its way. A text that ends by itself costs one token more, which nobody sees: it is cut off from what
`generate` returns and from the cache. Transformers (5.24) does the same on Apple's devices alone.

Calls in which somebody could notice the token too many are asked at once: with criteria, processors or hooks of the
caller's, in several processes, with beams or drafts, and where more is returned than tokens. `QWEN_NATIVE=0` in the
environment has all calls asked at once.

Shapes: B batch, S tokens of prompt and reply.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .cache_qwen import QWenCache, QWenGrowingLayer
from .fingerprint_qwen import runs_foreign_code
from .qwen_generation_utils import SeededSampling, StopWordsCriteria
from .streaming_qwen import Stopped
from .translating_qwen import SWITCH

DEVICE = "cuda"
"""Type of the devices that are asked late; tests have a CPU asked so."""

_HARMLESS: frozenset[type] = frozenset((MaxLengthCriteria, EosTokenCriteria, StopWordsCriteria, Stopped))
"""Criteria that don't mind being asked about a text that has ended, nor wait for the GPU."""

_ELSEWHERE = (
    *("return_dict_in_generate", "prompt_lookup_num_tokens", "assistant_early_exit"),
    *("custom_generate", "penalty_alpha", "dola_layers", "token_healing"),
)
"""Settings under which another loop writes, or more is returned than tokens."""

_CALLERS = ("prefix_allowed_tokens_fn", "synced_gpus", "assistant_model")
"""Arguments of `generate` that see each token, or have it written elsewhere."""


class Late(StoppingCriteria):
    """Stands among the criteria of a call that is to be asked late, keeps what that takes, and ends no text itself.

    While a call takes it is a context, which gives the streamer what is still held back where the call fails.

    Args:
        prompts: (B, T), for the streamer.
        streamer: gets each token one step later, or None.

    Attributes:
        overran: whether a token too many has been written.
    """

    def __init__(self, prompts: torch.Tensor, streamer: BaseStreamer | None = None):
        self.streamer = streamer
        self.overran = False
        self._prompts: torch.Tensor | None = prompts
        self._length = 0
        self._answer: tuple[int, bool] | None = None
        self._before: _Copy | None = None
        self._token: _Copy | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, S) -> (B,), always false."""
        self.see(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def __enter__(self) -> None:
        """Nothing to do before the call."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            with suppress(RuntimeError):  # of a GPU that gives no answer any more
                self._stream()

    def begin(self) -> None:
        """Give the streamer the prompts, once."""
        prompts, self._prompts = self._prompts, None
        if self.streamer is not None and prompts is not None:
            self.streamer.put(prompts.cpu())

    def see(self, input_ids: torch.Tensor) -> None:
        """Note that each row has one more token, (B, S)."""
        self.begin()
        self._stream()
        self._length = input_ids.shape[1]
        if self.streamer is not None:
            self._token = _Copy(input_ids[:, -1])

    def ended(self, flag: torch.Tensor, most: int | None) -> bool:
        """Whether all rows had ended a token ago, or have their greatest length.

        Args:
            flag: () bool, whether they have ended now, on its way.
            most: tokens that end a text in any case.
        """
        if self._answer is None or self._answer[0] != self._length:  # asked twice, it says the same twice
            full = most is not None and self._length >= most
            before, self._before = self._before, None if full else _Copy(flag)
            self.overran = before is not None and bool(before.read())
            self._answer = self._length, full or self.overran
        return self._answer[1]

    def finish(self, sequences: torch.Tensor, cache: Any) -> torch.Tensor:
        """What `generate` returns, (B, S), without a token too many, which the cache forgets too."""
        if self.overran:
            sequences = sequences[:, :-1]
            for layer in () if cache is None else cache.layers:
                layer.forget_last()
        else:
            self._stream()
        if self.streamer is not None:
            self.streamer.end()
        return sequences

    def _stream(self) -> None:
        if self._token is not None and self.streamer is not None:
            self.streamer.put(self._token.read())
        self._token = None


class _Copy:
    """What a tensor of a GPU holds at this point of its work, on the processor once that is done."""

    def __init__(self, tensor: torch.Tensor):
        self._event = torch.cuda.Event() if tensor.device.type == "cuda" else None
        pinned = self._event is not None
        self._held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        self._held.copy_(tensor, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> torch.Tensor:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._held


class _LateList(StoppingCriteriaList):
    """Criteria of a call whose answer is asked for late."""

    def __init__(self, criteria: list[StoppingCriteria], late: Late):
        super().__init__(criteria)
        self.late = late

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, S) -> (B,), true for the rows that have ended."""
        self.late.see(input_ids)
        return _Flags.of(super().__call__(input_ids, scores, **kwargs), "done", self)


class _Flags(torch.Tensor):
    """Flags of the rows, and what becomes of them on the way to the question whether all have ended, which alone is
    answered late. Whatever else is done with them gives plain tensors: another loop than the known one would wait.
    """

    stage: str
    asked: _LateList

    _WAY = MappingProxyType(
        {
            ("done", "__invert__"): "going",
            ("done", "bitwise_not"): "going",
            ("going", "__and__"): "going",
            ("going", "max"): "most",
            ("most", "__eq__"): "ended",
            ("most", "eq"): "ended",
        }
    )

    @classmethod
    def of(cls, flags: torch.Tensor, stage: str, asked: _LateList) -> torch.Tensor:
        """These flags at a stage of the way."""
        found = flags.as_subclass(cls)
        found.stage, found.asked = stage, asked
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        known = next((one for one in args if isinstance(one, cls) and hasattr(one, "stage")), None)
        stage = None if known is None else cls._WAY.get((known.stage, func.__name__))
        if stage == "ended" and not (isinstance(args[1], int) and args[1] == 0):
            return result
        if known is None or stage is None or type(result) is not torch.Tensor:
            return result
        return cls.of(result, stage, known.asked)

    def __bool__(self) -> bool:
        if getattr(self, "stage", "") == "ended":
            return self.asked.late.ended(self.as_subclass(torch.Tensor), self.asked.max_length)
        return bool(self.as_subclass(torch.Tensor))


def asked_late(
    model: Any, prompts: torch.Tensor | None, cache: Any, settings: Any, arguments: dict[str, Any]
) -> Late | None:
    """What keeps the answers of a call of `generate` that is asked late; None where it has to wait for each of them.

    Args:
        model: a `QWenLMHeadModel`.
        prompts: token ids, (B, T), or None where only embeddings are given.
        cache: of the call; None where transformers makes one for it.
        settings: `GenerationSettings` of the call.
        arguments: of the call, by name. What is returned stands among its criteria, in the place of its streamer.
    """
    if prompts is None or prompts.device.type != DEVICE or not _forgets(model, cache, settings):
        return None
    if os.environ.get(SWITCH) == "0" or runs_foreign_code(model):
        return None
    criteria, processors = ([*(arguments[name] or ())] for name in ("stopping_criteria", "logits_processor"))
    if not {*map(type, criteria)} <= _HARMLESS or not {*map(type, processors)} <= {SeededSampling}:
        return None
    if any(arguments[name] for name in _CALLERS) or any(settings[name] for name in _ELSEWHERE):
        return None
    if (settings["num_beams"] or 1) > 1:
        return None
    if arguments["streamer"] is not None and (settings["num_return_sequences"] or 1) > 1:
        return None  # which streamers refuse when `generate` shows them the prompts
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    late = Late(prompts, arguments["streamer"])
    arguments |= {"stopping_criteria": StoppingCriteriaList([*criteria, late]), "streamer": None}
    return late


def _forgets(model: Any, cache: Any, settings: Any) -> bool:
    """Whether nobody finds a token too many in the cache of a call: it can be taken back, or ends with the call."""
    if cache is None:
        compiled = settings["compile_config"] is not None
        return settings["cache_implementation"] == "static" and not compiled and model.transformer.takes_static_cache()
    if type(cache) is not QWenCache or cache.offloading:
        return False
    return all(type(layer) is QWenGrowingLayer for layer in cache.layers)


def with_late_answers(criteria: StoppingCriteriaList) -> StoppingCriteriaList:
    """The criteria of a call as `generate` has arranged them, asked late where `Late` is among them and none minds."""
    late = next((one for one in criteria if isinstance(one, Late)), None)
    if late is None:
        return criteria
    late.begin()  # not before: by now `generate` has checked its arguments
    others = [one for one in criteria if one is not late]
    return _LateList(others, late) if {*map(type, others)} <= _HARMLESS else criteria
