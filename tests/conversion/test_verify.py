"""`verify`: models of every format in their own classes, equal logits pass, any other difference fails."""

import json
import math
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from qwen1 import QWenLMHeadModel
from qwen1.conversion.checking import logits
from qwen1.conversion.checking.comparison import TOLERANCE
from qwen1.conversion.checking.logits import compare, compare_logits, run
from qwen1.conversion.checking.models import load_model
from qwen1.conversion.checking.token_ids import parse_ids, random_ids
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.qwen2 import qwen2_config
from qwen1.conversion.formats.recipes import convert_tensors
from qwen1.conversion.opening.sources import open_source

EXACT = 2e-5  # of logits with a standard deviation of 1.5: what another order of summation makes


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_weights(folder, change_them):
    tensors = load_file(folder / "model.safetensors")
    change_them(tensors)
    save_file(tensors, folder / "model.safetensors")


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def copy_case(golden, tmp_path):
    """Copy a golden checkpoint, to be changed: (case) -> folder."""

    def copy(case):
        target = tmp_path / case.replace("/", "_")
        shutil.copytree(golden / case, target, copy_function=shutil.copyfile)
        (target / "expected.safetensors").unlink(missing_ok=True)
        return target

    return copy


@pytest.fixture
def as_qwen2(tmp_path):
    """Write the weights of a QWen checkpoint as a Qwen2 one: (source, dtype) -> folder."""

    def convert(path, dtype=torch.float32, **changes):
        source = open_source(path)
        names = {name for recipe in source.to_hf() for name in recipe.sources}
        tensors = convert_tensors(source.to_hf(), {name: source.weights.read(name) for name in names})
        config = {**qwen2_config(source.architecture, str(dtype).removeprefix("torch.")), **changes}
        return write(tmp_path / "qwen2", config, {name: tensor.to(dtype) for name, tensor in tensors.items()})

    return convert


def assert_close(logits, expected):
    assert (logits - expected.flatten(0, 1)).abs().max() < EXACT


# --- each format in its own class ---


@pytest.mark.parametrize(
    ("case", "model_class"),
    [("llama_gqa", LlamaForCausalLM), ("qwen2_gqa_tied", Qwen2ForCausalLM), ("qwen2_mha_untied", Qwen2ForCausalLM)],
)
def test_hugging_face_format(golden, case, model_class):
    expected = load_file(golden / "native" / case / "expected.safetensors")
    model = load_model(golden / "native" / case)
    assert type(model) is model_class and not model.training
    assert model.config._attn_implementation == "eager"
    assert_close(run(model, expected["ids"]), expected["logits"])


@pytest.mark.parametrize("case", ["aug_ntk_logn", "aug_residual_post_ln", "dec_ntk_logn"])
def test_qwen(golden, golden_tensors, case):
    model = load_model(golden / "model" / case)
    assert type(model) is QWenLMHeadModel and not model.training
    for name, expected in golden_tensors(case).items():
        if name.startswith("prefill_"):
            length = int(name.removeprefix("prefill_"))
            ids = golden_tensors(case)[f"ids_{length}"][:, :length]
            assert_close(run(model, ids), expected)


@pytest.mark.parametrize("case", ["mp1", "mp2"])
def test_llama_in_the_original_format(golden, case):
    expected = load_file(golden / "llama_meta" / "expected.safetensors")
    model = load_model(golden / "llama_meta" / case)
    assert type(model) is LlamaForCausalLM and not model.training
    assert_close(run(model, expected["ids"]), expected["logits"])


def test_llama_with_other_eps_base_and_a_tied_head(golden, tmp_path):
    tensors = torch.load(golden / "llama_meta" / "mp1" / "consolidated.00.pth", weights_only=True)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    arguments = json.loads((golden / "llama_meta" / "mp1" / "params.json").read_text())
    torch.save({"model": tensors, "model_args": arguments}, tmp_path / "plain.pt")
    torch.save({"model": tensors, "model_args": {**arguments, "rope_theta": 1e6}}, tmp_path / "base.pt")
    torch.save({"model": tensors, "model_args": {**arguments, "norm_eps": 0.5}}, tmp_path / "eps.pt")
    model = load_model(tmp_path / "plain.pt")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["tok_embeddings.weight"])
    for other in ("base.pt", "eps.pt"):
        assert not compare(tmp_path / "plain.pt", tmp_path / other).passed


