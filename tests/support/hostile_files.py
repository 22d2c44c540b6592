"""Whole files of every format, their readers, and what comes of a damaged one."""

import contextlib
import io
import json
import shutil
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import reptune_jax as rt
from reptune_jax import convert, lm, program, tuned_run
from reptune_jax.data import behavior
from reptune_jax.data.tuning import Answer
from reptune_jax.hub.safetensors_io import save_tensors
from reptune_jax.vectors import extraction
from tests.support import hostile, hostile_gguf
from tests.support.damage import Case

KINDS = ("sharded", "orbax", "run")  # that take seconds to make


class Format(NamedTuple):
    """How the files of a kind are damaged, where whole ones lie, and who reads them."""

    cases: Callable[[Path], st.SearchStrategy[Case]]  # of the folder of whole ones
    whole: str
    read: Callable[[Path, Path], Any]  # (the damaged folder, the folder of all whole ones)


def make_whole(folder: Path, kinds: Collection[str] = KINDS) -> None:
    """A tiny model in every form, with an adapter, a run, a vector, targets and a behavior."""
    from tests.support import hub_models, lora_case, tiny, tiny_behavior  # they import torch

    hf = tiny.make_llama(folder / "hf")
    if "sharded" in kinds:
        sharded = tiny.make_llama(folder / "sharded")
        save_tensors(sharded, load_file(sharded / "model.safetensors"), 100_000)
    if "orbax" in kinds:
        convert.run(str(hf), str(folder / "orbax"), format="orbax")
    if "run" in kinds:
        lora_case.make_run(folder / "run", lm.load(str(hf), "float32"))
    (folder / "gguf").mkdir()
    hub_models.write_gguf(folder / "gguf" / "model.gguf", hub_models.make_model("llama"))
    _make_adapter(folder / "adapter")
    (folder / "other").mkdir()
    _make_vector(folder / "other" / "vector.safetensors")
    answers = [Answer(f"i{k}", "tune", 1, "p", "t", [5, 6, 7], 0.5) for k in range(3)]
    extraction.write_targets(folder / "other" / "targets.jsonl", answers)
    tiny_behavior.write(folder / "other")


def _make_adapter(folder: Path) -> None:
    """As peft writes one on v of two layers."""
    folder.mkdir()
    rng, names = np.random.default_rng(0), {}
    for layer in (1, 2):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        for which, shape in (("A", (4, 64)), ("B", (32, 4))):
            names[f"{name}.lora_{which}.weight"] = rng.normal(size=shape).astype(np.float32)
    save_file(names, folder / "adapter_model.safetensors", {"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "a/model",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": ["v_proj"],
        "exclude_modules": None,
        "layers_to_transform": [1, 2],
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))


def _make_vector(path: Path) -> None:
    rng = np.random.default_rng(0)
    directions, mean = rng.normal(size=(2, 4, 64)).astype(np.float32)
    meta = {"model": "m", "method": "mean_diff", "position": "last", "agreement": [0.5] * 4}
    norms = np.ones(4, np.float32)
    rt.SteeringVector(directions, norms, mean, (0, 1, 2, 3), meta).save(path)


# ---------------------------------------------------------------- readers


def read_model(folder: Path, whole: Path) -> None:
    """Loads, renders a chat, and looks whether what is computed is numbers."""
    target = next(iter(folder.glob("*.gguf")), folder)
    model = rt.load(str(target), "float32")
    ids = model.encode_prompt("Hi") if model.tokenizer and model.tokenizer.chat_template else [5, 6]
    _computes(model, ids)


def read_adapter(folder: Path, whole: Path) -> None:
    """Merges it into its base."""
    _computes(rt.load_adapter(rt.load(str(whole / "hf"), "float32"), folder))


def read_run(folder: Path, whole: Path) -> None:
    """Lays a tuned run over its base."""
    _computes(tuned_run.load(folder).over(rt.load(str(whole / "hf"), "float32")))


def read_vector(folder: Path, whole: Path) -> None:
    """As the programs take it."""
    vector = rt.SteeringVector.load(folder / "vector.safetensors")
    model = rt.load(str(whole / "hf"), "float32")
    extraction.fit(vector, model)
    model.encode_prompt("Hi")
    assert repr(vector)
    vector.check_shape(model.arch.N, model.arch.D)


def read_targets(folder: Path, whole: Path) -> None:
    """As tuning takes them."""
    for answer in extraction.read_targets(folder / "targets.jsonl"):
        assert isinstance(answer.ids, list) and answer.sign in (1, -1), answer


def read_behavior(folder: Path, whole: Path) -> None:
    """As every program takes it."""
    found = behavior.load(folder / "sentiment.jsonl")
    assert all(isinstance(item.label, int | None) for item in found.items)


def _computes(model: lm.Model, ids: list[int] | None = None) -> None:
    logits = model.forward([ids or [5, 6]]).logits_BxTxV
    if not np.isfinite(logits).all():
        raise AssertionError("accepted, and what is computed are no numbers")


FORMATS = {
    "config": Format(hostile.config, "hf", read_model),
    "header": Format(hostile.header, "hf", read_model),
    "index": Format(hostile.index, "sharded", read_model),
    "tokenizer": Format(hostile.tokenizer, "hf", read_model),
    "template": Format(hostile.template, "hf", read_model),
    "gguf": Format(hostile_gguf.gguf, "gguf", read_model),
    "orbax": Format(hostile.orbax, "orbax", read_model),
    "run": Format(hostile.run, "run", read_run),
    "adapter": Format(hostile.adapter, "adapter", read_adapter),
    "vector": Format(hostile.vector, "other", read_vector),
    "targets": Format(hostile.targets, "other", read_targets),
    "behavior": Format(hostile.behavior, "other", read_behavior),
}


def lay(case: Case, whole: Path, folder: Path) -> Path:
    """The case's folder: the whole files, with those of the case over them."""
    shutil.copytree(whole / FORMATS[case.format].whole, folder)
    for name, raw in case.files.items():
        if raw is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(raw)
    return folder


def outcome(case: Case, folder: Path, whole: Path) -> tuple[str, str]:
    """(refused | accepted | silent | traceback, what was said) of reading a case as programs do."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            program.call(lambda: FORMATS[case.format].read(folder, whole))
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        one = len(errors) == 1 and lines[-1] == errors[0] and 20 < len(errors[0]) < 2000
        return ("refused" if one else "several lines"), " / ".join(lines)[-2000:]
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [
            f
            for f in frames
            if "/reptune_jax/reptune_jax/" in f.filename or "/B/reptune_jax/" in f.filename
        ]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in own[-3:])
        return "traceback", f"{where} {type(error).__name__}: {str(error).strip()[:200]}"
    return ("silent" if case.wrong else "accepted"), ""
