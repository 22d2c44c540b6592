"""Any accepted model name -> config, lazily read tensors under HF names, tokenizer."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reptune_jax.hub import endings, orbax_io, side_files
from reptune_jax.hub.gguf_io import read_gguf
from reptune_jax.hub.names import Spelling
from reptune_jax.hub.safetensors_io import TensorHandle, read_tensors
from reptune_jax.hub.settle import check_layers, settled
from reptune_jax.hub.tokenizer import check_vocabulary, follow_file, gguf_tokenizer
from reptune_jax.model import families, sampling
from reptune_jax.model.arch import Arch
from reptune_jax.reading import parse_json, reading

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DOWNLOAD = [*side_files.PATTERNS, "*.safetensors", "*.safetensors.index.json"]
_SKIP = ["original/*", "consolidated*", "onnx/*", "*/*.safetensors"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk; nothing of its weights is read until a handle is."""

    name: str
    config: dict[str, Any]  # keys of HF config.json
    tensors: Mapping[str, TensorHandle] = dataclasses.field(repr=False)
    tokenizer: "PreTrainedTokenizerBase | None" = dataclasses.field(repr=False)
    folder: Path | None  # None for a GGUF file
    eos_ids: tuple[int, ...]  # tokens that end a generation
    leaves: Mapping[str, TensorHandle] | None = None  # of an Orbax model folder, by our paths
    spelling: Spelling | None = None  # of the Hugging Face folder that one was made from
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)  # as it declares it

    def arch(self) -> Arch:
        """What the config describes.

        Raises:
          ValueError: a family or a setting that is not computed here.
        """
        with reading(self.name, ""):
            return families.from_config(self.config)


def open_source(name: str | Path) -> Source:
    """Opens an HF folder, a hub id (`org/name`, downloaded once), a `.gguf` or an Orbax folder.

    Raises:
      ValueError: nothing there, files missing, damaged or unsafe, or the hub does not give it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(str(name), path)
    if path.is_file():
        return _open_file(str(name), path)
    if _HUB_ID.fullmatch(str(name)) and path.suffix != ".gguf":
        return _open_folder(str(name), _download(str(name)))
    raise ValueError(
        f"model: {str(name)!r} does not exist{_did_you_mean(path)}, expected a folder with "
        "config.json, a .gguf file, or a hub id such as 'org/name'."
    )


def _did_you_mean(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (did you mean {str(path.parent / close[0])!r}?)" if close else ""


def _open_file(name: str, path: Path) -> Source:
    if path.suffix in (".safetensors", ".json", ".bin", ".pt", ".pth"):
        raise ValueError(
            f"model: got the file {name!r}, expected its folder. Name {str(path.parent)!r}."
        )
    with reading(name, "Convert the file again."):
        gguf = read_gguf(path)
        check_layers(gguf.config, gguf.tensors)
        config, tensors = settled(name, gguf.config, gguf.tensors)
        tokenizer = gguf_tokenizer(gguf.metadata)
        check_vocabulary(tokenizer, config["vocab_size"])
        ends = endings.stop_ids(tokenizer, endings.gguf_ends(gguf.metadata), config["vocab_size"])
    return Source(name, config, tensors, tokenizer, None, ends)


def _open_folder(name: str, folder: Path) -> Source:
    config = _config(folder)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{name}: is quantized ({method}), expected plain weights. "
            "Use the unquantized model, or a GGUF file."
        )
    leaves, spelling = None, None
    tensors: Mapping[str, TensorHandle] = {}
    if orbax_io.is_model(folder):
        if foreign := next(folder.glob("model*.safetensors"), None):
            raise ValueError(
                f"{folder}: holds {orbax_io.INDEX} and {foreign.name}, two sources of the weights, "
                "expected one. Delete the one that is old."
            )
        leaves, spelling = orbax_io.read_leaves(folder)
    else:
        tensors = read_tensors(folder)
    with reading(name, "Check that config.json belongs to these weights."):
        check_layers(config, tensors, leaves)
        config, tensors = settled(name, config, tensors)
    tokenizer = _tokenizer(folder)
    V = config.get("vocab_size")
    V = V if type(V) is int and 0 < V < 2**31 else 2**31  # no number: refused by the family
    if tokenizer is not None:
        check_vocabulary(tokenizer, V)
    path = folder / "generation_config.json"
    generation = _json(path) if path.exists() else {}
    declared = [generation.get("eos_token_id"), config.get("eos_token_id")]
    with reading(folder, "Use another model."):
        ends = endings.stop_ids(tokenizer, declared, V)
    how = sampling.declared(generation)
    return Source(name, config, tensors, tokenizer, folder, ends, leaves, spelling, how)


def _config(folder: Path) -> dict[str, Any]:
    if (folder / "config.json").exists():
        return _json(folder / "config.json")
    advice = "Is this the model's own folder?"
    if (folder / "adapter_config.json").exists():
        advice = "This is an adapter: name its base model, or merge it into the base first."
    elif files := sorted(folder.glob("*.gguf")):
        advice = f"Did you mean the file {str(files[0])!r}?"
    raise ValueError(
        f"{folder}: has no config.json, expected a Hugging Face model folder. {advice}"
    )


def _json(path: Path) -> dict[str, Any]:
    return parse_json(path.read_bytes(), path)


def _tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        # never a folder's own code: auto_map is ignored or refused, not run
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds, all about the files
        raise ValueError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}). "
            "Code in model folders is not run; a tokenizer.json is needed."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: got a slow tokenizer, expected a tokenizer.json. Convert it.")
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise ValueError(
            f"{folder}: got a chat_template that is a {type(tokenizer.chat_template).__name__}, "
            "expected a text. Correct tokenizer_config.json."
        )
    with reading(folder):
        if (folder / "tokenizer.json").exists():
            follow_file(tokenizer, folder)
        tokenizer.encode("a")
    return tokenizer


def _download(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOAD, ignore_patterns=_SKIP))
    except errors.GatedRepoError:
        why = "is gated. Accept its license on its hub page and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = (
            "is neither a folder here nor a public model on the hub. Check the spelling; for "
            "a private model log in with `hf auth login`"
        )
    except errors.HFValidationError as error:
        why = f"is no valid hub id ({error})"
    except Exception as error:  # every HTTP library has its own connection errors
        first = str(error).strip().splitlines()[:1] or [""]
        why = (
            "is not a folder here, and the hub cannot be reached "
            f"({type(error).__name__}: {first[0]}). Connect, or download the model elsewhere and "
            "name its folder or a .gguf file"
        )
    raise ValueError(f"model: {name!r} {why}.")
