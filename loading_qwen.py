"""Loading and saving: the published flags, and what has to be installed."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, logging

from .arguments_qwen import without_resume_download
from .attention_qwen import FLASH_IMPLEMENTATION, HALF_PRECISION
from .bits_qwen import QWenBitsEmbedding
from .few_bits_qwen import PACKED, chosen_settings, register
from .saving_qwen import refuse_kernel_weights, saved_as_published
from .shards_qwen import gather_weights, needs_gathering, refuse_pipeline, sharing_group, weights_once
from .tensor_parallel_qwen import complete_plan

logger = logging.get_logger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LOAD_FLAGS = (*_DTYPES, "use_flash_attn", "softmax_in_fp32")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

LEFTOVERS = [r"\.attn\.(masked_)?bias$", r"rotary_emb\.inv_freq$"]
"""What early releases stored beside the weights, as patterns of names."""

_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024  # at most, says Git LFS
_LOADED = (".bin", ".json", ".safetensors")

_AT_TIMES = ("_cache", "peft_config")
"""Attributes of the classes here that raise an AttributeError while there is nothing for them to give."""

_PACKAGES = {
    **PACKED,
    "bitsandbytes": ("bitsandbytes", "accelerate"),
}
"""What transformers loads weights of a quantisation with, from 5.4 to 5.24."""


def is_pointer(path: Any) -> bool:
    """Whether Git LFS has left a pointer in the place of a large file."""
    try:
        if not os.path.isfile(path) or os.stat(path).st_size > _POINTER_BYTES:
            return False
        with open(path, "rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def refuse_pointers(folder: Any) -> None:
    """Refuse a local folder in which Git LFS has left a pointer in the place of a file that is loaded.

    Raises:
        OSError: names the file and the remedy.
    """
    if folder is None or not os.path.isdir(folder):  # None where weights come as `state_dict`
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.endswith(_LOADED) and is_pointer(entry.path):
            raise OSError(
                f"{entry.path!r} is a pointer of Git LFS, not the file itself: run `git lfs pull` in "
                f"{os.fspath(folder)!r}."
            )


def check_packages(quantization: Any) -> None:
    """Refuse weights in few bits that nothing here can read, before transformers looks for a GPU instead.

    Args:
        quantization: `quantization_config` of a configuration or of a call: a dictionary or an object; None for none.

    Raises:
        ImportError: names the quantisation, the packages that are missing and the command that installs them.
    """
    values = quantization if isinstance(quantization, Mapping) else vars(quantization) if quantization else {}
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    wanted = _PACKAGES.get(method, ())
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        here = "load them on a processor, which needs neither (device_map='cpu'), " if method in PACKED else ""
        raise ImportError(
            f"These weights are to be loaded by {method}, which needs {' and '.join(wanted)}; not installed: "
            f"{', '.join(missing)}. Install them (pip install {' '.join(missing)}), {here}or take weights that are not "
            "quantised."
        )


def choose_softmax(config: Any) -> None:
    """Make `eager` the attention of a configuration with `softmax_in_fp32`, which is a switch of it, or warn."""
    if not config.softmax_in_fp32:
        return
    if config._attn_implementation is None:
        config._attn_implementation = "eager"
    elif config._attn_implementation != "eager":
        logger.warning_once(
            f"softmax_in_fp32=True has no effect with attn_implementation='{config._attn_implementation}': "
            "it is a switch of 'eager'."
        )


if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class LoadingMixin(_Base):
    """`from_pretrained` and `save_pretrained` with the flags of the published configurations."""

    config_class: Any
    home: str
    """Name of the module in which the published classes are defined."""

    def post_init(self) -> None:
        """As in transformers; early releases lose a part of the plan of tensor parallel here."""
        super().post_init()
        complete_plan(self)

    def __dir__(self) -> list[str]:
        """The names of attributes that have a value: optimum reads all that this names, to find layers for GPTQ."""
        return [name for name in super().__dir__() if name not in _AT_TIMES or hasattr(self, name)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in transformers, with the published flags, in the configuration or as arguments.

        `bf16`, `fp16` or `fp32` choose the dtype, `use_flash_attn` the attention implementation. An argument wins over
        the configuration, and an explicit `dtype` or `attn_implementation` over both.

        - `use_flash_attn=False`, float32 or no CUDA device: transformers' default, `sdpa`.
        - `"auto"`: `flash_attention_2` where flash-attn is installed, else `sdpa`.
        - `True`: `flash_attention_2` where flash-attn is installed, else `qwen_varlen`; a warning where neither runs.
        - `softmax_in_fp32=True`: `eager`, the only implementation with that switch.

        Raises:
            ValueError: two of the precision flags contradict each other, or transformers' own pipeline is asked for.
            ImportError: weights in few bits, and the packages that read them are not installed.
            OSError: a pointer of Git LFS in the place of a file.
        """
        kwargs = without_resume_download(kwargs)
        refuse_pointers(pretrained_model_name_or_path)
        refuse_pipeline(kwargs.get("distributed_config"))
        flags = {name: kwargs.pop(name) for name in _LOAD_FLAGS if name in kwargs}
        if isinstance(config, PreTrainedConfig):
            config = effective = copy.deepcopy(config)
            config.override(flags)
            flags = {}
        else:
            hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            effective = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **hub, **flags)
        config = cls._choose_bits(pretrained_model_name_or_path, config, effective, flags, kwargs)
        check_packages(kwargs.get("quantization_config") or getattr(config or effective, "quantization_config", None))
        precision = effective.precision_flag()
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None and precision is not None:
            kwargs["dtype"] = _DTYPES[precision]
        free = kwargs.get("attn_implementation") is None and effective._attn_implementation is None
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **flags, **kwargs)
        if free:
            loaded_model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
            loaded_model._apply_flash_flag()
        return loaded

    @classmethod
    def _choose_bits(cls, folder: Any, config: Any, effective: Any, flags: dict, kwargs: dict) -> Any:
        """Change the arguments of a call so that weights in few bits are read here, where that is chosen.

        Returns:
            The configuration to load with: that of the call, or one without the settings of another library.
        """
        stored = getattr(effective, "quantization_config", None)
        settings = chosen_settings(kwargs.get("quantization_config"), stored, kwargs.get("device_map"))
        if settings is None:
            return config
        register()
        if settings.packed is None:
            kwargs["quantization_config"] = settings if stored is None else None
            return config
        kwargs["quantization_config"] = settings
        if not isinstance(config, PreTrainedConfig):
            hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            known = {*effective.to_dict(), *effective.attribute_map} - {"dtype", "torch_dtype", "quantization_config"}
            changes = {name: kwargs.pop(name) for name in known if name in kwargs}
            config = cls.config_class.from_pretrained(config or folder, **hub, **flags, **changes)
            flags.clear()
        del config.quantization_config
        return config

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in transformers, with the code of the published class, even if FSDP2 or a program derived another.

        A precision flag, where one is set, becomes that of the weights saved. Weights that FSDP2 has in shards are put
        together, unless they come in `state_dict`: then every process has to call this method, and the first one
        writes.

        Raises:
            NotADirectoryError: there is a file of that name.
            ValueError: weights that gptqmodel has loaded, which can't be saved right.
        """
        refuse_kernel_weights(self)
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{os.fspath(save_directory)} is a file: name a folder to save into.")
        if state_dict is None and not kwargs.get("distributed_checkpoint") and needs_gathering(self):
            state_dict = gather_weights(self)
            if torch.distributed.get_rank() != 0:
                return
        if state_dict is None and not kwargs.get("distributed_checkpoint") and sharing_group(self) is not None:
            state_dict = weights_once(self)
        if self.config.precision_flag() is not None:
            for flag, dtype in _DTYPES.items():
                setattr(self.config, flag, self.dtype == dtype)
        with saved_as_published(self, self.home):
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def _apply_flash_flag(self) -> None:
        """Choose the attention that `use_flash_attn` asks for, now that the dtype of the weights is known."""
        wanted = self.config.use_flash_attn and not self.config.softmax_in_fp32
        if not wanted:
            return
        if self.dtype in HALF_PRECISION and torch.cuda.is_available():
            if is_flash_attn_2_available():
                self.set_attn_implementation("flash_attention_2")
            elif self.config.use_flash_attn is True:
                self.set_attn_implementation(FLASH_IMPLEMENTATION)
        elif self.config.use_flash_attn is True:
            logger.warning_once(
                "use_flash_attn=True needs a CUDA device and half precision (bf16=True or fp16=True); the dtype is "
                f"{self.dtype} here, so attention runs as 'sdpa'."
            )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the padded vocabulary, where the configuration counts one, follows.

        Raises:
            ValueError: an embedding in few bits.
        """
        wanted = kwargs.get("new_num_tokens", args[0] if args else None)
        own = self.get_input_embeddings()
        if isinstance(own, QWenBitsEmbedding) and wanted not in (None, own.num_embeddings):
            raise ValueError(
                f"An embedding in {own.bits} bits can't be resized to {wanted} rows: resize whole weights, save them, "
                "and load these in few bits."
            )
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.padded_vocab_size is not None:
            self.config.padded_vocab_size = embeddings.num_embeddings
        return embeddings
