"""Tensors to wire bytes and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import TensorHeader, decode_tensor, digest, dtype_of, encode_tensor
from protocol.errors import ProtocolError, Reason

CPU = torch.device("cpu")
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def through_the_wire(tensor: torch.Tensor, codec: str) -> torch.Tensor:
    header = TensorHeader(codec, tuple(tensor.shape))
    payload = memoryview(bytearray(encode_tensor(tensor, codec)))
    assert len(payload) == header.size
    return decode_tensor(payload, header, CPU)


@given(shapes, st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_fp32_is_exact(shape: tuple[int, ...], seed: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e10
    assert torch.equal(through_the_wire(tensor, "fp32"), tensor)


@given(shapes, st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_bf16_keeps_eight_bits(shape: tuple[int, ...], seed: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    back = through_the_wire(tensor, "bf16")
    assert back.dtype == torch.float32
    assert torch.all((back - tensor).abs() <= tensor.abs() * 2**-8)
    assert torch.equal(through_the_wire(back, "bf16"), back)


def test_special_values_survive() -> None:
    tensor = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-45, 3.4e38])
    assert bytes(encode_tensor(through_the_wire(tensor, "fp32"), "fp32")) == bytes(
        encode_tensor(tensor, "fp32")
    )
    assert torch.isnan(through_the_wire(torch.tensor([float("nan")]), "bf16")).all()


def test_a_tensor_that_is_not_contiguous_is_sent_in_its_logical_order() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    assert torch.equal(through_the_wire(tensor, "fp32"), tensor)


def test_fp32_on_the_cpu_is_not_copied() -> None:
    tensor = torch.zeros(4)
    view = encode_tensor(tensor, "fp32")
    tensor[0] = 1.0
    assert torch.frombuffer(view, dtype=torch.float32)[0] == 1.0


@given(st.integers(0, 200))
@settings(max_examples=40)
def test_a_payload_of_another_size_is_refused(size: int) -> None:
    header = TensorHeader("fp32", (3, 4))
    if size == header.size:
        return
    with pytest.raises(ProtocolError) as caught:
        decode_tensor(memoryview(bytearray(size)), header, CPU)
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("codec", ["fp16", "", "float32"])
def test_an_unknown_codec_is_refused(codec: str) -> None:
    for act in (lambda: dtype_of(codec), lambda: TensorHeader(codec, (1,)).size):
        with pytest.raises(ProtocolError) as caught:
            act()
        assert caught.value.reason is Reason.WRONG_DTYPE


def test_a_digest_is_of_all_parts_in_order() -> None:
    assert digest(b"ab", b"c") == digest(b"abc") == digest(memoryview(b"a"), b"bc")
    assert digest(b"c", b"ab") != digest(b"abc")
    assert len(digest()) == 32
