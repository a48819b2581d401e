"""Stop words: token sequences that end a reply, in `chat`, in streams and in plain `generate`."""

import re

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from qwen1 import Tool, ToolCall, make_context
from qwen1.cache_qwen import new_cache
from qwen1.qwen_generation_utils import StopWordsCriteria, check_stop_words

EOD, IM_START, IM_END = 256, 257, 258
STOP = list(b"Observation:")


REPLIES = [  # the reply that the model would write, stop words, what chat gives as published, and without stop words
    ("Thought Observation: seen", [STOP], "Thought Observation:", "Thought"),
    ("Obs, Observe, Observation: seen", [STOP], "Obs, Observe, Observation:", "Obs, Observe,"),  # begun twice before
    ("Observation: seen", [STOP], "Observation:", ""),
    ("Observatio", [STOP], "Observatio", "Observatio"),
    ("ObObservation: seen", [STOP], "ObObservation:", "Ob"),
    ("ab Observation: c", [list(b"Observation"), STOP, list(b"Observation:\n")], "ab Observation", "ab"),
    ("ab\n\n cd", [list(b"\n\n")], "ab", "ab"),  # space around a reply is no part of it
    ("ab cd ef", [list(b"ef"), list(b"cd")], "ab cd", "ab"),
    ("abc", [list(b"abc"), list(b"b")], "ab", "a"),
    ("a😀b", [list("😀".encode()[1:])], "a😀", "a\ufffd"),
    ("a b c", [[ord("b")]], "a b", "a"),
    ("a b c", [[300]], "a b c", "a b c"),
    ("a b c", [], "a b c", "a b c"),
    ("a b c", None, "a b c", "a b c"),
    ("a b c", torch.tensor([list(b"c"), list(b"b")]), "a b", "a"),
    ([*b"a b", IM_END, *b"c"], [[ord("b"), IM_END]], "a b", "a"),  # control tokens never stay
    ([*b"ab", EOD], [[EOD], [IM_END]], "ab", "ab"),
    ([*b"ab", 300, *b"c"], [[300]], "ab<|extra_41|>", "ab"),
]


@pytest.mark.parametrize("keep", [None, True, False], ids=["default", "kept", "left out"])
@pytest.mark.parametrize(("reply", "stops", "published", "without"), REPLIES)
def test_every_door_ends_alike(chat_model, byte_tokenizer, forced, reply, stops, published, without, keep):
    arguments = {"stop_words_ids": stops, "max_new_tokens": 40}
    if keep is not None:
        arguments["keep_stop_words"] = keep
    expected = without if keep is False else published
    processors, again = forced(reply), forced(reply)
    text, history = chat_model.chat(byte_tokenizer, "q", logits_processor=processors, **arguments)
    assert text == expected and history == [("q", expected)]
    texts = list(chat_model.chat_stream(byte_tokenizer, "q", logits_processor=again, **arguments))
    assert texts[-1] == expected
    assert all(expected.startswith(text) for text in texts)
    assert again[0].steps == processors[0].steps
    texts, histories = chat_model.batch_chat(
        byte_tokenizer, ["q", "r"], logits_processor=forced("a longer one", reply), **arguments
    )
    assert texts[1] == expected and histories[1] == [("r", expected)]
    stream = chat_model.chat(byte_tokenizer, "q", stream=True, logits_processor=forced(reply), **arguments)
    assert list(stream)[-1] == expected


@pytest.mark.parametrize("keep", [True, False])
def test_the_next_turn_reads_the_reply_as_it_is(chat_model, byte_tokenizer, forced, keep):
    """With keys and values kept or not."""
    arguments = {"stop_words_ids": [STOP], "keep_stop_words": keep}
    said = forced("Thought: x\nObservation: seen")
    reply, history = chat_model.chat(byte_tokenizer, "q", logits_processor=said, **arguments)
    for reuse in (True, False):
        processors = forced("ok")
        chat_model.chat(byte_tokenizer, "r", history, "s", reuse_cache=reuse, logits_processor=processors)
        assert processors[0].prompts == [make_context(byte_tokenizer, "r", [("q", reply)], "s")[1]]
    texts = [chat_model.chat(byte_tokenizer, "r", history, reuse_cache=reuse)[0] for reuse in (True, False)]
    assert texts[0] == texts[1] and reply.endswith("Observation:") is keep


