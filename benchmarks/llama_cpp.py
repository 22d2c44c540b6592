"""A control vector written here, in llama.cpp itself: its loader, its graph, its logits.

    pip install xllamacpp==2026.10.11549   # its structs are read as this one lays them out
    python -m benchmarks.llama_cpp [--model FILE.gguf] [--dose 2]

Weights are written out as float32 first, so that both sides compute the same model, and what
remains is seen without a vector. llama.cpp is called in xllamacpp's library by its C interface.
Prints how far the last token's logits are apart, and how far the vector moves them.
"""

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp.xllamacpp

import reptune_jax as rt
from benchmarks.model import fetched
from benchmarks.side_by_side import PAIRS, PROMPTS

_LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"

_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class _Parameters(ctypes.Structure):
    """Any of llama.cpp's parameter structs, by value: it reads as many bytes as it knows of."""

    _fields_ = (("bytes", ctypes.c_char * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (("n_tokens", ctypes.c_int32), ("arrays", ctypes.c_void_p * 6))


class _Info(ctypes.Structure):
    """common_control_vector_load_info: a strength and a std::string, in manylinux2014 a pointer."""

    _fields_ = (("strength", ctypes.c_float), ("text", ctypes.c_char_p))


class _Data(ctypes.Structure):
    """common_control_vector_data: the width, and a std::vector<float> of rows 1 to the last."""

    _fields_ = (("n_embd", ctypes.c_int), ("vector", ctypes.c_void_p * 3))


def _library() -> Any:
    lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Parameters
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_batch_get_one.restype = _Batch
    lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    getattr(lib, _LOADER).restype = _Data
    lib.llama_log_set(_SILENT, None)
    return lib


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path):
        self.lib = _library()
        load = self.lib.llama_model_load_from_file
        model = load(str(path).encode(), self.lib.llama_model_default_params())
        if not model:
            raise ValueError(f"llama.cpp does not read {path}")
        self.model = ctypes.c_void_p(model)
        self.begin()

    def begin(self) -> None:
        """A new context: one that was steered keeps the layers that the next file does not name."""
        begin = self.lib.llama_init_from_model
        context = begin(self.model, self.lib.llama_context_default_params())
        self.context = ctypes.c_void_p(context)

    def steer(self, path: Path, layers: int) -> None:
        """Adds a control vector file, as `--control-vector` does."""
        self.begin()
        info = _Info(1.0, str(path).encode())
        at = ctypes.addressof(info)
        end = at + ctypes.sizeof(info)
        data = getattr(self.lib, _LOADER)((ctypes.c_void_p * 3)(at, end, end))
        begin, stop = data.vector[:2]
        if data.n_embd <= 0:
            raise ValueError(f"llama.cpp does not read {path}")
        size = ctypes.c_size_t((stop - begin) // ctypes.sizeof(ctypes.c_float))
        use = self.lib.llama_set_adapter_cvec
        use(self.context, ctypes.c_void_p(begin), size, data.n_embd, 1, layers)

    def logits(self, tokens: list[int], V: int) -> np.ndarray:
        """[V] after the last token."""
        memory = ctypes.c_void_p(self.lib.llama_get_memory(self.context))
        self.lib.llama_memory_clear(memory, True)
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self.lib.llama_batch_get_one(ids, len(tokens))
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (V,)).copy()


def as_float32(source: str, path: Path) -> Path:
    """The same GGUF file with float32 weights."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main() -> None:
    """Prints one line without a vector, and one for each choice of layers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a GGUF file; SmolLM2-135M-Instruct, fetched once")
    parser.add_argument("--dose", type=float, default=2.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = as_float32(args.model or fetched(), Path(folder, "model.gguf"))
        ours = rt.load(str(path), dtype="float32")
        theirs = LlamaCpp(path)
        prompts = [ours.encode_prompt(prompt) for prompt in PROMPTS[:8]]
        compare("no vector", ours, theirs, prompts, None)
        vector = rt.extract(ours, PAIRS)
        N = ours.arch.N
        for layers in ([1], [N // 2], [N - 1], [N // 3, N // 2], list(range(1, N))):
            steer = args.dose / len(layers) * vector.at(layers)
            file = Path(folder, "vector.gguf")
            steer.save(file)
            theirs.steer(file, N)
            compare(f"layers {layers if len(layers) < 3 else 'all'}", ours, theirs, prompts, steer)


def compare(name: str, ours: rt.Model, theirs: LlamaCpp, prompts: list, steer: Any) -> None:
    """Prints how far logits are apart, and how far the vector moves them."""
    apart = moved = largest = 0.0
    for tokens in prompts:
        mask = np.ones((1, len(tokens)), bool)
        ids = np.array([tokens])
        plain = np.asarray(ours.forward(ids, mask).logits_BxTxV)[0, -1]
        steered = np.asarray(ours.forward(ids, mask, steer=steer).logits_BxTxV)[0, -1]
        apart = max(apart, np.abs(steered - theirs.logits(tokens, len(steered))).max())
        moved = max(moved, np.abs(steered - plain).max())
        largest = max(largest, np.abs(steered).max())
    print(f"{name}: {apart:.1e} apart, moved by {moved:.1e}, largest {largest:.0f}", flush=True)


if __name__ == "__main__":
    main()
