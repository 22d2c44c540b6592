"""The config and the command line: every mistake is answered by name, without a traceback."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from flax import traverse_util

from reptune_jax import command_line, config, program, ranges, roles, train
from tests.support import tiny, tiny_behavior

ROOT = Path(__file__).parent.parent


def run(module, *args):
    return subprocess.run(
        [sys.executable, "-m", f"reptune_jax.{module}", *map(str, args)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def settings(**changes):
    c = config.default()
    c.model = "model"
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "mine.py"
    path.write_text(
        "from reptune_jax.config import default\n\n\n"
        'def get_config(arg="nowhere"):\n'
        "    c = default()\n    c.model = arg\n    return c\n"
    )
    return path


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "override,message",
    [
        ("--config.trian.lr=1", 'Did you mean "train" instead of "trian"'),
        ("--config.train.lr=high", "train.lr=high"),
        ("--config.arm=duel", "error: arm: got 'duel', expected one of base, prompt, steer"),
        ("--config.model=/no/such/folder", "/no/such/folder"),
    ],
)
def test_a_mistake_ends_the_program_with_a_message(override, message, config_file, tmp_path):
    found = run("train", f"--config={config_file}", override, f"--workdir={tmp_path / 'w'}")
    assert found.returncode == 1
    assert message in found.stderr and "Traceback" not in found.stderr
    made = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert set(made) <= {"config.json"}


def test_help_shows_the_docstring_and_the_flags():
    found = run("train", "--help")
    first = train.__doc__.splitlines()[0]
    assert first.startswith("Program: ") and first in found.stdout and found.returncode == 0
    assert "--config" in found.stdout and "--workdir" in found.stdout
    assert "Traceback" not in found.stderr


def test_only_messages_meant_for_the_user_replace_a_traceback(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        program.call(lambda: ranges.check(config.default()))
    assert capsys.readouterr().err.startswith("error: model: got ''")
    with pytest.raises(SystemExit):
        program.call(lambda: config.default().lock().train.__setattr__("rl", 1))
    assert "unknown key or wrong type" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.call(lambda: Path(__file__, "w").mkdir())
    assert capsys.readouterr().err == f"error: {Path(__file__, 'w')}: Not a directory.\n"
    with pytest.raises(AttributeError):  # our own fault, or another library's: all of it is shown
        program.call(lambda: program.load_model(None))
    with pytest.raises(ValueError):
        program.call(lambda: json.loads("{"))
    monkeypatch.setenv("REPTUNE_DEBUG", "1")
    with pytest.raises(ValueError):
        program.call(lambda: ranges.check(config.default()))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"loss__mode": "into"}, "loss.mode: got 'into', expected one of in, out"),
        ({"loss__targets": "x"}, "loss.targets: got 'x'"),
        ({"train__decay": "exp"}, "train.decay: got 'exp'"),
        ({"train__remat": "all"}, "train.remat: got 'all'"),
        ({"train__pack": "yes"}, "train.pack: got 'yes', expected one of auto, on, off"),
        ({"vector__norm": "l2"}, "vector.norm: got 'l2'"),
        ({"dtype": "float23"}, "dtype: got 'float23'"),
        ({"sign": 0}, "sign: got 0, expected one of 1, -1"),
        ({"seed": -1}, "seed: got -1, expected 0 or more"),
        ({"train__layers": (5, 5)}, r"train.layers: got \(5, 5\), expected first < stop"),
        ({"train__layers": (5,)}, r"train.layers: got \(5,\)"),
        ({"train__layers": ("0.5", "0.4")}, r"train.layers: got \('0.5', '0.4'\), expected first"),
        ({"targets__layers": ("half",)}, "targets.layers: got 'half', expected layers"),
        (
            {"loss__layers": (-1, 5)},
            "loss.layers: got -1, expected layers, counted from 0",
        ),
        ({"steer__layers": (3, -2)}, "steer.layers: got -2, expected layers, counted from 0"),
        ({"train__steps": 0}, "train.steps: got 0, expected 1 or more"),
        ({"train__patience": -1}, "train.patience: got -1, expected 0 or more"),
        ({"train__clip": -1.0}, "train.clip: got -1.0, expected 0 or more"),
        ({"train__warmup": -3}, "train.warmup: got -3"),
        ({"train__val_rows": -1}, "train.val_rows: got -1"),
        ({"train__b2": 2.0}, "train.b2: got 2.0, expected 0 or more, at most"),
        ({"train__log_every": 0}, "train.log_every: got 0"),
        ({"train__eval_every": -1}, "train.eval_every: got -1"),
        ({"train__measure_every": -1}, "train.measure_every: got -1"),
        ({"train__lr": 0.0}, "train.lr: got 0.0, expected more than 0, at most 1"),
        ({"train__lr": float("nan")}, "train.lr: got nan"),
        ({"train__lr": float("inf")}, "train.lr: got inf"),
        ({"train__lora__rank": -4}, "train.lora.rank: got -4"),
        ({"train__accumulate": 3}, "train.accumulate: got 3, expected a divisor of train.batch=8"),
        ({"train__profile": (5, 2)}, r"train.profile: got \(5, 2\)"),
        ({"loss__cosine": -1.0}, "loss.cosine: got -1.0, expected 0 or more"),
        ({"loss__shift": float("nan")}, "loss.shift: got nan"),
        ({"loss__anneal__token": (1.0, -1.0)}, "loss.anneal.token: got -1.0"),
        ({"loss__anneal__token": (1.0,)}, r"loss.anneal.token: got \(1.0,\), expected two factors"),
        ({"loss__position": "reponse"}, "loss.position: got 'reponse', expected one of response"),
        ({"vector__position": "7"}, "vector.position: got '7'"),
        ({"targets__dose": 1e38}, "targets.dose: got 1e[+]38, expected -10000 or more, at most"),
        ({"targets__max_repeat": 1.5}, "targets.max_repeat: got 1.5"),
        ({"steer__doses": (1.0, 1e38)}, "steer.doses: got 1e[+]38, expected more than 0"),
        ({"eval__prompts": -1}, "eval.prompts: got -1, expected 0 or more"),
        ({"eval__splits": ("test", "trian")}, "eval.splits: got 'trian', expected one of val"),
        ({"mesh__fsdp": -2}, "mesh.fsdp: got -2, expected -1 or more"),
        ({"study__arms": ("base", "duel")}, "study.arms: got 'duel'"),
        ({"study__signs": (2,)}, "study.signs: got 2, expected one of 1, -1"),
        ({"study__signs": ()}, r"study.signs: got \(\), expected some"),
        ({"study__seeds": (-1,)}, "study.seeds: got -1"),
        ({"study__seeds": (0, 0)}, r"study.seeds: got \(0, 0\), expected some, each of them once"),
        ({"template_arguments": "{"}, "template_arguments: got '{'"),
        ({"model": ""}, "model: got ''"),
    ],
)
def test_values_are_checked_by_name(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ranges.check(settings(**changes))


def test_values_of_names_that_a_user_chose_are_checked():
    c = settings()
    c.train.lr_by_path.mlp = -1e-5
    with pytest.raises(ValueError, match=r"train.lr_by_path.mlp: got -1e-05, expected 0 or more"):
        ranges.check(c)
    c = settings()
    c.loss.also.other = config.also_behavior("runs/other")
    assert ranges.check(c) == c
    c.loss.also.other.batch = 0
    with pytest.raises(ValueError, match=r"loss.also.other.batch: got 0, expected 1 or more"):
        ranges.check(c)


@pytest.mark.parametrize(
    "name",
    ["sentiment", "sentiment:quick", "sentiment:persona", "honesty", "scale", "scale:llama-3-8b"],
)
def test_shipped_configs_are_within_their_ranges(name):
    path, _, argument = command_line.find_config(name).partition(":")
    c = runpy.run_path(path)["get_config"](*filter(None, [argument]))
    c.model = c.model or "model"
    assert ranges.check(c)


def test_every_number_has_a_range_and_every_range_a_key():
    c = config.default()
    c.loss.also["*"], c.train.lr_by_path["*"] = config.also_behavior(""), 1e-5
    flat = traverse_util.flatten_dict(c.to_dict(), sep=".")
    for name in c.loss.anneal:
        flat["loss.anneal.*"] = flat.pop(f"loss.anneal.{name}")
    numbers = {
        key
        for key, value in flat.items()
        for one in (value if isinstance(value, tuple) else (value,))
        if type(one) in (int, float)
    }
    assert numbers <= ranges.RANGES.keys() <= flat.keys()


def test_a_config_that_is_right_passes_and_is_not_changed():
    c = settings(loss__position="-7")
    assert ranges.check(c) == c and ranges.check(c) is not c


def test_arms_differ_by_their_settings_only():
    for arm, changes in config.ARMS.items():
        c = settings(arm=arm)
        armed = roles._flatten(config.armed(c).to_dict())
        plain = roles._flatten(c.to_dict())
        assert {k: armed[k] for k in changes} == changes
        assert {k for k, v in armed.items() if plain[k] != v} <= changes.keys()
        assert c == settings(arm=arm)
    assert set(config.TUNED_ARMS) < set(config.ARMS)


def test_the_digest_identifies_values():
    assert roles.digest(settings().to_dict()) == roles.digest(settings().to_dict())
    assert roles.digest(settings().to_dict()) != roles.digest(settings(train__lr=1e-3).to_dict())


# ---------------------------------------------------------------- inputs that are wrong


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"id": "a"\n', r"line 1: malformed JSON"),
        ("\n\n[1]\n", r"line 3: got list, expected a JSON object"),
        ('{"id": "a"}\n', r"line 1: missing behavior"),
    ],
)
def test_a_malformed_behavior_is_named_by_line(text, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    c = tiny_behavior.settings(tiny.make_llama(tmp_path / "m"), path)
    with pytest.raises(ValueError, match=f"mine.jsonl, {message}"):
        train.run(c, tmp_path / "w")


def test_an_empty_behavior_is_an_error(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("")
    c = tiny_behavior.settings(tiny.make_llama(tmp_path / "m"), path)
    with pytest.raises(ValueError, match=r"mine|persona|claim"):
        train.run(c, tmp_path / "w")


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_folder_that_lacks_a_file(gone, tmp_path):
    model = tiny.make_llama(tmp_path / "m")
    (model / gone).unlink()
    if gone == "tokenizer.json":
        (model / "tokenizer_config.json").unlink()
    c = tiny_behavior.settings(model, "sentiment")
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        program.load_model(c)
    assert str(model) in str(e.value)


def test_a_mesh_for_more_devices_than_there_are(tmp_path):
    c = tiny_behavior.settings(tiny.make_llama(tmp_path), "sentiment", mesh__tensor=4)
    with pytest.raises(ValueError, match=r"mesh: got .*'tensor': 4"):
        program.load_model(c)
