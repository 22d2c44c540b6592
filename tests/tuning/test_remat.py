"""`train.remat=auto` takes what fits: by real programs' memory, and whatever a compiler does."""

import types

import jax
import pytest

from reptune_jax import lm
from reptune_jax.tuning import remat
from reptune_jax.tuning import step as steps
from tests.support import tiny, tuning_case


def program(temporaries: float):
    """What `remat` asks of a compiled program."""
    memory = types.SimpleNamespace(
        temp_size_in_bytes=temporaries,
        output_size_in_bytes=3,
        alias_size_in_bytes=3,
        generated_code_size_in_bytes=0,
    )
    return types.SimpleNamespace(memory_analysis=lambda: memory)


def test_the_first_real_program_that_fits_is_taken(tmp_path, monkeypatch, capsys):
    model = lm.load(str(tiny.make_llama(tmp_path)), "float32")
    case = tuning_case.case(model, tuning_case.settings(train__layers=(0, 4)))
    args = case.state, case.objective, tuning_case.batch(model), jax.numpy.array(False)
    made = {}

    def compiled(choice):
        step = steps.make_step(case.decoder.clone(remat=choice), case.train)
        made.setdefault(choice, step.lower(*args).compile())
        return made[choice]

    need = {choice: remat.needed(compiled(choice)) for choice in ("none", "dots", "full")}
    assert need["none"] > need["dots"] > need["full"]
    for choice, bytes_ in need.items():
        monkeypatch.setattr(remat, "free", lambda bytes_=bytes_: bytes_)
        assert remat.fitting("auto", "gpu", compiled) is made[choice]
    monkeypatch.setattr(remat, "free", lambda: 0.0)  # nothing fits, or nothing is known
    assert remat.fitting("auto", "gpu", compiled) is made["full"]
    said = capsys.readouterr().out
    assert "remat: none needs" in said and "remat: dots" in said
    assert remat.fitting("none", "gpu", compiled) is made["none"]  # as it was asked for


def test_a_compiler_that_refuses_a_program_is_asked_for_the_next(monkeypatch):
    monkeypatch.setattr(remat, "free", lambda: 10.0)
    why = ["RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."]

    def compiled(choice):
        if choice == "none":
            raise jax.errors.JaxRuntimeError(why[0])
        return program({"dots": 11, "full": 9}[choice])

    assert remat.needed(remat.fitting("auto", "tpu", compiled)) == 9
    why[0] = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        remat.fitting("auto", "tpu", compiled)


def test_a_cpu_stores_little():
    assert remat.choices("auto", "cpu") == ("dots",)
    assert remat.choices("auto", "gpu") == ("none", "dots", "full")
    assert remat.choices("full", "gpu") == ("full",)
