"""GGUF files: tensors, config and tokenizer out of one file, and what is refused."""

import dataclasses
import struct

import gguf
import numpy as np
import pytest

from reptune_jax.hub.gguf_header import read_header
from reptune_jax.hub.gguf_io import read_gguf
from reptune_jax.hub.source import open_source
from reptune_jax.model import families
from tests.support import tiny
from tests.support.hub_models import (
    assert_same,
    make_model,
    tokenizer_metadata,
    weights_of,
    write_gguf,
)
from tests.support.tiny import smollm2_path


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def qwen2():
    return make_model("qwen2", tie_word_embeddings=True)


def test_llama_gguf_equals_the_model_it_came_from(llama, tmp_path):
    source = open_source(write_gguf(tmp_path / "m.gguf", llama))
    assert_same(source.tensors, weights_of(llama))
    assert source.config["tie_word_embeddings"] is False
    assert source.config["rope_parameters"]["rope_theta"] == 10000.0
    assert (source.eos_ids, source.folder) == ((2, 0), None)  # <|im_end|>, <|endoftext|>
    expected = llama.config.to_dict()
    for key, value in source.config.items():
        if key not in ("architectures", "rms_norm_eps", "pad_token_id"):
            assert expected[key] == value, key


def test_llama_gguf_with_biases(tmp_path):
    model = make_model("llama", attention_bias=True, mlp_bias=True)
    gguf_file = read_gguf(write_gguf(tmp_path / "m.gguf", model))
    assert_same(gguf_file.tensors, weights_of(model))
    assert gguf_file.config["attention_bias"] and gguf_file.config["mlp_bias"]


def test_qwen2_gguf_is_tied_and_not_permuted(qwen2, tmp_path):
    gguf_file = read_gguf(write_gguf(tmp_path / "m.gguf", qwen2))
    assert_same(gguf_file.tensors, weights_of(qwen2))
    assert gguf_file.config["tie_word_embeddings"] is True


def test_gemma3_gguf_norms_lose_their_one_and_rows_stay(tmp_path):
    model = make_model("gemma3_text", num_hidden_layers=7, tie_word_embeddings=True, head_dim=16)
    gguf_file = read_gguf(write_gguf(tmp_path / "m.gguf", model))
    expected = weights_of(model)
    assert gguf_file.tensors.keys() == expected.keys()
    for name, array in expected.items():
        got = gguf_file.tensors[name].read()
        np.testing.assert_allclose(got, array, atol=2e-7 if "norm" in name else 0, err_msg=name)
    theirs, ours = families.from_config(model.config.to_dict()), gguf_file.config
    same = dataclasses.replace(families.from_config(ours), scale=theirs.scale, norm_eps=1e-6)
    assert same == theirs
    assert (ours["query_pre_attn_scalar"], ours["sliding_window"]) == (16, 4096)


def test_quantized_gguf_is_within_a_step_of_the_model(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama, quantized=True)
    assert "Q8_0" in {info.kind.name for info in read_header(path).tensors.values()}
    tensors = read_gguf(path).tensors
    for name, array in weights_of(llama).items():
        got = tensors[name].read()
        step = np.abs(array).max() / 127
        np.testing.assert_allclose(got, array, atol=0 if array.ndim == 1 else step, err_msg=name)


def test_half_precision_gguf_keeps_its_dtype(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama.half())
    llama.float()
    handle = read_gguf(path).tensors["lm_head.weight"]
    assert (handle.dtype, handle.read().dtype) == (np.float16, np.float16)