def test_params_from_elsewhere(golden, copy_case, tmp_path):
    folder = copy_case("llama_meta/mp2")
    (folder / "params.json").rename(tmp_path / "other.json")
    with pytest.raises(CheckpointError, match="--params"):
        load_model(folder)
    assert compare(folder, golden / "llama_meta" / "mp1", params=tmp_path / "other.json").largest == 0
    # The option concerns the original format only.
    assert not compare(folder, golden / "native" / "llama_gqa", params=tmp_path / "other.json").passed


def test_code_and_pickles_of_2023(golden, copy_case):
    folder = copy_case("model/aug_plain")
    auto_map = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    change(folder / "config.json", auto_map=auto_map)
    for name in ("configuration_qwen.py", "modeling_qwen.py"):
        (folder / name).write_text("raise SystemExit('this code must not run')")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert compare(folder, golden / "model" / "aug_plain").largest == 0


def test_dtype_and_rounding(golden):
    path = golden / "llama_meta" / "mp1"
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(golden / "model" / "aug_plain", dtype=torch.bfloat16).dtype == torch.bfloat16
    for case in (path, golden / "model" / "aug_plain"):
        plain, rounded = load_model(case), load_model(case, rounded=torch.bfloat16)
        assert rounded.dtype == torch.float32
        for before, after in zip(plain.parameters(), rounded.parameters(), strict=True):
            assert torch.equal(before.bfloat16().float(), after)
        assert any(not torch.equal(*pair) for pair in zip(plain.parameters(), rounded.parameters(), strict=True))


# --- what can't be loaded ---


@pytest.mark.parametrize(
    ("case", "missing", "unknown", "shape"),
    [
        (
            "model/aug_plain",
            "'lm_head.weight' is missing",
            "'lm_head.bias' .* is not a weight",
            r"has shape \(7, 64\)",
        ),
        (
            "native/llama_gqa",
            "1 missing tensors, first lm_head.weight",
            "1 unexpected tensors, first lm_head.bias",
            "1 mismatched tensors, first .*lm_head.weight",
        ),
    ],
)
def test_incomplete_checkpoints_are_refused(copy_case, case, missing, unknown, shape):
    folder = copy_case(case)
    # Copies, for some releases of safetensors write over a file that is still mapped.
    whole = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=missing):
        load_model(folder)
    save_file({**whole, "lm_head.bias": torch.zeros(320)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=unknown):
        load_model(folder)
    save_file({**whole, "lm_head.weight": torch.zeros(7, 64)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=shape):
        load_model(folder)


def test_damaged_llama_files_are_refused(copy_case):
    folder = copy_case("llama_meta/mp2")
    tensors = torch.load(folder / "consolidated.01.pth", weights_only=True)
    tensors.pop("norm.weight")
    torch.save(tensors, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match="'01/norm.weight' is missing"):
        load_model(folder)
    (folder / "consolidated.01.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="consolidated.01.pth is truncated"):
        load_model(folder)


def test_stored_tables_are_no_reason_to_refuse(copy_case):
    for case, table in (
        ("model/aug_plain", "transformer.h.0.attn.masked_bias"),
        ("native/llama_gqa", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ):
        folder = copy_case(case)
        change_weights(folder, lambda tensors, table=table: tensors.update({table: torch.zeros(1)}))
        load_model(folder)


def test_adapters_and_quantised_weights_are_refused(copy_case, tmp_path):
    folder = copy_case("model/aug_plain")
    change(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="quantised"):
        load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge-lora"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="nowhere doesn't exist"):
        compare(folder.parent / "nowhere", folder)


# --- token ids ---


def test_random_ids_depend_on_the_seed_alone():
    ids = random_ids(50, 200, 3, seed=1)
    assert ids.shape == (3, 200) and ids.dtype == torch.int64
    assert ids.min() == 0 and ids.max() == 49
    torch.manual_seed(7)
    assert torch.equal(ids, random_ids(50, 200, 3, seed=1))
    assert not torch.equal(ids, random_ids(50, 200, 3, seed=2))


def test_ids_as_text_and_in_files(tmp_path):
    assert parse_ids("1,2,3").tolist() == [[1, 2, 3]]
    assert parse_ids(" 4 , 5 ").tolist() == [[4, 5]]
    assert parse_ids("0").tolist() == [[0]]
    (tmp_path / "one.json").write_text("[1, 2, 3]")
    (tmp_path / "rows").write_text("[[1, 2], [3, 4]]")
    assert parse_ids(str(tmp_path / "one.json")).tolist() == [[1, 2, 3]]
    assert parse_ids(str(tmp_path / "rows")).tolist() == [[1, 2], [3, 4]]
    assert parse_ids("1,2").dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,x,3", "'x' in '1,x,3'"),
        ("1,-2", "'-2' in"),
        ("1,,2", "'' in"),
        ("1.5", "'1.5' in"),
        ("99999999999999999999", "99999999999999999999 in"),
        ("", "'' in"),
        ("missing.json", "missing.json is not a JSON file"),
    ],
)
def test_wrong_ids_are_named(text, words):
    with pytest.raises(CheckpointError, match=words):
        parse_ids(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2.5]", "2.5 in"),
        ("[true]", "True in"),
        ("[[1], 2]", "has 2 where a list"),
        ("[[1, 2], [3]]", "rows of 1 and of 2 ids"),
        ("[]", r"has \[\] where"),
        ("[[]]", r"has \[\] where"),
        ('{"a": 1}', "where a list"),
        ("[1, 2", "not a JSON file"),
    ],
)
def test_wrong_ids_in_files_are_named(tmp_path, content, words):
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        parse_ids(str(tmp_path / "ids.json"))


