"""A peer's place on the network: one p2pd child with our identity, its gossip and its DHT node.

hivemind's `P2P` and `DHTNode` run inside our event loop; its `DHT` would fork and is not used.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import structlog
from hivemind.dht import DHTNode
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from protocol import gossip
from protocol.errors import ProtocolError, Reason, SentinelError, UserError
from protocol.identity import PeerId

log = structlog.get_logger("host")

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1")
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
_STARTUP_TIMEOUT = 30.0
_CONNECT_TIMEOUT = 5.0
_STOP_TIMEOUT = 5.0

# With p2pd's defaults a relayed connection is cut at 128 KiB, less than one activation.
_RELAY_SERVICE = {
    "relayService": 1,
    "relayDataLimit": 4 << 30,
    "relayTimeLimit": "30m",
    "relayBufferSize": 65536,
}
# p2pd would prefer Noise, whose ChaCha20 costs it a sixth more processor time a tensor than TLS 1.3 with the
# processor's AES. A peer with p2pd's defaults speaks both.
_SECURITY = {"noise": 0}
_PUBSUB = {"pubsub": 1, "pubsubRouter": "gossipsub", "pubsubSign": 1, "pubsubSignStrict": 1}


_starting: ContextVar[list[P2P]] = ContextVar("_starting")
"""Where a daemon enters itself at birth: `P2P.create` hands it out only once it is up, and it may not come to that."""


class _Daemon(P2P):  # type: ignore[misc]
    """hivemind's wrapper of p2pd, with the flags that `P2P.create` does not expose."""

    extra_flags: dict[str, Any] = {}  # noqa: RUF012 - set once a subclass, below

    def __init__(self) -> None:
        super().__init__()
        _starting.get().append(self)

    @classmethod
    def _make_process_args(cls, *args: Any, **flags: Any) -> list[str]:
        return list(P2P._make_process_args(*args, **flags, **_SECURITY, **_PUBSUB, **cls.extra_flags))


class _RelayDaemon(_Daemon):
    extra_flags = _RELAY_SERVICE


class _ClientDaemon(_Daemon):
    extra_flags = {"relayService": 0}  # noqa: RUF012


def _is_loopback(listen: Sequence[str]) -> bool:
    return all("/127." in address or "/ip6/::1/" in address for address in listen)


