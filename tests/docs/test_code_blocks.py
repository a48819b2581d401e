"""The blocks of Python and bash in README.md and docs/ run as they are printed.

The blocks of a page run in their order in a copy of the repository: those of Python in one process and one namespace,
those of bash in a shell each, where `.venv/bin` stands for the folder of this interpreter and nothing is installed. Our
own commands find torch and transformers loaded, see `warm.py`; the Python of a page doesn't.
`<!-- not run: REASON -->` right before a block leaves it out; `pytest -rs` lists the reasons.
"""

import ast
import json
import os
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))]

EXECUTED = ("bash", "python")
SHOWN = ("css", "diff", "dockerfile", "html", "ini", "javascript", "jinja", "json", "text", "toml", "xml", "yaml")
"""Languages of blocks that are read only. No second names of the executed ones: such blocks would never run."""

TIME_LIMIT = 300.0
"""Seconds for a block."""

_OLD = "cp -rL qwen-tiny-chat Qwen-7B-Chat"
PRESUMED = {
    "README.md": _OLD,
    "docs/migrate.md": _OLD,
    "docs/use.md": "cp qwen-tiny-chat/qwen.tiktoken . && printf 'zorvandel\\t40\\n' > words.txt",
}
"""page -> files that the page takes for granted, as bash that makes them; runs before its first block."""

SESSION = """
def serve():
    import json, os, sys, traceback

    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what blocks print goes where errors go
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for request in requests:
        name, code = json.loads(request)
        try:
            exec(compile(code, name, "exec"), sys.modules["__main__"].__dict__)
            answer = "done"
        except BaseException:
            traceback.print_exc()
            answer = "failed"
        sys.stdout.flush()
        print(answer, file=answers)

serve()
"""

PYTHON = """#!/bin/sh
case "$1 $2" in "-m venv" | "-m pip" | "-m ensurepip") exit 0 ;; esac
exec '{interpreter}' "$@"
"""

NOTHING = "#!/bin/sh\n"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: path below the top level.
        line: of the opening fence, counted from 1.
        language: the first word behind the fence.
        code: without the fences.
        not_run: the reason in the comment before it, None where there is no comment.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def marker(token) -> str | None:
    """The reason in a comment `<!-- not run: REASON -->`, None for anything else."""
    found = re.fullmatch(r"<!--\s*not run\b:?(.*?)-->\s*", token.content, re.DOTALL)
    return found[1].strip() if token.type == "html_block" and found else None


def parse(page: str, text: str) -> tuple[list[Block], int]:
    """The fenced blocks of a page, and the number of its markers."""
    blocks, before = [], None
    tokens = MarkdownIt("commonmark").parse(text)
    for token in tokens:
        if token.type == "fence":
            language = token.info.split()[0] if token.info.strip() else ""
            blocks.append(Block(page, token.map[0] + 1, language, token.content, before))
        before = marker(token)
    return blocks, sum(marker(token) is not None for token in tokens)


