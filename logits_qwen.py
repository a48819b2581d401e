"""The logits of a training step, computed when somebody reads them: `QWenTrainingOutput`.

The loss of `loss_qwen` needs no logits, so most steps never make them. In their place the states of the last layer are
kept, E numbers for a token and not V.

Shapes: B batch, T tokens, E width of the residual stream, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from .arguments_qwen import KNOWN_ARGUMENTS, QWenCausalLMOutput, cache_argument
from .loss_qwen import gives_its_weight, logits_behind_loss, loss_of_head
from .products_qwen import is_transformed
from .shards_qwen import local_part

_LOOKS = 1024  # values of the head that are compared before it is used again


class _Origin:
    """The head as it was in `forward`, and what it was called under.

    An optimizer may write to the weight without a trace in its version (a fused one does), so that some of its values
    are kept too.
    """

    def __init__(self, states: torch.Tensor, head: nn.Linear):
        self.head, self.weight = head, head.weight
        self.version, self.looks = _version_of(head.weight), self._look()
        self.dtype, self.device, self.differentiated = states.dtype, states.device, states.requires_grad
        kind = states.device.type
        self.autocast = torch.is_autocast_enabled(kind)
        self.autocast_dtype = torch.get_autocast_dtype(kind)

    def _look(self) -> torch.Tensor:
        values = local_part(self.weight.detach()).flatten()
        step = len(values) // _LOOKS | 1  # odd: of every column some
        return values[::step].clone()

    def _check_head(self) -> None:
        """Refuse a head that isn't the one of `forward` any more."""
        same = gives_its_weight(self.head) and self.head.weight is self.weight
        if same and _version_of(self.weight) == self.version and torch.equal(self._look().to(self.looks), self.looks):
            return
        raise RuntimeError(
            "The logits of this training step were not computed yet, and the head has changed since: it was trained, "
            "wrapped, or its weight is sharded again. Read outputs.logits before backward() and optimizer.step(), or "
            "call the model with skip_logits=False."
        )

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The head's product, (B, T, E) -> (B, T, V), with gradients whoever reads it.

        States that a wrapper has cast or moved give the logits that would have been cast or moved.
        """
        self._check_head()
        # Read for a metric first, under no_grad, they may be read for the loss later.
        differentiated = states.requires_grad or not self.differentiated
        autocast = torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast)
        with torch.inference_mode(False), torch.set_grad_enabled(differentiated), autocast:
            logits = logits_behind_loss(self.head, states.to(self.device, self.dtype))
            moved = states.dtype != self.dtype or states.device != self.device
            return logits.to(states.device, states.dtype) if moved else logits


def _version_of(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


@dataclass(eq=False, repr=False)
class UnreadLogits:
    """Stands for logits, (B, T, V), that nobody has read: every use as a tensor computes them.

    A dataclass and a node of torch's trees, so that DDP and FSDP find the states that the gradients of the logits go
    through; they see these, (B, T, E), in place of the logits.

    Args:
        states: (B, T, E), of the last layer.
        origin: the head.
        as_dtype: of the logits, where it is not that of the head.
    """

    states: torch.Tensor
    origin: _Origin
    as_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, states: torch.Tensor, head: nn.Linear) -> UnreadLogits:
        """Of states, (B, T, E), and the head that `forward` would have called now."""
        return cls(states, _Origin(states, head))

    def read(self) -> torch.Tensor:
        """The logits, computed anew at each call."""
        logits = self.origin.logits(self.states)
        return logits if self.as_dtype is None else logits.to(self.as_dtype)

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        return torch.Size((*self.states.shape[:-1], self.origin.head.out_features))

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        origin = self.origin
        if self.as_dtype is not None or self.states.dtype != origin.dtype:
            return self.as_dtype or self.states.dtype
        return origin.autocast_dtype if origin.autocast else origin.dtype

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        return self.states.device

    def float(self) -> UnreadLogits:
        """In float32 when they are read: accelerate asks this of every output under mixed precision."""
        return replace(self, as_dtype=torch.float32)

    def __repr__(self) -> str:
        return f"UnreadLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of Python, and fields of a copy that is being made
            raise AttributeError(name)
        known = getattr(torch.Tensor, name)  # whoever asks whether there is such a method doesn't use it yet
        return partial(_as_tensor(name), self) if callable(known) else getattr(self.read(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map(
            lambda value: value.read() if isinstance(value, cls) else value,
            (args, kwargs or {}),
            is_leaf=lambda value: isinstance(value, cls),
        )
        return function(*args, **kwargs)


def _as_tensor(name: str) -> Callable:
    def method(self: UnreadLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.read(), name)(*args, **kwargs)

    return method


for _operator in ("getitem", "len", "iter", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "matmul"):
    setattr(UnreadLogits, f"__{_operator}__", _as_tensor(f"__{_operator}__"))


def _unflatten(children: Any, context: Any) -> Any:
    (states,) = children
    return UnreadLogits(states, *context) if isinstance(states, torch.Tensor) else states


pytree.register_pytree_node(
    UnreadLogits,
    lambda unread: ([unread.states], (unread.origin, unread.as_dtype)),
    _unflatten,
    serialized_type_name="qwen.UnreadLogits",
)


def _fields_for_wrappers() -> dict[str, Any]:
    """The fields of the output with `unread` in the place of `logits`."""
    fields = {}
    for name, field in QWenCausalLMOutput.__dataclass_fields__.items():
        field = copy.copy(field)
        field.name = "unread" if name == "logits" else name
        fields[field.name] = field
    return fields


class QWenTrainingOutput(QWenCausalLMOutput):
    """Output of `QWenLMHeadModel` in training, whose `logits` are computed when they are read.

    They are read by the attribute, by key, index or slice, `to_tuple`, `get` and pickling, and kept from then on.
    Names, `in`, `len`, `repr` and a copy don't read them; `items` and `values` give `UnreadLogits`, which are computed
    where they are used.
    """

    # FSDP and others go through the fields of a dataclass, and would compute the logits of every step.
    __dataclass_fields__ = _fields_for_wrappers()

    def __init__(self, loss: Any = None, logits: Any = None, unread: Any = None, **others: Any):
        OrderedDict.__init__(self)
        given = {"loss": loss, "logits": logits if unread is None else unread, **others}
        # Accelerate makes an output anew from a dictionary of all its values.
        for name, value in (loss if isinstance(loss, dict) else given).items():
            if value is not None:
                self[name] = value

    @property
    def unread(self) -> Any:
        """`UnreadLogits`, or the logits where they have been read."""
        return OrderedDict.get(self, "logits")

    @property
    def logits(self) -> torch.Tensor | None:
        """(B, T, V); computed when it is read first.

        Raises:
            RuntimeError: it is read too late, when the head has changed.
        """
        if isinstance(self.unread, UnreadLogits):
            self.logits = self.unread.read()
        return self.unread

    @logits.setter
    def logits(self, value: Any) -> None:
        OrderedDict.__setitem__(self, "logits", value)

    def __getitem__(self, key: Any) -> Any:
        return self.logits if key == "logits" else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dictionary."""
        return self[key] if key in self else default

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def __copy__(self) -> QWenTrainingOutput:
        return type(self)(dict(zip(self.keys(), self.values(), strict=True)))

    copy = __copy__

    def __reduce__(self) -> Any:
        return type(self), ({name: self[name] for name in self.keys()},)


