"""The command line around the programs: `reptune`, what people type, the columns of `chat`."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import app, flags

import reptune_jax as rt
from reptune_jax import chat, cli, command_line, config, convert, ranges, stored_config
from reptune_jax.folder import Study

ROOT = Path(__file__).parents[1]
# One process runs all programs here, some of which the others import.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def run(*words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `reptune WORDS` in this process, with flags of its own."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    app.define_help_flags()  # which a process does once
    before = {name: flags.FLAGS[name] for name in flags.FLAGS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reptune", *words])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            finally:
                for name in [name for name in flags.FLAGS if name not in before]:
                    delattr(flags.FLAGS, name)
    return code, out.getvalue(), err.getvalue()


def test_overview_names_every_program_with_its_own_first_line() -> None:
    text = cli.overview()
    for name, module in cli.PROGRAMS.items():
        assert f"  {name}" in text
        assert cli.summary(module) in text


def test_unknown_program_is_answered_with_the_likely_one() -> None:
    code, _, err = run("trian")
    assert code == 1 and err.startswith("error: program: got 'trian'"), err
    assert "Did you mean 'train'?" in err


def test_columns_hold_every_word_and_fit_the_terminal() -> None:
    answers = {"base": "one two three " * 6, "tuned": "four five"}
    lines = chat.side_by_side(answers, 60)
    assert all(len(line) <= 60 for line in lines)
    words = " ".join(lines).split()
    assert words.count("three") == 6 and "four" in words and "base" in words


def test_narrow_terminals_get_a_list() -> None:
    lines = chat.side_by_side({"base": "alpha", "tuned": "beta"}, 24)
    assert not any("alpha" in line and "beta" in line for line in lines)


def test_an_unknown_run_is_answered_with_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "dual+_s0" / "checkpoints").mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match=r"dual\+_s0"):
        chat.find_run(Study(tmp_path), "dual-_s7")


def test_the_program_module_does_not_hide_the_function_of_its_name() -> None:
    import reptune_jax as rt
    import reptune_jax.extract
    import reptune_jax.sweep

    with pytest.raises(ValueError, match="method: got 'none'"):
        rt.extract(None, [], method="none")
    with pytest.raises(ValueError, match="asked: got none"):
        rt.sweep(None, SimpleNamespace(layers=(1,)), [])


# ---------------------------------------------------------------- what people type


@pytest.mark.parametrize("name", cli.PROGRAMS)
def test_every_program_says_its_version_and_what_it_is(name: str) -> None:
    code, out, err = run(name, "--version")
    assert (code, out.strip(), err) == (0, f"reptune_jax {rt.__version__}", "")
    code, out, err = run(name, "--help", "--config=no/such.py")
    assert (code, err) == (0, "") and cli.summary(cli.PROGRAMS[name]) in out
    own = {"convert": "--from", "lmeval": "--from", "vector": "--layers", "sweep": "--doses"}
    assert own.get(name, "--config") in out or (name == "report" and "--workdir" in out)


def test_a_key_without_the_config_that_it_belongs_to() -> None:
    code, _, err = run("dial", "--workdir=none", "--config.dial.arms=token")
    assert code == 1 and err.startswith("error: --config: got none, which --config.dial.arms is a")
    code, _, err = run("sweep", "vector.safetensors", "--config.dial.arms=token")  # has no --config
    assert code == 1 and err.startswith("error: Unknown command line flag 'config.dial.arms'")


def test_shipped_configs_are_found_by_name_with_their_argument() -> None:
    path = command_line.find_config("sentiment:quick")
    assert path == f"{ROOT / 'configs' / 'sentiment.py'}:quick"
    given = f"{ROOT}/configs/honesty.py"
    assert command_line.find_config(given) == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sentimnt", r"got 'sentimnt'\. Expected .*honesty, scale, sentiment\. Did you mean 'sent"),
        ("no/such.py:quick", r"got 'no/such\.py', which is not a file\. Expected a path"),
        ("configs/sentimant.py", r"Did you mean 'sentiment'"),
    ],
)
def test_a_config_that_is_not_there_is_named(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_line.find_config(given)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("study.arms", "base,steer", ("base", "steer")),
        ("study.arms", "base", ("base",)),
        ("study.arms", "base,'steer'", ("base", "steer")),
        ("study.arms", '("base","steer")', ("base", "steer")),
        ("loss.also.honesty.layers", "8,16", ("8", "16")),
        ("train.modules", "('attn/v', 'attn/o')", ("attn/v", "attn/o")),
        ("study.arms", "('base', 'steer')", ("base", "steer")),
        ("study.signs", "1,-1", (1, -1)),
        ("study.seeds", "3", (3,)),
        ("train.layers", "[10, 20]", ("10", "20")),
        ("train.modules", "attn/v, attn/o", ("attn/v", "attn/o")),
        ("steer.doses", "1,2.5", (1.0, 2.5)),
        ("loss.anneal.cosine", "1,0", (1.0, 0.0)),
    ],
)
def test_tuples_are_given_as_plain_lists(key: str, text: str, expected: tuple) -> None:
    (got,) = command_line.prepare([f"--config.{key}={text}"])
    assert got == f"--config.{key}={expected!r}"
    assert command_line.prepare([f"--config.{key}", text]) == [got]


def test_a_list_of_something_else_is_named() -> None:
    with pytest.raises(ValueError, match=r"study\.seeds: got 'low,high', expected whole numbers"):
        command_line.prepare(["--config.study.seeds=low,high"])
    assert command_line.prepare(["--config.train.lr=1e-4"]) == ["--config.train.lr=1e-4"]


def test_a_study_folder_alone_is_enough_where_that_is_allowed(tmp_path: Path) -> None:
    given = [f"--workdir={tmp_path}", "--config.chat.run=dual-_s0"]
    assert command_line.prepare(given) == given
    config, *_ = command_line.prepare(given, of_study=True)
    assert config.endswith(f"stored_config.py:{tmp_path}")


def test_what_a_study_stores_is_its_config_again(tmp_path: Path) -> None:
    c = config.default()
    c.model, c.train.layers, c.train.lr = "model", (3, 5), 1
    c.loss.also.honesty = config.also_behavior("runs/honesty")
    Study(tmp_path).claim(ranges.check(c))
    c.chat.dose = c.seed = 3  # which are not stored
    again = stored_config.get_config(str(tmp_path))
    again.chat.dose = again.seed = 3
    assert again.to_dict() == c.to_dict()


def test_the_run_that_stands_for_a_study(tmp_path: Path, capsys) -> None:
    def after(*made: str) -> str | None:
        for folder in made:
            (tmp_path / folder).mkdir(parents=True)
        found = Study(tmp_path).chosen()
        return found and found.path.name

    assert after() is None
    assert after("token-_s1/checkpoints") == "token-_s1"  # the only one
    assert after("token+_s1/checkpoints") is None
    with pytest.raises(ValueError, match=r"Name one of .*token\+_s1, .*token-_s1\."):
        convert.find_run(tmp_path)
    assert after("dual-_s0/checkpoints", "dual-_s1/checkpoints") == "dual-_s0"
    assert after("dual+_s1/checkpoints") == "dual+_s1"
    assert after("export/token-_s1", "export/token+_s1_adapter") == "token-_s1"
    assert chat.find_run(Study(tmp_path), "").name == "token-_s1"
    with pytest.raises(FileNotFoundError):  # nothing was saved there
        convert.find_run(tmp_path)
    assert "taking token-_s1 (there is dual+_s1, dual-_s0, dual-_s1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config=sentiment"], "--workdir"),
        (["train", "--config=sentimnt", "--workdir=w"], "Did you mean 'sentiment'"),
        (["train", "--config=sentiment:slow", "--workdir=w"], "got 'slow', expected nothing"),
        (["train", "--config=sentiment", "--wrkdir=w"], "wrkdir"),
        (
            ["train", "--config=honesty:slow", "--workdir=w"],
            "got 'slow', expected nothing, 'cpu' or 'quick'",
        ),
        (["extract", "--config=sentiment", "--workdir="], "--workdir: got '', nothing, expected"),
        (
            ["study", "--config=sentiment", f"--workdir={__file__}"],
            "test_cli.py', a file, expected",
        ),
        (["plan", "--config=sentiment"], "--topology: got none"),
        (["study", "--config=sentiment", "--workdir=w", "--config.trian.lr=1"], 'mean "train"'),
        (["chat", "--workdir=no/such/study"], "holds no study"),
        (["report", "no/such/study"], "no per-item results"),
        (["report"], "expected one study folder"),
        (["convert", "--to=x"], "--from"),
        (["convert", "--from=gone.gguf", "--to=x"], "does not exist"),
        (["vector", "join", "a.gguf"], "expected one of convert, info, diff, merge, plot"),
        (["vector", "convert", "gone.gguf", "x.svec"], "gone.gguf: no such file"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_traceback(words, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*words)
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ") and message in err, err
    assert not list(tmp_path.iterdir())


def test_a_config_that_takes_no_argument_says_so_with_its_name(tmp_path) -> None:
    path = tmp_path / "plain.py"
    path.write_text("def get_config():\n    return None\n")
    code, _, err = run("train", f"--config={path}:slow", f"--workdir={tmp_path}/w")
    assert code == 1 and f"{path}:slow: get_config() takes" in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not a run's"), ('{"a": 1}', "not a run's"), ("[]", "not a run's")]
)
def test_a_folder_of_something_else_is_no_study(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    code, _, err = run("chat", f"--workdir={tmp_path}")
    assert code == 1 and message in err and err.count("\n") == 1


# ---------------------------------------------------------------- away from a clone


def test_the_face_is_tidy() -> None:
    names = [name for name in dir(rt) if not name.startswith("__")]
    assert names == [name for name in rt.__all__ if name != "__version__"]
    assert {"__version__", "__doc__", "__path__"} <= set(dir(rt)) and rt.__version__[0].isdigit()


def test_a_wheel_brings_configs_data_and_types(tmp_path: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    source = tmp_path / "source"  # builds leave folders behind
    for name in ("reptune_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source), "-w", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "reptune_jax").rglob("*.*")}
    expected = {name for name in expected if "__pycache__" not in name and "egg-info" not in name}
    expected |= {f"reptune_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    assert found == expected
    assert {"reptune_jax/py.typed", "reptune_jax/report/template.html"} < found

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    script = (
        "import reptune_jax as rt; from reptune_jax.command_line import find_config; "
        "print(rt.__version__, rt.__file__, find_config('sentiment:quick'), sep='\\n')"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=env, cwd=tmp_path
    )
    version, face, path = done.stdout.split()
    assert version == rt.__version__ and face == str(installed / "reptune_jax" / "__init__.py")
    assert path == f"{installed / 'reptune_jax' / 'configs' / 'sentiment.py'}:quick"
