"""What of packed weights can be wrong though names and shapes are right, and where values and settings disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from ..errors import CheckpointError
from ..files.tensors import TensorInfo
from .dequantised import unpack
from .quantised import Packing, layout_of


def check_groups(info: TensorInfo, g_idx: torch.Tensor, groups: int) -> None:
    """Refuse places of groups that are not there.

    Args:
        info: of the tensor.
        g_idx: the group of each input.
        groups: their number.

    Raises:
        CheckpointError: names the tensor, its extremes and the number of groups.
    """
    least, most = (int(value) for value in g_idx.aminmax())
    if least < 0 or most >= groups:
        raise CheckpointError(
            f"{info} puts inputs into groups {least} to {most}, and there are groups 0 to {groups - 1} only: download "
            "the file again."
        )


def contradictions(
    shapes: Mapping[str, tuple[int, ...]], packing: Packing, read: Callable[[str], torch.Tensor | None]
) -> list[str]:
    """Settings of GPTQ that the tensors contradict, in sentences for the user: engines that believe them go wrong.

    Args:
        shapes: name -> shape of every full weight.
        read: gives a tensor by its name, None where it can't be read.
    """
    if packing.method != "gptq":
        return []
    unordered, unequal = [], []
    for name, shape in shapes.items():
        packed, module = packing.of_weight(name, shape), name.removesuffix(".weight")
        if packed is None:
            continue
        if not packed.reorders and not _is_in_order(read(f"{module}.g_idx"), packed):
            unordered.append(f"{module}.g_idx")
        if packed.is_symmetric and not _is_half(read(f"{module}.qzeros"), packed, shape[0]):
            unequal.append(f"{module}.qzeros")
    return [
        *_sentence(unordered, "not in order, though desc_act is false", "ignore it", "set desc_act to true"),
        *_sentence(unequal, "not the middle, though sym is true", "ignore them", "set sym to false"),
    ]


def _sentence(names: list[str], what: str, done: str, remedy: str) -> Iterable[str]:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        yield (
            f"{names[0]}{more} is {what}: some engines {done}, and then compute something else. If the file is whole, "
            f"{remedy} in quantization_config."
        )


def _is_in_order(g_idx: torch.Tensor | None, packing: Packing) -> bool:
    if g_idx is None:
        return True
    size = g_idx.numel() if packing.group == -1 else packing.group
    return torch.equal(g_idx, (torch.arange(g_idx.numel()) // size).to(g_idx.dtype))


def _is_half(qzeros: torch.Tensor | None, packing: Packing, outputs: int) -> bool:
    if qzeros is None or packing.bits not in (2, 4, 8):
        return True
    middle = 2 ** (packing.bits - 1) - (layout_of(packing.settings) == "gptq")
    return bool((unpack(qzeros, packing.bits, 1)[:, :outputs] == middle).all())