def training_output(
    outputs: Any, head: nn.Linear, labels: torch.Tensor, skip_logits: bool | None, arguments: dict[str, Any]
) -> QWenTrainingOutput:
    """The output of a step whose loss is computed without logits.

    Args:
        outputs: of the model below the head.
        labels: (B, T).
        skip_logits: True for no logits at all; else they are there for who reads them.
        arguments: of the loss.
    """
    states = outputs.last_hidden_state
    loss = loss_of_head(head, states, labels, **arguments)
    # Behind the loss: what FSDP2 has put together for it may stay so until the backward pass.
    unread = None if skip_logits else UnreadLogits.of(states, head)
    return QWenTrainingOutput(loss=loss, logits=unread, **beside_logits(outputs))


def beside_logits(outputs: Any) -> dict[str, Any]:
    """What an output with logits takes over from the model below the head."""
    states, probabilities = outputs.hidden_states, outputs.attentions
    return {**cache_argument(outputs.cache), "hidden_states": states, "attentions": probabilities}


def keep_states(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The states whose logits are wanted, (B, T, E) -> (B, N, E): the last so many, 0 for all, or those of indices."""
    if isinstance(logits_to_keep, int) and not logits_to_keep:
        return states
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    # With the strides of a slice torch would copy the whole head for the product, 0.3 GB of a model of 0.5 B.
    return states[:, kept, :].clone(memory_format=torch.contiguous_format)


def skips_logits(
    model: Any, labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor, wanted: bool | None
) -> bool:
    """Whether a call of a language model computes its loss without logits.

    Args:
        model: with `lm_head`, `loss_type` and a loss function.
        labels, logits_to_keep: of the call.
        wanted: `skip_logits` of the call; None leaves it to this function.

    Raises:
        ValueError: it is wanted and can't be.
    """
    plain = labels is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
    alone = (getattr(model, "tp_size", None) or 1) == 1  # of early transformers 5 a shard looks like a whole weight
    plain = plain and alone and gives_its_weight(model.lm_head)
    if wanted and not plain:
        raise ValueError(
            "skip_logits=True needs labels, no logits_to_keep, and a head that is a plain matrix at hand, without "
            f"adapter, hook, quantisation, offloading or sharding ({type(model.lm_head).__name__} here): leave it out."
        )
    if wanted is None:  # a loss of the caller's own, a compiler or `torch.func` gets the logits
        own_loss = model.loss_type == "ForCausalLM" and getattr(model, "_loss_function", None) is None
        training = model.training and torch.is_grad_enabled()
        return plain and own_loss and training and not torch.compiler.is_compiling() and not is_transformed()
    return wanted


def arguments_of_loss(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call that only a loss of the caller's own names, which are not for the model."""
    # Not a difference of sets, which torch before 2.12 can't trace.
    unknown = [name for name in kwargs if name not in KNOWN_ARGUMENTS]
    if not unknown or getattr(model, "_loss_function", None) is None:
        return {}
    named = inspect.signature(model.loss_function).parameters
    return {name: kwargs[name] for name in unknown if name in named}