PARSED = {page: parse(page, (ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
BLOCKS = [block for blocks, _ in PARSED.values() for block in blocks if block.language in EXECUTED]


@dataclass
class Page:
    """A copy of the repository in which the blocks of a page run, and what became of them.

    Attributes:
        python: the first words of what runs its blocks of Python, in one session.
    """

    blocks: list[Block]
    folder: Path
    log: Path
    variables: dict[str, str]
    time_limit: float = TIME_LIMIT
    python: tuple[str, ...] = (sys.executable,)
    failures: dict[Block, str] = field(default_factory=dict)
    started: list[subprocess.Popen] = field(default_factory=list)
    session: subprocess.Popen | None = None

    def failure(self, block: Block) -> str:
        """Run the blocks up to this one, those before only once; what went wrong in this one, or an empty text."""
        for earlier in self.blocks[: self.blocks.index(block) + 1]:
            if earlier not in self.failures and earlier.not_run is None:
                self.failures[earlier] = self._run(earlier)
        failed = [str(earlier) for earlier, failure in self.failures.items() if failure and earlier != block]
        hint = f"\n(failed before: {', '.join(failed)})" if failed else ""
        return self.failures[block] and self.failures[block] + hint

    def _run(self, block: Block) -> str:
        printed = self.log.stat().st_size if self.log.exists() else 0
        failure = self._run_bash(block.code) if block.language == "bash" else self._run_python(block)
        if not failure:
            return ""
        output = self.log.read_bytes()[printed:].decode(errors="replace")
        return f"{block} {failure}:\n{block.code}\n{output}"

    def _run_bash(self, code: str) -> str:
        shell = self._start(["bash", "-euo", "pipefail", "-c", code], stdin=subprocess.DEVNULL, stdout=None)
        try:
            status = shell.wait(self.time_limit)
        except subprocess.TimeoutExpired:
            _kill(shell)
            return f"didn't end within {self.time_limit} s"
        return f"ended with status {status}" if status else ""

    def _run_python(self, block: Block) -> str:
        if self.session is None:
            self.session = self._start([*self.python, "-c", SESSION], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # Blank lines in front, so that a traceback shows the lines of the page.
        request = json.dumps([block.page, "\n" * block.line + block.code]) + "\n"
        try:
            self.session.stdin.write(request.encode())
        except BrokenPipeError:
            return "found the Python of this page ended"
        if not select.select([self.session.stdout], [], [], self.time_limit)[0]:
            _kill(self.session)
            return f"didn't end within {self.time_limit} s"
        answer = self.session.stdout.readline().decode().strip()
        return {"done": "", "failed": "failed"}.get(answer, "ended the Python of this page")

    def _start(self, command: list[str], stdin: int, stdout: int | None) -> subprocess.Popen:
        # Output goes to a file: a pipe would stay open for as long as a server in the background runs.
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self.variables, "PATH": f"{self.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"},
                stdin=stdin,
                stdout=log if stdout is None else stdout,
                stderr=log,
                bufsize=0,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def close(self) -> None:
        """End what still runs, servers in the background of a shell among them."""
        for process in self.started:
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
    except ProcessLookupError:
        pass
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


@pytest.fixture(scope="module")
def variables(tmp_path_factory) -> dict[str, str]:
    """For what blocks run: none of the settings of who runs the tests, and nothing of the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "HF_", "PYTEST_"))}
    home = str(tmp_path_factory.mktemp("huggingface"))
    return {**kept, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HOME": home, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}


def copy_repository(folder: Path, python: list[str]) -> None:
    """What a clone has, and a `.venv/bin` with the commands of this interpreter's folder, of which none installs.

    Args:
        python: the first words of what runs our own commands.
    """
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True)
    for command in Path(sys.executable).parent.iterdir():
        if command.name.startswith("python"):
            _write_script(commands / command.name, PYTHON.format(interpreter=sys.executable))
        elif command.name.startswith(("pip", "activate")):
            _write_script(commands / command.name, NOTHING)
        elif command.name.startswith("qwen1-"):
            _write_script(commands / command.name, f'#!/bin/sh\nexec {shlex.join([*python, str(command)])} "$@"\n')
        else:
            (commands / command.name).symlink_to(command)
    for name, script in (("python", PYTHON), ("python3", PYTHON), ("pip", NOTHING), ("pip3", NOTHING)):
        _write_script(commands / name, script.format(interpreter=sys.executable))


def _write_script(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="module")
def page(tmp_path_factory, variables, warm_with):
    """The copy in which the blocks of a page run, made when the first of them is asked for: name -> Page."""
    pages: dict[str, Page] = {}

    def get(name: str) -> Page:
        if name not in pages:
            parent = tmp_path_factory.mktemp("page")
            presumed = [Block(name, 0, "bash", PRESUMED[name])] if name in PRESUMED else []
            executed = [block for block in BLOCKS if block.page == name]
            copy_repository(parent / "clone", warm_with(variables))
            python = tuple(warm_with(variables, "torch"))
            blocks = [*presumed, *executed]
            pages[name] = Page(blocks, parent / "clone", parent / "output.log", variables, python=python)
        return pages[name]

    yield get
    for opened in pages.values():
        opened.close()


@pytest.fixture
def made_up(tmp_path, variables):
    """A page with these blocks, (language, code) each, in an empty folder."""
    pages = []

    def make(*blocks: tuple[str, str], time_limit: float = 60.0) -> Page:
        listed = [Block("page.md", line, language, code) for line, (language, code) in enumerate(blocks, 1)]
        pages.append(Page(listed, tmp_path, tmp_path / "output.log", variables, time_limit))
        return pages[-1]

    yield make
    for opened in pages:
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_runs(block, page):
    if block.not_run is not None:
        pytest.skip(f"not run: {block.not_run}")
    failure = page(block.page).failure(block)
    assert not failure, failure


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_is_well_formed(block):
    """Also those that aren't run."""
    if block.language == "python":
        compile(block.code, str(block), "exec")
    else:
        done = subprocess.run(["bash", "-n", "-c", block.code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", PAGES)
def test_blocks_say_which_folder_they_mean(name):
    """Also those that aren't run: who copies one has the line that makes `folder`, on the page and above it."""
    made = False
    for block in (block for block in PARSED[name][0] if block.language == "python"):
        uses = [node for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.Name) and node.id == "folder"]
        made = made or any(isinstance(node.ctx, ast.Store) for node in uses)
        assert made or not uses, f"{block} uses `folder` before the page has made it"


@pytest.mark.parametrize("name", PAGES)
def test_fences_name_a_known_language(name):
    unknown = {str(block): block.language for block in PARSED[name][0] if block.language not in EXECUTED + SHOWN}
    assert not unknown, f"use one of {EXECUTED + SHOWN}"


@pytest.mark.parametrize("name", PAGES)
def test_each_marker_stands_before_a_block_and_gives_a_reason(name):
    blocks, markers = PARSED[name]
    marked = [block for block in blocks if block.not_run is not None and block.language in EXECUTED]
    assert len(marked) == markers, "a marker stands elsewhere than right before a block of Python or bash"
    assert [str(block) for block in marked if not block.not_run] == [], "a marker without a reason"


def test_presumed_pages_exist():
    assert set(PRESUMED) <= set(PAGES)


# --- the machinery of these tests ---


def test_parse_finds_blocks_lines_and_reasons():
    text = """\
# Page
<!-- not run: it takes an hour -->
```bash
make
```
- item:

  ```python title="x"
  if True:
      pass
  ```
<!-- not run: -->

```python
```
<!-- not run: stands alone -->
text
```
```
"""
    blocks, markers = parse("page.md", text)
    assert blocks == [
        Block("page.md", 3, "bash", "make\n", "it takes an hour"),
        Block("page.md", 8, "python", "if True:\n    pass\n"),
        Block("page.md", 14, "python", "", ""),
        Block("page.md", 18, "", ""),
    ]
    assert markers == 3


def test_blocks_run_once_in_order_and_share_names_and_files(made_up):
    page = made_up(
        ("bash", "echo one >> file"),
        ("python", "from pathlib import Path\ncount = len(Path('file').read_text().split())"),
        ("bash", "echo two >> file"),
        ("python", "assert count == 1 and Path('file').read_text().split() == ['one', 'two']"),
    )
    assert page.failure(page.blocks[3]) == page.failure(page.blocks[3]) == page.failure(page.blocks[0]) == ""


def test_what_goes_wrong_is_told(made_up):
    page = made_up(
        ("bash", "echo printed\nfalse | true"),
        ("bash", "echo $UNSET"),
        ("python", "print('said')\n1 / 0"),
        ("python", "import os\nos._exit(0)"),
        ("python", "pass"),
    )
    failures = [page.failure(block) for block in page.blocks]
    assert "page.md:1 ended with status 1" in failures[0] and "printed" in failures[0]
    assert "UNSET: unbound variable" in failures[1] and "(failed before: page.md:1)" in failures[1]
    assert all(part in failures[2] for part in ("said", 'File "page.md", line 5', "ZeroDivisionError"))
    assert "ended the Python" in failures[3]
    assert "page.md:5 found the Python of this page ended" in failures[4] or "ended the Python" in failures[4]


@pytest.mark.parametrize("language, code", [("bash", "sleep 60"), ("python", "import time\ntime.sleep(60)")])
def test_a_block_that_hangs_is_ended(made_up, language, code):
    page = made_up((language, code), time_limit=0.5)
    assert "didn't end within 0.5 s" in page.failure(page.blocks[0])


def test_a_server_in_the_background_ends_with_its_page(made_up, tmp_path):
    page = made_up(("bash", "while sleep 0.02; do touch beat; done &"), ("bash", "until test -e beat; do :; done"))
    assert page.failure(page.blocks[1]) == ""
    page.close()
    (tmp_path / "beat").unlink()
    time.sleep(0.2)
    assert not (tmp_path / "beat").exists()


def test_the_copy_installs_nothing_and_has_the_commands(tmp_path, made_up):
    copy_repository(tmp_path, [sys.executable])
    page = made_up(
        ("bash", "python3 -m venv .venv && .venv/bin/pip install nothing-of-this-name"),
        ("bash", "source .venv/bin/activate\npip install nothing-of-this-name\npython -m pip install nothing"),
        ("bash", f"test \"$(.venv/bin/python -c 'import sys; print(sys.prefix)')\" = '{sys.prefix}'"),
        ("bash", "test -L qwen-tiny-chat/modeling_qwen.py\n.venv/bin/pytest --version\ntest ! -e .git"),
    )
    assert [page.failure(block) for block in page.blocks] == [""] * 4
