"""The decoders that ExecuTorch is given: programs with a static cache inside, as transformers prepares them."""

import pytest
import torch
from torch.export import Dim
from transformers import DynamicCache, StaticCache
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    TorchExportableModuleWithStaticCache,
    convert_and_export_with_cache,
    export_with_dynamic_cache,
)

from qwen1.arguments_qwen import CACHE_NAME

from .conftest import CLOSE, SEQ_LENGTH

ROOM = 96


@pytest.fixture
def model(tiny_model):
    model = tiny_model("sdpa")
    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": ROOM}
    return model


@torch.no_grad()
def eager(model, ids, chunks):
    """Logits of a text read in chunks of these lengths, with a static cache as those programs hold."""
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    pieces = ids[:, : sum(chunks)].split(chunks, dim=1)
    return torch.cat([model(piece, use_cache=True, **{CACHE_NAME: cache}).logits for piece in pieces], dim=1)


@torch.no_grad()
def run(program, ids, chunks):
    """The same by a program."""
    logits, start = [], 0
    for piece in ids[:, : sum(chunks)].split(chunks, dim=1):
        end = start + piece.shape[1]
        logits.append(program(input_ids=piece, cache_position=torch.arange(start, end)))
        start = end
    return torch.cat(logits, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.no_cover
def test_a_token_at_a_time_over_every_edge(model, text, strict):
    program = convert_and_export_with_cache(model, strict=strict).module()
    chunks = [1] * (2 * SEQ_LENGTH + 8)
    for _ in range(2):  # the second text finds what the first has left
        torch.testing.assert_close(run(program, text, chunks), eager(model, text, chunks), **CLOSE)


def test_a_prompt_at_once_keeps_its_alpha(model, text, warnings_of):
    module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=ROOM)
    length = Dim("length", max=ROOM - 1)
    sample = {"input_ids": torch.zeros((1, 3), dtype=torch.long), "cache_position": torch.arange(3)}
    shapes = {"input_ids": {1: length}, "cache_position": {0: length}}
    program = module.export(**sample, dynamic_shapes=shapes, strict=False).module()
    for chunks in (
        [40, *[1] * 30],  # replies of a long prompt, then of a short one, each over an edge
        [20, *[1] * 20],
        [2 * SEQ_LENGTH + 1, 1, 1],
        [20, 20, 1],
        [2, *[1] * 40],
    ):
        torch.testing.assert_close(run(program, text, chunks), eager(model, text, chunks), **CLOSE)
    assert not warnings_of()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.no_cover
def test_what_was_read_before_the_export_leaves_nothing_in_the_program(model, text, strict):
    module = TorchExportableModuleWithStaticCache(model)
    run(module, text, [40, 1])
    sample = {"input_ids": text[:, :1], "cache_position": torch.tensor([0])}
    with torch.no_grad():
        program = torch.export.export(module, (), sample, strict=strict).module()
    chunks = [1] * (SEQ_LENGTH + 3)
    torch.testing.assert_close(run(program, text, chunks), eager(model, text, chunks), **CLOSE)


class NotExported:
    """Stands for the program of a module that runs as it is."""

    def __init__(self, module):
        self.module = lambda: module
        self.named_buffers = module.named_buffers


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.no_cover
def test_generate_of_a_program_writes_what_it_does_of_the_module(model, text):
    generate = TorchExportableModuleWithStaticCache.generate
    prompt = text[:, : SEQ_LENGTH - 4]
    written = generate(convert_and_export_with_cache(model, strict=False), prompt, max_new_tokens=8)
    expected = generate(NotExported(TorchExportableModuleWithStaticCache(model)), prompt, max_new_tokens=8)
    assert written.shape == (1, SEQ_LENGTH + 4)
    assert written.tolist() == expected.tolist()


@torch.no_grad()
def test_a_program_that_fills_a_cache(model, text):
    mask = torch.ones((1, 40), dtype=torch.long)
    program = export_with_dynamic_cache(model, text[:, :40], mask).module()
    cache = DynamicCache(config=model.config)
    outputs = program(input_ids=text[:, :40], attention_mask=mask, use_cache=True, **{CACHE_NAME: cache})
    torch.testing.assert_close(outputs.logits, model(text[:, :40]).logits, **CLOSE)


def test_the_buffer_of_such_programs_is_no_part_of_a_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not any("program_alpha" in name for name in loaded.state_dict())
    assert loaded.transformer.program_alpha.tolist() == [[1]]
    assert loaded.transformer.program_alpha.dtype == torch.long
