"""Choice of the network device through which ranks reach each other."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from syncbn.training.distributed import world

_SIOCGIFADDR = 0x8915  # Linux: ioctl request for the IPv4 address of a device


def choose_device() -> None:
    """Sets the network device that gloo listens on (GLOO_SOCKET_IFNAME), unless the user has set it.

    For a job on one machine it is the loopback device, for NCCL too (NCCL_SOCKET_IFNAME), because no other machine has
    to reach these ranks. For several machines it is the device whose address is on the route to the others: gloo's own
    choice is the address that the host's name resolves to, which on many systems is a loopback address.

    Called on every rank of a distributed job; ranks of several machines exchange addresses through the store.
    """
    devices = [name for _, name in socket.if_nameindex()]
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world.world_size()):
        loopback = next((name for name in devices if name in ("lo", "lo0")), None)
        if loopback is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
        return
    own = own_address()
    if "GLOO_SOCKET_IFNAME" not in os.environ and own is not None:
        found = next((name for name in devices if own in addresses_of(name)), None)
        if found is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = found


def own_address() -> str | None:
    """The address from which this rank reaches other machines, or None if there is no route.

    Every rank has to call it: addresses are exchanged through the store.
    """
    own = source_address(os.environ["MASTER_ADDR"])
    world.store().set(f"syncbn/address/{world.rank()}", own or "")
    if own is not None and ip_address(own).is_loopback:
        # MASTER_ADDR is this machine, by a name that resolves to loopback: take the route to another rank's address.
        keys = [f"syncbn/address/{rank}" for rank in range(world.world_size())]
        others = [value.decode() for value in world.store().multi_get(keys)]
        outside = next((other for other in others if other and not ip_address(other).is_loopback), None)
        return own if outside is None else source_address(outside)
    return own


def source_address(host: str) -> str | None:
    """The local address from which packets to `host` would leave, or None if there is no route; sends no packets."""
    with suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # for a datagram socket this only looks up the route
            return str(probe.getsockname()[0])
    return None


def addresses_of(device: str) -> set[str]:
    """The first IPv4 address and all IPv6 addresses of a network device; empty on systems other than Linux."""
    found = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", device.encode()[:15])
        with suppress(OSError):  # the device has no IPv4 address
            found.add(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, name = line.split()
        if name == device:
            found.add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found
