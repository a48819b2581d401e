"""The place of these classes among transformers' Auto classes, in a program that imports this package.

Registered classes take the place of a checkpoint's own code, which is what folders of 2023 need: their code no longer
runs. Two things transformers decides by the model type or by the name of a class alone, so they are decided here first:

- Relatives (Qwen-VL, Qwen-Audio) and models of others say `"model_type": "qwen"` too. Their code stays theirs.
- `AutoTokenizer` runs a folder's code where `trust_remote_code=True` is left in, whatever is registered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .configuration_qwen import AUTO_MAP, QWenConfig
from .foreign_qwen import refuse_relatives, relative
from .loading_qwen import refuse_pointers
from .modeling_qwen import (
    QWenForQuestionAnswering,
    QWenForSequenceClassification,
    QWenForTokenClassification,
    QWenLMHeadModel,
    QWenModel,
)
from .tokenization_qwen import QWenTokenizer, QWenTokenizerFast

_MODELS = (
    (AutoModel, QWenModel),
    (AutoModelForCausalLM, QWenLMHeadModel),
    (AutoModelForSequenceClassification, QWenForSequenceClassification),
    (AutoModelForTokenClassification, QWenForTokenClassification),
    (AutoModelForQuestionAnswering, QWenForQuestionAnswering),
)
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def register() -> None:
    """Make the Auto classes load these classes, and saving copy the .py files along."""
    AutoConfig.register(QWenConfig.model_type, QWenConfig, exist_ok=True)
    QWenConfig.register_for_auto_class("AutoConfig")
    for auto_class, model_class in _MODELS:
        auto_class.register(QWenConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
    AutoTokenizer.register(
        QWenConfig, slow_tokenizer_class=QWenTokenizer, fast_tokenizer_class=QWenTokenizerFast, exist_ok=True
    )
    for tokenizer_class in (QWenTokenizer, QWenTokenizerFast):
        tokenizer_class.register_for_auto_class("AutoTokenizer")
    _put_before(AutoConfig, _load_config)
    _put_before(AutoTokenizer, _load_tokenizer)


def _put_before(auto_class: Any, load: Callable[..., Any]) -> None:
    before = auto_class.from_pretrained
    auto_class.from_pretrained = staticmethod(functools.wraps(before)(functools.partial(load, before)))


def _load_config(before: Callable[..., Any], name: Any, **kwargs: Any) -> Any:
    """As `AutoConfig.from_pretrained`, which is `before`, with the code of this package, or that of other models."""
    refuse_pointers(name)
    values = _config_values(name, kwargs) if kwargs.get("trust_remote_code") else {}
    references = _references(values)
    if values.get("model_type") == QWenConfig.model_type:
        own = _is_own(values)
        if own or "AutoConfig" in references:
            kwargs.pop("trust_remote_code")
        if not own and "AutoConfig" in references:
            kwargs |= {"_from_auto": True, "name_or_path": name}  # as AutoConfig has them: a model finds its code so
            return _remote_class(references["AutoConfig"], name, kwargs).from_pretrained(name, **kwargs)
    loaded = before(name, **kwargs)
    config = loaded[0] if isinstance(loaded, tuple) else loaded  # with return_unused_kwargs
    if isinstance(config, QWenConfig):  # in transformers 5.4 AutoModel runs what it names, registered or not
        config.auto_map = {key: value for key, value in _references(vars(config)).items() if not _known([value])}
    return loaded


def _load_tokenizer(before: Callable[..., Any], name: Any, *inputs: Any, **kwargs: Any) -> Any:
    """As `AutoTokenizer.from_pretrained`, which is `before`, with the same preference as `_load_config`.

    Raises:
        ValueError: a relative's folder, whose code isn't trusted.
    """
    refuse_pointers(name)
    told = any(kwargs.get(key) is not None for key in ("config", "gguf_file", "tokenizer_type"))
    values = {} if told else _config_values(name, kwargs)
    if told or values.get("model_type", QWenConfig.model_type) != QWenConfig.model_type:
        return before(name, *inputs, **kwargs)
    trusted = kwargs.get("trust_remote_code")
    of_tokenizer = _references(get_tokenizer_config(name, **_hub_arguments(kwargs))).get("AutoTokenizer")
    if not trusted or of_tokenizer is None:
        refuse_relatives(values)
    elif relative(values) or not _known([of_tokenizer]):
        slow, fast = (*of_tokenizer, None)[:2] if isinstance(of_tokenizer, (list, tuple)) else (of_tokenizer, None)
        return _remote_class(fast or slow, name, kwargs).from_pretrained(name, *inputs, **kwargs)
    else:
        kwargs.pop("trust_remote_code")
    return before(name, *inputs, **kwargs)


def _config_values(name: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says, or nothing where none can be read, of which transformers will tell."""
    try:
        return PreTrainedConfig.get_config_dict(name, **_hub_arguments(kwargs))[0]
    except (OSError, ValueError):
        return {}


def _hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in _HUB if key in kwargs}


def _references(values: Mapping[str, Any]) -> dict[str, Any]:
    """`auto_map` of a file; early tokenizers have the list of their classes in its place."""
    found = values.get("auto_map") or {}
    return dict(found) if isinstance(found, Mapping) else {"AutoTokenizer": found}


def _is_own(values: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of these models, with the code of 2023 or of today."""
    return relative(values) is None and _known(_references(values).values())


def _known(references: Iterable[Any]) -> bool:
    """Whether all classes that an `auto_map` names are those of the published checkpoints, here or in another repo."""
    return set(_flat(references)) <= set(_flat(AUTO_MAP.values()))


def _flat(references: Iterable[Any]) -> Iterable[str]:
    for reference in references:
        if isinstance(reference, (list, tuple)):
            yield from _flat(reference)
        elif reference is not None:
            yield str(reference).rpartition("--")[2]


def _remote_class(reference: str, name: Any, kwargs: dict[str, Any]) -> Any:
    """A class of the checkpoint's own code, which saves itself as such."""
    code_revision = kwargs.pop("code_revision", None)
    found: Any = get_class_from_dynamic_module(reference, name, code_revision=code_revision, **_hub_arguments(kwargs))
    found.register_for_auto_class()
    return found
