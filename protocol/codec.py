"""Tensors as wire bytes and back, with no copy that the number format does not ask for."""

from __future__ import annotations

from math import prod
from typing import Annotated, Final, NamedTuple

import msgspec
import torch
from blake3 import blake3

from protocol import wire
from protocol.errors import ProtocolError, Reason

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
_Dimension = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]

Buffer = memoryview


class TensorHeader(wire.Message, frozen=True):
    """What a payload's first bytes are: `codec` (fp32 or bf16, little-endian) and `shape`."""

    codec: Annotated[str, msgspec.Meta(max_length=8)]
    shape: Annotated[tuple[_Dimension, ...], msgspec.Meta(min_length=1, max_length=4)]

    @property
    def size(self) -> int:
        """Bytes of payload that the tensor takes. Raises `ProtocolError` (wrong_dtype) for an unknown codec."""
        return prod(self.shape) * dtype_of(self.codec).itemsize


def dtype_of(codec: str) -> torch.dtype:
    """The number format of a codec. Raises `ProtocolError` (wrong_dtype) for an unknown one."""
    try:
        return _DTYPES[codec]
    except KeyError:
        raise ProtocolError(Reason.WRONG_DTYPE, codec) from None


def encode_tensor(tensor: torch.Tensor, codec: str) -> Buffer:
    """The bytes of a tensor of any float dtype on any device. fp32 on the CPU is a view, not a copy."""
    return bytes_of(tensor.detach().to("cpu", dtype_of(codec)))


def bytes_of(tensor: torch.Tensor) -> Buffer:
    """A CPU tensor's memory as bytes; it keeps the tensor alive."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def decode_tensor(payload: Buffer, header: TensorHeader, device: torch.device) -> torch.Tensor:
    """An fp32 tensor of `header.shape` on `device`. Raises `ProtocolError` if `payload` is not of its size.

    On the CPU an fp32 payload is not copied: the tensor is the payload's memory.
    """
    if len(payload) != header.size:
        raise ProtocolError(Reason.MALFORMED, f"{len(payload)} bytes for {header}")
    flat = torch.frombuffer(payload, dtype=dtype_of(header.codec))
    return flat.view(header.shape).to(device, torch.float32)


def digest(*parts: bytes | Buffer) -> bytes:
    """32 bytes of BLAKE3 over the parts, in order."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def leaves_of(header: TensorHeader, tensor: Buffer, *more: Buffer) -> tuple[bytes, ...]:
    """The digest of each of a payload's sequences, then of what follows the tensor (the labels), if anything does."""
    size = len(tensor) // header.shape[0]
    own = (digest(tensor[at : at + size]) for at in range(0, size * header.shape[0], size))
    return (*own, *(digest(one) for one in more))


class Payload(NamedTuple):
    """What came behind a message, and of a tensor the digests of its leaves, made while it arrived."""

    data: Buffer
    leaves: tuple[bytes, ...] = ()


class ArrivingTensor:
    """A payload that the network is filling: each leaf is digested as soon as it is there.

    It costs no time of its own, since the next bytes are still on their way, and finds them in the processor's cache.
    """

    def __init__(self, header: TensorHeader, memory: Buffer) -> None:
        size = header.size // header.shape[0]
        self._memory = memory
        self._ends = [
            *range(size, header.size + 1, size),
            *([len(memory)] if len(memory) > header.size else []),
        ]
        self._digested = 0
        self._leaves: list[bytes] = []

    def advance(self, filled: int) -> None:
        """`filled` bytes are there now."""
        while len(self._leaves) < len(self._ends) and (end := self._ends[len(self._leaves)]) <= filled:
            self._leaves.append(digest(self._memory[self._digested : end]))
            self._digested = end

    def payload(self) -> Payload:
        return Payload(self._memory, tuple(self._leaves))


def payload_digest(header: TensorHeader, tensor: Buffer, *more: Buffer) -> bytes:
    """What receipts name a payload by: the digest of its leaves, so that one sequence can be shown without the rest."""
    return digest(*leaves_of(header, tensor, *more))


def split_payload(header: TensorHeader, payload: Buffer) -> tuple[Buffer, ...]:
    """The tensor, and the labels if there are any, of a payload that is at least a tensor long."""
    tensor, labels = payload[: header.size], payload[header.size :]
    return (tensor, labels) if len(labels) else (tensor,)
