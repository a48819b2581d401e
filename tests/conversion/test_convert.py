"""`convert`: logits, tokenizers, settings and refusals, judged by golden data and transformers' own classes."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from qwen1 import QWenLMHeadModel, QWenTokenizerFast
from qwen1.configuration_qwen import AUTO_MAP
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.companions import CODE_FILES
from qwen1.conversion.formats.qwen2 import RopeScaling
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.conversion import plan_conversion
from qwen1.conversion.planning.upgrade import plan_upgrade
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress

NATIVE = ["llama_gqa", "qwen2_gqa_tied", "qwen2_mha_untied"]
TRAINED = {"aug_ntk_logn": (1, 7, 30, 32), "aug_plain": (1, 5), "aug_rotary_base": (3,), "dec_ntk_logn": (1, 7, 32)}
"""Golden case -> its prompts that are no longer than the trained length, where NTK and LogN do nothing."""

LONGROPE = {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.fixture
def converted(tmp_path):
    """Convert a folder: (source, to, **options) -> (new folder, notes)."""
    counter = iter(range(100))

    def run(source, to, params=None, **options):
        origin = open_source(source, params)
        plan = plan_conversion(origin, to, **options)
        target = tmp_path / f"converted-{next(counter)}"
        assert write_plan(plan, target, Progress())
        return target, plan.notes

    return run


@pytest.fixture
def editable(tmp_path, golden):
    """Copy a golden checkpoint, with changes to its configuration: (folder, **changes) -> folder."""

    def copy(name, **changes):
        folder = tmp_path / "editable"
        shutil.copytree(golden / name, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


@pytest.fixture
def qwen_folder(checkpoint_folder, published_vocabulary):
    """A tiny chat checkpoint with the published vocabulary, whose rows it doesn't have, but nobody runs it."""
    shutil.copy(published_vocabulary, checkpoint_folder / "qwen.tiktoken")
    return checkpoint_folder


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def refused(source, to, **options):
    with pytest.raises(CheckpointError) as error:
        plan_conversion(open_source(source), to, **options)
    return str(error.value)


# --- to QWen ---


@pytest.mark.parametrize("name", NATIVE)
def test_native_checkpoints_give_their_golden_logits_as_qwen(converted, golden, name):
    folder, _ = converted(golden / "native" / name, "qwen")
    expected = load_file(golden / "native" / name / "expected.safetensors")
    model = QWenLMHeadModel.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(logits(model, expected["ids"]), expected["logits"], atol=5e-5, rtol=0)
    mask = expected["left_pad_mask"]
    with torch.no_grad():
        padded = model(expected["ids"], attention_mask=mask).logits
    torch.testing.assert_close(padded[mask.bool()], expected["left_pad_logits"][mask.bool()], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["mp1", "mp2"])
def test_llama_in_the_original_format_gives_its_golden_logits_as_qwen(converted, golden, name):
    folder, notes = converted(golden / "llama_meta" / name, "qwen")
    expected = load_file(golden / "llama_meta" / "expected.safetensors")
    model = QWenLMHeadModel.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(logits(model, expected["ids"]), expected["logits"], atol=5e-5, rtol=0)
    assert model.config.seq_length == 4096 and any("--seq-length" in note for note in notes)


def test_the_trained_length_can_be_given_where_the_source_does_not_tell(converted, golden):
    folder, notes = converted(golden / "llama_meta" / "mp1", "qwen", length=512)
    config = json.loads((folder / "config.json").read_text())
    assert config["seq_length"] == config["n_positions"] == config["max_position_embeddings"] == 512
    assert not any("--seq-length" in note for note in notes)