@pytest.mark.parametrize("keep", [True, False])
def test_with_tools_no_stop_word_stays(chat_model, byte_tokenizer, forced, keep):
    tools = [Tool("look", function=lambda: "x")]
    reply = "Thought: t\nAction: look\nAction Input: {} STOP Observation: y"
    arguments = {"tools": tools, "stop_words_ids": [list(b"STOP")], "keep_stop_words": keep, "max_new_tokens": 80}
    said, _ = chat_model.chat(byte_tokenizer, "q", logits_processor=forced(reply), **arguments)
    *_, last = chat_model.chat_stream(byte_tokenizer, "q", logits_processor=forced(reply), **arguments)
    assert said == last == "Thought: t\nAction: look\nAction Input: {}"
    assert said.call == last.call == ToolCall("look", {})


def test_generation_ends_with_the_stop_word(chat_model, byte_tokenizer, forced):
    processors = forced("ab STOP cd")
    chat_model.chat(byte_tokenizer, "q", stop_words_ids=[list(b"STOP")], logits_processor=processors)
    assert processors[0].steps == len("ab STOP")


@pytest.mark.parametrize("stream", [False, True])
def test_stop_words_in_the_prompt_stop_nothing(chat_model, byte_tokenizer, forced, stream):
    """Not even one that the reply would complete."""
    history = [("Observation:", "Observation:")]
    arguments = {"stop_words_ids": [STOP, [ord("\n"), ord("x")]], "logits_processor": forced("x Observation")}
    result = chat_model.chat(byte_tokenizer, "Observation:", history, stream=stream, **arguments)
    assert (list(result)[-1] if stream else result[0]) == "x Observation"


@pytest.mark.parametrize("fresh", [False, True], ids=["own configuration", "fresh configuration"])
def test_stop_words_of_the_configuration(chat_model, byte_tokenizer, forced, fresh):
    """They are in force where the caller's configuration says nothing about them."""
    chat_model.generation_config.stop_words_ids = [list(b"END")]
    config = type(chat_model.generation_config)(max_new_tokens=20) if fresh else None
    for given in (None, [list(b"STOP")]):
        processors = forced("ab END cd STOP ef")
        arguments = {"stop_words_ids": given, "generation_config": config, "logits_processor": processors}
        assert chat_model.chat(byte_tokenizer, "q", **arguments)[0] == "ab END"
        assert processors[0].steps == len("ab END")


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_of_transformers(chat_model, either_tokenizer, forced, stream):
    """They need a tokenizer, and stay in the reply."""
    arguments = {"stop_strings": ["STOP"], "logits_processor": forced("ab STOP cd")}
    result = chat_model.chat(either_tokenizer, "q", stream=stream, **arguments)
    assert (list(result)[-1] if stream else result[0]) == "ab STOP"


@pytest.fixture
def written(chat_model):
    """Tokens that `generate` writes after a prompt: (prompts as bytes, **arguments) -> list of lists."""

    def write(*prompts, **arguments):
        inputs = torch.tensor([list(prompt) for prompt in prompts])
        return chat_model.generate(inputs, **arguments)[:, inputs.shape[1] :].tolist()

    return write


@pytest.mark.parametrize("configured", [None, [[300]], "absent"])
def test_generate_with_any_configuration(chat_model, written, forced, configured):
    """A published configuration has the key, and transformers alone would then ignore the argument."""
    if configured == "absent":
        del chat_model.generation_config.stop_words_ids
    else:
        chat_model.generation_config.stop_words_ids = configured
    arguments = {"stop_words_ids": [list(b"STOP")], "logits_processor": forced("ab STOP cd")}
    assert written(b"the prompt with STOP", **arguments) == [list(b"ab STOP")]


