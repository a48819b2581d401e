"""transformers' own test suite, out of the source distribution of the installed release, as a referee.

The package `transformers` leaves its tests out, so they are fetched from the package index once for each release and
kept in the user's cache folder. `QWEN_TRANSFORMERS_TESTS` may name an unpacked source distribution instead.
"""

import datetime
import importlib
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import traceback
import types
import unittest
import unittest.mock
from collections.abc import Mapping
from pathlib import Path

import platformdirs
import pytest
import torch.distributed as dist
import transformers
from filelock import FileLock

PACKAGE = "transformers_tests"  # the name under which their modules are imported; they import one another relatively


def _several_processes(*args, **kwargs):
    raise unittest.SkipTest("runs in several processes, for which the source distribution lacks a helper")


def run_distributed(world_size):
    """Call a function of theirs, (rank, *arguments), in so many processes, which are copies of this one."""

    def run_function(function):
        def run(*arguments):
            with tempfile.TemporaryDirectory() as folder:
                context = multiprocessing.get_context("fork")
                one = (folder, world_size, function, arguments)
                started = [context.Process(target=_one_process, args=(rank, *one)) for rank in range(world_size)]
                for process in started:
                    process.start()
                for process in started:
                    process.join()
                reports = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.log")))
                assert not any(process.exitcode for process in started), reports

        return run

    return run_function


def _one_process(rank, folder, world_size, function, arguments):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        limit = datetime.timedelta(seconds=60)  # for what waits for another process, which may have failed
        where = f"file://{folder}/group"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size, timeout=limit)
        function(rank, *arguments)
    except BaseException:
        (Path(folder) / f"{rank}.log").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # without what pytest has still to do


STAND_INS = {
    "distributed_testing_utils": {
        "run_distributed": run_distributed,
        "_start_rank_processes": _several_processes,
        "_get_distributed_backend": lambda: "gloo",
        "_get_distributed_device_type": lambda: "cpu",
        "_get_rank_device": _several_processes,
        "_set_rank_device": _several_processes,
    },
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "problem_type": "regression",
        }
    },
}
"""Modules of their tests that the source distribution lacks, and what others import from them."""


class NotAvailable(Exception):
    """The source distribution can't be had; the message says why."""


def fetch_tests(version: str, cache: Path) -> Path:
    """Return the folder `tests` of a release, which is downloaded and unpacked into `cache` if it isn't there yet.

    Raises:
        NotAvailable: pip doesn't get it.
    """
    tests = cache / f"transformers-{version}" / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"transformers-{version}.lock"):  # several processes may run tests
        if not tests.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as work:
                with tarfile.open(_download(version, Path(work))) as archive:
                    members = [item for item in archive if item.name.startswith(f"transformers-{version}/tests/")]
                    archive.extractall(work, members, filter="data")
                os.renames(Path(work) / f"transformers-{version}" / "tests", tests)
    return tests


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--retries", "1"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), f"transformers=={version}"], capture_output=True, text=True, timeout=240
        )
    except subprocess.TimeoutExpired as error:
        raise NotAvailable(f"no answer from the package index in {error.timeout} s") from error
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        raise NotAvailable((done.stderr or done.stdout).strip().splitlines()[-1])
    return archives[0]


def tests_of(source: Path, version: str) -> Path:
    """Return the folder `tests` of an unpacked source distribution.

    Raises:
        ValueError: it has none, or is that of another release.
    """
    about = source / "PKG-INFO"
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    if f"Version: {version}" not in lines or not (source / "tests").is_dir():
        raise ValueError(f"QWEN_TRANSFORMERS_TESTS={source} is not the unpacked source of transformers {version}")
    return source / "tests"