def test_a_single_training_file_is_converted(tmp_path, golden, converted):
    """The file layout of small educational trainings: everything in one pickle, with its settings."""
    params = json.loads((golden / "llama_meta" / "mp1" / "params.json").read_text())
    state = torch.load(golden / "llama_meta" / "mp1" / "consolidated.00.pth", weights_only=True)
    path = tmp_path / "ckpt.pt"
    named = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": named, "model_args": {**params, "max_seq_len": 256}, "iter_num": 3}, path)
    folder, _ = converted(path, "qwen")
    expected = load_file(golden / "llama_meta" / "expected.safetensors")
    model = QWenLMHeadModel.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(logits(model, expected["ids"]), expected["logits"], atol=5e-5, rtol=0)
    assert model.config.seq_length == 256


def test_a_single_file_without_settings_needs_params(tmp_path, golden, converted):
    source = golden / "llama_meta" / "mp1"
    path = tmp_path / "full_sft_512.pth"
    shutil.copy(source / "consolidated.00.pth", path)
    with pytest.raises(CheckpointError, match="--params"):
        open_source(path)
    converted(path, "qwen", params=source / "params.json")


def test_a_model_that_shares_its_embedding_becomes_tied(tmp_path, golden, converted):
    state = torch.load(golden / "llama_meta" / "mp1" / "consolidated.00.pth", weights_only=True)
    state["output.weight"] = state["tok_embeddings.weight"]
    source = tmp_path / "source"
    source.mkdir()
    torch.save(state, source / "consolidated.00.pth")
    shutil.copy(golden / "llama_meta" / "mp1" / "params.json", source)
    folder, _ = converted(source, "qwen")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert torch.equal(QWenLMHeadModel.from_pretrained(folder).lm_head.weight, state["tok_embeddings.weight"])


def test_remote_code_loads_what_was_converted(converted, golden, repository):
    folder, _ = converted(golden / "native" / "qwen2_gqa_tied", "qwen")
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["num_key_value_heads"] == 2 and config["rotary_emb_base"] == 1e6
    assert (config["use_dynamic_ntk"], config["use_logn_attn"], config["seq_length"]) == (False, False, 256)
    for code in folder.glob("*.py"):
        assert code.read_text() == (repository / code.name).read_text()
    assert {path.name for path in folder.glob("*.py")} == set(CODE_FILES)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None}, "sliding"),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": LONGROPE}, "'longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor=0.5"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "qwen2_moe"}, "mixture of experts"),
        ({"model_type": "qwen3"}, "norms of queries and keys"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"num_hidden_layers": 3, "layer_types": None}, "'model.layers.2"),
        ({"num_hidden_layers": 1, "layer_types": None}, "'model.layers.1"),
        ({"num_hidden_layers": 3}, "`num_hidden_layers` (3)"),
        ({"vocab_size": 321}, "(320, 64)"),
        ({"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
    ],
)
def test_what_qwen_cannot_represent_is_refused_by_name(editable, changes, named):
    folder = editable("native/qwen2_gqa_tied", **changes)
    with pytest.raises(CheckpointError) as error:
        plan_conversion(open_source(folder), "qwen")
    assert named in str(error.value)


def test_a_tied_head_that_differs_is_refused(editable):
    folder = editable("native/qwen2_mha_untied", tie_word_embeddings=True)
    assert "lm_head.weight" in refused(folder, "qwen") and "tie_word_embeddings" in refused(folder, "qwen")


# --- to Qwen2 ---


