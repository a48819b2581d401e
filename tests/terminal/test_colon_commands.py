"""The commands of a conversation."""

import pytest

from qwen1.terminal.colon_commands import COMMANDS, NAMES, Commands, Leave, is_command
from qwen1.terminal.errors import CommandError

PUBLISHED = ("help h exit quit q clear cl clear-history clh history his seed conf reset-conf").split()


@pytest.fixture
def cleared():
    return []


@pytest.fixture
def commands(conversation, cleared):
    conversation.history.append(("你好", "Hello!"))
    return Commands(conversation, clear_screen=lambda: cleared.append(True))


def test_the_commands_of_the_published_demo_are_there():
    assert set(PUBLISHED) <= set(NAMES)
    assert {"config", "config-reset", "reset", "save", "load", "stats"} <= set(NAMES)


@pytest.mark.parametrize("name", ["help", "h"])
def test_help_lists_every_name(commands, name):
    text = commands.run(f":{name}")
    words = text.replace(",", " ").split()
    assert all(f":{name}" in words for name in NAMES)
    assert len(text.splitlines()) == sum(len(command.uses) for command in COMMANDS)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", ["exit", "quit", "q", "EXIT", " q "])
def test_leaving(commands, name):
    with pytest.raises(Leave):
        commands.run(f":{name}")


@pytest.mark.parametrize("name", ["clear", "cl"])
def test_clear_empties_the_screen_alone(commands, cleared, name):
    assert commands.run(f":{name}") == ""
    assert cleared == [True] and len(commands.conversation.history) == 1


@pytest.mark.parametrize("name", ["history", "his"])
def test_history_shows_the_turns(commands, name):
    assert commands.run(f":{name}") == "[1] User: 你好\n[1] Assistant: Hello!"
    commands.conversation.restart()
    assert commands.run(f":{name}") == "Nothing was said yet."


@pytest.mark.parametrize("name", ["clear-history", "clear-his", "clh"])
def test_clear_history_begins_anew(commands, name):
    commands.conversation.history.kept = object()
    assert commands.run(f":{name}") == "Forgot 1 turn."
    assert commands.run(f":{name}") == "Forgot 0 turns."
    assert commands.conversation.history == [] and commands.conversation.history.kept is None


def test_seed_is_shown_and_set(commands):
    assert "No seed" in commands.run(":seed")
    assert commands.run(":seed 42") == commands.run(":seed") == "The seed is 42."
    assert commands.conversation.seed == 42
    with pytest.raises(CommandError, match="whole number.*'x'"):
        commands.run(":seed x")
    assert commands.conversation.seed == 42
    commands.run(":seed none")
    assert commands.conversation.seed is None


@pytest.mark.parametrize("show", ["config", "conf"])
@pytest.mark.parametrize("reset", ["config-reset", "reset-conf", "reset"])
def test_config_shows_changes_and_undoes(commands, show, reset):
    def shown(text):
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()}

    before = shown(commands.run(f":{show}"))
    assert before["do_sample"] == "false" and before["max_new_tokens"] == "64" and before["max_time"] == "none"
    after = shown(commands.run(f":{show} do_sample=true  top_p=0.5 max_new_tokens=7"))
    assert after["do_sample"] == "true  (set here)" and after["top_p"] == "0.5  (set here)"
    assert commands.conversation.settings.changed == {"do_sample": True, "top_p": 0.5, "max_new_tokens": 7}
    commands.run(f":{reset}")
    assert shown(commands.run(f":{show}")) == before


@pytest.mark.parametrize("argument", ["top_p", "top_p 0.5", "top_p = 0.5", "=3", "do_sample=true top_p"])
def test_config_wants_key_and_value(commands, argument):
    with pytest.raises(CommandError, match="key=value"):
        commands.run(f":config {argument}")
    assert commands.conversation.settings.changed == {}


def test_stats(commands):
    assert commands.run(":stats") == "There was no reply yet."
    assert commands.show_statistics is False
    commands.run(":stats on")
    assert commands.show_statistics is True
    commands.run(":stats off")
    assert commands.show_statistics is False
    with pytest.raises(CommandError, match="'often'"):
        commands.run(":stats often")


def test_save_and_load(commands, tmp_path):
    conversation = commands.conversation
    conversation.system = "Be brief."
    path = tmp_path / "my file.json"
    assert str(path) in commands.run(f":save {path}")
    conversation.restart([], "other")
    assert "Loaded 1 turn from" in commands.run(f":load {path}") and "Be brief." in commands.run(f":load {path}")
    assert conversation.history == [("你好", "Hello!")] and conversation.system == "Be brief."


def test_a_refused_file_loses_nothing(commands, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    kept = commands.conversation.history
    for line in (f":save {path}", f":load {path}", f":load {tmp_path}/none.json"):
        with pytest.raises(CommandError):
            commands.run(line)
    assert path.read_text() == "{"
    assert commands.conversation.history is kept and len(kept) == 1
    commands.run(f":save! {path}")
    assert path.read_text() != "{"


def test_files_need_a_name(commands):
    for name in ("save", "save!", "load"):
        with pytest.raises(CommandError, match="Name a file"):
            commands.run(f":{name}")


def test_home_is_resolved(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    commands.run(":save ~/a.json")
    assert (tmp_path / "a.json").is_file()
    with pytest.raises(CommandError, match="no_such_user"):
        commands.run(":save ~no_such_user/a.json")


@pytest.mark.parametrize("line, remedy", [(":hlep", "`:help`"), (":xyzzy", "lists the commands"), (":D", "a blank")])
def test_unknown_commands_name_themselves_and_the_remedy(commands, line, remedy):
    with pytest.raises(CommandError, match=f"(?s)`{line}` is unknown.*{remedy}"):
        commands.run(line)


def test_arguments_that_mean_nothing_are_refused(commands):
    for line in (":exit now", ":clear all", ":clh 3", ":reset top_p"):
        with pytest.raises(CommandError, match="no argument"):
            commands.run(line)


def test_what_is_a_command():
    assert all(is_command(text) for text in (":help", ":seed 3", ":x\n"))
    assert not any(is_command(text) for text in ("help", " :help", ":)", ":", "::", ":3", ":help\nme", "你好"))
