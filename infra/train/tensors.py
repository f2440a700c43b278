"""The safetensors format, written in pieces and read by ranges: nothing is held twice, nothing has to be local."""

import json
import weakref
from collections.abc import Iterator, Mapping

import torch

from infra import storage, strict

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_PIECE = 16 * 2**20  # bytes
_LONGEST = 100_000_000  # bytes of a header, as the format has it


def pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of `tensors`, in order; views of the tensors, where they lie in this memory.

    ValueError for a type of number that the format has no name for.
    """
    # Wide numbers first: then each tensor begins at a multiple of its own width, as readers that map files want it.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, place = {}, 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise ValueError(f"'{name}' is of {tensor.dtype}, which cannot be saved. Use one of {', '.join(TYPES)}.")
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = strict.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        yield from (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))


class TensorFile:
    """The tensors of one safetensors file by name; each is read when it is asked for, and nothing else is.

    A local file is held open: it may be removed meanwhile. ValueError if it is no such file, or is cut.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._file = storage.open_read(url) if storage.is_local(url) else None
        if self._file is not None:
            weakref.finalize(self, self._file.close)
        length = int.from_bytes(self._read(0, 8), "little")
        if length > _LONGEST:
            raise ValueError(f"{url} is no safetensors file: its header would be {length:,} bytes long.")
        try:
            self._header = {k: v for k, v in json.loads(self._read(8, length)).items() if k != "__metadata__"}
        except json.JSONDecodeError as error:
            raise ValueError(f"{url} is no safetensors file: its header is not valid JSON: {error}.") from None
        self._start = 8 + length

    @property
    def names(self) -> list[str]:
        """All that it holds."""
        return list(self._header)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(entry["shape"], dtype=TYPES[entry["dtype"]])
        data = self._read(self._start + begin, end - begin)
        return torch.frombuffer(data, dtype=TYPES[entry["dtype"]]).reshape(entry["shape"])

    def _read(self, place: int, length: int) -> bytearray:
        data = bytearray(length)
        if self._file is not None:
            self._file.seek(place)
            found = self._file.readinto(data)  # type: ignore[attr-defined]
        else:
            told = storage.read_bytes(self._url, place, length)
            data, found = bytearray(told), len(told)
        if found < length:
            raise ValueError(f"{self._url} is cut: it ends at byte {place + found}, {length - found} bytes too soon.")
        return data
