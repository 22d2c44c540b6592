"""The house rules of the source tree: import direction, no torch, sizes, README's file map."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "reptune_jax"

# Left to right; a module imports from its own entry and from those before it. A folder of the
# package stands for all that lies in it.
ORDER: tuple[tuple[str, ...], ...] = (
    ("config",),
    ("roles",),  # of its keys
    ("ending",),  # signals, and what must not be left half made
    ("background",),  # errors beside the main thread
    ("distributed",),  # plain calls where there is one process
    ("console",),
    ("reading",),  # files that others made
    ("lock",),
    ("folder",),
    ("stored_config",),
    ("command_line",),
    ("mesh",),
    ("model",),
    ("hub",),
    ("depth",),  # layers by number
    ("ranges",),  # of values that a config may have
    ("lm",),
    ("frozen",),  # a model as tuning holds it
    ("data",),
    ("vectors",),
    ("tuned_run",),
    ("program",),  # what every program shares
    ("evals",),
    ("watch",),
    ("cost",),
    ("tuning",),
    ("plan",),
    ("report",),
    ("cards",),
    ("train", "extract", "convert", "vector", "chat"),
    ("recipe", "relearn", "select", "sweep"),
    ("study",),
    ("__init__", "__main__", "cli"),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
SELF_CONTAINED = {"model"}  # pure functions: nothing of ours but themselves
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
# Names of what a study folder holds are spelled in folder.py and nowhere else.
STUDY_FILES = re.compile(
    r"""["'/](vector\.safetensors|targets\.jsonl|(baseline|steering|tuned)\.parquet|metrics\.jsonl|"""
    r"""done\.json|checkpoints|index\.html|export)["'/]|results/\*"""
)

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    p for d in ("reptune_jax", "benchmarks", "configs", "tests") for p in (ROOT / d).rglob("*.py")
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(path: Path) -> str:
    """The entry of ORDER that a file of the package belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, nested ones too, relative to `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def imports_of(path: Path) -> list[tuple[int, str]]:
    return list(imported(parse(path), ".".join(path.relative_to(ROOT).parent.parts)))


def own_part(name: str) -> str | None:
    """The entry of ORDER that an import of ours leads to; the face for names of the package."""
    first, *rest = name.split(".")
    if first != PACKAGE.name:
        return None
    return rest[0] if rest and rest[0] in RANK else "__init__"


def wrong_imports(part: str, names: list[tuple[int, str]]) -> list[str]:
    problems = []
    for line, name in names:
        target = own_part(name)
        if target is None or target == part:
            continue
        if part in SELF_CONTAINED:
            problems.append(f"line {line}: {name} ({part} imports nothing of ours but itself)")
        elif RANK[target] > RANK[part]:
            problems.append(f"line {line}: {name} ({target} stands to the right of {part})")
    return problems


def long_functions(tree: ast.Module) -> list[str]:
    return [
        f"{node.name} (line {node.lineno}): {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def spelled_files(source: str) -> list[str]:
    """Names of a study's files in string literals of code; docstrings may speak of them."""
    tree = ast.parse(source)
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    texts = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    )
    return [text for text in texts if STUDY_FILES.search(f'"{text}"')]


def file_map(readme: str) -> str:
    """The fenced block under the heading "File map"."""
    found = re.search(
        r"^#+\s*File map\s*$.*?^```[^\n]*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE | re.I
    )
    assert found, 'README.md: expected a heading "File map" with a fenced block under it'
    return found[1]


def mapped_files(block: str) -> set[str]:
    """Every .py named in a map. A line beginning with `folder/` opens it for those below.

    A line's own files follow its folder; parentheses and what comes after `#` are description.
    """
    files: set[str] = set()
    folders: list[tuple[int, str]] = []
    for raw in block.splitlines():
        line = re.sub(r"\([^)]*\)", "", re.sub(r"[│├└─]", " ", raw).split("#")[0])
        indent = len(line) - len(line.lstrip())
        words = line.split()
        if not words:
            continue
        while folders and folders[-1][0] >= indent:
            folders.pop()
        here = folders[-1][1] if folders else ""
        if words[0].endswith("/"):
            here += words[0]
            folders.append((indent, here))
        files |= {here + name for name in re.findall(r"(?<![\w./*-])[\w/]+\.py\b", line)}
    return files


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_from_right_to_left(path):
    part = part_of(path)
    assert part in RANK, (
        f"{relative(path)}: give {part!r} its place in ORDER, in {relative(Path(__file__))}"
    )
    problems = wrong_imports(part, imports_of(path))
    assert not problems, "\n".join([relative(path), *problems])


