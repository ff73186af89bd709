"""A network of our own, in which connections can be cut: nothing arrives, and nobody is told.

The run moves into a network namespace (`unshare --net`), where clients connect from addresses of
their own. Taking such an address off the interface cuts the connections from it, in both
directions; giving it back heals them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess

INSIDE = "CHAOS_NETWORK"  # in the environment of a run that has moved


def _unshare() -> list[str]:
    return ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]


def obstacle() -> str:
    """Why connections cannot be cut here; empty if they can."""
    for tool in ("unshare", "ip"):
        if shutil.which(tool) is None:
            return f"there is no command `{tool}`"
    done = subprocess.run(
        [*_unshare(), "ip", "link", "set", "lo", "up"], capture_output=True, text=True
    )
    return done.stderr.strip() if done.returncode else ""


def move(command: list[str]) -> None:
    """Start anew in a network of our own. Does not return."""
    os.execvpe("unshare", [*_unshare(), *command], {**os.environ, INSIDE: "1"})


def has_moved() -> bool:
    return INSIDE in os.environ


class Network:
    def __init__(self) -> None:
        self.can_cut = has_moved()
        self._last = 0
        if self.can_cut:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    async def address(self) -> str:
        """An address to connect from."""
        self._last += 1
        address = f"10.99.{self._last // 250 % 250}.{self._last % 250 + 1}"
        await self.heal(address)
        return address

    async def release(self, address: str) -> None:
        await self.cut(address)

    async def cut(self, address: str) -> None:
        await _ip("del", address)

    async def heal(self, address: str) -> None:
        await _ip("add", address)


async def _ip(verb: str, address: str) -> None:
    command = ("ip", "addr", verb, f"{address}/32", "dev", "lo")
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    await process.wait()
