"""What an adapter of peft brings along beside its weights: the settings of a chat that its base was not taught.

A base model says `chat_format="raw"` in its generation settings, and an adapter has none of its own. So
`qwen1-finetune` writes those of a chat into `adapter_config.json`, in the one place where peft keeps what it doesn't
know: `auto_mapping`, which it reads only of adapters without a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SETTINGS = "generation_config"
"""Key in `auto_mapping` of the settings."""

_TAKEN = ("chat_format", "eos_token_id", "pad_token_id", "max_window_size")


def settings_of_adapter(auto_mapping: Any) -> dict[str, Any]:
    """The generation settings of a chat in an adapter's `auto_mapping`; none where it has none."""
    found = auto_mapping.get(SETTINGS) if isinstance(auto_mapping, Mapping) else None
    return {name: found[name] for name in _TAKEN if name in found} if isinstance(found, Mapping) else {}


class ChatAdapterMixin:
    """Takes over the settings of an adapter when peft puts it on a base: what it merges then chats too."""

    generation_config: Any

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters' configurations by name, which peft sets when it has put the first of them on this model."""
        try:
            return self.__dict__["peft_config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no adapter") from None

    @peft_config.setter
    def peft_config(self, configurations: dict[str, Any]) -> None:
        self.__dict__["peft_config"] = configurations
        for configuration in configurations.values():
            settings = settings_of_adapter(getattr(configuration, "auto_mapping", None))
            if settings and getattr(self.generation_config, "chat_format", None) != "chatml":
                self.generation_config.update(**settings, allow_custom_entries=True)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["peft_config"]
