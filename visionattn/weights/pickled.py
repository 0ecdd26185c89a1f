"""Files of torch.save, read without torch's unpickler or Python's: nothing that they name is imported or called.

A pickle is a program. This machine runs the part of it that builds numbers, texts, lists, dictionaries and tensors;
whatever else a file names (a Namespace, an AttributeDict, a module, `os.system`) becomes an inert placeholder, which is
dropped once the file is read. Time and memory are bounded by the file's size.
"""

import io
import mmap
import os
import pickletools
import sys
import zipfile
from collections.abc import Callable
from itertools import islice
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import VisionattnError, shortened

MOST_TENSORS = 1 << 15
"""In a file, and entries of an archive: several times as many as the largest training checkpoints hold."""
LEAST_STEPS = 1 << 19
"""Of the machine, for a small file; for large ones a share of their bytes is added."""
ELEMENTS = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "ComplexDoubleStorage": torch.complex128, "BoolStorage": torch.bool},
    **{"ComplexFloatStorage": torch.complex64, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"UntypedStorage": torch.uint8},
}
"""Types of a storage's elements by the last part of its class's name."""
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Opcodes that stand for their arguments."""
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
PLAIN = dict | list | Tensor | str | int | float | bytes | None
"""What a file may give; tuples and the rest are dropped with the placeholders."""
DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
REBUILT = ("torch._utils._rebuild_", "torch._tensor._rebuild_")
"""What the names of the functions that make tensors begin with; those that make plain ones are known to the machine."""
TO_SAVE = "load it where its class can be imported, and torch.save(model.state_dict(), FILE)"


class _Placeholder:
    """Stands for something that a pickle names, or for what calling it would give.

    Args:
        name: what the pickle names.
        called: whether it stands for a result.
    """

    __slots__ = ("name", "called", "items", "is_module")

    def __init__(self, name: str, called: bool = False) -> None:
        self.name, self.called, self.items, self.is_module = name, called, None, False


def read_pickled(file: BinaryIO) -> Any:
    """What a file of torch.save holds, in either format: tensors, plain values, and lists and dictionaries of them.

    Args:
        file: opened for reading.

    Raises:
        VisionattnError: if it is damaged, holds a module pickled whole, or would expand past a multiple of its size.
        Exception: whatever damaged bytes cause.
    """
    file.seek(0)
    machine = _Machine(os.fstat(file.fileno()).st_size)
    content = machine.finish(_read_archive(file, machine) if zipfile.is_zipfile(file) else _read_legacy(file, machine))
    if isinstance(content, _Placeholder):
        if not content.is_module:
            raise VisionattnError(f"holds a {shortened(content.name)}, expected a dictionary of tensors")
        machine.has_state_dict = False
    if machine.modules and not machine.has_state_dict:
        raise VisionattnError(f"holds a whole {machine.modules[-1]}, pickled: {TO_SAVE}")
    return content


def _read_archive(file: BinaryIO, machine: "_Machine") -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > MOST_TENSORS:
            raise VisionattnError(f"is refused: its archive has {len(entries)} entries, more than {MOST_TENSORS}")
        names = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "constants.pkl" in names:
            raise VisionattnError("is a TorchScript program: torch.jit.load and torch.save(model.state_dict(), FILE)")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise VisionattnError("is not a file of torch.save (its archive is compressed)")
        if len({entry.filename for entry in entries}) < len(entries):
            raise VisionattnError("is refused: two of its archive's entries have one name")
        if sum(entry.file_size for entry in entries) > machine.size:
            raise VisionattnError("is refused: its archive's entries overlap")
        if len(names) < len(entries) or "data.pkl" not in names:
            raise VisionattnError("is an archive, but not one of torch.save")
        swapped = "byteorder" in names and archive.read(names["byteorder"]).decode() != sys.byteorder
        storages: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
            if key not in storages:
                entry = names[f"data/{key}"]
                storages[key] = torch.empty(entry.file_size, dtype=torch.uint8)
                with archive.open(entry) as data:  # which compares the checksum at its end
                    _fill(storages[key], data)
                if swapped:
                    storages[key].untyped_storage().byteswap(dtype)
            return storages[key][: numel * dtype.itemsize].view(dtype)

        with archive.open(names["data.pkl"]) as data:
            pickled = data.read()
        return machine.run(io.BytesIO(pickled), storage)


def _read_legacy(file: BinaryIO, machine: "_Machine") -> Any:
    """What torch.save wrote before 1.6: magic number, version, system, content and keys, then the storages' bytes."""
    storages: dict[str, Tensor] = {}
    left = machine.size

    def storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        nonlocal left
        if key not in storages:
            left -= numel * dtype.itemsize
            if left < 0:
                raise VisionattnError("is damaged (its storages are larger than the file)")
            storages[key] = torch.empty(numel, dtype=dtype)
        return storages[key]

    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pickles:  # whose reads end where the file ends
        magic, _, system, content, keys = (machine.run(pickles, storage) for _ in range(5))
        file.seek(pickles.tell())
    if magic != 0x1950A86A20F9469CFC6C or not isinstance(system, dict) or not system.get("little_endian"):
        raise VisionattnError("is damaged, or a pickle that torch.save did not write")
    for key in keys:
        numel = int.from_bytes(file.read(8), "little", signed=True)
        if numel != storages[key].numel():
            raise VisionattnError("is damaged (a storage has another size than it says)")
        _fill(storages[key].view(torch.uint8), file)
    if set(keys) != storages.keys():
        raise VisionattnError("is damaged (storages are missing)")
    return content


