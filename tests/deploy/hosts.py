"""Hosts with addresses of their own on one machine, that a test may switch off or cut off.

    with Network() as network:
        a, b = network.host("a"), network.host("b")
        subprocess.run([*a.prefix(Path.cwd()), "getent", "hosts", "b"])
        b.cut()          # its link is down; what runs on it goes on
        b.switch_off()   # everything on it is killed at once, as by a power cut

A host is a set of Linux namespaces (network, processes, host name, mounts) without a name, held by its first process,
which the kernel kills with this one. So nothing stays behind, whatever ends the tests, and no packet leaves the
network: its switch is a namespace too. Needs root.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

_SUBNET = "10.77.0"
# The first process says that it is there and then does nothing; the kernel ends it with its parent.
_IDLE = 'hostname "$0"; ip link set lo up; mount --bind "$1" /etc/hosts; echo ready; exec sleep infinity'


class Host:
    """One host; made by `Network.host`."""

    def __init__(self, name: str, address: str, hosts_file: Path) -> None:
        self.name, self.address = name, address
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL",
             "unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc",
             "bash", "-c", _IDLE, name, str(hosts_file)],
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", f"host {name} has not started"
        self._process.stdout.close()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.first_pid = int(children[0])
        self.uplink: tuple[Host, str] | None = None
        """The switch, and the name of its end of the cable."""

    def prefix(self, cwd: Path) -> tuple[str, ...]:
        """What a command line has in front to run on this host, in this directory."""
        return ("nsenter", "--target", str(self.first_pid), "--net", "--uts", "--pid", "--mount", f"--wd={cwd}")

    def configure(self, *arguments: str) -> None:
        """The command `ip` on its network, but among our own processes: so it can name those of other hosts."""
        subprocess.run(["nsenter", "--target", str(self.first_pid), "--net", "ip", *arguments], check=True, timeout=20)

    def cut(self) -> None:
        """Takes the cable out."""
        self._set_link("down")

    def mend(self) -> None:
        """Puts the cable in again."""
        self._set_link("up")

    def _set_link(self, state: str) -> None:
        assert self.uplink is not None
        switch, cable = self.uplink
        switch.configure("link", "set", cable, state)

    def switch_off(self) -> None:
        """Kills everything that runs on it."""
        self._process.kill()
        self._process.wait()


class Network:
    """A switch and the hosts on it."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._hosts: list[Host] = []

    def __enter__(self) -> Network:
        self._switch = Host("switch", "", Path("/etc/hosts"))
        self._switch.configure("link", "add", "bridge", "type", "bridge")
        self._switch.configure("link", "set", "bridge", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in (*self._hosts, self._switch):
            host.switch_off()
        self._directory.cleanup()

    def host(self, name: str) -> Host:
        """A new host. As on many installed machines, its own name leads to a loopback address there."""
        number = len(self._hosts) + 1
        known = [f"{host.address} {host.name}" for host in self._hosts if host.name != name]
        hosts_file = Path(self._directory.name, f"{number}-{name}")
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *known, ""]))
        host = Host(name, f"{_SUBNET}.{number}", hosts_file)
        for other in self._hosts:
            with Path(self._directory.name, f"{other.address.split('.')[-1]}-{other.name}").open("a") as file:
                file.write(f"{host.address} {name}\n")
        self._hosts.append(host)
        cable = f"port{number}"
        peer = ("peer", "name", "eth0", "netns", str(host.first_pid))
        self._switch.configure("link", "add", cable, "type", "veth", *peer)
        self._switch.configure("link", "set", cable, "master", "bridge", "up")
        host.uplink = (self._switch, cable)
        host.configure("address", "add", f"{host.address}/24", "dev", "eth0")
        host.configure("link", "set", "eth0", "up")
        return host