def test_generate_takes_them_from_the_configuration(chat_model, written, forced):
    chat_model.generation_config.stop_words_ids = [list(b"STOP")]
    assert written(b"prompt", logits_processor=forced("ab STOP cd")) == [list(b"ab STOP")]
    assert written(b"prompt", stop_words_ids=None, logits_processor=forced("ab STOP")) == [[*b"ab STOP", IM_END]]


def test_rows_of_generate_end_independently(written, forced):
    replies = forced("a STOP b c", "d", "e STOX STOP f")
    rows = written(b"same STOP", b"long STOP", b"word STOP", stop_words_ids=[list(b"STOP")], logits_processor=replies)
    padding = [[EOD] * count for count in (5, 9, 0)]
    assert rows == [[*b"a STOP", *padding[0]], [*b"d", IM_END, *padding[1]], list(b"e STOX STOP")]


def test_prompt_lookup_stops_within_an_accepted_draft(written, forced):
    """The whole reply stands in the prompt, so the first step already accepts several tokens at once."""
    prompt = b"abc STOP defghi, again: abc"
    arguments = {"stop_words_ids": [list(b"STOP")], "prompt_lookup_num_tokens": 8, "max_new_tokens": 16}
    (tokens,) = written(prompt, logits_processor=forced(" STOP defghi, again: abc"), **arguments)
    assert tokens[:5] == list(b" STOP") and len(tokens) <= 9


def test_chat_with_prompt_lookup(chat_model, byte_tokenizer, forced):
    """Many tokens at once end a reply where single ones would."""
    query, reply = "abc one STOP two, abc", "abc one STOP two, abc"
    for stops in ([list(b"STOP")], [list(b"c one STOP t"), list(b"STOP")]):
        arguments = {"stop_words_ids": stops, "prompt_lookup_num_tokens": 10, "max_new_tokens": 20}
        for keep, expected in [(True, "abc one STOP"), (False, "abc one")]:
            arguments["keep_stop_words"] = keep
            assert chat_model.chat(byte_tokenizer, query, logits_processor=forced(reply), **arguments)[0] == expected
            stream = chat_model.chat_stream(byte_tokenizer, query, logits_processor=forced(reply), **arguments)
            assert list(stream)[-1] == expected


def test_assistant_model_stops(chat_model, written, forced):
    reply = "ab STOP cd"
    arguments = {"stop_words_ids": [list(b"STOP")], "assistant_model": chat_model, "max_new_tokens": 12}
    (tokens,) = written(b"prompt", logits_processor=forced(reply), **arguments)
    assert bytes(tokens) == b"ab STOP", "what was drafted behind the stop word is no part of the text"


@pytest.mark.parametrize(
    "drafts", [{"prompt_lookup_num_tokens": 8}, {"assistant_model": True}], ids=["lookup", "model"]
)
def test_all_that_is_returned_ends_with_the_stop_word(chat_model, forced, drafts):
    """As without drafts: scores that go on behind it would be read as those of other tokens."""
    chat_model.set_attn_implementation("eager")
    prompt, reply = torch.tensor([list(b"abc one STOP two, again: abc one")]), "abc one STOP two"
    names = ("scores", "logits", "hidden_states", "attentions")
    asked = {f"output_{name}": True for name in names}
    arguments = {"return_dict_in_generate": True, "stop_words_ids": [list(b"STOP")], "use_cache": True, **asked}
    expected = chat_model.generate(prompt, logits_processor=forced(reply), **arguments)
    drafts = {"assistant_model": chat_model} if "assistant_model" in drafts else drafts
    output = chat_model.generate(prompt, logits_processor=forced(reply), **arguments, **drafts)
    assert torch.equal(output.sequences, expected.sequences) and output.keys() == expected.keys()
    assert output.cache.get_seq_length() == expected.cache.get_seq_length()
    assert [len(output[name]) for name in names] == [len(expected[name]) for name in names]
    # For drafts of the first step, here the assistant's, transformers returns states of the prompt's first tokens.
    for name in names[:2] if "assistant_model" in drafts else names:
        torch.testing.assert_close(output[name], expected[name])
    gains = [chat_model.compute_transition_scores(one.sequences, one.logits) for one in (output, expected)]
    torch.testing.assert_close(*gains)