@pytest.mark.parametrize("case", TRAINED)
def test_qwen_gives_its_golden_logits_as_qwen2_within_the_trained_length(converted, golden, case):
    folder, _ = converted(golden / "model" / case, "qwen2")
    expected = load_file(golden / "model" / case / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert type(model) is Qwen2ForCausalLM
    for length in TRAINED[case]:
        ids = expected[f"ids_{length}"][:, :length]
        torch.testing.assert_close(logits(model, ids), expected[f"prefill_{length}"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", TRAINED)
def test_qwen_comes_back_bit_for_bit(converted, golden, case):
    there, _ = converted(golden / "model" / case, "qwen2")
    back, _ = converted(there, "qwen")
    before, after = load_file(golden / "model" / case / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["qwen2_gqa_tied", "qwen2_mha_untied"])
def test_qwen2_comes_back_bit_for_bit(converted, golden, name):
    there, _ = converted(golden / "native" / name, "qwen", max_shard_size="100KB")
    back, _ = converted(there, "qwen2")
    before, after = load_file(golden / "native" / name / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    old, new = (AutoConfig.from_pretrained(folder).to_dict() for folder in (golden / "native" / name, back))
    differing = {key for key in old | new if old.get(key) != new.get(key)}
    assert differing <= {"_name_or_path", "max_window_layers", "transformers_version", "eos_token_id"}


def test_a_target_inside_the_source_is_refused(editable):
    folder = editable("model/aug_plain")
    source = open_source(folder)
    with pytest.raises(CheckpointError, match="inside the source"):
        write_plan(plan_conversion(source, "qwen2"), folder / "new", Progress())


def test_a_foreign_tokenizer_goes_along_to_qwen2_too(golden, converted, tmp_path):
    llama = tmp_path / "llama"
    shutil.copytree(golden / "llama_meta" / "mp1", llama)
    (llama / "tokenizer.model").write_bytes(b"sentencepiece")
    qwen, _ = converted(llama, "qwen")
    assert json.loads((qwen / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    folder, notes = converted(qwen, "qwen2")
    assert (folder / "tokenizer.model").exists() and any("<|im_end|>" in note for note in notes)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2


def test_lost_stretching_is_told_and_the_length_is_the_trained_one(converted, golden):
    folder, notes = converted(golden / "model" / "aug_ntk_logn", "qwen2")
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 32
    assert any("NTK and LogN" in note and "32 tokens" in note for note in notes)
    assert any("max_position_embeddings becomes 32" in note for note in notes)
    assert any("--rope-scaling" in note for note in notes)


@pytest.mark.parametrize("text, limit", [("yarn:4", 128), ("dynamic", 32), ("dynamic:3.5", 32)])
def test_rope_scaling_can_be_chosen(converted, golden, text, limit):
    folder, _ = converted(golden / "model" / "aug_ntk_logn", "qwen2", scaling=RopeScaling.parse(text))
    config = Qwen2Config.from_pretrained(folder)
    kind, _, factor = text.partition(":")
    assert config.max_position_embeddings == limit
    assert config.rope_parameters["rope_type"] == kind and config.rope_parameters["rope_theta"] == 10000
    assert config.rope_parameters["factor"] == float(factor or 2)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_rope_scaling_of_the_source_survives_both_ways(converted, editable, kind):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    source = editable("native/qwen2_mha_untied", rope_parameters=rope, max_position_embeddings=40)
    folder, _ = converted(source, "qwen")
    back, notes = converted(folder, "qwen2")
    assert any(f"stretched by {kind} scaling with factor 2" in note for note in notes)
    assert "scaling of its own" in refused(folder, "qwen2", scaling=RopeScaling.parse("dynamic"))
    ids = torch.randint(0, 320, (1, 70))
    models = [
        model_class.from_pretrained(path, attn_implementation="eager")
        for model_class, path in ((Qwen2ForCausalLM, source), (QWenLMHeadModel, folder), (Qwen2ForCausalLM, back))
    ]
    expected = logits(models[0], ids)
    for model in models[1:]:
        torch.testing.assert_close(logits(model, ids), expected, atol=5e-5, rtol=0)


def test_dynamic_scaling_gives_qwens_own_stretch_at_powers_of_two(converted, golden):
    """With factor 2, transformers computes 2 L / seq_length - 1: alpha, for L a power of two times seq_length."""
    folder, _ = converted(golden / "model" / "dec_ntk_padded", "qwen2", scaling=RopeScaling.parse("dynamic"))
    ours = QWenLMHeadModel.from_pretrained(golden / "model" / "dec_ntk_padded", attn_implementation="eager")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.randint(0, 320, (1, 2 * ours.config.seq_length))
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("text", ["yarn", "yarn:", "yarn:x", "yarn:1", "yarn:inf", "linear:2", "", "dynamic:0.5"])
def test_unknown_rope_scaling_is_refused(text):
    with pytest.raises(CheckpointError, match="yarn:FACTOR"):
        RopeScaling.parse(text)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"rotary_pct": 0.5}, "rotary_pct=0.5"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
        ({"hidden_size": 128}, "contradict"),
        ({"n_layer": 1}, "transformer.h.1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_what_qwen2_cannot_represent_is_refused_by_name(editable, changes, named):
    assert named in refused(editable("model/aug_plain", **changes), "qwen2")


def test_biases_that_qwen2_lacks_must_be_zero(tmp_path, tiny_model, converted):
    model = tiny_model(no_bias=False, use_dynamic_ntk=False, use_logn_attn=False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter) if "c_attn" in name else torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "zero")
    folder, _ = converted(tmp_path / "zero", "qwen2")
    ids = torch.randint(0, 464, (2, 20))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder), ids), logits(model, ids), atol=5e-5, rtol=0
    )
    torch.nn.init.ones_(model.transformer.h[1].mlp.w2.bias)
    model.save_pretrained(tmp_path / "one")
    assert "'transformer.h.1.mlp.w2.bias' is not zero" in refused(tmp_path / "one", "qwen2")


def test_heads_of_any_size_and_tied_grouped_heads_are_converted(tmp_path, tiny_model, converted):
    plain = dict(use_dynamic_ntk=False, use_logn_attn=False)
    model = tiny_model(kv_channels=32, num_key_value_heads=2, tie_word_embeddings=True, **plain)
    model.save_pretrained(tmp_path / "model")
    folder, _ = converted(tmp_path / "model", "qwen2")
    ids = torch.randint(0, 464, (2, 20))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder), ids), logits(model, ids), atol=5e-5, rtol=0
    )


