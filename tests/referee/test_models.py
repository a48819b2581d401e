"""transformers' tests of models and configurations, on our classes and, where they don't pass, on its Qwen2 as well."""

import functools
import unittest
import unittest.mock

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

import qwen1
from qwen1.arguments_qwen import TESTED_RELEASES

pytest.importorskip("parameterized")  # their tests use it
if transformers.__version__ != TESTED_RELEASES[-1]:
    pytest.skip(f"these tests are those of transformers {TESTED_RELEASES[-1]}", allow_module_level=True)

HEADS = {
    "Model": "MODEL_MAPPING_NAMES",
    "LMHeadModel": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "ForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "ForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
"""Name of a class behind QWen -> the table in which transformers lists its own classes of that kind."""

VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "stretched": {"seq_length": 4, "use_dynamic_ntk": True, "use_logn_attn": True},  # their texts have 7 tokens
}
"""Name -> what differs from the smallest configuration."""

MIXINS = {
    "test_modeling_common": "ModelTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
    "test_training_mixin": "TrainingTesterMixin",
    "test_tensor_parallel_mixin": "TensorParallelTesterMixin",
    "test_fsdp_mixin": "FSDPTesterMixin",
}
"""Module of their tests -> the class in it that holds the tests of any model."""

REASONS = {
    "test_model_rope_scaling_frequencies": "wants a rotary module that is made from a configuration alone",
    "test_sliding_window_mask": "QWen has no sliding window",
    **dict.fromkeys(
        (f"stretched-test_model_rope_scaling_from_config_{kind}" for kind in ("0_linear", "1_dynamic", "2_yarn")),
        "a configuration that stretches by NTK refuses to be stretched a second time",
    ),
}
"""Test, or variant-test -> why it doesn't pass for us although it does for Qwen2."""

LONG = {
    "test_training_overfit": "plain",
    "test_decoder_only_lm_export": "stretched",
    "test_tp_forward_0": "stretched",
    "test_tp_forward_1": "plain",
    "test_tp_generation": "plain",
    "test_tp_generation_quantized": "grouped",
    "test_tp_backward": "grouped",  # in the others c_attn has three parts, and they look for its gradient in one piece
}
"""Test that takes many seconds -> the one variant in which it runs."""


class Family:
    """What their tests ask of the models under test: classes, sizes, a configuration, inputs.

    Args:
        config_class: of the models.
        classes: in the order of `HEADS`.
        shape: of the configuration, where the families call it differently.
    """

    batch_size, seq_length, is_training = 13, 7, True
    num_hidden_layers, num_attention_heads, hidden_size, vocab_size, num_labels = 2, 4, 32, 99, 3

    def __init__(self, config_class, classes, shape):
        self.config_class, self.shape = config_class, shape
        self.all_model_classes = tuple(classes)
        self.base_model_class, self.causal_lm_class, self.sequence_classification_class, *_ = classes

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **self.shape,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


def our_classes():
    return [getattr(qwen1, f"QWen{head}") for head in HEADS if hasattr(qwen1, f"QWen{head}")]


def our_family(variant):
    shape = {"kv_channels": 8, "ffn_hidden_size": 64, "num_key_value_heads": 4, **VARIANTS[variant]}
    return Family(qwen1.QWenConfig, our_classes(), shape)


def qwen2_family(variant):
    heads = [cls.__name__.removeprefix("QWen").replace("LMHeadModel", "ForCausalLM") for cls in our_classes()]
    shape = {"intermediate_size": 32, "num_key_value_heads": VARIANTS[variant].get("num_key_value_heads", 4)}
    return Family(transformers.Qwen2Config, [getattr(transformers, f"Qwen2{head}") for head in heads], shape)


def model_case(load, family):
    """Their tests of models and configurations for a family."""

    def test_config(case):
        configurations = load("test_configuration_common")
        configurations.ConfigTester(case, config_class=family.config_class).run_common_tests()

    body = {
        "model_tester": family,
        "all_model_classes": family.all_model_classes,
        "test_can_init_all_missing_weights_before_2023": True,  # they read the year at the head of a file
        "test_config": test_config,
    }
    bases = [getattr(load(module), mixin) for module, mixin in MIXINS.items()]
    return type("ModelTest", (*bases, unittest.TestCase), body)


def export_case(load, family):
    """Their tests of the export for ExecuTorch, with a model of a family in place of one from the Hub."""
    module = load("test_executorch")

    def set_up(case):
        torch.manual_seed(0)
        model = family.causal_lm_class(family.get_config())
        with unittest.mock.patch.object(module.AutoModelForCausalLM, "from_pretrained", return_value=model):
            module.ExecutorchTest.setUp(case)

    return type("ExportTest", (module.ExecutorchTest,), {"setUp": set_up})


@functools.cache
def make_case(load, make, whose, variant):
    return make(load, whose(variant))


def list_cases(load):
    """Each of their tests in each variant."""
    names = {
        make: unittest.defaultTestLoader.getTestCaseNames(make_case(load, make, our_family, "plain"))
        for make in (model_case, export_case)
    }
    return [
        pytest.param((make, variant, name), id=f"{variant}-{name}")
        for variant in VARIANTS
        for make in names
        for name in names[make]
        if LONG.get(name, variant) == variant
    ]


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """Our classes stand in the tables of transformers, by which its tests tell the kind of a class."""
    for cls in our_classes():
        table = getattr(modeling_auto, HEADS[cls.__name__.removeprefix("QWen")])
        monkeypatch.setitem(table, "qwen", cls.__name__)


@pytest.fixture(autouse=True)
def among_the_families_in_several_processes(monkeypatch, upstream):
    """Their tests of several processes run for a list of families only."""
    types = upstream("test_tensor_parallel_mixin").TP_DISTRIBUTED_TEST_MODEL_TYPES
    monkeypatch.setattr(upstream("test_tensor_parallel_mixin"), "TP_DISTRIBUTED_TEST_MODEL_TYPES", {*types, "qwen"})


def run_test(case, name):
    """Run one of their tests -> "passed", "skipped: …", or the traceback."""
    result = unittest.TestResult()
    unittest.TestSuite([case(name)]).run(result)
    unhappy = [trace for _, trace in (*result.errors, *result.failures)]
    unhappy += [f"skipped: {reason}" for _, reason in result.skipped]
    return unhappy[0] if unhappy else "passed"


def test_no_worse_than_qwen2(upstream, upstream_case):
    """A test that passes for Qwen2 passes for us, and one that is skipped doesn't pass."""
    make, variant, name = upstream_case
    ours = run_test(make_case(upstream, make, our_family, variant), name)
    theirs = None if ours == "passed" else run_test(make_case(upstream, make, qwen2_family, variant), name)
    reason = REASONS.get(name) or REASONS.get(f"{variant}-{name}")
    if theirs == "passed":
        assert reason, f"passes for Qwen2, but not for us: {ours}"
        pytest.xfail(reason)
    assert not reason, f"{name} is no worse for us than for Qwen2: take it out of REASONS"
    if theirs is not None:
        pytest.skip(f"for Qwen2 as well: {theirs.strip().splitlines()[-1]}")


def test_each_reason_is_that_of_a_test(upstream):
    names = {name for case in list_cases(upstream) for name in (case.values[0][2], "-".join(case.values[0][1:]))}
    assert not REASONS.keys() - names