def find_upstream() -> None:
    """Make transformers' tests a package that can be imported.

    Raises:
        NotAvailable: they can't be had.
    """
    if PACKAGE in sys.modules:
        return
    version = transformers.__version__
    if source := os.environ.get("QWEN_TRANSFORMERS_TESTS"):
        tests = tests_of(Path(source), version)
    else:
        tests = fetch_tests(version, platformdirs.user_cache_path("qwen1") / "transformers-tests")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    for name, contents in STAND_INS.items():
        module = sys.modules[f"{PACKAGE}.{name}"] = types.ModuleType(f"{PACKAGE}.{name}")
        vars(module).update(contents)


def load_upstream(name: str) -> types.ModuleType:
    """Import a module of transformers' tests by its name there; raises as `find_upstream`."""
    find_upstream()
    # Two of their modules look for transformers in the folders beside them.
    with unittest.mock.patch("transformers.utils.direct_transformers_import", lambda path: transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")


@pytest.fixture(scope="session")
def upstream():
    """Import a module of transformers' tests by its name there. Skips where they can't be had."""
    try:
        find_upstream()
    except NotAvailable as error:
        pytest.skip(f"the tests of transformers {transformers.__version__} can't be downloaded: {error}")
    yield load_upstream
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


MARKS = (
    *("accelerate_tests", "torch_compile_test", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test"),
    *("is_training_test", "is_tensor_parallel_test", "is_fsdp_test", "is_expert_parallel_test", "is_pipeline_test"),
)
"""Marks that their tests carry."""


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' tests")


def pytest_generate_tests(metafunc):
    """Give a test that takes `upstream_case` each of the cases that `list_cases` of its module finds upstream."""
    if "upstream_case" not in metafunc.fixturenames:
        return
    try:
        cases = metafunc.module.list_cases(load_upstream)
    except NotAvailable as error:
        skip = pytest.mark.skip(reason=f"the tests of transformers can't be downloaded: {error}")
        cases = [pytest.param(None, marks=skip, id="not-available")]
    metafunc.parametrize("upstream_case", cases)


class Outcomes(unittest.TestResult):
    """What became of each test of a suite, by name: "passed", "skipped", or else the traceback."""

    def __init__(self):
        super().__init__()
        self.by_name = {}

    def _record(self, test, outcome):
        name = getattr(test, "test_case", test).id().rpartition(".")[2]  # a subtest counts for its test
        if self.by_name.get(name) in (None, "passed", "skipped"):
            self.by_name[name] = outcome

    def addSuccess(self, test):
        self._record(test, "passed")

    def addSkip(self, test, reason):
        self._record(test, "skipped")

    def addFailure(self, test, err):
        self._record(test, self._exc_info_to_string(err, test))

    addError = addFailure

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addFailure(test, err)


@pytest.fixture(scope="session")
def run_suite():
    """Run the tests of a `unittest.TestCase` class and return name -> "passed", "skipped", or the traceback."""

    def run(case: type[unittest.TestCase]) -> dict[str, str]:
        outcomes = Outcomes()
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(outcomes)
        for name, outcome in outcomes.by_name.items():
            assert name.startswith("test"), f"{case.__name__} can't be set up:\n{outcome}"
        return outcomes.by_name

    return run


@pytest.fixture(scope="session")
def judge():
    """Compare outcomes: what their class passes ours must pass, unless a reason is given, which must be needed."""

    def compare(ours: Mapping[str, str], theirs: Mapping[str, str], reasons: Mapping[str, str]) -> None:
        assert ours.keys() == theirs.keys()
        worse = {name for name in ours if _failed(ours[name]) and not _failed(theirs[name])}
        report = [f"{name} fails for our class only:\n{ours[name]}" for name in sorted(worse - reasons.keys())]
        report += [
            f"{name} is listed with a reason to fail, and doesn't fail for our class only: take it off the list"
            for name in sorted(reasons.keys() & ours.keys() - worse)
        ]
        report += [f"{name} is listed, and there is no such test" for name in sorted(reasons.keys() - ours.keys())]
        assert not report, "\n\n".join(report)

    return compare


def _failed(outcome: str) -> bool:
    return outcome not in ("passed", "skipped")
