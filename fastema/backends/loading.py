"""Choose the extension for this torch and this Python, check it, and load it.

It reads torch's structures directly, and torch moves their fields from one minor to the next. So there is a file for
each minor, which is loaded where it expects the fields where they are, and kept where it then does the right thing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from fastema.backends.building import extension_name
from fastema.backends.contract import Segment, UpdateArgs

FOLDER = Path(__file__).parent.parent
_MARK = b"fastema: torch's layout\0"  # csrc/layout.cpp
_FIELDS = struct.Struct("=9q")
_TENSOR_IMPL, _STORAGE_IMPL = 176, 56  # bytes that both have at least, in torch 2.10 to 2.15; none beyond is read
_FLOAT32 = 6  # c10::ScalarType::Float


def extension_file() -> Path:
    """Return where the extension for this torch and this Python is, or would be."""
    return FOLDER / f"{extension_name(torch.__version__)}{EXTENSION_SUFFIXES[0]}"


def load(file: Path) -> ModuleType:
    """Load an extension as fastema._C, with the kernels beside it.

    Raises:
        ImportError: there is no such file; or it is for another torch, or of another version of fastema.
    """
    if not file.is_file():
        others = ", ".join(sorted(path.name for path in FOLDER.glob("_torch_*"))) or "no other"
        raise ImportError(f"there is no {file.name}, but {others}")
    fault = layout_fault(file.read_bytes())
    if fault is not None:
        raise ImportError(f"{file.name} is for a torch with another layout: {fault}")
    spec = importlib.util.spec_from_file_location("fastema._C", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        use_kernels(module, FOLDER / "_cuda.so")
    except ValueError as error:
        raise ImportError(str(error)) from None
    if not _behaves(module):
        raise ImportError(f"{file.name} does not do on torch {torch.__version__} what it should")
    return module


def use_kernels(module: ModuleType, gpu: Path) -> None:
    """Let the extension run the kernels of fastema/_kernels.so, and those of `gpu` if there is such a file."""
    module.use_kernels(
        cpu=_table(FOLDER / "_kernels.so", "fastema_cpu_kernels"),
        gpu=_table(gpu, "fastema_gpu_kernels") if gpu.is_file() else 0,
        current_stream=_current_stream(),
    )


def layout_fault(extension: bytes) -> str | None:
    """Return which field of torch's structures is not where an extension expects it, or None.

    Every word that is read lies in an object that is known to be there.
    """
    start = extension.find(_MARK)
    if start < 0 or len(extension) < start + len(_MARK) + _FIELDS.size:
        return "it does not say which one"
    fields = _FIELDS.unpack_from(extension, start + len(_MARK))
    tensor_in_object, storage, _, dimensions, offset, count, dtype, data, size = fields
    ends = [torch.Tensor.__basicsize__, *[_TENSOR_IMPL] * 6, *[_STORAGE_IMPL] * 2]
    ends[3] -= 10 * 8  # five sizes and five strides follow
    if not all(0 <= field <= end - 8 for field, end in zip(fields, ends, strict=True)):
        return "a field lies outside"
    # Of memory that torch did not allocate: there a storage's pointer differs from its deleter's argument.
    tensor = torch.frombuffer(bytearray(256), dtype=torch.float32).as_strided((2, 3), (5, 7), 1)
    memory = tensor.untyped_storage()

    def word(address: int, field: int) -> int:
        return ctypes.c_int64.from_address(address + field).value

    if word(id(tensor), tensor_in_object) != tensor._cdata:
        return "the tensor in its Python object"
    if word(tensor._cdata, storage) != memory._cdata:
        return "the storage of a tensor"
    # c10::impl::SizesAndStrides: the number of dimensions, five sizes, five strides
    if [word(tensor._cdata, dimensions + 8 * i) for i in (0, 1, 2, 6, 7)] != [2, 2, 3, 5, 7]:
        return "the sizes and strides of a tensor"
    if word(tensor._cdata, offset) != 1 or word(tensor._cdata, count) != 6:
        return "the offset or the number of elements of a tensor"
    if ctypes.c_uint16.from_address(tensor._cdata + dtype).value != _FLOAT32:
        return "the dtype of a tensor"
    if word(memory._cdata, data) != memory.data_ptr() or word(memory._cdata, size) != memory.nbytes():
        return "the memory of a storage"
    return None


def _behaves(module: ModuleType) -> bool:
    """Try an update and a swap on two tensors."""
    shadow, live = (torch.full((3,), value, dtype=torch.float32, device="cpu") for value in (0.0, 1.0))
    addresses = shadow.data_ptr(), live.data_ptr()
    module.Plan([Segment([shadow], live, copy=False)], [shadow]).update(UpdateArgs([0.5], skip_nonfinite=False))
    exchange = module.StorageExchange([live], [shadow], [live])
    exchange.enter(7)
    inside = live.tolist(), shadow.tolist(), live._version, (live.data_ptr(), shadow.data_ptr())
    exchange.leave()
    after = shadow.tolist(), shadow._version, live._version, (shadow.data_ptr(), live.data_ptr())
    return inside == ([0.5] * 3, [1.0] * 3, 7, addresses) and after == ([0.5] * 3, 1, 0, addresses)


def _table(library: Path, function: str) -> int:
    """Return the address of a library's kernels; see csrc/kernel_tables.h."""
    try:
        find = getattr(ctypes.CDLL(str(library)), function)
    except OSError as error:
        raise ImportError(str(error)) from None
    find.restype = ctypes.c_void_p
    return find()


def _current_stream() -> int:
    """Return the address of torch's function for it; 0: its streams tell their handle themselves, or there are none."""
    library = Path(torch.__file__).parent / "lib/libtorch_cuda.so"
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11) or not library.is_file():
        return 0
    function = ctypes.CDLL(str(library)).aoti_torch_get_current_cuda_stream
    return ctypes.cast(function, ctypes.c_void_p).value or 0
