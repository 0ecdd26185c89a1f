"""Our reader of torch.save's files: the same tensors as torch's, and no more work than a file's size warrants.

What a file may not do is told by the reader's own count of steps and tensors; memory and time are held by limits on a
process that reads the worst of them.
"""

import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import visionattn
from visionattn.errors import VisionattnError
from visionattn.training.checkpoint import link
from visionattn.training.evaluation import ResultFile
from visionattn.weights import read_checkpoint, write_checkpoint
from visionattn.weights.files import write_file
from visionattn.weights.pickled import LEAST_STEPS, MOST_TENSORS

DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("complex64", "complex128"),
]
ODD_DTYPES = ["float8_e4m3fn", "uint16", "uint32", "uint64"]  # which torch itself cannot read in its old format


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("archive", [True, False])
def test_it_reads_what_torch_reads(archive, protocol, tmp_path):
    base = torch.randn(100)
    kinds = DTYPES + (ODD_DTYPES if archive else [])
    tensors = {f"a.{kind}": torch.arange(12).reshape(3, 4).to(getattr(torch, kind)) for kind in kinds}
    tensors |= {
        "view": base.view(10, 10).T[2:5, 1:],
        "end": base[50:],
        "empty": torch.zeros(0, 3),
        "s": torch.tensor(3.0),
    }
    tensors |= {"parameter": torch.nn.Parameter(torch.ones(2)), "buffer": torch.nn.Buffer(torch.ones(3))}
    tensors["tied"] = tensors["s"]
    content = {
        "model": collections.OrderedDict(tensors),
        "epoch": 3,
        "rate": 0.1,
        "list": [1, {"x": base}],
        "none": None,
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=archive, pickle_protocol=protocol)
    found, expected = read_checkpoint(tmp_path / "w.pth")[0], torch.load(tmp_path / "w.pth", weights_only=False)
    assert found.keys() == content.keys() and found["model"].keys() == tensors.keys()
    for key, value in expected["model"].items():
        ours = found["model"][key]
        assert (ours.dtype, ours.shape, ours.stride()) == (value.dtype, value.shape, value.stride()), key
        assert ours.tolist() == value.tolist(), key
    assert found["model"]["tied"] is not None and found["model"]["view"].data_ptr() % 4 == 0
    assert found["model"]["end"].untyped_storage().data_ptr() == found["list"][1]["x"].untyped_storage().data_ptr()
    assert (found["epoch"], found["rate"], found["none"], found["list"][0]) == (3, 0.1, None, 1)


