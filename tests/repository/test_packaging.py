"""The repository as a package: metadata, registration with the Auto classes, and rules for files pushed to the Hub."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qwen1

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(ROOT.glob("*.py"))
PACKAGES = {
    ".".join(path.parent.relative_to(ROOT).parts): path.parent
    for path in (*ROOT.glob("__init__.py"), *ROOT.glob("[a-z]*/**/__init__.py"))
    if path.relative_to(ROOT).parts[0] not in ("build", "dist", "qwen1_commands", "tests")
}
"""The name of each package below `qwen1`, which itself is the empty one, and its folder."""
HUB_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")


def by_name(path: Path) -> str:
    return path.name


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def classes_defined_in(module: str) -> set[str]:
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def auto_map_references() -> list[tuple[str, str, str]]:
    references = []
    for name in HUB_FILES:
        if name.endswith(".json"):
            for auto_class, target in json.loads((ROOT / name).read_text()).get("auto_map", {}).items():
                targets = target if isinstance(target, list) else [target]
                references += [(name, auto_class, reference) for reference in targets if reference is not None]
    return references


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exported_names_exist_and_are_sorted():
    assert [name for name in qwen1.__all__ if not hasattr(qwen1, name)] == []
    assert qwen1.__all__ == sorted(set(qwen1.__all__))


def test_version_of_the_distribution_is_the_package_version():
    assert importlib.metadata.version("qwen1") == qwen1.__version__


def test_installed_package_is_this_tree():
    """Otherwise coverage and every other test would look at stale copies."""
    assert Path(qwen1.__file__).resolve() == ROOT / "__init__.py"


@pytest.mark.parametrize(
    "name",
    ["qwen1-browser", "qwen1-chat", "qwen1-checkpoint", "qwen1-extend-vocabulary", "qwen1-finetune", "qwen1-tiny-chat"],
)
def test_console_scripts_point_to_callables(name):
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    assert callable(script.load())


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_are_in_the_package(name):
    assert (Path(qwen1.__file__).parent / name).is_file()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.json")), ids=by_name)
def test_json_parses_without_duplicate_keys(path):
    def unique(pairs):
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), f"duplicate keys in {path.name}: {keys}"
        return dict(pairs)

    assert isinstance(json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique), dict)


def test_auto_maps_name_every_auto_class():
    names = {auto_class for _, auto_class, _ in auto_map_references()}
    assert names >= {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
    }


def test_auto_maps_name_existing_classes():
    for file, auto_class, reference in auto_map_references():
        module, _, class_name = reference.partition(".")
        assert class_name in classes_defined_in(module), f"{file}: {auto_class} -> {reference}"


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_sibling_imports_are_written_as_transformers_expects(path):
    """transformers copies siblings that a regular expression finds in `from .x import y`; it misses all other forms."""
    siblings = {module.stem for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots = {alias.name.partition(".")[0] for alias in node.names}
            assert not roots & (siblings | {"qwen1"}), f"{path.name}:{node.lineno} imports a sibling absolutely"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.partition(".")[0] not in siblings | {"qwen1"}, f"{path.name}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module in siblings, f"{path.name}:{node.lineno}"


INNER_MODULES = sorted(path for name, folder in PACKAGES.items() if name for path in folder.glob("*.py"))


@pytest.mark.parametrize("path", INNER_MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_inner_modules_import_their_own_package_relatively(path):
    """The package may have another name: `convert_checkpoint.py` makes one of the folder that it lies in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        own = {"qwen1", *(name.partition(".")[0] for name in PACKAGES if name)}
        assert not own & {name.partition(".")[0] for name in names}, f"{path.name}:{node.lineno}"


def test_every_module_is_type_checked(pyproject):
    """What mypy leaves out is no module of the packages."""
    settings = pyproject["tool"]["mypy"]
    left_out = re.compile(settings["exclude"])
    assert settings["packages"] == ["qwen1", "qwen1_commands"] and "modules" not in settings
    for folder in PACKAGES.values():
        seen = Path(".mypy_cache/package/qwen1") / folder.relative_to(ROOT)
        names = [path.name for path in folder.glob("*.py") if left_out.search((seen / path.name).as_posix())]
        assert [name for name in names if name != "setup.py"] == []


@pytest.mark.slow
def test_import_registers_auto_classes_without_remote_code():
    printed = run_python(
        """
import qwen1
import transformers
config = qwen1.QWenConfig()
assert type(transformers.AutoConfig.for_model("qwen")) is qwen1.QWenConfig
for auto, own in (
    ("AutoModel", "QWenModel"),
    ("AutoModelForCausalLM", "QWenLMHeadModel"),
    ("AutoModelForSequenceClassification", "QWenForSequenceClassification"),
    ("AutoModelForTokenClassification", "QWenForTokenClassification"),
    ("AutoModelForQuestionAnswering", "QWenForQuestionAnswering"),
):
    assert getattr(transformers, auto)._model_mapping[qwen1.QWenConfig] is getattr(qwen1, own), auto
    assert getattr(qwen1, own)._auto_class == auto
assert qwen1.QWenConfig._auto_class == "AutoConfig"
for own in (qwen1.QWenTokenizer, qwen1.QWenTokenizerFast):
    assert own._auto_class == "AutoTokenizer"
print("registered")
"""
    )
    assert printed.strip() == "registered"


def test_saving_after_a_direct_import_copies_the_code(tmp_path):
    qwen1.QWenConfig().save_pretrained(tmp_path)
    assert (tmp_path / "configuration_qwen.py").read_bytes() == (ROOT / "configuration_qwen.py").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"] == (
        "configuration_qwen.QWenConfig"
    )


@pytest.mark.slow
def test_import_loads_nothing_heavy_of_its_own():
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel, PreTrainedTokenizer
heavy = {"bitsandbytes", "flash_attn", "gradio", "peft", "torch._dynamo", "torch._inductor"}
heavy |= {"prompt_toolkit", "rich.live", "rich.markdown"}
heavy |= {f"qwen1.{name}" for name in ("browser", "conversion", "programs", "terminal", "training", "vocabulary")}
before = heavy & set(sys.modules)
import qwen1
print(sorted((heavy & set(sys.modules)) - before))
"""
    assert run_python(code).strip() == "[]"


def test_no_machine_paths_or_index_addresses():
    """A folder of one machine, an address of a package index, or a credential-bearing URL works nowhere else.

    torch's index of wheels for the CPU is public: who has no GPU needs it.
    """
    folders = "|".join(("work", "farm", "tmp", "root", "home", "Users"))
    local = re.compile(
        rf"(?<![\w.)\]}}/:-])/(?:{folders})/"
        r"|file:///|--(?:extra-)?index-url(?! https://download\.pytorch\.org/whl/cpu$)|--find-links|://[^\s/@]+:[^\s/@]+@"
    )
    found = []
    for path in tracked_files():
        is_data = "tests" in path.relative_to(ROOT).parts and path.suffix not in {".py", ".md"}
        if path == Path(__file__).resolve() or is_data:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := local.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []


@pytest.mark.parametrize("module", ["configuration_qwen", "modeling_qwen", "tokenization_qwen"])
def test_what_an_auto_map_names_names_every_file_it_needs(code_of, module):
    """transformers 5.4 copies those that it imports itself from a local folder, not what they import in turn."""
    files = code_of(module)
    assert len(files) > 1 and {path for file in files for path in code_of(file.stem)} == set(files)
