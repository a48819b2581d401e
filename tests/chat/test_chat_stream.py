"""`chat_stream`: it ends in the text of `chat`, never shows half a character, and leaves no thread behind."""

import gc
import random
import sys
import threading
import time

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, TextStreamer

from qwen1 import streaming_qwen
from qwen1.qwen_generation_utils import find_end
from qwen1.streaming_qwen import stream_text, stream_tokens

EOD, IM_START, IM_END = 256, 257, 258
FAMILY = "👨‍👩‍👧"


class Slow(LogitsProcessor):
    """Takes its time for each step, counts them, and reports the first one to whoever waits."""

    def __init__(self, seconds=0.002):
        self.seconds = seconds
        self.steps = 0

    def __call__(self, input_ids, scores):
        self.steps += 1
        time.sleep(self.seconds)
        return scores


class Failing(LogitsProcessor):
    """Raises at the third token."""

    def __init__(self):
        self.steps = 0

    def __call__(self, input_ids, scores):
        self.steps += 1
        if self.steps == 3:
            raise ZeroDivisionError("third token")
        return scores


@pytest.fixture
def endless(chat_model, byte_tokenizer):
    """Start a stream of 3000 visible tokens: () -> (stream, its `Slow`)."""

    def start():
        slow = Slow()
        never = {"suppress_tokens": [*range(ord("!")), *range(127, 464)], "max_new_tokens": 3000}
        return chat_model.chat_stream(byte_tokenizer, "q", logits_processor=[slow], **never), slow

    return start


def check_growing(texts):
    """Each text is the beginning of the next, and none is shown twice."""
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "reply",
    [
        "plain text",
        "你好，世界！",
        f"a {FAMILY} b 😀",
        " \n leading and trailing \t\n ",
        "two  spaces\n\nkept",
        "real \ufffd inside",
        "real at the end \ufffd\ufffd",
        "\ufffd",
        b"broken \xe4\xbd",
        b"\xf0\x9f\x98",
        b"\xff\xfe in front",
        b"middle \xe4\xbd and \x80 on",
        "",
        "   ",
        [*b"a", 300, *b"b"],
        [*b"a", 463],
        [*b"yes", IM_START, *b"no"],
        [*b"yes ", EOD],
        [*"你".encode()[:2], IM_END],
    ],
    ids=repr,
)
def test_ends_in_the_text_of_chat(chat_model, byte_tokenizer, forced, reply):
    expected, _ = chat_model.chat(byte_tokenizer, "q", logits_processor=forced(reply))
    texts = list(chat_model.chat_stream(byte_tokenizer, "q", logits_processor=forced(reply)))
    assert texts[-1] == expected
    check_growing(texts)
    assert all(text.count("\ufffd") <= expected.count("\ufffd") for text in texts)


def test_characters_come_whole(chat_model, byte_tokenizer, forced):
    reply = "a你é😀b"
    texts = list(chat_model.chat_stream(byte_tokenizer, "q", logits_processor=forced(reply)))
    assert texts == [reply[:length] for length in range(1, len(reply) + 1)]


def test_reply_cut_by_length(chat_model, byte_tokenizer, forced):
    """The last token is there, also where it holds only half a character."""
    for length, expected in [(2, "ab"), (3, "ab\ufffd"), (5, "ab你")]:
        stream = chat_model.chat_stream(byte_tokenizer, "q", max_new_tokens=length, logits_processor=forced("ab你c"))
        assert list(stream)[-1] == expected


def test_greedy_replies_of_the_model_itself(chat_model, byte_tokenizer):
    for query in ["a", "cafe\u0301", "long " * 20]:
        reply, _ = chat_model.chat(byte_tokenizer, query, [("x", "y")], "s")
        texts = list(chat_model.chat_stream(byte_tokenizer, query, [("x", "y")], "s"))
        assert texts[-1] == reply
        check_growing(texts)


def test_published_calls(chat_model, byte_tokenizer, forced):
    task_history = [["a", "b"]]
    for response in chat_model.chat_stream(byte_tokenizer, "q", history=task_history, logits_processor=forced("yes")):
        assert isinstance(response, str)
    assert response == "yes" and task_history == [["a", "b"]]
    stream = chat_model.chat_stream(byte_tokenizer, "q", None, "s", [[1]], LogitsProcessorList(forced("yes")), None)
    assert list(stream)[-1] == "yes"
    stream = chat_model.chat(byte_tokenizer, "q", None, "s", True, True, logits_processor=forced("yes"))
    assert list(stream)[-1] == "yes"


