"""What the person at the terminal is told, and by which process."""

import pytest

from reptune_jax import console


@pytest.mark.parametrize("first", [True, False])
def test_one_of_several_processes_speaks_and_draws(first, monkeypatch, capsys):
    monkeypatch.setattr(console.distributed, "is_first", lambda: first)
    console.say("hello")
    assert capsys.readouterr().out.endswith("] hello\n") == first
    steps = console.watched(range(3), "reading")
    assert steps.disable != first
    assert list(steps) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # what is over within two seconds has no bar


def test_a_bar_stands_for_those_within_it():
    with console.counted(2, "all", quiet=True) as outer:
        assert outer.disable and console.watched([1], "a part").disable
    assert not console.watched([1], "alone").disable
    with pytest.raises(KeyError), console.counted(2, "all") as outer:
        assert not outer.disable and console.watched([1], "a part").disable
        raise KeyError
    assert not console.watched([1], "alone").disable


@pytest.mark.parametrize(
    "seconds,text",
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7325, "2 h 02 min"),
    ],
)
def test_a_time_as_people_say_it(seconds, text):
    assert console.clock(seconds) == text
