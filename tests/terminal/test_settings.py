"""Generation settings of a conversation."""

import pytest

from qwen1.terminal.errors import CommandError
from qwen1.terminal.settings import SETTINGS, Settings


@pytest.fixture
def settings(tiny_chat):
    return Settings(tiny_chat[0], {"max_new_tokens": 8})


def test_effective_values_are_those_of_the_next_reply(settings, tiny_chat):
    values = settings.effective()
    assert list(values) == list(SETTINGS)
    assert values["max_new_tokens"] == 8 and values["max_window_size"] == 448  # given; the checkpoint's
    assert values["do_sample"] is False and values["top_k"] == 50  # the checkpoint's; what generate puts in
    assert values["max_time"] is None
    settings.change({"max_window_size": "300", "repetition_penalty": "1.5"})
    values = settings.effective()
    assert values["max_window_size"] == 300 and values["repetition_penalty"] == 1.5
    assert tiny_chat[0].generation_config.max_window_size == 448


def test_values_have_the_types_of_the_generation_configuration(settings):
    settings.change({"do_sample": "True", "temperature": "1", "top_k": "0", "top_p": "1e-1"})
    assert settings.changed == {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.1}
    assert isinstance(settings.changed["temperature"], float)


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("do_sample", "maybe", "true or false"),
        ("do_sample", "1", "true or false"),
        ("max_new_tokens", "ten", "a whole number"),
        ("max_new_tokens", "1.5", "a whole number"),
        ("max_new_tokens", "0", "greater than 0"),
        ("min_new_tokens", "-1", "negative"),
        ("max_window_size", "-5", "greater than 0"),
        ("max_time", "0", "greater than 0"),
        ("temperature", "hot", "a number"),
        ("temperature", "nan", "a number"),
        ("temperature", "inf", "a number"),
        ("temperature", "0", "do_sample=False"),
        ("top_k", "-3", "strictly positive"),
        ("top_p", "1.5", "top_p"),
        ("min_p", "2", "min_p"),
        ("typical_p", "7", "typical_p"),
        ("epsilon_cutoff", "1", "epsilon_cutoff"),
        ("eta_cutoff", "-1", "eta_cutoff"),
        ("repetition_penalty", "0", "strictly positive"),
        ("no_repeat_ngram_size", "-1", "strictly positive"),
    ],
)
def test_bad_values_are_named_and_change_nothing(settings, name, value, reason):
    others = {"do_sample": "true"} if name != "do_sample" else {}
    with pytest.raises(CommandError, match=f"(?s){name}=.*{reason}"):
        settings.change({**others, name: value})
    assert settings.changed == {"max_new_tokens": 8}


def test_every_setting_is_known_to_generate(tiny_chat):
    config = type(tiny_chat[0].generation_config)()
    assert [name for name in SETTINGS if not hasattr(config, name)] == ["max_window_size"]


def test_what_has_no_effect_is_refused(settings):
    with pytest.raises(CommandError, match="temperature.*do_sample=True"):
        settings.change({"temperature": "0.7"})
    settings.change({"do_sample": "true", "temperature": "0.7"})
    with pytest.raises(CommandError, match="temperature"):
        settings.change({"do_sample": "false"})
    settings.change({"do_sample": "false", "temperature": "none"})
    assert settings.effective()["do_sample"] is False


def test_what_the_checkpoint_has_for_sampling_may_lie_idle(tiny_model):
    model = tiny_model()
    model.generation_config.update(do_sample=True, top_p=0.8)
    settings = Settings(model, {})
    settings.change({"do_sample": "false"})
    assert settings.effective()["top_p"] == 0.8


def test_none_brings_the_checkpoints_value_back(settings):
    settings.change({"max_new_tokens": "none"})
    assert settings.effective()["max_new_tokens"] == 64


def test_reset_undoes_every_change(settings):
    settings.change({"max_new_tokens": "3", "do_sample": "true"})
    settings.reset()
    assert settings.changed == {"max_new_tokens": 8}
    assert settings.effective()["do_sample"] is False


@pytest.mark.parametrize("name, remedy", [("temprature", "'temperature'"), ("num_beams", "top_p"), ("seed", ":seed N")])
def test_unknown_names_have_a_remedy(settings, name, remedy):
    with pytest.raises(CommandError, match=remedy):
        settings.change({name: "1"})


def test_given_values_are_checked_too(tiny_chat):
    with pytest.raises(CommandError, match="max_new_tokens=0"):
        Settings(tiny_chat[0], {"max_new_tokens": 0})


def test_settings_reach_the_reply(conversation):
    import threading

    conversation.settings.change({"max_new_tokens": "2"})
    list(conversation.reply("你好", threading.Event()))
    assert conversation.statistics.tokens == 2
