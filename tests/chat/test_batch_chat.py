"""`batch_chat`: several conversations at once, each answered as it would be alone."""

import pytest
from transformers import GenerationConfig

EOD = 256
CONVERSATIONS = [
    ("short", None, "s"),
    ("long " * 40, [("a", "b")], "a longer system message"),
    ("cafe\u0301 你好", [("x" * 50, "y" * 50), ("c", "d")], ""),
    ("q", [], "s"),
]


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_greedy_replies_are_those_of_chat(chat_model, byte_tokenizer, attn_implementation):
    """Prompts of different lengths and NTK factors, so every row is padded differently."""
    chat_model.set_attn_implementation(attn_implementation)
    alone = [chat_model.chat(byte_tokenizer, *conversation) for conversation in CONVERSATIONS]
    queries, histories, systems = zip(*CONVERSATIONS, strict=True)
    replies, turns = chat_model.batch_chat(byte_tokenizer, queries, histories, systems)
    assert replies == [reply for reply, _ in alone]
    assert turns == [history for _, history in alone]
    assert len(set(replies)) == len(replies)


def test_rows_end_on_their_own(chat_model, byte_tokenizer, forced):
    """By end token, stop word or length; what follows the end of a row is no part of its reply."""
    processors = forced("a", "bcSTOPbc", "defghi", "")
    replies, histories = chat_model.batch_chat(
        byte_tokenizer,
        ["q"] * 4,
        stop_words_ids=[list(b"STOP")],
        max_new_tokens=6,
        keep_stop_words=False,
        logits_processor=processors,
    )
    assert replies == ["a", "bc", "defghi", ""]
    assert histories == [[("q", reply)] for reply in replies]
    assert processors[0].steps == 6


@pytest.mark.parametrize("eos", [None, EOD])
def test_configuration_without_pad_token(chat_model, byte_tokenizer, forced, transformers_log, eos):
    chat_model.generation_config.update(eos_token_id=eos, pad_token_id=None)
    replies, _ = chat_model.batch_chat(byte_tokenizer, ["q", "longer"], logits_processor=forced("a", "bcd"))
    assert replies == ["a", "bcd"]
    assert transformers_log.messages == []


def test_arguments_are_those_of_chat(chat_model, byte_tokenizer, forced):
    histories = [[["a", "b"]], (turn for turn in [("c", "d")])]
    config = GenerationConfig(max_new_tokens=3)
    replies, turns = chat_model.batch_chat(
        byte_tokenizer,
        (query for query in ["q", "r"]),
        (history for history in histories),
        generation_config=config,
        append_history=False,
        logits_processor=forced("abcd", "ef"),
    )
    assert (replies, turns) == (["abc", "ef"], [[("a", "b")], [("c", "d")]])
    assert histories[0] == [["a", "b"]] and config.max_new_tokens == 3


def test_first_row_is_sampled_as_alone(chat_model, byte_tokenizer):
    alone, _ = chat_model.chat(byte_tokenizer, "q", do_sample=True, seed=5)
    replies, _ = chat_model.batch_chat(byte_tokenizer, ["q", "long " * 30, "q"], do_sample=True, seed=5)
    assert replies[0] == alone != replies[2]


def test_single_and_no_conversation(chat_model, byte_tokenizer):
    assert chat_model.batch_chat(byte_tokenizer, []) == ([], [])
    reply, history = chat_model.chat(byte_tokenizer, "q")
    assert chat_model.batch_chat(byte_tokenizer, ["q"]) == ([reply], [history])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": "q"}, "queries='q' must be a list of texts; for a single one use chat"),
        ({"queries": ["q", "r"], "histories": [None]}, "histories has 1 entries for 2 queries: give one for each"),
        ({"queries": ["q", "r"], "system": ["s"]}, "system has 1 entries for 2 queries: give one for each"),
        ({"queries": None}, "queries=None must be a list of texts; for a single one use chat"),
        ({"queries": ["q", None]}, r"queries\[1\]=None must be a text"),
        ({"queries": ["q"], "system": None}, "system=None must be a text, or a list of texts, one for each query"),
        ({"queries": ["q", "r"], "system": ["s", 5]}, r"system\[1\]=5 must be a text"),
        ({"queries": ["q"], "histories": 5}, "histories=5 must be None or a list of histories, one for each query"),
        ({"queries": ["q", "r"], "histories": [None, 5]}, r"histories\[1\]=5 must be None or a list of pairs"),
        ({"queries": ["q", "r"], "histories": [None, ["ab"]]}, r"histories\[1\]\[0\]='ab' must be a pair"),
        ({"queries": ["q"] * 3, "histories": [None, None, [("a",)]]}, r"histories\[2\]\[0\]=\('a',\) must be a pair"),
        ({"queries": ["q"], "histories": [[("a", "b"), ("c", 5)]]}, r"histories\[0\]\[1\]=\('c', 5\) must be a pair"),
        ({"queries": ["q", "r"], "max_window_size": "90"}, "max_window_size='90' must be a whole number"),
        ({"queries": ["q", "r"], "generation_config": {}}, "generation_config={} must be a GenerationConfig or None"),
    ],
)
def test_bad_input(chat_model, byte_tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        chat_model.batch_chat(byte_tokenizer, **arguments)


def test_base_model_refuses(chat_model, byte_tokenizer):
    chat_model.generation_config.chat_format = "raw"
    with pytest.raises(ValueError, match="chat_format='raw'"):
        chat_model.batch_chat(byte_tokenizer, ["q"])


def test_what_fills_up_a_row_that_has_ended_is_no_part_of_its_reply(chat_model, byte_tokenizer, forced):
    settings = dict(stop_strings=["STOP"], pad_token_id=33)
    replies, _ = chat_model.batch_chat(
        byte_tokenizer, ["hi", "yo"], logits_processor=forced("abSTOPcd", "abcdefghijkl"), **settings
    )
    alone, _ = chat_model.chat(byte_tokenizer, "hi", logits_processor=forced("abSTOPcd"), **settings)
    assert replies == [alone, "abcdefghijkl"] and alone == "abSTOP"
