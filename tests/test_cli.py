"""The command line around the programs: `reptune`, and the columns of `chat`."""

import subprocess
import sys
from pathlib import Path

import pytest

from reptune_jax import chat, cli


def test_overview_names_every_program_with_its_own_first_line() -> None:
    text = cli.overview()
    for name, module in cli.PROGRAMS.items():
        assert f"  {name}" in text
        assert cli.summary(module) in text


def test_unknown_program_is_answered_with_the_likely_one() -> None:
    command = [sys.executable, "-c", "from reptune_jax import cli; cli.main()", "trian"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert "got 'trian'" in done.stderr and "Did you mean 'train'?" in done.stderr
    assert "Traceback" not in done.stderr


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
        chat.find_run(tmp_path, "dual-_s7")


def test_the_program_module_does_not_hide_the_function_of_its_name() -> None:
    import reptune_jax as rt
    import reptune_jax.extract

    with pytest.raises(ValueError, match="method: got 'none'"):
        rt.extract(None, [], method="none")