def test_random_replies_in_random_chunks(byte_tokenizer):
    """Pieces that end in the middle of characters and stop words, with end tokens and broken bytes among them."""
    rng = random.Random(0)
    pieces = [
        list(text.encode()) for text in ("你", "😀", FAMILY, "é", " ", "\n", "a", "Obs", "Observation:", "\ufffd")
    ]
    pieces += [[0xE4], [0xBD], [0xFF], [IM_END], [300]]
    words, ends = [list(b"Observation:"), list(b"serv!"), [*"😀".encode()[1:], ord("a")]], [[IM_END], [EOD]]
    stopped = 0
    for _ in range(300):
        reply = sum(rng.choices(pieces, weights=[5] * 10 + [1] * 5, k=rng.randint(0, 12)), [])
        chunks, rest = [], reply
        while rest:
            size = rng.randint(1, 4)
            chunks.append(rest[:size])
            rest = rest[size:]
        cut, kept = rng.choice([(ends + words, []), (ends, words)])
        end = find_end(reply, cut, kept)
        stopped += end is not None
        texts = list(stream_text((chunk for chunk in chunks), byte_tokenizer, cut, kept))
        assert texts[-1] == byte_tokenizer.decode(reply[:end]).strip()
        check_growing(texts)
    assert 50 < stopped < 250


def test_random_replies_through_the_model(chat_model, byte_tokenizer, forced):
    rng = random.Random(1)
    for _ in range(10):
        reply = rng.choices([*"你😀 a".encode(), 0xFF, IM_END], k=8)
        expected, _ = chat_model.chat(byte_tokenizer, "q", logits_processor=forced(reply))
        texts = list(chat_model.chat_stream(byte_tokenizer, "q", logits_processor=forced(reply)))
        assert texts[-1] == expected
        check_growing(texts)


def test_never_started_runs_nothing(endless, stream_threads):
    stream, slow = endless()
    assert stream_threads() == []
    stream.close()
    assert slow.steps == 0 and list(stream) == []


@pytest.mark.parametrize("how", ["close", "delete", "break", "exception"])
def test_ends_at_once(endless, stream_threads, how):
    """Whichever way the consumer leaves, the thread is gone when it has left and no further step is made."""
    stream, slow = endless()
    if how == "break":
        for _ in stream:
            break
        del stream
    elif how == "exception":
        with pytest.raises(KeyboardInterrupt):
            next(stream)
            assert len(stream_threads()) == 1
            stream.throw(KeyboardInterrupt)
    else:
        next(stream)
        assert len(stream_threads()) == 1
        if how == "close":
            stream.close()
        del stream
    assert stream_threads() == []
    steps = slow.steps
    assert 0 < steps < 1500
    time.sleep(0.02)
    assert slow.steps == steps


