"""The exporters of transformers: the prompt and the step that `generate` runs, each a program, one after the other."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from qwen1.arguments_qwen import CACHE_NAME

from .conftest import CLOSE, SEQ_LENGTH

exporter_dynamo = pytest.importorskip(
    "transformers.exporters.exporter_dynamo", reason="this transformers has no exporters"
)
utils = pytest.importorskip("transformers.exporters.utils")

STEPS = 4
PROMPTS = (2, 3, SEQ_LENGTH - 2, SEQ_LENGTH + 1, 2 * SEQ_LENGTH - 1, 4 * SEQ_LENGTH + 1)


def export(model, ids, **kwargs):
    """Programs of prompt and step."""
    captured = utils.decompose_prefill_decode(model, {"input_ids": ids}, **kwargs)
    config = exporter_dynamo.DynamoConfig(dynamic=True)
    exporter = exporter_dynamo.DynamoExporter()
    return {name: exporter.export(module, dict(inputs), config=config) for name, (module, inputs) in captured.items()}


def first_inputs(model, ids, settings):
    """What `generate` gives to the model first."""
    given = copy.deepcopy(settings)
    return dict(utils.decompose_prefill_decode(model, {"input_ids": ids}, generation_config=given)["prefill"][1])


def run(programs, model, ids, settings, width=1):
    """Logits of the last token of the prompt and of each step; the cache goes from one program to the next."""
    inputs = first_inputs(model, ids, settings)
    outputs = programs["prefill"](**copy.deepcopy(inputs))
    logits, length = [outputs["logits"][:, -1:]], ids.shape[1]
    for _ in range(STEPS):
        inputs |= {
            "input_ids": logits[-1].argmax(-1)[:, -1:],
            "position_ids": torch.tensor([[length]]),
            CACHE_NAME: outputs[CACHE_NAME],
        }
        outputs = programs["decode"](**inputs)
        logits.append(outputs["logits"])
        length += 1
    return torch.cat(logits, dim=1)


def eager(model, ids, settings):
    """The same by `generate`, (1, STEPS + 1, V)."""
    config = copy.deepcopy(settings)
    config.update(max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, output_logits=True, return_dict_in_generate=True)
    return torch.stack(model.generate(ids, generation_config=config).logits, dim=1)


@pytest.fixture
def settings():
    return GenerationConfig(do_sample=False, pad_token_id=0)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True}], ids=str)
@torch.no_grad()
@pytest.mark.no_cover
def test_prompt_and_steps_over_every_edge(tiny_model, text, settings, changes):
    model = tiny_model("sdpa", **changes)
    programs = export(model, text[:, :20])
    for length in PROMPTS:
        ids = text[:, :length]
        torch.testing.assert_close(run(programs, model, ids, settings), eager(model, ids, settings), **CLOSE)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.no_cover
def test_a_step_of_several_tokens(tiny_model, text, settings):
    model = tiny_model("sdpa")
    programs = export(model, text[:, :20], multi_token_decode=True)
    for length in (3, SEQ_LENGTH - 2, 2 * SEQ_LENGTH + 1):
        ids = text[:, :length]
        torch.testing.assert_close(run(programs, model, ids, settings), eager(model, ids, settings), **CLOSE)

    inputs = first_inputs(model, text[:, :30], settings)
    outputs = programs["prefill"](**copy.deepcopy(inputs))
    inputs |= {"input_ids": text[:, 30:50], "position_ids": torch.arange(30, 50)[None], CACHE_NAME: outputs[CACHE_NAME]}
    expected = model(text[:, :50], ntk_alpha=torch.ones(1, 1)).logits[:, 30:]
    torch.testing.assert_close(programs["decode"](**inputs)["logits"], expected, **CLOSE)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.no_cover
def test_a_static_cache(tiny_model, text):
    model = tiny_model("sdpa")
    settings = GenerationConfig(do_sample=False, pad_token_id=0, cache_implementation="static")
    settings.max_cache_len = 160
    programs = export(model, text[:, :20], generation_config=copy.deepcopy(settings))
    for length in PROMPTS:
        captured = utils.decompose_prefill_decode(
            model, {"input_ids": text[:, :length]}, generation_config=copy.deepcopy(settings)
        )
        prompt, step = (copy.deepcopy(dict(captured[name][1])) for name in ("prefill", "decode"))
        outputs = programs["prefill"](**prompt)
        logits = programs["decode"](**{**step, CACHE_NAME: outputs[CACHE_NAME]})["logits"]
        expected = eager(model, text[:, :length], settings)
        torch.testing.assert_close(outputs["logits"][:, -1], expected[:, 0], **CLOSE)
        torch.testing.assert_close(logits[:, -1], expected[:, 1], **CLOSE)