# --- dtypes ---


def test_weights_are_rounded_to_the_dtype_asked_for(converted, golden):
    source = golden / "model" / "aug_plain"
    folder, _ = converted(source, "qwen2", dtype=torch.bfloat16)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"].bfloat16())
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_without_a_dtype_that_of_the_source_stays_also_for_new_biases(tmp_path, golden, converted):
    folder = tmp_path / "llama"
    shutil.copytree(golden / "native" / "llama_gqa", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    target, _ = converted(folder, "qwen")
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.float16}
    assert QWenLMHeadModel.from_pretrained(target).dtype == torch.float16


# --- tokenizers and settings ---


def texts(golden):
    """Golden texts, and a thousand random ones of the pieces that tokenizers stumble over."""
    cases = json.loads((golden / "tokenizer" / "encode.json").read_text())
    pieces = [
        "a",
        " ",
        "  ",
        "\n",
        "\r\n",
        "中文",
        "é",
        "e\u0301",
        "\u0301",
        "<|im_start|>",
        "<|im_end|>",
        "<|extra_7|>",
    ]
    pieces += ["123", "'s", "\u00a0", "🙂", "\t", ".!", "ﷺ", "\u3000", "İ", "ß", "def ", "한국어", "\u200d", "<|"]
    generator = random.Random(0)
    return [case["text"] for case in cases] + [
        "".join(generator.choices(pieces, k=generator.randint(1, 30))) for _ in range(1000)
    ]


@pytest.fixture(scope="module")
def published_chat_as_qwen2(tmp_path_factory, repository, golden, published_vocabulary):
    """Settings and tokenizer of a published chat checkpoint around tiny weights, and what Qwen2 makes of them."""
    source, folder = tmp_path_factory.mktemp("published") / "qwen", tmp_path_factory.mktemp("converted") / "qwen2"
    shutil.copytree(golden / "model" / "aug_plain", source)
    shutil.copy(published_vocabulary, source / "qwen.tiktoken")
    settings = golden / "published_configs" / "2023-08-chat.generation_config.json"
    shutil.copy(settings, source / "generation_config.json")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(repository / name, source)
    assert write_plan(plan_conversion(open_source(source), "qwen2"), folder, Progress())
    return source, folder