def test_header_equals_the_librarys_reader(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama, quantized=True)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {k: v.contents() for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        raw = ours.data[info.start : info.start + info.n_bytes]
        assert raw.tobytes() == tensor.data.tobytes()


def llama3_factors(factor=8.0):
    """What llama.cpp stores for llama3's scaling, by way of transformers."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": factor}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 8, 2) / 8)
    return rope, (plain / scaled.numpy()).astype(np.float32)


def test_llama3_scaling_is_recovered_from_its_factors(llama, tmp_path):
    rope, factors = llama3_factors()
    assert factors[3] == pytest.approx(8) and 1.1 < factors[2] < 7 and factors[0] == 1
    extra = {"rope.freq_base": 500000.0}
    given = {"rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "m.gguf", llama, extra=extra, tensors=given)
    assert read_gguf(path).config["rope_parameters"] == rope
    given = {"rope_freqs.weight": factors * np.float32([1, 1, 1.1, 1])}
    path = write_gguf(tmp_path / "n.gguf", llama, extra=extra, tensors=given)
    with pytest.raises(ValueError, match=r"rope_freqs.weight .*is not llama3's scaling"):
        read_gguf(path)


def test_linear_scaling_is_kept(llama, tmp_path):
    extra = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    rope = read_gguf(write_gguf(tmp_path / "m.gguf", llama, extra=extra)).config["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"rope.scaling.type": "yarn"},
            "got rotary scaling 'yarn', expected none, linear or llama3",
        ),
        ({"rope.dimension_count": 4}, "got 4 rotary dims of 8"),
        ({"expert_count": 8}, "got llama.expert_count = 8"),
        ({"attention.sliding_window": 64}, "got llama.attention.sliding_window = 64"),
        ({"attention.head_count_kv": [2, 2]}, "got a head count per layer"),
        ({"block_count": None}, "metadata llama.block_count is missing"),
    ],
)
def test_gguf_of_another_arithmetic_is_refused(llama, tmp_path, extra, message):
    path = write_gguf(tmp_path / "m.gguf", llama, extra=extra)
    with pytest.raises(ValueError, match=message):
        open_source(path)


def test_gguf_with_unknown_architecture_tensors_or_parts(llama, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", llama, arch="gemma3n")
    with pytest.raises(
        ValueError, match="got architecture 'gemma3n', expected one of llama, qwen2"
    ):
        open_source(path)
    extra = {"blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)}
    path = write_gguf(tmp_path / "b.gguf", llama, tensors=extra)
    with pytest.raises(ValueError, match=r"1 tensors with no place .*such as blk.0.ffn_gate_exps"):
        open_source(path)
    path = write_gguf(
        tmp_path / "c.gguf", llama, metadata=tokenizer_metadata() | {"split.count": 3}
    )
    with pytest.raises(ValueError, match="one of 3 parts"):
        open_source(path)


def test_gguf_truncated_anywhere_says_how_many_bytes(llama, tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", llama).read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in (5, 20, 200, 3000, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=rf"got {keep:,} bytes, (expected|but the header)"):
            open_source(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got 0 bytes starting with b'', expected b'GGUF'"),
        (b"<html>error</html>", "starting with b'<htm', expected b'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "got GGUF version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QI", 0, 99), "metadata of type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62), "truncated"),
    ],
)
def test_not_a_gguf_file(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(path)


def test_gguf_with_a_quantization_nobody_reads(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama)
    whole = path.read_bytes()
    at = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    for kind, message in [
        (9, "quantization Q8_1, which cannot"),
        (77, "quantization 77, which is"),
    ]:
        path.write_bytes(whole[:at] + struct.pack("<I", kind) + whole[at + 4 :])
        with pytest.raises(ValueError, match=f"output_norm.weight has {message}"):
            open_source(path)


@pytest.mark.slow
@pytest.mark.skipif(smollm2_path() is None, reason="needs the SmolLM2 GGUF")
def test_smollm2_equals_transformers_own_reading():
    source, model = open_source(smollm2_path()), tiny.smollm2_in_torch()
    assert_same(source.tensors, weights_of(model))
    theirs = model.config.to_dict()
    shared = [key for key in source.config if key != "architectures"]
    assert {k: source.config[k] for k in shared} == {k: theirs[k] for k in shared}
    assert source.eos_ids == (source.tokenizer.eos_token_id, 0)  # llama.cpp ends at both