def _fill(storage: Tensor, data: Any) -> None:
    """Read a storage's bytes."""
    into = memoryview(storage.numpy())
    while len(into):
        if not (count := data.readinto(into[: 1 << 18])):
            raise VisionattnError("is damaged (it ends too early)")
        into = into[count:]


class _Machine:
    """Runs pickles.

    Args:
        size: bytes of the file, which bound the steps.
    """

    def __init__(self, size: int) -> None:
        self.size, self.steps, self.tensors = size, LEAST_STEPS + size // 16, 0
        self.containers: list[dict | list] = []
        self.modules: list[str] = []
        self.has_state_dict = False
        self.storage: Callable[[str, torch.dtype, int], Tensor]

    def run(self, file: BinaryIO, storage: Callable[[str, torch.dtype, int], Tensor]) -> Any:
        """What a pickle builds, placeholders included; the file is then at the pickle's end.

        Args:
            file: at the pickle's start.
            storage: gives a storage as elements, by its key, their type and their number.
        """
        self.storage = storage
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def above_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for opcode, argument, _ in pickletools.genops(file):
            self.spend(1)
            name = opcode.name
            if name in LITERALS:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in ("BINGET", "GET", "LONG_BINGET"):
                stack.append(memo[int(argument)])
            elif name in ("BINPUT", "PUT", "LONG_BINPUT"):
                memo[int(argument)] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("EMPTY_DICT", "EMPTY_LIST"):
                stack.append(self.keep({} if name == "EMPTY_DICT" else []))
            elif name in ("SETITEM", "SETITEMS", "DICT"):
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else above_mark()
                if name == "DICT":
                    stack.append(self.keep({}))
                self.set_items(stack[-1], items)
            elif name in ("APPEND", "APPENDS"):
                items = above_mark() if name == "APPENDS" else [stack.pop()]
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            elif name == "LIST":
                stack.append(self.keep(above_mark()))
            elif name == "TUPLE":
                stack.append(tuple(above_mark()))
            elif name in TUPLES:
                stack.append(tuple([stack.pop() for _ in range(TUPLES[name])][::-1]))
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                parts = argument.split(" ") if name == "GLOBAL" else [stack.pop(), stack.pop()][::-1]
                stack.append(_Placeholder(".".join(map(str, parts))))
            elif name == "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
                if name == "NEWOBJ_EX":  # with keywords
                    stack.pop()
                arguments, called = stack.pop(), stack.pop()
                stack.append(self.call(called, arguments))
            elif name in ("INST", "OBJ"):
                items = above_mark()
                called = _Placeholder(argument.replace(" ", ".")) if name == "INST" else items.pop(0)
                stack.append(self.call(called, tuple(items)))
            elif name == "BUILD":
                state = stack.pop()
                self.build(stack[-1], state)
            elif name in ("ADDITEMS", "FROZENSET"):
                above_mark()
                if name == "FROZENSET":
                    stack.append(_Placeholder("builtins.frozenset", called=True))
            elif name == "POP_MARK" or name == "POP" and marks and marks[-1] == len(stack):
                above_mark()
            elif name == "POP":
                stack.pop()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name in ("EMPTY_SET", "NEXT_BUFFER", "PERSID", "EXT1", "EXT2", "EXT4"):
                stack.append(_Placeholder(name, called=True))
            elif name not in ("PROTO", "FRAME", "READONLY_BUFFER", "STOP"):
                raise VisionattnError(f"is damaged (its pickle has the opcode {name})")
        return stack.pop()

    def spend(self, steps: int) -> None:
        """Count steps, and refuse a file that takes more than its size warrants."""
        self.steps -= steps
        if self.steps < 0:
            raise VisionattnError(f"is refused: its pickle takes more steps than one of {self.size} bytes should")

    def keep(self, container: Any) -> Any:
        """Remember a list or dictionary, to take the placeholders out of it."""
        self.containers.append(container)
        return container

    def set_items(self, target: Any, items: list[Any]) -> None:
        """Put keys and values into a dictionary, or a placeholder of something like one."""
        if isinstance(target, _Placeholder):
            if target.items is None:
                target.items = self.keep({})
            target = target.items
        if isinstance(target, dict):
            for key, value in zip(islice(items, 0, None, 2), islice(items, 1, None, 2), strict=True):
                # Others, tuples of tuples and long numbers, may take exponential time to hash, or anew each time.
                if isinstance(key, str | float | None) or isinstance(key, int) and key.bit_length() < 64:
                    target[key] = value

    def build(self, target: Any, state: Any) -> None:
        """Note which placeholders are of modules, by their state."""
        if isinstance(target, _Placeholder) and isinstance(state, dict) and {"_modules", "_parameters"} <= state.keys():
            target.is_module = True
            self.modules.append(shortened(target.name))  # a module after those that are inside

    def persistent(self, description: Any) -> Any:
        """A storage, as a tensor of its elements."""
        kind, storage_type, key, _, numel, *view = description
        dtype = ELEMENTS.get(getattr(storage_type, "name", "").rpartition(".")[2])
        if kind != "storage" or dtype is None or any(view):
            return _Placeholder(f"{REBUILT[0]}storage", called=True)
        if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise VisionattnError("is damaged (a storage has no size)")
        self.count_tensor()
        elements = self.storage(key, dtype, numel)
        if elements.dtype != dtype or len(elements) != numel:
            raise VisionattnError(f"is damaged (storage {shortened(key)} has another size or type than it says)")
        return elements

    def call(self, called: Any, arguments: Any) -> Any:
        """What calling something would give: a tensor or a dictionary, or else a placeholder."""
        name = called.name if isinstance(called, _Placeholder) and not called.called else ""
        arguments = arguments if isinstance(arguments, tuple) else ()
        first = arguments[0] if arguments else None
        if name in DICTIONARIES:
            made = self.keep({})
            pairs = arguments[-1] if arguments else ()
            if isinstance(pairs, list | dict):
                self.spend(len(pairs))
                pairs = pairs.items() if isinstance(pairs, dict) else pairs
                self.set_items(made, [part for pair in pairs if len(pair) == 2 for part in pair])
            return made
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return first
        if name == "torch._tensor._rebuild_from_type_v2":
            return self.call(first, arguments[2])
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            if isinstance(first, Tensor) and not any(arguments[6:]):
                return self.view(*arguments[:4])
        elif name == "torch._utils._rebuild_tensor_v3" and isinstance(first, Tensor) and not any(arguments[7:]):
            dtype = DTYPES.get(getattr(arguments[6], "name", ""))
            if dtype is not None:
                return self.view(first.view(dtype), *arguments[1:4])
        elif name == "copy_reg._reconstructor" and isinstance(first, _Placeholder):
            name = first.name
        return _Placeholder(name, called=True)

    def view(self, elements: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """A tensor over elements of a storage."""
        self.count_tensor()
        numbers = [offset, *size, *stride]
        last = offset + sum((s - 1) * step for s, step in zip(size, stride, strict=True))
        if any(not isinstance(n, int) or n < 0 for n in numbers) or prod(size) and last >= len(elements):
            raise VisionattnError("is damaged (a tensor reaches beyond its storage)")
        if prod(size) >= 1 << 62:
            raise VisionattnError(f"is refused: a tensor of {len(elements)} elements is expanded to {size}")
        return elements.as_strided(size, stride, elements.storage_offset() + offset)

    def count_tensor(self) -> None:
        """Refuse a file of too many tensors."""
        self.tensors += 1
        if self.tensors > 2 * MOST_TENSORS:  # each with its storage
            raise VisionattnError(f"is refused: it has more than {MOST_TENSORS} tensors")

    def finish(self, content: Any) -> Any:
        """Take the placeholders out of what pickles built."""

        def settled(value: Any) -> Any:
            return value.items if isinstance(value, _Placeholder) and value.items is not None else value

        for container in self.containers:
            if isinstance(container, list):
                container[:] = [v for v in map(settled, container) if isinstance(v, PLAIN)]
                continue
            for key, value in list(container.items()):
                value = settled(value)
                if isinstance(value, PLAIN):
                    container[key] = value
                    continue
                if isinstance(value, _Placeholder) and value.called and value.name.startswith(REBUILT):
                    raise VisionattnError(f"is refused: {shortened(key)} is no plain tensor ({shortened(value.name)})")
                del container[key]
            self.has_state_dict |= any(
                isinstance(key, str) and "." in key and isinstance(value, Tensor) for key, value in container.items()
            )
        return settled(content)
