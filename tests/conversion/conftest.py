"""A Hugging Face Hub on this machine, for tests that upload and download; checkpoints in few bits."""

import base64
import hashlib
import json
import re
import shutil
import socket
import struct
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".tiktoken"))


def blob_id(path: str, content: bytes) -> str:
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", **body):
        self.status, self.code, self.body = status, code, body


@dataclass
class Repository:
    name: str
    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)

    def commit(self, branch: str, files: dict) -> str:
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> dict:
        return self.commits[self.sha(revision)]


class Hub:
    """What the server keeps, and one method for each route.

    Attributes:
        owner: the one namespace that `token` may write to.
        sent: hashes of the large files that arrived, as often as they did.
        accepted: how many large files arrive before the others are cut off; None for all.
        cut: "reset" closes the connection, "error" answers 500.
        failing: part of a path -> answer to each request with it, a status or what a proxy writes in place of the Hub.
        paths: of all requests.
        messages: of all commits.
    """

    owner, token = "tester", "hf_may_write"

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.accepted: int | None = None
        self.cut = "reset"
        self.failing: dict[str, int | bytes] = {}
        self.paths: list[str] = []
        self.messages: list[str] = []
        self.url = ""

    def add(self, name: str, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(name, private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return repository

    def find(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refusal(404, "RepoNotFound")
        return self.repositories[name]

    def check_writer(self, name: str) -> None:
        if name.partition("/")[0] != self.owner:
            raise Refusal(403, error="You may not write here")

    # --- routes ---

    def create(self, request):
        name = f"{request.json['organization'] or self.owner}/{request.json['name']}"
        self.check_writer(name)
        if name in self.repositories:
            raise Refusal(409, error="exists", url=f"{self.url}/{name}")
        visibility = request.json.get("visibility", "private" if request.json.get("private") else "public")
        self.add(name, visibility == "private")
        return {"url": f"{self.url}/{name}"}

    def validate(self, request):
        front_matter = request.json["content"].split("---\n")[1]
        if yaml.safe_load(front_matter).get("license") == "no such licence":
            raise Refusal(400, errors=[{"message": '"license" must be one of'}], warnings=[])
        return {"errors": [], "warnings": []}

    def preupload(self, request, name, revision):
        self.check_writer(name)
        files = self.find(name).files(revision)
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large(path) else "regular",
                    "shouldIgnore": False,
                    "oid": blob_id(path, files[path]) if path in files else None,
                }
                for path in (file["path"] for file in request.json["files"])
            ]
        }

    def batch(self, request, name):
        self.check_writer(name)
        answer = [dict(wanted) for wanted in request.json["objects"]]
        for wanted in answer:
            if wanted["oid"] not in self.objects:
                upload = {"href": f"{self.url}/upload/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/verify"}}
        return {"transfer": "basic", "objects": answer}

    def upload(self, request, oid):
        if self.accepted is not None and len(self.sent) >= self.accepted:
            if self.cut == "error":
                raise Refusal(500, error="out of order")
            raise ConnectionAbortedError
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, error="another hash")
        self.objects[oid] = request.body
        self.sent.append(oid)
        return {}

    def verify(self, request):
        if len(self.objects[request.json["oid"]]) != request.json["size"]:
            raise Refusal(400, error="another size")
        return {}

    def commit(self, request, name, revision):
        self.check_writer(name)
        repository = self.find(name)
        files = dict(repository.files(revision))
        for line in request.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                self.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, error=f"{value['path']} was never uploaded")
                files[value["path"]] = self.objects[value["oid"]]
        sha = repository.commit(revision, files)
        return {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha}

    def branch(self, request, name, branch):
        self.check_writer(name)
        repository = self.find(name)
        if branch in repository.branches:
            raise Refusal(409, error="exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def info(self, request, name, revision="main"):
        repository = self.find(name)
        siblings = [{"rfilename": path} for path in repository.files(revision)]
        sha = repository.sha(revision)
        return {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}

    def tree(self, request, name, revision, folder=""):
        files = self.find(name).files(revision)
        inside = {path: content for path, content in files.items() if path.startswith(folder.lstrip("/"))}
        if not inside:
            raise Refusal(404, "EntryNotFound")
        return [
            {"type": "file", "path": path, "size": len(content), "oid": blob_id(path, content)}
            for path, content in inside.items()
        ]

    def resolve(self, request, name, revision, path):
        repository = self.find(name)
        sha = repository.sha(revision)
        if path not in repository.files(sha):
            raise Refusal(404, "EntryNotFound")
        content = repository.files(sha)[path]
        request.headers_out = {"ETag": f'"{blob_id(path, content)}"', "X-Repo-Commit": sha}
        return content

    REPO = r"([\w.-]+/[\w.-]+)"
    ROUTES = [
        ("POST", r"/api/repos/create", create),
        ("POST", r"/api/validate-yaml", validate),
        ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", preupload),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", batch),
        ("PUT", r"/upload/(\w+)", upload),
        ("POST", r"/verify", verify),
        ("POST", rf"/api/models/{REPO}/commit/([^/]+)", commit),
        ("POST", rf"/api/models/{REPO}/branch/([^/]+)", branch),
        ("GET", rf"/api/models/{REPO}", info),
        ("GET", rf"/api/models/{REPO}/revision/([^/]+)", info),
        ("GET", rf"/api/models/{REPO}/tree/([^/]+)(/.+)?", tree),
        ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", resolve),
    ]

    def answer(self, request):
        """Find the route of a request and follow it."""
        self.paths.append(request.path)
        for part, answer in self.failing.items():
            if part in request.path and isinstance(answer, bytes):
                return answer
            if part in request.path:
                raise Refusal(answer, error="broken")
        method = "GET" if request.method == "HEAD" else request.method
        token = request.token
        if (method == "POST" or token) and token != self.token:
            raise Refusal(401, error="Invalid username or password.")
        for verb, pattern, route in self.ROUTES:
            if verb == method and (match := re.fullmatch(pattern, request.path)):
                return route(self, request, *(unquote(group) for group in match.groups() if group is not None))
        raise Refusal(404, error=f"no route for {method} {request.path}")


