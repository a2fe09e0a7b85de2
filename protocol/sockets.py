"""Raw streams of p2pd as sockets: opened and accepted over the daemon's control socket.

hivemind wraps each in an asyncio StreamReader, which copies every payload two or three times. Taking the socket
itself lets a payload be read into the memory where it stays.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import structlog
from hivemind.p2p import P2P, PeerID
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from protocol.errors import ProtocolError, Reason
from protocol.identity import PeerId
from protocol.tasks import Background

log = structlog.get_logger("sockets")

_BUFFER = 4 * 1024 * 1024
_HANDSHAKE_TIMEOUT = 10.0
_MAX_CONTROL = 64 * 1024
_ACCEPT_AGAIN = 0.2

OnSocket = Callable[[PeerId, socket.socket], Awaitable[None]]


def _unix_socket() -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.setblocking(False)
    _widen(stream)
    return stream


def _widen(stream: socket.socket) -> None:
    # A payload of megabytes should cross to the daemon in few system calls.
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)


async def _read_exactly(stream: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        more = await loop.sock_recv(stream, size - len(data))
        if not more:
            raise ProtocolError(Reason.UNREACHABLE, "p2pd closed the stream")
        data += more
    return data


async def _read_delimited(stream: socket.socket) -> bytes:
    """A protobuf message behind its varint length; never a byte more, since the stream's data follows."""
    size = shift = 0
    while True:
        byte = (await _read_exactly(stream, 1))[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if size > _MAX_CONTROL:
        raise ProtocolError(Reason.OVERSIZED, "p2pd control message")
    return await _read_exactly(stream, size)


def _delimited(message: bytes) -> bytes:
    size, prefix = len(message), b""
    while size >= 0x80:
        prefix += bytes([size & 0x7F | 0x80])
        size >>= 7
    return prefix + bytes([size]) + message


async def _call(stream: socket.socket, control: str, request: p2pd_pb2.Request) -> p2pd_pb2.Response:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(stream, control)
    await loop.sock_sendall(stream, _delimited(request.SerializeToString()))
    response = p2pd_pb2.Response.FromString(await _read_delimited(stream))
    if response.type == p2pd_pb2.Response.ERROR:
        raise ProtocolError(Reason.UNREACHABLE, response.error.msg)
    return response


async def dial(p2p: P2P, peer: PeerId, protocol: str, timeout: float) -> socket.socket:
    """A stream to `peer`. Raises `ProtocolError` (unreachable or timed_out) if there is none to be had."""
    stream = _unix_socket()
    request = p2pd_pb2.Request(
        type=p2pd_pb2.Request.STREAM_OPEN,
        streamOpen=p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer).to_bytes(), proto=[protocol]),
    )
    try:
        async with asyncio.timeout(timeout):
            await _call(stream, p2p.daemon_listen_maddr["unix"], request)
    except TimeoutError:
        stream.close()
        raise ProtocolError(Reason.TIMED_OUT, f"dialling {peer}") from None
    except (OSError, ProtocolError) as error:
        stream.close()
        raise ProtocolError(Reason.UNREACHABLE, f"{peer}: {error}") from None
    except BaseException:
        stream.close()
        raise
    return stream


class Acceptor:
    """Takes the streams that peers open to us under one protocol name."""

    def __init__(self, on_socket: OnSocket) -> None:
        self._on_socket = on_socket
        self._path = Path(tempfile.gettempdir()) / f"sentinel-{secrets.token_urlsafe(8)}.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._tasks = Background()

    async def start(self, p2p: P2P, protocol: str) -> None:
        self._listener.setblocking(False)
        self._listener.bind(str(self._path))
        self._path.chmod(0o600)
        self._listener.listen(64)
        self._tasks.spawn(self._accept())
        address = Multiaddr(f"/unix{self._path}")
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_HANDLER,
            streamHandler=p2pd_pb2.StreamHandlerRequest(
                addr=address.to_bytes(), proto=[protocol], balanced=False
            ),
        )
        control = _unix_socket()
        with control:
            await _call(control, p2p.daemon_listen_maddr["unix"], request)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                stream, _ = await loop.sock_accept(self._listener)
                stream.setblocking(False)
            except OSError as error:
                # Out of file descriptors: this passes, and must not make us deaf for good.
                log.warning("cannot accept a stream", problem=str(error))
                await asyncio.sleep(_ACCEPT_AGAIN)
                continue
            _widen(stream)
            self._tasks.spawn(self._greet(stream))

    async def _greet(self, stream: socket.socket) -> None:
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
                info = p2pd_pb2.StreamInfo.FromString(await _read_delimited(stream))
            await self._on_socket(PeerId(PeerID(info.peer).to_base58()), stream)
        except (OSError, TimeoutError, ProtocolError, asyncio.CancelledError):
            stream.close()

    async def stop(self) -> None:
        await self._tasks.stop()
        self._listener.close()
        with suppress(FileNotFoundError):
            self._path.unlink()
