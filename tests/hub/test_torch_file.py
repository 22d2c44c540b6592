"""torch's files without torch: torch writes what we read, and reads what we write."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from reptune_jax.hub.torch_file import read_torch, write_torch


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64"])
def test_views_of_a_storage_are_read_as_torch_sees_them(tmp_path, name):
    whole = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(getattr(torch, name))
    saved = {"view": whole.T[1:4], "last": whole[-1, 2:], "empty": whole[:0], "more": [1, 2.5, "x"]}
    torch.save(saved, tmp_path / "v.pt")
    found = read_torch(tmp_path / "v.pt")
    assert found["more"] == [1, 2.5, "x"] and found["view"].dtype.name == name
    for key in ("view", "last", "empty"):
        np.testing.assert_array_equal(found[key].astype(float), saved[key].double().numpy())


def test_torch_reads_what_is_written_and_so_do_we(tmp_path):
    value = {
        "a": {"v": np.arange(6, dtype=np.float32).reshape(2, 3), "k": 0.1, "none": None},
        "n": -3, "yes": True, "text": "für", "w": np.ones(4, np.float32),
    }  # fmt: skip
    write_torch(tmp_path / "v.pt", value)
    theirs = torch.load(tmp_path / "v.pt", weights_only=True)
    assert theirs["a"]["v"].dtype == torch.float32
    for found in (theirs, read_torch(tmp_path / "v.pt")):
        np.testing.assert_array_equal(np.asarray(found["a"].pop("v")), [[0, 1, 2], [3, 4, 5]])
        np.testing.assert_array_equal(np.asarray(found.pop("w")), np.ones(4))
        assert found == {"a": {"k": 0.1, "none": None}, "n": -3, "yes": True, "text": "für"}


class Calls:
    """A pickle of it calls `function(*given)`."""

    def __init__(self, function, *given):
        self.what = function, given

    def __reduce__(self):
        return self.what


def test_what_would_be_run_is_not(tmp_path):
    mark = tmp_path / "mark"
    for call in (Calls(open, str(mark), "w"), Calls(eval, f"open({str(mark)!r}, 'w')")):
        torch.save({"v": torch.ones(3), "w": call}, tmp_path / "v.pt")
        with pytest.raises(ValueError, match=r"v.pt: holds \S+, expected .* Nothing of it was run"):
            read_torch(tmp_path / "v.pt")
        assert not mark.exists()
    torch.load(tmp_path / "v.pt", weights_only=False)  # which is what it would have done
    assert mark.exists()


def test_a_name_that_is_allowed_leads_to_no_other(tmp_path):
    for text in (
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"\x80\x04\x8c\x05torch\x8c\x04load\x93.",
    ):
        with zipfile.ZipFile(tmp_path / "v.pt", "w") as archive:
            archive.writestr("archive/data.pkl", text)
        with pytest.raises(ValueError, match=r"v.pt: holds .* Nothing of it was run"):
            read_torch(tmp_path / "v.pt")


def _with_pickle(path, change):
    """The file with its pickle changed and everything else as it was."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    path = tmp_path / "v.pt"
    small, int_of = np.ones((2, 3), np.float32), lambda n: b"J" + n.to_bytes(4, "little")
    changes = (
        (int_of(2) + int_of(3), int_of(2) + int_of(4)),  # more columns
        (int_of(3) + int_of(1), int_of(9) + int_of(1)),  # a longer stride
        (int_of(6), int_of(7)),  # more than the file holds
        (int_of(2), int_of(2**31 - 1)),
    )
    for old, new in changes:
        write_torch(path, {"v": small})
        _with_pickle(path, lambda data, old=old, new=new: data.replace(old, new))
        with pytest.raises(ValueError, match=r"v.pt: got "):
            read_torch(path)


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "v.pt"
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"v.pt: got no zip file, .* safetensors"):
        read_torch(path)
    path.write_bytes(pickle.dumps({"v": [1.0]}))
    with pytest.raises(ValueError, match="got no zip file"):
        read_torch(path)
    module = torch.nn.Linear(2, 2)
    for value, name in ((torch.arange(3), "LongStorage"), (module, r"\S+linear.Linear")):
        torch.save(value, path)
        with pytest.raises(ValueError, match=f"holds torch.{name}, expected"):
            read_torch(path)
    torch.save({"v": torch.ones(3)}, path)
    whole = path.read_bytes()
    for keep in (10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"^\S*v.pt: "):
            read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.txt", "")
    with pytest.raises(ValueError, match=r"got 0 files data.pkl"):
        read_torch(path)