@pytest.fixture(scope="module")
def published_tokenizers(published_chat_as_qwen2):
    """Of the Qwen2 folder, and ours."""
    source, folder = published_chat_as_qwen2
    return AutoTokenizer.from_pretrained(folder), QWenTokenizerFast.from_pretrained(source)


@pytest.mark.slow
@pytest.mark.no_cover
def test_written_tokenizer_json_gives_identical_ids(published_tokenizers, golden):
    theirs, ours = published_tokenizers
    assert type(theirs).__name__ == "Qwen2Tokenizer" and len(theirs) == len(ours) == 151851
    assert [theirs(text).input_ids for text in texts(golden)] == [ours(text).input_ids for text in texts(golden)]
    cases = json.loads((golden / "tokenizer" / "encode.json").read_text())
    assert [theirs(case["text"]).input_ids for case in cases] == [case["ids"] for case in cases]
    assert theirs.convert_tokens_to_ids("<|extra_204|>") == 151850


def test_converted_chat_template_gives_the_tokens_of_chat(published_chat_as_qwen2, published_tokenizers):
    theirs, ours = published_tokenizers
    turns = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "?"},
    ]
    for messages in (turns, [{"role": "system", "content": "Be brief."}, *turns], turns[:1]):
        for generate in (True, False):
            ids = [
                tokenizer.apply_chat_template(messages, add_generation_prompt=generate)["input_ids"]
                for tokenizer in (theirs, ours)
            ]
            assert ids[0] == ids[1]
    assert "generation %}" not in (published_chat_as_qwen2[1] / "chat_template.jinja").read_text()


@pytest.mark.slow
@pytest.mark.no_cover
def test_extra_vocabulary_is_in_tokenizer_json(converted, qwen_folder, golden):
    shutil.copy(golden / "tokenizer" / "qwen_extra.tiktoken", qwen_folder)
    folder, _ = converted(qwen_folder, "qwen2")
    ours = QWenTokenizerFast.from_pretrained(qwen_folder)
    words = (golden / "tokenizer" / "qwen_extra_vocab.txt").read_text().split("\n")
    text = " ".join(word.split("\t")[0] for word in words) + "我是一只猫"
    ids = ours(text).input_ids
    assert max(ids) > 151850 and AutoTokenizer.from_pretrained(folder)(text).input_ids == ids


def ends_as(folder, ends, end):
    """Whether a Qwen2 folder has these ends of a text and nothing of QWen's own settings."""
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ends and generation["top_p"] == 0.8
    assert not {"chat_format", "stop_words_ids", "max_window_size"} & generation.keys()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == end
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, 151643)


def test_the_end_of_text_is_right_for_chat_models(published_chat_as_qwen2):
    assert ends_as(published_chat_as_qwen2[1], [151645, 151643], 151645)


