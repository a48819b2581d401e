"""Files of weights: what they hold, what is refused, what damage is noticed, and how much memory reading takes."""

import argparse
import gc
import hashlib
import json
import os
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file

from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.files.access import read_json
from qwen1.conversion.files.checksums import check_file, known_checksum, same_bytes
from qwen1.conversion.files.tensors import meta_tensors
from qwen1.conversion.files.weights import Weights, open_weights

SHA_OF_NOTHING = hashlib.sha256(b"").hexdigest()


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "model.a.weight": torch.randn(40, 6),
        "model.b.bias": torch.randn(7).half(),
        "c": torch.randn(3, 3).bfloat16(),
        "steps": torch.arange(5),
    }


@pytest.fixture(params=["pytorch_model.bin", "model.safetensors"])
def weights_file(request, tmp_path, tensors):
    """One file of those tensors, in either container."""
    path = tmp_path / request.param
    save(tensors, path)
    return path


def save(tensors, path):
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def read_all(weights):
    return {name: weights.read(name).clone() for name in weights.infos}


def identical(first, second):
    """Equal to the bit, in names, shapes and dtypes."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype
        and tensor.shape == second[name].shape
        and torch.equal(tensor.contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8))
        for name, tensor in first.items()
    )


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def rewrite(path, data):
    """Write a new file, because the old one may still be mapped."""
    path.unlink()
    path.write_bytes(data)


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        read_all(open_weights(path))
    return str(error.value)


def shards(folder, *parts, places=None, container="model.safetensors"):
    """Write a file per part and the index of all, with other `places` if told to."""
    listed = {}
    stem, suffix = container.split(".")
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}"
        save(part, folder / name)
        listed |= dict.fromkeys(part, name)
    index = folder / f"{container}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed if places is None else listed | places}))
    return folder


# --- what files hold ---


def test_every_tensor_is_read_as_it_was_saved(weights_file, tensors):
    weights = Weights([weights_file])
    assert {name: (info.dtype, info.shape) for name, info in weights.infos.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert identical(read_all(weights), tensors)
    assert weights.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert list(weights.dtypes.items())[0] == (torch.float32, 240)
    assert all(info.file == weights_file and str(weights_file) in str(info) for info in weights.infos.values())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.uint8, torch.bool])
def test_every_dtype_is_read_to_the_bit(tmp_path, dtype):
    tensor = torch.arange(64, dtype=torch.uint8).view(dtype if dtype != torch.bool else torch.uint8)
    for name in ("a.safetensors", "a.bin"):
        save({"a": tensor.to(dtype)}, tmp_path / name)
        assert identical(read_all(Weights([tmp_path / name])), {"a": tensor.to(dtype)})


def test_a_dtype_without_a_counterpart_is_named(tmp_path):
    save_file({"wave": torch.ones(3, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"'wave' in .*a\.safetensors has dtype C64"):
        Weights([tmp_path / "a.safetensors"])


def test_tensors_that_share_memory_are_known_as_such(tmp_path):
    one, other = torch.randn(4, 4), torch.randn(4, 4)
    views = {"a": one, "b": one, "c": one[:2], "d": one.T, "e": other, "none": torch.empty(0), "nil": torch.empty(0)}
    torch.save(views, tmp_path / "a.bin")
    weights = Weights([tmp_path / "a.bin"])
    assert {name: info.same_as for name, info in weights.infos.items() if info.same_as} == {"b": "a"}
    assert identical(read_all(weights), views)
    assert weights.nbytes == (16 + 8 + 16 + 16) * 4, "b takes no memory of its own"
    assert weights.infos["a"].memory == weights.infos["b"].memory == "a" != weights.infos["e"].memory


def test_parameters_lose_their_gradients(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a.bin")
    assert not Weights([tmp_path / "a.bin"]).read("a").requires_grad


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_a_training_checkpoint_is_seen_through(tmp_path, tensors, wrapper):
    extras = {"model_args": {"dim": 64}, "iter_num": 3, "best_val_loss": torch.tensor(1.5), "optimizer": {"state": {}}}
    torch.save({wrapper: OrderedDict(tensors), **extras}, tmp_path / "ckpt.pt")
    weights = Weights([tmp_path / "ckpt.pt"])
    assert identical(read_all(weights), tensors)
    assert weights.extras == extras


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_and_wrapped_modules_are_left_out(tmp_path, tensors, prefix):
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "a.pth")
    assert identical(read_all(Weights([tmp_path / "a.pth"])), tensors)


def test_names_that_differ_in_their_prefix_only_are_refused(tmp_path):
    torch.save({"a": torch.ones(2), "module.a": torch.zeros(2)}, tmp_path / "a.pth")
    assert "'a' is twice in" in refusal(tmp_path / "a.pth")


def test_shapes_without_values_are_made_of_what_files_announce(weights_file, tensors):
    weights = Weights([weights_file])
    for tensor, meta in zip(tensors.values(), meta_tensors(weights.infos, tensors), strict=True):
        assert (meta.shape, meta.dtype, meta.device.type) == (tensor.shape, tensor.dtype, "meta")


# --- pickles are data, not programs ---


class Touch:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["tensor", "extra", "top"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, zipped, place):
    trace, evil = tmp_path / "trace", Touch(tmp_path / "trace")
    content = {"tensor": {"a": evil}, "extra": {"model": {"a": torch.ones(2)}, "args": evil}, "top": evil}[place]
    path = tmp_path / "a.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert str(path) in message and not trace.exists()
    if zipped:
        assert "pickles more than tensors (posix.system)" in message
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file would have run"


def test_what_is_refused_in_a_pickle_is_named(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert "(argparse.Namespace)" in message and "Save the bare state dict" in message
    assert "add_safe_globals" not in message, "no advice on how to allow it"


@pytest.mark.parametrize(
    "content, named",
    [
        ([torch.ones(2)], "holds a list, not tensors by name"),
        (torch.ones(2), "holds a Tensor, not tensors by name"),
        ({"a": 5}, "'a' in .* names no dense tensor, but a int"),
        ({"layers": {"a": torch.ones(2)}}, "'layers' in .* names no dense tensor, but a dict"),
        ({1: torch.ones(2)}, "1 in .* is no name of a tensor"),
        ({"a": torch.eye(2).to_sparse()}, "'a' in .* names no dense tensor, but a tensor of .*sparse_coo"),
        ({"a": torch.empty(2, device="meta")}, "'a' in .* names no dense tensor, but a tensor of .*on meta"),
    ],
)
def test_anything_but_dense_tensors_by_name_is_refused(tmp_path, content, named):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=named):
        Weights([tmp_path / "a.bin"])


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_refused(tmp_path):
    torch.save({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, tmp_path / "a.bin")
    assert "'a' in" in (message := refusal(tmp_path / "a.bin")) and "qint8" in message


@pytest.mark.filterwarnings("ignore")
def test_torchscript_programs_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    assert "TorchScript program" in refusal(tmp_path / "a.pt")


def test_files_older_than_torch_1_6_are_refused_with_the_remedy(tmp_path, tensors):
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    assert "older than torch 1.6" in (message := refusal(tmp_path / "a.bin")) and "save it anew" in message


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_repacked_file_is_read_or_refused_but_never_misread(tmp_path, compression):
    content = {"a": torch.arange(1000.0)}
    torch.save(content, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as old, zipfile.ZipFile(tmp_path / "b.bin", "w") as new:
        for record in old.namelist():
            new.writestr(record, old.read(record), compression if "/data/" in record else zipfile.ZIP_STORED)
    if compression == zipfile.ZIP_STORED:
        assert identical(read_all(Weights([tmp_path / "b.bin"])), content)
    else:
        assert "is compressed" in (message := refusal(tmp_path / "b.bin")) and "/data/0'" in message


# --- damage ---


def test_a_truncated_file_is_an_error_that_names_it(weights_file):
    data = weights_file.read_bytes()
    for share in (0.0, 0.001, 0.02, 0.3, 0.5, 0.8, 0.97, 0.999):
        rewrite(weights_file, data[: int(len(data) * share)])
        assert str(weights_file) in refusal(weights_file), share
    rewrite(weights_file, data[:-1])
    assert str(weights_file) in refusal(weights_file)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        assert f"{tmp_path / name} doesn't exist" in refusal(tmp_path / name)


def test_something_else_in_the_place_of_weights_is_an_error_that_names_it(weights_file):
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", b"<html>", b"\0" * 4096):
        rewrite(weights_file, content)
        assert str(weights_file) in refusal(weights_file)


@pytest.mark.parametrize("region", ["anywhere", "pickle", "directory", "tensors"])
def test_a_flipped_bit_in_a_pickle_is_noticed_wherever_it_matters(tmp_path, tensors, region):
    path = tmp_path / "ckpt.pt"
    content = {"model": tensors, "model_args": {"dim": 64, "n_heads": 4}}
    torch.save(content, path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    pickled, stored = data.index(b"model_args"), data.index(tensors["model.a.weight"].numpy().tobytes())
    start, stop = {
        "anywhere": (0, len(data)),
        "pickle": (pickled - 300, pickled + 40),
        "directory": (directory, len(data)),
        "tensors": (stored, stored + 960),
    }[region]
    noticed = 0
    for bit in random.Random(0).sample(range(8 * start, 8 * stop), 200):
        rewrite(path, flipped(data, bit))
        try:
            weights = Weights([path])
            assert identical(read_all(weights), tensors), bit
            assert weights.extras == {"model_args": content["model_args"]}, bit
        except CheckpointError as error:
            assert str(path) in str(error), bit
            noticed += 1
    assert noticed >= {"anywhere": 50, "pickle": 200, "directory": 40, "tensors": 200}[region]


def test_a_flipped_bit_in_the_header_of_a_safetensors_file_is_noticed(tmp_path, tensors):
    """Or it changes a name, which is for the configuration or the index to notice, or nothing."""
    path = tmp_path / "model.safetensors"
    save(tensors, path)
    data = path.read_bytes()
    noticed = 0
    for bit in random.Random(0).sample(range(8 * (8 + int.from_bytes(data[:8], "little"))), 400):
        rewrite(path, flipped(data, bit))
        try:
            found = read_all(Weights([path]))
            changed = found.keys() - tensors.keys()
            assert len(changed) <= 1, bit
            renamed = {
                (tensors.keys() - found.keys()).pop() if name in changed else name: found[name] for name in found
            }
            assert identical(renamed, tensors), bit
        except CheckpointError as error:
            assert str(path) in str(error), bit
            noticed += 1
    assert noticed >= 250


def test_a_name_that_a_flipped_bit_changes_contradicts_the_index(tmp_path, tensors):
    folder = shards(tmp_path, tensors)
    path = folder / "model-00001-of-00001.safetensors"
    data = path.read_bytes()
    rewrite(path, data.replace(b"model.b.bias", b"model.c.bias"))
    assert "'model.b.bias' is missing" in (message := refusal(folder)) and path.name in message


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": "\xff"}', b"", b"5"])
def test_a_damaged_json_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


# --- known checksums ---


@pytest.fixture(params=["cache", "local folder", "SHA256SUMS", "checklist.chk"])
def published(request, tmp_path, tensors, hub):
    """A file whose checksum is known, in each of the places where one is found."""
    save(tensors, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    if request.param in ("cache", "local folder"):
        hub.add("tester/model").commit("main", {"model.safetensors": data})
        place = {"cache_dir" if request.param == "cache" else "local_dir": tmp_path / "downloaded"}
        return Path(hf_hub_download("tester/model", "model.safetensors", endpoint=hub.url, token=False, **place))
    algorithm = "sha256" if request.param == "SHA256SUMS" else "md5"
    line = f"{hashlib.new(algorithm, data).hexdigest()}  model.safetensors\n"
    (tmp_path / request.param).write_text(f"{'0' * 32}  other.safetensors\n{line}")
    return tmp_path / "model.safetensors"


def test_any_flipped_bit_under_a_known_checksum_is_noticed(published, tensors):
    assert identical(read_all(Weights([published])), tensors)
    real, times = published.resolve(), (published.stat().st_atime, published.stat().st_mtime)
    data = real.read_bytes()
    algorithm, digest = known_checksum(published)
    assert hashlib.new(algorithm, data).hexdigest() == digest
    header = 8 + int.from_bytes(data[:8], "little")
    for bit in random.Random(0).sample(range(8 * header, 8 * len(data)), 200):
        rewrite(real, flipped(data, bit))
        os.utime(real, times)  # disks that rot leave the time alone
        with pytest.raises(CheckpointError, match="is damaged") as error:
            read_all(Weights([published]))
        assert str(published) in str(error.value) and digest in str(error.value)


def test_a_file_written_after_its_download_has_no_known_checksum(tmp_path, tensors, hub):
    save(tensors, tmp_path / "model.safetensors")
    hub.add("tester/model").commit("main", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    arguments = {"endpoint": hub.url, "token": False, "local_dir": tmp_path / "downloaded"}
    path = Path(hf_hub_download("tester/model", "model.safetensors", **arguments))
    tensors["c"] = tensors["c"] + 1
    save(tensors, path)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 10))
    assert known_checksum(path) is None
    assert identical(read_all(Weights([path])), tensors)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"revision\n",
        b"revision\n\xff\n1.0\n",
        f"revision\n{SHA_OF_NOTHING}\nyesterday\n".encode(),
        b"revision\n"
        + b"0" * 40
        + b"\n9999999999.5\n",  # the id of a small file in git, which is no checksum of its bytes
    ],
)
def test_records_without_a_checksum_are_passed_over(weights_file, record):
    metadata = weights_file.parent / ".cache" / "huggingface" / "download" / f"{weights_file.name}.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_bytes(record)
    (weights_file.parent / "SHA256SUMS").write_bytes(b"\xff\xfe no checksum\n\n")
    assert known_checksum(weights_file) is None
    check_file(weights_file)


def test_checksums_are_compared_before_the_first_tensor_of_a_file_only(weights_file, monkeypatch):
    compared = []
    monkeypatch.setattr("qwen1.conversion.files.weights.check_file", compared.append)
    weights = Weights([weights_file])
    assert compared == []
    for _ in range(2):
        read_all(weights)
    assert compared == [weights_file]


@pytest.mark.parametrize("form", ["{}  {}", "{} *{}", "{}  ./{}"])
def test_lists_of_checksums_come_in_several_forms(weights_file, form):
    (weights_file.parent / "SHA256SUMS").write_text(form.format(SHA_OF_NOTHING.upper(), weights_file.name) + "\n")
    assert known_checksum(weights_file) == ("sha256", SHA_OF_NOTHING)
    with pytest.raises(CheckpointError, match=f"its sha256 is .*published was {SHA_OF_NOTHING}"):
        check_file(weights_file)


# --- folders ---


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_read_together(tmp_path, tensors, container):
    names = list(tensors)
    parts = [{name: tensors[name] for name in group} for group in (names[:1], names[1:3], names[3:])]
    weights = open_weights(shards(tmp_path, *parts, container=container))
    assert len(weights.files) == 3
    assert identical(read_all(weights), tensors)
    assert identical({name: weights.read(name).clone() for name in reversed(names)}, dict(reversed(tensors.items())))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "C:\\x",
        "..\\x",
        "a\\b",
        "..",
        ".hidden",
        "",
        5,
        None,
        "a\0b",
    ],
)
def test_an_index_may_name_files_of_its_own_folder_only(tmp_path, tensors, name):
    (tmp_path / "inside").mkdir()
    save(tensors, tmp_path / "x.safetensors")
    folder = shards(tmp_path / "inside", tensors, places={"c": name})
    message = refusal(folder)
    assert "'c'" in message and repr(name) in message and "not a file of the same folder" in message


def test_an_index_that_names_a_missing_file(tmp_path, tensors):
    folder = shards(tmp_path, tensors, places={"more": "model-00002-of-00002.safetensors"})
    assert "model-00002-of-00002.safetensors doesn't exist, but model.safetensors.index.json" in refusal(folder)


def test_an_index_that_names_a_missing_tensor(tmp_path, tensors):
    folder = shards(tmp_path, tensors, places={"more": "model-00001-of-00001.safetensors"})
    assert "'more' is missing" in (message := refusal(folder)) and "model-00001-of-00001.safetensors" in message


def test_an_index_that_leaves_out_a_tensor(tmp_path, tensors):
    folder = shards(tmp_path, tensors)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["c"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'c' in" in (message := refusal(folder)) and "isn't there according to" in message


def test_a_tensor_in_another_file_than_the_index_says(tmp_path, tensors):
    folder = shards(tmp_path, tensors, {"more": torch.ones(2)}, places={"c": "model-00002-of-00002.safetensors"})
    assert "'c' in" in (message := refusal(folder)) and "isn't there according to" in message


def test_a_tensor_in_two_files(tmp_path, tensors):
    folder = shards(tmp_path, tensors, {"c": tensors["c"]})
    message = refusal(folder)
    assert "'c' in" in message and "is in model-00001-of-00002.safetensors as well" in message


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_an_index_without_a_map(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_two_versions_of_the_weights_are_refused(tmp_path, tensors):
    """transformers would read the single file, other programs the shards."""
    folder = shards(tmp_path, tensors)
    save({"c": tensors["c"] + 1}, folder / "model.safetensors")
    assert "two versions of the weights" in refusal(folder)


def test_an_index_of_a_single_file_is_no_second_version(tmp_path, tensors):
    save(tensors, tmp_path / "model.safetensors")
    listed = dict.fromkeys(tensors, "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert identical(read_all(open_weights(tmp_path)), tensors)


def test_safetensors_come_before_pickles(tmp_path, tensors):
    save(tensors, tmp_path / "model.safetensors")
    save({"other": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert [file.name for file in open_weights(tmp_path).files] == ["model.safetensors"]


def test_a_folder_without_weights(tmp_path):
    message = refusal(tmp_path)
    assert str(tmp_path) in message and "model.safetensors" in message and "consolidated.00.pth" in message


def test_model_parallel_files_are_numbered(tmp_path, tensors):
    for number in range(3):
        save({name: tensor + number for name, tensor in tensors.items()}, tmp_path / f"consolidated.{number:02d}.pth")
    weights = open_weights(tmp_path)
    assert len(weights.infos) == 3 * len(tensors)
    for number in range(3):
        assert torch.equal(weights.read(f"{number:02d}/c"), tensors["c"] + number)


@pytest.mark.parametrize("numbers, missing", [((1,), 0), ((0, 2), 1), ((1, 2), 0)])
def test_a_missing_model_parallel_file_is_named(tmp_path, tensors, numbers, missing):
    for number in numbers:
        save(tensors, tmp_path / f"consolidated.{number:02d}.pth")
    assert f"consolidated.{missing:02d}.pth is missing" in refusal(tmp_path)


def test_damage_in_the_second_shard_names_the_second_shard(tmp_path, tensors):
    folder = shards(tmp_path, {"a": tensors["c"]}, {"b": tensors["c"]}, container="pytorch_model.bin")
    path = folder / "pytorch_model-00002-of-00002.bin"
    data = path.read_bytes()
    place = data.index(tensors["c"].view(torch.int16).numpy().tobytes())
    rewrite(path, flipped(data, 8 * place))
    weights = open_weights(folder)
    weights.read("a")
    with pytest.raises(CheckpointError, match=path.name):
        weights.read("b")


def test_files_are_compared_to_the_byte(tmp_path):
    for name, content in (("a", b"x" * 3000000), ("b", b"x" * 3000000), ("c", b"x" * 2999999 + b"y"), ("d", b"x")):
        (tmp_path / name).write_bytes(content)
    os.link(tmp_path / "a", tmp_path / "e")
    assert [name for name in "abcde" if same_bytes(tmp_path / "a", tmp_path / name)] == ["a", "b", "e"]


# --- memory ---


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def zeros_file(path, count, nbytes):
    """Tensors of zeros; a safetensors file of them takes no space on disk, while a pickle has checksums."""
    if path.suffix == ".bin":
        torch.save({str(number): torch.zeros(nbytes // 4) for number in range(count)}, path)
        return
    entries = {
        str(number): {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [number * nbytes, (number + 1) * nbytes]}
        for number in range(count)
    }
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + count * nbytes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_reading_one_tensor_at_a_time_takes_little_memory(tmp_path, name):
    zeros_file(tmp_path / name, 24, 25_600_000)
    gc.collect()
    before, most = resident_bytes(), 0
    weights = Weights([tmp_path / name])
    assert weights.nbytes > 600e6
    for tensor_name in weights.infos:
        tensor = weights.read(tensor_name)
        assert not tensor.any(), "which looks at every page"
        most = max(most, resident_bytes())
        del tensor
    assert 25e6 < most - before < 250e6
    weights.close()
    (tmp_path / name).unlink()