def test_a_cache_that_was_given_ends_with_the_stop_word(chat_model, written, forced):
    """It can be continued with the sequences, whatever form they are returned in."""
    cache = new_cache(chat_model.transformer)
    arguments = {"stop_words_ids": [list(b"STOP")], "past_key_values": cache, "prompt_lookup_num_tokens": 8}
    prompt = b"abc one STOP two, again: "
    (tokens,) = written(prompt, logits_processor=forced("abc one STOP two"), **arguments)
    assert bytes(tokens) == b"abc one STOP" and cache.get_seq_length() == len(prompt) + len(tokens) - 1


def test_beams_stop(written, forced):
    (tokens,) = written(b"prompt", num_beams=2, stop_words_ids=[[ord("x")]], logits_processor=forced("abx", "abx"))
    assert tokens[:3] == list(b"abx") and len(tokens) == 3


def test_criteria_looks_at_what_was_written_only():
    criteria = StopWordsCriteria([[1, 2], [3]], prompt_length=2)
    rows = torch.tensor([[1, 2, 0, 0, 0], [3, 1, 2, 0, 0], [0, 0, 1, 2, 0], [0, 0, 0, 0, 3]])
    assert criteria(rows, None).tolist() == [False, False, True, True]
    assert criteria(rows[:, :2], None).tolist() == [False] * 4


def test_check_stop_words_copies():
    given = [[1], (2, 3), torch.tensor([4, 5])]
    checked = check_stop_words(given)
    assert checked == [[1], [2, 3], [4, 5]] and checked[0] is not given[0]
    assert check_stop_words(None) == check_stop_words([]) == []


@pytest.mark.parametrize(
    ("words", "entry"),
    [("ab", "'ab'"), (5, "5"), ([[]], r"\[\]"), ([["a"]], r"\['a'\]"), ([[True]], r"\[True\]"), ([[1.0]], r"\[1.0\]")],
)
def test_bad_stop_words(written, words, entry):
    with pytest.raises(ValueError, match=f"stop_words_ids.*{entry}.*must be a"):
        written(b"prompt", stop_words_ids=words)


@pytest.mark.parametrize(("word", "ids"), [([65, 464], "464"), ([-1, 65, 10**9], "-1, 1000000000")])
def test_stop_words_that_can_never_be_written(chat_model, byte_tokenizer, written, word, ids):
    arguments = {"stop_words_ids": [[65], word]}
    message = re.escape(f"stop_words_ids has the entry {word}, but this model writes the ids 0 to 463 and no {ids}: ")
    with pytest.raises(ValueError, match=message):
        written(b"prompt", **arguments)
    with pytest.raises(ValueError, match=message):
        chat_model.chat(byte_tokenizer, "q", **arguments)
    with pytest.raises(ValueError, match=message):
        chat_model.chat_stream(byte_tokenizer, "q", **arguments)


def test_the_configuration_of_a_larger_model_may_name_other_stop_words(chat_model, byte_tokenizer, written, forced):
    chat_model.generation_config.stop_words_ids = [[151643], [ord("b")]]
    assert written(b"prompt", logits_processor=forced("abc")) == [list(b"ab")]
    assert chat_model.chat(byte_tokenizer, "q", logits_processor=forced("abc"))[0] == "ab"


def test_an_assistant_of_fewer_tokens_may_never_write_a_stop_word(tiny_model):
    """It is given those of the model that it helps."""
    fewer = tiny_model("sdpa", vocab_size=300)
    config = GenerationConfig(stop_words_ids=[[301]], is_assistant=True, max_new_tokens=4)
    config.update(return_dict_in_generate=True, output_scores=True, assistant_confidence_threshold=0.0)
    assert fewer.generate(torch.tensor([[65, 66]]), generation_config=config).sequences.shape == (1, 6)


def test_stop_words_of_numpy(written, forced):
    assert written(b"prompt", stop_words_ids=[[np.int64(ord("b"))]], logits_processor=forced("abc")) == [list(b"ab")]