def test_the_other_byte_order(tmp_path):
    torch.save({"a.w": torch.arange(4, dtype=torch.int32), "a.x": torch.ones(3)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as source, zipfile.ZipFile(tmp_path / "b.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if "/data/" in name:
                data = np.frombuffer(data, np.int32).byteswap().tobytes()
            target.writestr(name, b"big" if name.endswith("byteorder") else data)
    found = read_checkpoint(tmp_path / "b.pth")[0]
    assert found["a.w"].tolist() == [0, 1, 2, 3] and found["a.x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "save",
    [
        lambda model: model,
        lambda model: {"model": model},
        lambda model: {
            "model": model,
            "ema": model,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
            "epoch": 3,
        },
        lambda model: torch.nn.DataParallel(model),
    ],
)
def test_a_module_pickled_whole(save, tmp_path):
    torch.save(save(visionattn.create_model("test_van", num_classes=3)), tmp_path / "w.pth")
    told = (
        r"w.pth holds a whole \S+(VAN|DataParallel), pickled: load it .* and torch.save\(model.state_dict\(\), FILE\)$"
    )
    with pytest.raises(VisionattnError, match=told):
        visionattn.create_model("test_van", checkpoint_path=str(tmp_path / "w.pth"))


def test_a_program(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "w.pth"))
    with pytest.raises(VisionattnError, match="w.pth is a TorchScript program: "):
        read_checkpoint(tmp_path / "w.pth")


def archive_of(pickled: bytes, *others: tuple[str, bytes], name: str = "archive/data.pkl") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for entry in ((name, pickled), ("archive/version", b"3\n"), *others):
            archive.writestr(*entry)
    return file.getvalue()


def repeated_name() -> bytes:
    """An archive with two entries of one name, which readers tell apart in ways of their own."""
    good, bad = pickle.dumps({"a.w": 1}, 2), b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x04\x85R."
    return archive_of(good, ("archive/dbtb.pkl", bad)).replace(b"dbtb.pkl", b"data.pkl")


def overlapping(count: int) -> bytes:
    """An archive whose entries all have the same megabyte for content."""
    data = bytearray(archive_of(pickle.dumps({}, 2), ("archive/data/0", bytes(1 << 20))))
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    entries = bytes(data[start:end])
    last = entries[entries.rindex(b"PK\x01\x02") :]
    entries += b"".join(last[:-1] + struct.pack("B", 65 + i) for i in range(count))
    tail = bytearray(data[end:])
    tail[8:16] = struct.pack("<HHI", 3 + count, 3 + count, len(entries))
    return bytes(data[:start]) + entries + bytes(tail)


GLOBAL = b"c__builtin__\nbytearray\n"
HUGE = b"\x8a\x05\x00\x00\x00\x00\x04"  # 16 GiB, as a number
TUPLES = b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(64))  # each twice the one before
LISTS = b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(64))
BOMBS = {
    "other case": (
        archive_of(b"\x80\x02" + GLOBAL + HUGE + b"\x85R.", name="archive/DATA.PKL"),
        "not one of torch.save",
    ),
    "both cases": (
        archive_of(pickle.dumps({"a.w": 1}, 2), ("archive/DATA.PKL", b"\x80\x02" + GLOBAL + HUGE + b"\x85R.")),
        None,
    ),
    "repeated name": (repeated_name(), "two of its archive's entries have one name"),
    "two pickles": (archive_of(pickle.dumps({}, 2), ("other/data.pkl", pickle.dumps({}, 2))), "not one of torch.save"),
    "overlapping": (overlapping(20), "is refused: its archive's entries overlap"),
    "bytearray": (archive_of(b"\x80\x02}X\x01\x00\x00\x00a" + GLOBAL + HUGE + b"\x85Rs."), None),
    "bytearray of its own": (archive_of(b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"."), "is damaged"),
    "bytes": (archive_of(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 36) + b"."), "is damaged"),
    "bytes, old format": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 36) + b"x" * 99, "is damaged"),
    "memo": (archive_of(b"\x80\x02}r\xff\xff\xff\x7f."), None),
    "tuples doubled, as a key": (archive_of(b"\x80\x02})q\x000" + TUPLES + b"h\x40K\x01s."), None),
    "tuples doubled": (archive_of(b"\x80\x02})q\x000" + TUPLES + b"K\x02h\x40s."), None),
    "lists doubled": (archive_of(b"\x80\x02}]q\x000" + LISTS + b"K\x02h\x40s."), None),
    "dictionaries": (archive_of(b"\x80\x02" + b"}" * 2 * LEAST_STEPS + b"."), "takes more steps than one of"),
    "sets": (archive_of(b"\x80\x04" + b"\x8f" * 2 * LEAST_STEPS + b"."), "takes more steps than one of"),
    "copies": (
        archive_of(
            b"\x80\x02(" + b"]K\x01aK\x01a" * 20_000 + b"lq\x000"
            b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R0" * 999 + b"}."
        ),
        "takes more steps than one of",
    ),
    "dtype": (
        archive_of(
            b"\x80\x02}K\x01cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX\x0b\x00\x00\x00V2000000000K\x00K\x01\x87RU\x04"
            b"\x00\x00\x00\x00\x86Rs."
        ),
        None,
    ),
    "entries": (
        archive_of(pickle.dumps({}, 2), *((f"archive/data/{i}", b"") for i in range(MOST_TENSORS))),
        f"its archive has {MOST_TENSORS + 2} entries, more than {MOST_TENSORS}",
    ),
    "deep": (archive_of(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."), "holds a list, expected a dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb, tmp_path):
    data, told = BOMBS[bomb]
    (tmp_path / "w.pth").write_bytes(data)
    if told is None:
        assert set(read_checkpoint(tmp_path / "w.pth")[0]) <= {"a", "a.w", 1, 2}
        return
    with pytest.raises(VisionattnError, match=told) as e:
        read_checkpoint(tmp_path / "w.pth")
    assert str(e.value).isprintable() and len(str(e.value)) < 500


def test_they_take_no_memory(tmp_path):
    """All of them in a process that gets 1 GiB more than an empty one."""
    for number, (data, _) in enumerate(BOMBS.values()):
        (tmp_path / f"{number}.pth").write_bytes(data)
    header = json.dumps(
        {f"a.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    ).encode()
    (tmp_path / "many.pth").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "long.pth").write_bytes(struct.pack("<Q", 1 << 26) + b"{" + b" " * ((1 << 26) - 2) + b"}")
    code = """
import resource, sys
from pathlib import Path
from visionattn.files import read_checkpoint
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_checkpoint(path)
    except ValueError as e:
        assert "MemoryError" not in str(e), (path, e)
        print(path.name, e)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"it has 50000 tensors, more than {MOST_TENSORS}" in done.stdout
    assert f"its header of {1 << 26} bytes is longer than" in done.stdout


def test_too_many_tensors(tmp_path):
    """All over one storage, each of which costs a file twenty bytes."""
    program = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x01(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQq\x02"
    )
    program += b"h\x01(h\x02K\x00K\x04\x85K\x01\x85\x89}tR0" * 2 * MOST_TENSORS + b"}."
    (tmp_path / "w.pth").write_bytes(archive_of(program, ("archive/data/0", bytes(16))))
    with pytest.raises(VisionattnError, match=f"it(s pickle takes| has) more .*(steps|{MOST_TENSORS} tensors)"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_names_that_take_long_to_match(suffix, tmp_path):
    """Rules are regular expressions, some of which would take cubic time on what no model calls a tensor."""
    names = ["{" * 100_000, "|" * 50_000, "a." * 100_000, "blocks." * 30_000, "0" * 100_000]
    tensors = visionattn.create_model("test_van").state_dict() | {name: torch.ones(1) for name in names}
    path = tmp_path / f"w.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    visionattn.create_model("test_van", checkpoint_path=str(path))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("folder", [0o777, 0o1777, 0o700])
def test_files_have_the_rights_that_the_umask_gives(umask, folder, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(folder)
    before = os.umask(umask)
    try:
        for _ in range(2):  # anew, and over what is there
            write_checkpoint(place / "a.safetensors", {"w": torch.ones(2)}, {})
            link(place / "a.safetensors", place / "b.safetensors")
            write_file(place / "c.yaml", "text")
            write_file(place / "d.png", lambda file: file.write(b"picture"))
            ResultFile(place / "e.csv").add({"model": "x"})
            ResultFile(place / "f.json").add({"model": "x"})
    finally:
        os.umask(before)
    rights = {path.name: path.stat().st_mode & 0o7777 for path in place.iterdir()}
    files = ("a.safetensors", "b.safetensors", "c.yaml", "d.png", "e.csv", "f.json")
    assert {name: rights[name] for name in files} == dict.fromkeys(files, 0o666 & ~umask)