class Host:
    """Start with `Host.start`, end with `stop`, on every path. `p2p` is hivemind's handle on the daemon."""

    def __init__(self, p2p: P2P, seeds: Sequence[str]) -> None:
        self.p2p, self._seeds = p2p, seeds
        self._dht: DHTNode | None = None
        self.peer_id = PeerId(p2p.peer_id.to_base58())
        self._gossip_tasks: list[asyncio.Task[None]] = []
        self._publisher = gossip.Publisher(p2p)

    @classmethod
    async def start(
        cls,
        identity: Path,
        *,
        listen: Sequence[str] = DEFAULT_LISTEN,
        announce: Sequence[str] = (),
        seeds: Sequence[str] = (),
        relay: bool = False,
    ) -> Host:
        """`announce`: addresses to tell others instead of those listened on.

        Raises `UserError` if an address cannot be listened on or no seed can be reached.
        """
        daemon = _RelayDaemon if relay else _ClientDaemon
        is_local = _is_loopback(listen)
        behind_nat = bool(seeds) and not is_local and not relay
        _check_ports_free(listen)
        born: list[P2P] = []
        _starting.set(born)
        try:
            p2p = await daemon.create(
                host_maddrs=list(listen),
                announce_maddrs=list(announce) or None,
                identity_path=str(identity),
                check_if_identity_free=False,
                startup_timeout=_STARTUP_TIMEOUT,
                nat_port_map=not is_local,
                auto_nat=not is_local,
                use_auto_relay=behind_nat,
                trusted_relays=list(seeds) if behind_nat else None,
            )
            await _reach_any(p2p, seeds)
        except (P2PDaemonError, ControlFailure, ValueError, OSError, EOFError) as error:
            await _shutdown(*born)
            raise _explain(error, listen) from None
        except BaseException:
            await _shutdown(*born)
            raise
        return cls(p2p, seeds)

    async def join_dht(self, validator: RecordValidatorBase, *, client: bool = False) -> DHTNode:
        """Our node of the run's DHT, which stores and believes what `validator` lets pass; a `client` stores nothing
        and answers nobody."""
        self._dht = await DHTNode.create(
            p2p=self.p2p,
            initial_peers=list(self._seeds),
            num_replicas=5,
            cache_locally=False,
            cache_on_store=False,
            record_validator=validator,
            ensure_bootstrap_success=False,
            client_mode=client,
        )
        return self._dht

    async def addresses(self) -> list[str]:
        """Multiaddrs that others can dial, each ending in /p2p/<our id>."""
        return [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]

    async def connect(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Make sure p2pd has a connection to `peer`. Raises `ProtocolError` (unreachable)."""
        try:
            targets = [_without_peer(address) for address in addresses]
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                await self.p2p._client.connect(PeerID.from_base58(peer), targets)
        except (ControlFailure, OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise ProtocolError(Reason.UNREACHABLE, f"{peer}: {error}") from None

    async def disconnect(self, peer: PeerId) -> None:
        with suppress(ControlFailure, OSError, asyncio.IncompleteReadError):
            await self.p2p._client.disconnect(PeerID.from_base58(peer))

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip to every subscriber of `topic`."""
        await self._publisher.publish(topic, data)

    async def subscribe(self, topic: str, on_gossip: gossip.OnGossip) -> None:
        """Until `stop`: call `on_gossip(author, data)` on the event loop for each message of `topic`."""
        self._gossip_tasks.append(await gossip.subscribe(self.p2p, topic, on_gossip))

    async def watch(self) -> None:
        """Until cancelled. Raises `SentinelError` if p2pd ends: without it we are off the network."""
        code = await self.p2p._child.wait()
        raise SentinelError(f"the network daemon p2pd ended by itself (code {code}); start this peer again")

    async def stop(self) -> None:
        for task in self._gossip_tasks:
            task.cancel()
        await asyncio.gather(*self._gossip_tasks, return_exceptions=True)
        self._publisher.close()
        with suppress(Exception):
            async with asyncio.timeout(_STOP_TIMEOUT):
                if self._dht is not None:
                    await self._dht.shutdown()
        await _shutdown(self.p2p)


async def _shutdown(*daemons: P2P) -> None:
    """Terminate p2pd and wait for its end; kill it if it does not go, since it would hold its port."""
    for p2p in daemons:
        try:
            async with asyncio.timeout(_STOP_TIMEOUT):
                await p2p.shutdown()
        except TimeoutError:
            log.warning("p2pd did not stop and was killed")
            p2p._child.kill()
            await p2p._child.wait()


def _without_peer(address: str) -> Multiaddr:
    return Multiaddr(address.split("/p2p/")[0]) if "/p2p-circuit" not in address else Multiaddr(address)


async def _reach_any(p2p: P2P, seeds: Sequence[str]) -> None:
    """Connect to the seeds, all at once; one is enough. Raises `UserError` if none answers."""

    async def reach(seed: str) -> None:
        address, _, peer = seed.rpartition("/p2p/")
        async with asyncio.timeout(_CONNECT_TIMEOUT * 2):
            await p2p._client.connect(PeerID.from_base58(peer), [Multiaddr(address)])

    if not seeds:
        return
    results = await asyncio.gather(*(reach(seed) for seed in seeds), return_exceptions=True)
    if all(isinstance(result, BaseException) for result in results):
        tried = ", ".join(seeds)
        raise UserError(
            f"No seed of the invite can be reached ({tried})",
            "Check your network, ask the operator if the bootstrap peer is up, or get a newer invite",
        )


def _check_ports_free(listen: Sequence[str]) -> None:
    """p2pd starts without a word when only some of its addresses are taken, so look first. Raises `UserError`."""
    for address in listen:
        parts = address.removeprefix("/").split("/")
        # Of an address that it does not understand p2pd says nothing either, if it understands another.
        if parts[0] not in ("ip4", "ip6") or parts[2:3] + parts[4:] not in (["tcp"], ["udp", "quic-v1"]):
            raise _no_address(address)
        family = socket.AF_INET if parts[0] == "ip4" else socket.AF_INET6
        kind = socket.SOCK_STREAM if parts[2] == "tcp" else socket.SOCK_DGRAM
        try:
            with socket.socket(family, kind) as probe:
                if kind == socket.SOCK_STREAM:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((parts[1], int(parts[3])))
        except (ValueError, OverflowError, socket.gaierror):
            raise _no_address(address) from None
        except OSError as error:
            raise UserError(
                f"Cannot listen on {address}: {error.strerror}",
                "Choose another with --listen, or stop what holds the port",
            ) from None


def _no_address(address: str) -> UserError:
    remedy = "Write it like /ip4/0.0.0.0/tcp/31337 or /ip4/0.0.0.0/udp/31337/quic-v1"
    return UserError(f"{address} is no address to listen on", remedy)


def _explain(error: Exception, listen: Sequence[str]) -> UserError:
    text = (str(error).splitlines() or [type(error).__name__])[0][:300]
    if "failed to start in" in text:
        return UserError(
            f"The network daemon p2pd did not come up in {_STARTUP_TIMEOUT:.0f} s",
            "The machine may be overloaded: try again",
        )
    return UserError(
        f"The network daemon p2pd cannot start on {', '.join(listen)}: {text}",
        "Check --listen; if it is right, install hivemind again, which brings p2pd",
    )
