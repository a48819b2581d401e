"""Checks of the model: replies that are known, and ways that have to give the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers

from ..cache_qwen import QWenCache, QWenInt8Cache
from .findings import Check, Outcome, State
from .measuring import (
    full_pass,
    generated,
    half_bound,
    in_chunks,
    worst,
)
from .patient import Patient
from .plain_model import plain_alpha, plain_logits

KNOWN_REPLIES = (
    ("你好", "你好！有什么可以帮你？"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("法国的首都是哪里？", "法国的首都是巴黎。"),
    ("3 + 4 = ?", "3+4=7"),
)
"""Greedy replies of qwen-tiny-chat, each to a new conversation.

Source: transformers 5.23.0 with torch 2.13.0 on x86-64, in float32; transformers 5.4.0 and bfloat16 give the same.
"""

QUESTION = "你好"
SHORT, NEW = 24, 6
SHORTENED = 32
"""What the trained length is set to where NTK and LogN are to show in a short text."""
PROMPTS = (28, 40)
"""Tokens of prompts that decoding takes across that length, and that begin beyond it."""
INT8_BOUND = 0.2
"""Error of logits read from the int8 cache relative to their norm: five times what the shipped model shows (0.035). A
lost key makes about 1."""


def model_checks(patient: Patient) -> list[Check]:
    """The checks of a model, in the order in which they are reported."""
    checks = {
        "greedy replies": check_replies,
        "plain arithmetic": check_arithmetic,
        "long texts (NTK, LogN)": check_long_text,
        "cache, token by token": check_token_by_token,
        "cache, in chunks": check_chunks,
        "generate against one pass": check_generate,
        "generate beyond the length": check_generate_long,
        "batch against single": check_batch,
        "stream against chat": check_stream,
    }
    caches = {"static cache": check_static_cache, "int8 cache": check_int8_cache}
    return [
        *(Check("model", name, partial(check, patient)) for name, check in checks.items()),
        *(Check("caches", name, partial(check, patient)) for name, check in caches.items()),
    ]


# --- replies ---


def not_a_chat_model(patient: Patient) -> Outcome | None:
    """What to say of a check that chats with a base model; None for a chat model."""
    if patient.chat_format == "chatml":
        return None
    return Outcome(
        State.ABSENT,
        f"a base model (chat_format={patient.chat_format!r}) continues texts and wasn't taught to chat: examine the "
        "chat model of its family for this",
    )


def check_replies(patient: Patient) -> Outcome:
    """Greedy replies are what they have to be, as far as that is known."""
    return check_known_replies(patient) if patient.is_shipped else check_greedy_reply(patient)


def check_known_replies(patient: Patient) -> Outcome:
    """The replies of the shipped model are those of `KNOWN_REPLIES`."""
    for question, expected in KNOWN_REPLIES:
        reply, _ = patient.model.chat(patient.slow, question, do_sample=False)
        if reply != expected:
            return Outcome(State.FAILED, f"{question!r} is answered by {reply!r}, expected {expected!r}")
    question, expected = KNOWN_REPLIES[0]
    return Outcome(
        State.OK, f"{len(KNOWN_REPLIES)} as expected: {question} – {expected}", {"count": len(KNOWN_REPLIES)}
    )


def check_greedy_reply(patient: Patient) -> Outcome:
    """A model without known replies says the same twice, from finite logits."""
    if patient.chat_format != "chatml":
        return _check_greedy_continuation(patient)
    (reply, _), (again, _) = (
        patient.model.chat(patient.slow, QUESTION, do_sample=False, max_new_tokens=16) for _ in range(2)
    )
    if reply != again:
        return Outcome(State.FAILED, f"{QUESTION!r} is answered by {reply!r}, and then by {again!r}")
    if not bool(full_pass(patient.model, patient.ids(SHORT)).isfinite().all()):
        return Outcome(State.FAILED, f"There are NaN or infinite logits in {patient.model.dtype}: try another dtype.")
    return Outcome(State.OK, f"repeatable; whether it is right is yours to judge: {QUESTION} – {reply}")


def _check_greedy_continuation(patient: Patient) -> Outcome:
    ids = patient.ids(SHORT)
    texts, logits = zip(*(generated(patient.model, ids, NEW) for _ in range(2)), strict=True)
    if not torch.equal(*texts):
        return Outcome(State.FAILED, "the same text is continued in two ways")
    if not bool(logits[0].isfinite().all()):
        return Outcome(State.FAILED, f"There are NaN or infinite logits in {patient.model.dtype}: try another dtype.")
    return Outcome(State.OK, f"repeatable (a base model, which continues texts: chat_format={patient.chat_format!r})")


def check_stream(patient: Patient) -> Outcome:
    """What `chat_stream` shows grows, and ends as what `chat` gives."""
    if (excuse := not_a_chat_model(patient)) is not None:
        return excuse
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}
    reply, _ = patient.model.chat(patient.slow, QUESTION, **settings)
    shown = list(patient.model.chat_stream(patient.slow, QUESTION, **settings))
    if not shown or shown[-1].strip() != reply:
        return Outcome(State.FAILED, f"the stream ends as {shown[-1:]}, chat gives {reply!r}")
    shrunk = [text for text, before in zip(shown[1:], shown, strict=False) if not text.startswith(before)]
    if shrunk:
        return Outcome(State.FAILED, f"the stream takes back what it has shown before {shrunk[0]!r}")
    return Outcome(State.OK, f"the same text, in {len(shown)} pieces", {"pieces": len(shown)})


# --- logits ---


def check_arithmetic(patient: Patient) -> Outcome:
    """One pass of the model gives the logits of plain torch."""
    return _against_plain(patient, patient.ids(48), "48 tokens")


def check_long_text(patient: Patient) -> Outcome:
    """The same for texts beyond the trained length, in two bands of NTK."""
    if not patient.stretches:
        return not_stretched()
    with patient.trained_for(SHORTENED):
        return worst(_against_plain(patient, patient.ids(n), _beyond(n, patient)) for n in (40, 80))


def not_stretched() -> Outcome:
    """What to say of a check of long texts where nothing stretches them."""
    return Outcome(State.ABSENT, "use_dynamic_ntk and use_logn_attn are off in this model")


def _beyond(length: int, patient: Patient) -> str:
    return f"{length} tokens, trained length set to {SHORTENED} ({' and '.join(patient.stretches)})"


def _against_plain(patient: Patient, ids: torch.Tensor, what: str) -> Outcome:
    model = patient.model
    with torch.inference_mode():
        got, expected = model(input_ids=ids, use_cache=False).logits[0].float(), plain_logits(model, ids[0])
    if not patient.is_half:
        return patient.ruler.outcome(got, expected, what)
    return bounded(got, expected, half_bound(model.dtype, model.config.n_layer), what)


def bounded(got: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> Outcome:
    """Compare logits of which one is rounded more coarsely, by the norm of their difference relative to theirs."""
    error = float((got - expected).norm() / expected.norm())
    state = State.OK if error <= bound else State.FAILED  # NaN is no less than anything
    return Outcome(
        state, f"{what}: relative error {error:.2g}, allowed {bound:.2g}", {"largest": error, "tolerance": bound}
    )


def check_token_by_token(patient: Patient) -> Outcome:
    """A text read a token at a time has the logits of one pass; beyond the trained length too."""
    return _read_in_pieces(patient, [1] * SHORT, [1] * NEW)


def check_chunks(patient: Patient) -> Outcome:
    """A text read in pieces has the logits of one pass; beyond the trained length too."""
    return _read_in_pieces(patient, [7, 1, 11, SHORT - 19], [5, 1, 6])


def _read_in_pieces(patient: Patient, short: list[int], behind: list[int]) -> Outcome:
    """Compare a short text, and the pieces that come behind the prompts of `PROMPTS`."""

    def outcomes() -> Iterator[Outcome]:
        yield _cached(patient, short)
        if patient.stretches:
            with patient.trained_for(SHORTENED):
                yield from (_cached(patient, [prompt, *behind]) for prompt in PROMPTS)

    return worst(outcomes())


def _cached(patient: Patient, lengths: list[int]) -> Outcome:
    """Compare a text that is read in pieces with one pass over it, under the alpha of the first piece."""
    ids = patient.ids(sum(lengths))
    got = in_chunks(patient.model, ids, lengths, QWenCache(config=patient.model.config))
    expected = full_pass(patient.model, ids, _alpha(patient, lengths[0]))
    outcome = patient.ruler.outcome(got, expected, f"{ids.shape[1]} tokens in {len(lengths)} calls")
    return _explained(patient, outcome, got[:, -1], ids[:, -lengths[-1] :], "the cache that forward is given")


def _alpha(patient: Patient, prompt: int) -> float:
    config = patient.model.config
    return plain_alpha(prompt, config.seq_length) if config.use_dynamic_ntk else 1.0


def _explained(patient: Patient, outcome: Outcome, got: torch.Tensor, last: torch.Tensor, cache: str) -> Outcome:
    """A failure, with its reason where the last call saw nothing but its own tokens: (1, V) logits, (1, T) ids."""
    if outcome.state is not State.FAILED:
        return outcome
    alone = full_pass(patient.model, last)[:, -1]
    if float((alone - got).abs().max()) > patient.ruler.tolerance:
        return outcome
    seen = "a single token" if last.shape[1] == 1 else "only its own tokens"
    reason = f"each step sees {seen}: {cache} is lost on the way (transformers {transformers.__version__})"
    return Outcome(State.FAILED, f"{reason}; {outcome.detail}", outcome.figures)


def check_generate(patient: Patient) -> Outcome:
    """The steps of `generate` have the logits of one pass over the text that they made."""
    return _steps(patient, patient.ids(SHORT))


def check_generate_long(patient: Patient) -> Outcome:
    """The same for prompts that end shortly before the trained length and beyond it, read at once and in chunks."""
    if not patient.stretches:
        return not_stretched()
    ways: tuple[tuple[int, dict[str, Any]], ...] = (
        *((prompt, {}) for prompt in PROMPTS),
        (PROMPTS[-1], {"prefill_chunk_size": 16}),
    )
    with patient.trained_for(SHORTENED):
        return worst(_steps(patient, patient.ids(prompt), **options) for prompt, options in ways)


def _steps(patient: Patient, ids: torch.Tensor, **options: Any) -> Outcome:
    """Compare the steps of `generate` with one pass, (1, T) ids."""
    prompt = ids.shape[1]
    text, got = generated(patient.model, ids, NEW, **options)
    expected = _expected_steps(patient, text, prompt)[:, : got.shape[1]]
    named = "".join(f", {name}={value}" for name, value in options.items() if name != "disable_compile")
    outcome = patient.ruler.outcome(got, expected, f"prompt of {prompt} and {got.shape[1]} steps{named}")
    read = text[:, : prompt + got.shape[1] - 1]
    return _explained(patient, outcome, got[:, -1], read[:, -1:], "the cache of generate")


def _expected_steps(patient: Patient, text: torch.Tensor, prompt: int) -> torch.Tensor:
    return full_pass(patient.model, text, _alpha(patient, prompt))[:, prompt - 1 : -1]


def check_batch(patient: Patient) -> Outcome:
    """Prompts of different lengths, padded on the left, generate as each does alone; beyond the trained length too."""

    def outcomes() -> Iterator[Outcome]:
        yield from _batched(patient, 9, SHORT)
        if patient.stretches:
            with patient.trained_for(SHORTENED):
                yield from _batched(patient, *PROMPTS)

    return worst(outcomes())


def _batched(patient: Patient, *lengths: int) -> Iterator[Outcome]:
    """Compare each row of a batch with one pass over it alone."""
    longest = max(lengths)
    rows = [patient.ids(length, seed) for seed, length in enumerate(lengths)]
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths]).to(ids.device)
    text, got = generated(patient.model, ids, NEW, mask)
    for row, length in enumerate(lengths):
        expected = _expected_steps(patient, text[row : row + 1, longest - length :], length)[:, : got.shape[1]]
        what = f"row of {length} tokens among {', '.join(map(str, lengths))}"
        yield patient.ruler.outcome(got[row : row + 1], expected, what)


# --- caches ---


def check_static_cache(patient: Patient) -> Outcome:
    """`cache_implementation="static"` gives the logits of one pass."""
    return _steps(patient, patient.ids(SHORT), cache_implementation="static", disable_compile=True)


def check_int8_cache(patient: Patient) -> Outcome:
    """The int8 cache gives them up to its rounding."""
    ids = patient.ids(SHORT)
    got = in_chunks(patient.model, ids, [SHORT - NEW, *[1] * NEW], QWenInt8Cache(patient.model.config))
    return bounded(got, full_pass(patient.model, ids), INT8_BOUND, f"{SHORT} tokens in {NEW + 1} calls")