class Handler(BaseHTTPRequestHandler):
    """Reads requests and writes what the Hub answers."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet, or each waits for the acknowledgement of its headers
    hub: Hub

    def handle_request(self):
        body = self.read_body()
        is_json = "json" in self.headers.get("Content-Type", "") and "ndjson" not in self.headers["Content-Type"]
        request = SimpleNamespace(
            method=self.command,
            path=self.path.partition("?")[0],
            token=self.headers.get("Authorization", "").removeprefix("Bearer "),
            body=body,
            json=json.loads(body) if is_json and body else None,
            headers_out={},
        )
        try:
            status, value = 200, self.hub.answer(request)
        except Refusal as refusal:
            status, value = refusal.status, refusal.body
            request.headers_out = {"X-Error-Code": refusal.code} if refusal.code else {}
        except ConnectionAbortedError:  # without a farewell, as when a network breaks
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        self.write(status, request.headers_out, value if isinstance(value, bytes) else json.dumps(value).encode())

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def write(self, status: int, headers: dict, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        """Keep silent."""


@pytest.fixture
def hub():
    """A Hub that listens at `hub.url`; nothing is directed to it yet."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


# --- weights in few bits ---

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Columns of AutoAWQ's words from the lowest bits on."""


def _words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of whole numbers as rows of words, number by number and bit by bit."""
    rows = -(-numbers.shape[0] * bits // 32)
    words = np.zeros((rows, numbers.shape[1]), np.uint32)
    for row, values in enumerate(numbers):
        for bit in range(bits):
            word, place = divmod(row * bits + bit, 32)
            words[word] |= ((values >> bit) & 1).astype(np.uint32) << np.uint32(place)
    return words.view(np.int32)


def _awq_words(numbers: np.ndarray) -> np.ndarray:
    order = np.concatenate([8 * block + np.array(_AWQ_COLUMNS) for block in range(numbers.shape[1] // 8)])
    return np.ascontiguousarray(_words(numbers[:, order].T, 4).T)


@dataclass
class Rounded:
    """A weight rounded to the nearest of what a few bits can say.

    Attributes:
        parts: what is stored of it.
        full: (outputs, inputs) float32, what it then is.
    """

    parts: dict
    full: torch.Tensor


def round_to_nearest(weight: torch.Tensor, settings: dict, seed: int = 0) -> Rounded:
    """Round a weight, (outputs, inputs), without packing and unpacking to find out what came of it."""
    random, bits = np.random.default_rng(seed), settings["bits"]
    outputs, inputs = weight.shape
    size = inputs if settings["group_size"] == -1 else settings["group_size"]
    places = random.permutation(inputs) if settings.get("desc_act") else np.arange(inputs)
    groups, top = places // size, 2**bits - 1
    codes, full = np.zeros((inputs, outputs), np.int64), np.zeros((inputs, outputs), np.float32)
    scales, zeros = [], []
    for group in range(groups.max() + 1):
        values = weight.float().numpy().T[groups == group]
        if settings.get("sym"):
            zero = np.full(outputs, 2 ** (bits - 1))
            scale = np.abs(values).max(0) / 2 ** (bits - 1)
        else:
            least = values.min(0)
            scale = (values.max(0) - least) / top
            zero = np.clip(np.round(-least / scale), 0, top).astype(np.int64)
        scale = scale.astype(np.float16)
        chosen = np.clip(np.round(values / scale.astype(np.float32)) + zero, 0, top).astype(np.int64)
        codes[groups == group] = chosen
        full[groups == group] = (chosen - zero) * scale.astype(np.float32)
        scales.append(scale)
        zeros.append(zero)
    scales, zeros = np.stack(scales), np.stack(zeros)
    if settings["quant_method"] == "awq":
        parts = {"qweight": _awq_words(codes), "qzeros": _awq_words(zeros), "scales": scales}
    else:
        stored = zeros if settings.get("checkpoint_format") == "gptq_v2" else (zeros - 1) & top
        qzeros = np.ascontiguousarray(_words(stored.T, bits).T)
        parts = {"qweight": _words(codes, bits), "qzeros": qzeros, "scales": scales, "g_idx": groups.astype(np.int32)}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
    return Rounded(tensors, torch.from_numpy(np.ascontiguousarray(full.T)))


_LINEAR = re.compile(
    r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.w1|mlp\.w2|mlp\.c_proj)\.weight"
    r"|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight"
)


def round_folder(source, folder, settings, chosen=_LINEAR):
    """Write the same checkpoint twice, `folder/packed` and `folder/full`, whose weights are the same numbers."""
    packed, full = {}, {}
    for seed, (name, tensor) in enumerate(load_file(source / "model.safetensors").items()):
        if not chosen.fullmatch(name):
            full[name] = packed[name] = tensor.half()
            continue
        # Query, key and value have their inputs from one place, so they share an order.
        rounded = round_to_nearest(tensor, settings, seed if "_proj" not in name else len(name.split(".")[2]))
        full[name] = rounded.full
        packed |= {name.removesuffix("weight") + part: values for part, values in rounded.parts.items()}
    config = json.loads((source / "config.json").read_text())
    for kind, tensors in (("packed", packed), ("full", full)):
        shutil.copytree(source, folder / kind, copy_function=shutil.copyfile)
        (folder / kind / "expected.safetensors").unlink(missing_ok=True)
        (folder / kind / "model.safetensors").unlink()
        save_file(tensors, folder / kind / "model.safetensors", {"format": "pt"})
        changes = {"quantization_config": settings} if kind == "packed" else {}
        (folder / kind / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(name="round_to_nearest", scope="session")
def _round_to_nearest():
    return round_to_nearest


@pytest.fixture(name="round_folder", scope="session")
def _round_folder():
    return round_folder


@pytest.fixture
def rounded(tiny_checkpoint, tmp_path):
    """Make a checkpoint twice: (settings, golden case) -> folder with `packed` and `full`."""
    return lambda settings=GPTQ, case="model/aug_plain", **options: round_folder(
        tiny_checkpoint(case), tmp_path / "rounded", settings, **options
    )


@pytest.fixture
def tiny_checkpoint(golden, tmp_path):
    """A golden checkpoint with an MLP of 96, which fills whole words: golden case -> folder."""

    def make(case):
        folder = shutil.copytree(golden / case, tmp_path / "narrow", copy_function=shutil.copyfile)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if re.fullmatch(r".*\.(w1|w2|gate_proj|up_proj)\.weight", name):
                tensors[name] = tensor[:96].clone()
            elif re.fullmatch(r".*\.mlp\.(c_proj|down_proj)\.weight", name):
                tensors[name] = tensor[:, :96].clone()
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        size = {"ffn_hidden_size": 192} if config["model_type"] == "qwen" else {"intermediate_size": 96}
        (folder / "config.json").write_text(json.dumps({**config, **size}))
        return folder

    return make