def test_ids_beyond_the_vocabulary_are_named(golden):
    path = golden / "model" / "aug_plain"
    assert compare(path, path, ids=torch.tensor([[0, 319]])).passed
    with pytest.raises(CheckpointError, match="Token id 320 is out of the vocabulary: .* 0 to 319"):
        compare(path, path, ids=torch.tensor([[1, 320]]))
    with pytest.raises(CheckpointError, match="shape"):
        compare(path, path, ids=torch.tensor([1, 2]))
    with pytest.raises(CheckpointError, match="2 rows of 0 tokens"):
        compare(path, path, tokens=0)


# --- comparing ---


@pytest.mark.parametrize("case", ["model/dec_ntk_logn", "native/qwen2_gqa_tied", "llama_meta/mp2"])
def test_a_checkpoint_equals_itself_exactly(golden, case):
    comparison = compare(golden / case, golden / case)
    assert (comparison.largest, comparison.mean, comparison.agreement) == (0, 0, 1)
    assert comparison.passed and comparison.std > 1 and comparison.remarks == ()


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.h.1.attn.c_attn.bias",
        "transformer.h.1.mlp.w1.weight",
        "lm_head.weight",
    ],
)
def test_any_wrong_weight_fails(golden, copy_case, name):
    folder = copy_case("model/aug_plain")
    change_weights(folder, lambda tensors: tensors[name].mul_(1.05))
    comparison = compare(golden / "model" / "aug_plain", folder)
    assert not comparison.passed and comparison.largest > 10 * TOLERANCE


def test_another_architecture_with_the_same_weights_passes(golden, as_qwen2):
    path = golden / "model" / "aug_ntk_logn"
    converted = as_qwen2(path)
    comparison = compare(path, converted)
    assert comparison.passed and comparison.largest < EXACT
    assert comparison.tokens == 2 * 32  # trained length
    longer = compare(path, converted, tokens=40)
    assert not longer.passed and "more than the trained 32" in longer.remarks[0]


def test_weights_rounded_by_the_conversion(golden, as_qwen2):
    path = golden / "model" / "aug_plain"
    converted = as_qwen2(path, dtype=torch.bfloat16)
    assert not compare(path, converted).passed
    assert compare(path, converted, rounded=torch.bfloat16).largest < EXACT
    assert not compare(converted, path, rounded=torch.bfloat16).passed  # only the first one is rounded