@pytest.mark.slow
@pytest.mark.no_cover
def test_the_end_of_text_is_right_for_base_models(converted, published_chat_as_qwen2, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(published_chat_as_qwen2[0], base)
    settings = json.loads((base / "generation_config.json").read_text()) | {"chat_format": "raw"}
    (base / "generation_config.json").write_text(json.dumps(settings))
    assert ends_as(converted(base, "qwen2")[0], 151643, 151643)


@pytest.mark.slow
@pytest.mark.no_cover
def test_vocabulary_comes_back_from_qwen2_byte_for_byte(converted, published_chat_as_qwen2):
    source, there = published_chat_as_qwen2
    back, _ = converted(there, "qwen")
    for name in ("qwen.tiktoken", "chat_template.jinja"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


def qwen2_5_tokenizer(folder, published_vocabulary, golden):
    """A Qwen2 folder whose control tokens behind <|im_end|> are those of Qwen2.5."""
    shutil.copytree(golden / "native" / "qwen2_gqa_tied", folder)
    tokenizer = QWenTokenizerFast(str(published_vocabulary))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {151646: "<|object_ref_start|>", 151657: "<tool_call>"}
    backend["added_tokens"] = [
        {**token, "content": names.get(token["id"], token["content"])}
        for token in backend["added_tokens"]
        if token["id"] in (151643, 151644, 151645, *names)
    ]
    kept = {token["content"]: token["id"] for token in backend["added_tokens"]}
    ranks = {token: rank for token, rank in backend["model"]["vocab"].items() if rank < 151643}
    backend["model"]["vocab"] = ranks | kept
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.slow
def test_other_control_tokens_of_qwen2_are_kept(tmp_path, converted, golden, published_vocabulary):
    source = tmp_path / "qwen2.5"
    qwen2_5_tokenizer(source, published_vocabulary, golden)
    folder, _ = converted(source, "qwen")
    assert not (folder / "qwen.tiktoken").exists()
    theirs, ours = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is QWenTokenizerFast and ours.im_end_id == 151645
    text = "<|im_start|>user\n你好 <tool_call> <|object_ref_start|> Grüße<|im_end|>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert {151646, 151657} <= set(ours(text).input_ids)
    back, _ = converted(folder, "qwen2")
    assert AutoTokenizer.from_pretrained(back)(text).input_ids == theirs(text).input_ids
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == 151643
    again = tmp_path / "again"
    write_plan(plan_upgrade(open_source(folder)), again, Progress())
    assert (again / "tokenizer_config.json").read_text() == (folder / "tokenizer_config.json").read_text()


def test_tokenizer_without_tokenizer_json_is_read_from_its_parts(tmp_path, converted, golden, byte_vocabulary):
    source = tmp_path / "parts"
    shutil.copytree(golden / "native" / "qwen2_gqa_tied", source)
    backend = json.loads(QWenTokenizerFast(str(byte_vocabulary)).backend_tokenizer.to_str())
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    vocabulary = {token: rank for token, rank in backend["model"]["vocab"].items() if rank < 256}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\n")
    added = {str(rank): {"content": token, "special": True} for token, rank in special.items()}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    folder, _ = converted(source, "qwen")
    assert AutoTokenizer.from_pretrained(folder)("hi<|im_end|>").input_ids == [104, 105, 258]


def test_a_damaged_tokenizer_is_refused(editable):
    folder = editable("native/qwen2_gqa_tied")
    (folder / "tokenizer.json").write_text("{")
    assert "The tokenizer in" in refused(folder, "qwen")


def test_a_chat_template_of_its_own_is_kept(converted, checkpoint_folder):
    (checkpoint_folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    folder, _ = converted(checkpoint_folder, "qwen2")
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_a_foreign_tokenizer_is_kept_as_it_is(tmp_path, converted, golden):
    source = tmp_path / "llama"
    shutil.copytree(golden / "native" / "llama_gqa", source)
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    (source / "LICENSE").write_text("licence")
    folder, notes = converted(source, "qwen")
    assert (folder / "tokenizer.model").read_bytes() == b"sentencepiece" and (folder / "LICENSE").exists()
    assert any("can't chat" in note for note in notes)


# --- the request itself ---


def test_converting_to_the_same_architecture_is_refused(golden):
    assert "upgrade" in refused(golden / "model" / "aug_plain", "qwen")
    assert "only QWen" in refused(golden / "native" / "llama_gqa", "qwen2")
    assert "'gguf'" in refused(golden / "native" / "llama_gqa", "gguf")
    scaling = RopeScaling.parse("yarn:2")
    assert "--to qwen2 only" in refused(golden / "native" / "llama_gqa", "qwen", scaling=scaling)
