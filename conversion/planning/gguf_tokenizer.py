"""The tokenizer of a GGUF: all of it is in the file itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...tokenization_qwen import CHAT_TEMPLATE, ENDOFTEXT, IMEND, PAT_STR, build_backend
from ..errors import CheckpointError
from ..files.access import is_present, read_text
from ..formats.companions import TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_JSON, VOCABULARY, optional_json
from ..formats.endings import as_list, is_chat, load_ranks
from ..formats.gguf import gguf_package
from ..opening.sources import Contents, Source
from .companions import plain_template
from .qwen_tokenizer import load_backend

_NO_MERGES = [f"{ENDOFTEXT} {ENDOFTEXT}"]
"""In the place of an empty list, which llama.cpp refuses: text is never cut into such pieces."""

_CUTS = "qwen2"
"""What llama.cpp calls `PAT_STR`."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF says of its tokenizer.

    Attributes:
        tokens, types: of each row of the embedding, in llama.cpp's numbers for types; rows without a token are unused.
        merges: two tokens each, the first that apply first.
        ids: "bos", "eos" and "pad", as far as there are such tokens.
        template: of chats; or several, by name; None where there is none.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    template: str | list[dict[str, str]] | None

    def tell(self, writer: Any) -> None:
        """Tell a `gguf.GGUFWriter` all of it."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_CUTS)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for kind, token_id in self.ids.items():
            getattr(writer, f"add_{kind}_token_id")(token_id)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        if self.template is not None:
            writer.add_chat_template(self.template)


def gguf_tokenizer(source: Source, contents: Contents) -> GgufTokenizer:
    """The tokenizer of a folder of QWen or Qwen2.

    Raises:
        CheckpointError: there is none, it is damaged, or llama.cpp has no such tokenizer.
    """
    folder = source.folder
    content = json.loads(_backend(source).to_str())
    if not _cuts_as_qwen(content):
        raise CheckpointError(
            f"The tokenizer in {folder} doesn't cut texts as QWen's does, and by what name llama.cpp knows it can't be "
            "told here: use llama.cpp's own converter."
        )
    added = {token["content"]: token for token in content["added_tokens"]}
    tokens, types = _rows(content["model"]["vocab"], added, contents.architecture.rows, folder)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    settings = optional_json(folder / TOKENIZER_CONFIG) or {}
    ids = _ids(source, contents, {name: token["id"] for name, token in added.items()}, settings)
    for kind, token_id in ids.items():
        if not 0 <= token_id < len(tokens):
            raise CheckpointError(
                f"{kind}_token_id={token_id} is no row of the embedding ({len(tokens)} rows): mend it."
            )
    return GgufTokenizer(tokens, types, merges or _NO_MERGES, ids, _template(source, settings))


def _backend(source: Source) -> Tokenizer:
    folder = source.folder
    has_json = is_present(folder / TOKENIZER_JSON)
    if is_present(folder / VOCABULARY) and (source.kind.is_qwen or not has_json):
        return build_backend(*load_ranks(folder))
    if has_json or is_present(folder / "vocab.json") and is_present(folder / "merges.txt"):
        return load_backend(folder)
    raise CheckpointError(
        f"{folder} has no {VOCABULARY} and no {TOKENIZER_JSON}, and a GGUF is of no use without its tokenizer: put the "
        "published one into the folder."
    )


def _cuts_as_qwen(content: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` does what llama.cpp does for Qwen2: cut by its pattern, then join pairs of bytes."""
    cuts = content.get("pre_tokenizer") or {}
    steps = cuts.get("pretokenizers") or [cuts]
    patterns = [step.get("pattern") for step in steps if step.get("type") == "Split"]
    last = steps[-1]
    is_bytes = last.get("type") == "ByteLevel" and not last.get("use_regex") and not last.get("add_prefix_space")
    return content["model"].get("type") == "BPE" and is_bytes and len(steps) == 2 and patterns == [{"Regex": PAT_STR}]


def _rows(
    vocabulary: Mapping[str, int], added: Mapping[str, Mapping[str, Any]], rows: int, folder: Path
) -> tuple[list[str], list[int]]:
    types = gguf_package().TokenType
    names = {token_id: token for token, token_id in vocabulary.items()}
    names |= {token["id"]: name for name, token in added.items()}
    if (last := max(names, default=0)) >= rows:
        raise CheckpointError(
            f"The tokenizer in {folder} has a token {last}, but the embedding only {rows} rows: it is that of another "
            "model."
        )
    tokens, kinds = [], []
    for row in range(rows):
        name = names.get(row, f"[PAD{row}]")
        kind = types.NORMAL if row in names else types.UNUSED
        if row in names and name in added:
            # as in llama.cpp's converter: Qwen2.5 has control tokens that its settings don't call special
            is_control = added[name]["special"] or (name.startswith("<|") and name.endswith("|>"))
            kind = types.CONTROL if is_control else types.USER_DEFINED
        tokens.append(name)
        kinds.append(int(kind))
    return tokens, kinds


def _ids(source: Source, contents: Contents, added: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, int]:
    """Ids by the settings of the tokenizer, else by the configuration; QWen's own end with the kind of its chats."""
    config = dict(contents.architecture.settings or {})
    named = {kind: _content(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "pad")}
    if contents.ends is not None:
        named |= {"bos": None, "pad": ENDOFTEXT}
        named["eos"] = IMEND if is_chat(contents.generation, contents.ends[1]) else ENDOFTEXT
    ids = {}
    for kind, token in named.items():
        configured = as_list(config.get(f"{kind}_token_id"))
        found = added.get(token) if token is not None else None
        if found is None and configured:
            found = configured[0]
        if found is None and kind == "bos":  # without it llama.cpp takes 11, which is a comma
            found = added.get(ENDOFTEXT)
        if found is not None:
            ids[kind] = found
    return ids


def _content(token: Any) -> str | None:
    """The text of a token in settings, where it may be an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _template(source: Source, settings: Mapping[str, Any]) -> Any:
    """The chat template of a folder in plain Jinja; ours where a folder of QWen has none."""
    if is_present(source.folder / TEMPLATE):
        text = read_text(source.folder / TEMPLATE)
        return plain_template() if text == CHAT_TEMPLATE else text
    own = settings.get("chat_template")
    return plain_template() if own is None and source.kind.is_qwen else own