def test_rope_scaling_is_remarked_on(golden, as_qwen2):
    path = golden / "model" / "aug_plain"
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    comparison = compare(path, as_qwen2(path, rope_scaling=scaling, max_position_embeddings=128))
    assert not comparison.passed and "'yarn'" in comparison.remarks[0]


def test_rope_scaling_that_both_have_is_compared_without_remarks(copy_case, as_qwen2):
    path = copy_case("model/aug_plain")
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    change(path / "config.json", rope_parameters=rope)
    comparison = compare(path, as_qwen2(path))
    assert comparison.passed and comparison.largest < EXACT and not comparison.remarks


def test_padding_rows_are_left_out(golden, tmp_path):
    path = golden / "native" / "qwen2_mha_untied"
    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], torch.full((16, 64), 9.0)))
    config = {**json.loads((path / "config.json").read_text()), "vocab_size": 336}
    padded = write(tmp_path / "padded", config, tensors)
    for pair in ((path, padded), (padded, path)):
        comparison = compare(*pair)
        assert comparison.passed and comparison.vocabulary == 320 and comparison.agreement == 1
        assert "first 320 are compared" in comparison.remarks[0]


def test_ids_and_tokens_that_are_given(golden):
    path = golden / "native" / "llama_gqa"
    assert compare(path, path).tokens == 2 * 64
    assert compare(path, path, tokens=5).tokens == 2 * 5
    assert compare(path, path, ids=torch.tensor([[1, 2, 3]])).tokens == 3


def test_a_seed_gives_other_tokens(golden):
    path = golden / "native" / "llama_gqa"
    stds = [compare(path, path, tokens=8, seed=seed).std for seed in (0, 0, 1)]
    assert stds[0] == stds[1] != stds[2]


def test_only_one_model_is_in_memory(golden, monkeypatch):
    models, loaded = [], []

    def run_and_remember(model, ids):
        models.append(weakref.ref(model))
        return run(model, ids)

    def progress(step):
        if step.startswith("Loading"):
            loaded.append([model() for model in models])

    monkeypatch.setattr(logits, "run", run_and_remember)
    compare(golden / "model" / "aug_plain", golden / "native" / "llama_gqa", progress=progress)
    assert loaded == [[], [None]]


# --- the numbers ---


def test_numbers_by_hand():
    first = torch.tensor([[1.0, 2.0, 3.0], [9.0, 0.0, 0.0], [0.0, 5.0, 4.0], [1.0, 0.0, 0.0]])
    second = first.clone()
    second[0, 0] = 1.5
    second[2, 2] = 7.0  # another greedy token
    comparison = compare_logits(first, second, tolerance=2.9)
    assert comparison.largest == 3.0
    assert comparison.mean == pytest.approx(3.5 / 12)
    assert comparison.std == pytest.approx(first.std().item())
    assert comparison.agreement == 0.75
    assert (comparison.tokens, comparison.vocabulary) == (4, 3)
    assert not comparison.passed
    assert compare_logits(first, second, tolerance=3.0).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_what_is_not_finite_never_passes(value, which):
    pair = [torch.zeros(4, 5), torch.zeros(4, 5)]
    for number in which:
        pair[number][1, 2] = value
    comparison = compare_logits(*pair, tolerance=math.inf)
    assert not comparison.passed and "NaN or infinite" in str(comparison)
    assert comparison.to_json()["largest"] is None


def test_nan_in_a_checkpoint_fails(golden, copy_case):
    folder = copy_case("model/aug_plain")
    change_weights(folder, lambda tensors: tensors["transformer.ln_f.weight"].fill_(math.nan))
    assert not compare(folder, folder).passed


def test_json_and_text(golden):
    path = golden / "model" / "aug_plain"
    comparison = compare(path, path)
    report = comparison.to_json()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert list(report) == [
        "largest",
        "mean",
        "std",
        "agreement",
        "tokens",
        "vocabulary",
        "tolerance",
        "remarks",
        "passed",
    ]
    assert report["passed"] is True and report["tolerance"] == TOLERANCE
    assert "100.00% of 64 positions" in str(comparison) and str(comparison).endswith("Passed.")
    assert str(compare_logits(torch.zeros(1, 2), torch.ones(1, 2))).endswith("Failed.")
