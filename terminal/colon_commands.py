"""The commands of a conversation, which begin with a colon; their names are those of the demo published in 2023."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import files
from .conversation import Conversation
from .errors import CommandError


class Leave(Exception):
    """The user wants to go."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        names: without the colon; the first one is listed first.
        uses: argument, which may be empty, and what it does; for `:help`.
        run: carries it out with what stands behind the name, and returns what to show.
    """

    names: tuple[str, ...]
    uses: tuple[tuple[str, str], ...]
    run: Callable[[Commands, str], str]


class Commands:
    """Carries out the commands of one conversation.

    Args:
        conversation: to look at and change.
        clear_screen: empties the screen.
        show_statistics: whether statistics are to follow each reply.
    """

    def __init__(self, conversation: Conversation, clear_screen: Callable[[], None], show_statistics: bool = False):
        self.conversation = conversation
        self.clear_screen = clear_screen
        self.show_statistics = show_statistics

    def run(self, line: str) -> str:
        """Carry out a line that `is_command`, and return what to show.

        Raises:
            CommandError: an unknown command, or arguments that can't be.
            Leave: the conversation is over.
        """
        name, *rest = line[1:].strip().split(maxsplit=1)
        command = _BY_NAME.get(name.lower())
        if command is None:
            raise CommandError(_unknown(name))
        argument = rest[0] if rest else ""
        if argument and not any(described for described, _ in command.uses):
            raise CommandError(f"`:{name}` takes no argument, got {argument!r}: leave it out.")
        return command.run(self, argument)

    def help(self, argument: str) -> str:
        """All commands, a line each."""
        lines = []
        for command in COMMANDS:
            for argument, meaning in command.uses:
                names = ", ".join(f":{name}" for name in command.names)
                lines.append((f"{names} {argument}".rstrip(), meaning))
        width = max(len(left) for left, _ in lines)
        return "\n".join(f"{left:<{width}}  {meaning}" for left, meaning in lines)

    def leave(self, argument: str) -> str:
        """End the conversation."""
        raise Leave

    def clear(self, argument: str) -> str:
        """Empty the screen; the conversation stays."""
        self.clear_screen()
        return ""

    def history(self, argument: str) -> str:
        """Every turn."""
        turns = self.conversation.history
        shown = [f"[{n}] User: {query}\n[{n}] Assistant: {reply}" for n, (query, reply) in enumerate(turns, start=1)]
        return "\n".join(shown) or "Nothing was said yet."

    def clear_history(self, argument: str) -> str:
        """Begin anew, with the system message and the settings as they are."""
        turns = len(self.conversation.history)
        self.conversation.restart()
        return f"Forgot {_turns(turns)}."

    def seed(self, argument: str) -> str:
        """Show or set the seed."""
        if argument:
            try:
                self.conversation.seed = None if argument.lower() == "none" else int(argument)
            except ValueError as error:
                raise CommandError(f"The seed must be a whole number, or none, got {argument!r}.") from error
        seed = self.conversation.seed
        return "No seed: sampled replies differ from time to time." if seed is None else f"The seed is {seed}."

    def config(self, argument: str) -> str:
        """Show or change the generation settings."""
        settings = self.conversation.settings
        if argument:
            if not all("=" in item[1:] for item in argument.split()):
                raise CommandError(f"Write `:config key=value ...`, without blanks around `=`; got {argument!r}.")
            settings.change(dict(item.split("=", 1) for item in argument.split()))
        values = settings.effective()
        width = max(map(len, values))
        return "\n".join(
            f"{name:<{width}}  {_shown(value)}{'  (set here)' if name in settings.changed else ''}"
            for name, value in values.items()
        )

    def reset_config(self, argument: str) -> str:
        """Undo what `config` changed."""
        self.conversation.settings.reset()
        return "The generation settings are as at the start."

    def statistics(self, argument: str) -> str:
        """Show the statistics of the last reply, or switch those after each reply on or off."""
        if argument.lower() in ("on", "off"):
            self.show_statistics = argument.lower() == "on"
            return f"Statistics after each reply are {argument.lower()}."
        if argument:
            raise CommandError(f"`:stats` takes on, off or nothing, got {argument!r}.")
        return str(self.conversation.statistics or "There was no reply yet.")

    def save(self, argument: str) -> str:
        """Write the conversation into a new file."""
        return self._save(argument)

    def overwrite(self, argument: str) -> str:
        """Write the conversation, also over a file that is there."""
        return self._save(argument, overwrite=True)

    def _save(self, argument: str, overwrite: bool = False) -> str:
        path = _path(argument)
        files.save(path, self.conversation.system, self.conversation.history, overwrite)
        return f"Saved {_turns(len(self.conversation.history))} in {path}."

    def load(self, argument: str) -> str:
        """Go on from a saved conversation."""
        path = _path(argument)
        system, turns = files.load(path)
        self.conversation.restart(turns, system)
        return f"Loaded {_turns(len(turns))} from {path}; the system message is: {self.conversation.system}"


COMMANDS = (
    Command(("help", "h"), (("", "list the commands"),), Commands.help),
    Command(("exit", "quit", "q"), (("", "end, as Ctrl-D does"),), Commands.leave),
    Command(("clear", "cl"), (("", "clear the screen"),), Commands.clear),
    Command(("history", "his"), (("", "show the conversation"),), Commands.history),
    Command(("clear-history", "clear-his", "clh"), (("", "begin a new conversation"),), Commands.clear_history),
    Command(("seed",), (("", "show the seed"), ("N", "set it; none for no seed")), Commands.seed),
    Command(
        ("config", "conf"),
        (("", "show the generation settings"), ("KEY=VALUE ...", "change them; none for the checkpoint's own value")),
        Commands.config,
    ),
    Command(("config-reset", "reset-conf", "reset"), (("", "undo all changes of settings"),), Commands.reset_config),
    Command(
        ("stats",),
        (("", "what the last reply cost"), ("on|off", "show it after each reply, or no more")),
        Commands.statistics,
    ),
    Command(("save",), (("FILE", "save the conversation as JSON"),), Commands.save),
    Command(("save!",), (("FILE", "the same, over a file that is there"),), Commands.overwrite),
    Command(("load",), (("FILE", "go on from a saved conversation, in place of this one"),), Commands.load),
)
_BY_NAME = {name: command for command in COMMANDS for name in command.names}
NAMES = sorted(_BY_NAME)
"""Of all commands, without the colon."""


def is_command(text: str) -> bool:
    """Whether it is meant as a command: one line that begins with a colon and a letter."""
    return bool(re.match(r":[^\W\d_]", text)) and "\n" not in text.strip()


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, NAMES, n=1)
    guess = f" Did you mean `:{near[0]}`?" if near else ""
    return f"`:{name}` is unknown.{guess} `:help` lists the commands; with a blank before the colon it is a message."


def _path(argument: str) -> Path:
    if not argument:
        raise CommandError("Name a file, such as `conversation.json`, behind the command.")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:
        raise CommandError(f"{argument!r} can't be resolved: {error}") from error


def _turns(number: int) -> str:
    return "1 turn" if number == 1 else f"{number} turns"


def _shown(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