def test_collected_by_the_thread_that_generates(chat_model, byte_tokenizer, stream_threads, monkeypatch):
    """A stream in a reference cycle may be collected there, where it can't wait for itself."""
    collect, unraisable = threading.Event(), []

    class Collecting(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if collect.is_set():
                gc.collect()
            time.sleep(0.002)
            return scores

    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    arguments = {"logits_processor": [Collecting()], "min_new_tokens": 1900, "max_new_tokens": 2000}
    cycle = [chat_model.chat_stream(byte_tokenizer, "q", **arguments)]
    next(cycle[0])
    (thread,) = stream_threads()
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        collect.set()
        thread.join(timeout=60)  # a collection of all that other tests have left may take seconds
    finally:
        gc.enable()
    assert not thread.is_alive() and unraisable == []


def test_thread_is_gone_before_the_last_text(chat_model, byte_tokenizer, forced, stream_threads):
    stream = chat_model.chat_stream(byte_tokenizer, "q", logits_processor=forced(b"ab\xe4"))
    assert [next(stream) for _ in range(3)] == ["a", "ab", "ab\ufffd"]
    assert stream_threads() == []
    stream.close()


@pytest.mark.parametrize("ended", ["by its reader", "by a stop word"])
def test_source_of_the_tokens_is_closed(byte_tokenizer, ended):
    """At once, not when nobody refers to it any more."""
    closed = []

    def tokens():
        try:
            yield from ([ord("a")], [EOD], [ord("b")])
        finally:
            closed.append(True)

    source = tokens()
    stream = stream_text(source, byte_tokenizer, [[EOD]])
    assert next(stream) == "a" and not closed
    if ended == "by its reader":
        stream.close()
    else:
        assert list(stream) == []
    assert closed == [True]


def test_failure_reaches_the_consumer(chat_model, byte_tokenizer, stream_threads):
    stream = chat_model.chat_stream(byte_tokenizer, "q", logits_processor=[Failing()])
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert stream_threads() == []


WRONG = [  # and the words of the error that names it
    ({"num_beams": 2}, "num_beams=2 can't be streamed"),
    ({"streamer": TextStreamer}, "leave out streamer"),
    ({"max_new_token": 3}, "max_new_token"),
    ({"max_new_token": 3, "stop_strings": ["x"]}, "max_new_token"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"temperature": -1.0, "do_sample": True}, "temperature"),
    ({"top_p": -1.0, "do_sample": True}, "top_p"),
    ({"seed": "x", "do_sample": True}, "seed='x'"),
    ({"repetition_penalty": -1.0}, "penalty"),
    ({"cache_implementation": "none"}, "cache_implementation"),
    ({"cache_config": {"backend": "qwen_int8"}}, "cache_config"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_what_cannot_be_streamed_is_said_by_the_call(chat_model, byte_tokenizer, arguments, words):
    with pytest.raises(ValueError, match=words):
        chat_model.chat_stream(byte_tokenizer, "q", **arguments)


def test_a_prompt_without_room_for_a_reply_is_said_by_the_call(chat_model, byte_tokenizer):
    chat_model.generation_config.max_new_tokens = None
    with pytest.raises(ValueError, match="`max_length` is set to 20"):
        chat_model.chat_stream(byte_tokenizer, "q" * 50, max_length=20)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_the_call_itself_reads_nothing_and_draws_nothing(chat_model, byte_tokenizer, settings):
    class Asked(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise AssertionError("nothing has been written")

    settings = {"do_sample": True, "stopping_criteria": [Asked()], "logits_processor": [Failing()], **settings}
    hook = chat_model.transformer.h[0].register_forward_hook(lambda *args: pytest.fail("read"))
    state = torch.random.get_rng_state()
    chat_model.chat_stream(byte_tokenizer, "q", **settings)
    hook.remove()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_streamer_is_no_streamer(chat_model, byte_tokenizer):
    settings = dict(max_new_tokens=4, do_sample=False)
    streamed = list(chat_model.chat_stream(byte_tokenizer, "q", streamer=None, **settings))
    assert streamed[-1] == chat_model.chat(byte_tokenizer, "q", **settings)[0]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_autocast_holds_in_a_stream(chat_model, byte_tokenizer, enabled):
    dtypes = []
    hook = chat_model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    settings = dict(max_new_tokens=6, do_sample=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        text = chat_model.chat(byte_tokenizer, "q", **settings)[0]
        streamed = list(chat_model.chat_stream(byte_tokenizer, "q", **settings))
    hook.remove()
    assert set(dtypes) == {torch.bfloat16 if enabled else torch.float32}
    assert streamed[-1] == text


def test_the_exit_of_the_interpreter_ends_streams(endless, stream_threads, monkeypatch):
    """Before it can't stop them; whoever reads one doesn't take it for a whole reply."""
    monkeypatch.setattr(streaming_qwen._process, "ends", False)
    streams = [endless() for _ in range(2)]
    for stream, _ in streams:
        next(stream)
    streaming_qwen._end_streams()
    steps = [slow.steps for _, slow in streams]
    for stream, _ in streams:
        with pytest.raises(SystemExit, match="The interpreter ends, and this stream with it"):
            list(stream)
    late, slow = endless()
    with pytest.raises(SystemExit):
        next(late)
    assert slow.steps == 0 and [slow.steps for _, slow in streams] == steps and stream_threads() == []


def test_generation_that_never_reports_its_end():
    """A custom `generate` may forget its streamer; the reader must not wait for ever."""
    assert list(stream_tokens(lambda streamer, stopping_criteria: None)) == []


def test_interleaved_streams_never_see_each_other(chat_model, byte_tokenizer):
    """Prompts of different NTK factors, one step of each in turn, greedy and seeded."""
    conversations = [("short", {}), ("long " * 30, {}), ("long " * 60, {"do_sample": True, "seed": 1})]
    alone = [chat_model.chat(byte_tokenizer, query, **arguments)[0] for query, arguments in conversations]
    streams = [chat_model.chat_stream(byte_tokenizer, query, **arguments) for query, arguments in conversations]
    last = [None] * len(streams)
    running = set(range(len(streams)))
    while running:
        for index in sorted(running):
            text = next(streams[index], None)
            if text is None:
                running.remove(index)
            else:
                last[index] = text
    assert last == alone


def test_threads_never_see_each_other(chat_model, byte_tokenizer):
    conversations = [("long " * length, {"do_sample": bool(length % 2), "seed": length}) for length in (1, 20, 41, 60)]
    alone = [chat_model.chat(byte_tokenizer, query, **arguments)[0] for query, arguments in conversations]
    barrier = threading.Barrier(len(conversations))
    replies = {}

    def answer(index):
        query, arguments = conversations[index]
        barrier.wait()
        replies[index] = chat_model.chat(byte_tokenizer, query, **arguments)[0]

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(len(conversations))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [replies[index] for index in range(len(conversations))] == alone