def test_tests_mirror_the_package_and_share_through_support_only():
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    folders = {path.parent.name for path in tests} - {"tests", "support"}
    assert folders <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    for path in tests:
        names = {name for _, name in imports_of(path) if name.split(".")[0] == "tests"}
        wrong = {name for name in names if not name.startswith("tests.support")}
        assert not wrong, f"{relative(path)} imports {wrong}: move what is shared to tests/support"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_studys_files_are_named_in_one_place(path):
    if path.name != "folder.py":
        found = spelled_files(path.read_text(encoding="utf-8"))
        assert not found, f"{relative(path)}: {found}: take the path from folder.py"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_torch_in_the_package(path):
    names = [n for _, n in imports_of(path) if n.split(".")[0] in ("torch", "accelerate")]
    assert not names, f"{relative(path)} imports {names}: torch is for tests and benchmarks"


@pytest.mark.parametrize(
    ("module", "also"), [("train", ("pandas", "scipy.stats")), ("convert", ()), ("evals.tuned", ())]
)
def test_a_program_does_not_wait_for_what_it_may_not_need(module, also):
    """Each of these takes a second or more to import, at every start."""
    slow = ("matplotlib", "sklearn", "datasets", "transformers", "tensorflow", *also)
    code = f"import sys, reptune_jax.{module}; print(*[m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{relative(path)}: {lines} lines, at most {MAX_FILE_LINES}"
    too_long = long_functions(parse(path))
    assert not too_long, "\n".join([f"{relative(path)}, at most {MAX_FUNCTION_LINES}", *too_long])


def test_readme_maps_every_module_and_nothing_else():
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md does not exist yet: write it, with a file map"
    mapped = mapped_files(file_map(readme.read_text(encoding="utf-8")))
    modules = {relative(p) for p in MODULES if p.name != "__init__.py"}
    missing = sorted(modules - mapped)
    stale = sorted(f for f in mapped if not (ROOT / f).exists())
    assert not missing, f"not in README's file map: {missing}"
    assert not stale, f"in README's file map, but not in the tree: {stale}"


# The rules themselves, on made-up sources: a rule that sees nothing would pass everything above.


@pytest.mark.parametrize(
    "part,source,ok",
    [
        ("vectors", "from reptune_jax.hub import source", True),
        ("vectors", "from reptune_jax import mesh", True),
        ("vectors", "from reptune_jax.vectors.methods import mean_diff", True),
        ("vectors", "def f():\n    from reptune_jax.evals import arms", False),
        ("vectors", "import reptune_jax.evals.arms as arms", False),
        ("vectors", "import reptune_jax as rt", False),
        ("vectors", "from reptune_jax import load", False),
        ("vectors", "from ..evals import arms", False),
        ("vectors", "from .. import evals", False),
        ("vectors", "from . import methods", True),
        ("evals", "from reptune_jax.vectors import methods", True),
        ("hub", "from reptune_jax.model.arch import Arch", True),
        ("model", "from reptune_jax.model.arch import Arch", True),
        ("model", "from reptune_jax import config", False),
        ("cli", "from reptune_jax import train", True),
        ("train", "from reptune_jax import cli", False),
    ],
)
def test_direction_rule(part, source, ok):
    names = list(imported(ast.parse(source), f"reptune_jax.{part}"))
    assert (not wrong_imports(part, names)) == ok


def test_file_name_rule():
    assert spelled_files('x = folder / "vector.safetensors"') == ["vector.safetensors"]
    assert spelled_files('x = folder.glob("**/results/*.parquet")')
    assert not spelled_files(
        'def f():\n    """Writes metrics.jsonl."""\n    say("checkpoints: none")'
    )


def test_length_rule():
    body = "    x = 1\n"
    assert not long_functions(ast.parse("def f():\n" + body * (MAX_FUNCTION_LINES - 1)))
    assert long_functions(ast.parse("class A:\n def f(self):\n" + body * MAX_FUNCTION_LINES))


def test_file_map_rule():
    readme = """# X
## File map

```
pyproject.toml  README.md  tests/  train.py
pkg/
  __init__.py      the face
  cli.py           runs `python -m x`, see configs/*.py (and other.py)
  model/           arch.py (Arch, from config.json) block.py
                   rope.py   # not gone.py
    deep/          well.py
tests/
├── tiny.py
└── data/           make.py
```
other.py
"""
    assert mapped_files(file_map(readme)) == {
        "train.py",
        "pkg/__init__.py",
        "pkg/cli.py",
        "pkg/model/arch.py",
        "pkg/model/block.py",
        "pkg/model/rope.py",
        "pkg/model/deep/well.py",
        "tests/tiny.py",
        "tests/data/make.py",
    }
