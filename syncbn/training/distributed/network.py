"""The network device through which the ranks of several machines reach each other."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from syncbn.training.distributed import world

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a device


def choose_device() -> None:
    """Tells gloo which device to listen on; a choice of the user's own (GLOO_SOCKET_IFNAME) stays.

    On one machine that is the loopback device, for NCCL too: nobody else has to reach these ranks. On several it is the
    one that leads to the other machines. Left to itself, gloo takes the address that the host's own name leads to,
    which on many systems is a loopback one.
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
    """The address under which other machines see this rank; called on every rank."""
    own = source_address(os.environ["MASTER_ADDR"])
    world.store().set(f"syncbn/address/{world.rank()}", own or "")
    if own is not None and ip_address(own).is_loopback:
        # The store is on this machine, whose name leads to itself; the others know a way that leads out.
        keys = [f"syncbn/address/{rank}" for rank in range(world.world_size())]
        others = [value.decode() for value in world.store().multi_get(keys)]
        outside = next((other for other in others if other and not ip_address(other).is_loopback), None)
        return own if outside is None else source_address(outside)
    return own


def source_address(host: str) -> str | None:
    """The address of this machine from which packets to `host` would leave; sends none. None if there is no way."""
    with suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: it only looks the way up
            return str(probe.getsockname()[0])
    return None


def addresses_of(device: str) -> set[str]:
    """The first IPv4 address of a network device and its IPv6 ones; on Linux, elsewhere none."""
    found = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", device.encode()[:15])
        with suppress(OSError):  # it has none
            found.add(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, name = line.split()
        if name == device:
            found.add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found
