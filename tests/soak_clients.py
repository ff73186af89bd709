"""Clients of the soak, a process of their own: `python soak_clients.py ADDRESS ROUNDS`.

A round is four hundred requests: most on connections that are kept alive, some on new ones,
with bodies and without; some fail, and some clients leave early. Printed is, as JSON, how many
answers of each status came.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

from server import Client
from wire import chunked, post, request

CLOSING = "Connection: close"
KEPT = request("/hello") * 83 + request("/-/healthz") * 2 + request("/hello", method="HEAD")
KEPT += post("/echo", b"a" * 3000) + chunked("/echo", b"abc") + request("/file/9000")
NEW = request("/hello", CLOSING)
FAILING = [request(path, CLOSING) for path in ("/fail", "/fail-late", "/none")]
FAILING.append(request("/hello", "A b: malformed"))
REQUESTS = 400  # a round: four times KEPT and NEW, 30 NEW, FAILING, and 6 whose clients leave
ANSWERS = {"200": 391, "400": 1, "404": 1, "500": 1}  # to a round; one breaks off
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def ask(address: Any, sent: bytes) -> Counter[str]:
    """The statuses of all that comes until the server closes."""
    received = bytearray()
    with Client(address) as client:
        client.send(sent)
        while part := client.sock.recv(1 << 16):
            received += part
    return Counter(status.decode() for status in _STATUS.findall(received))


def leave(address: Any) -> None:
    """Clients that wait for no answer, or not for its end."""
    for sent in (NEW, KEPT[:30], post("/echo", b"a" * 9000)[:5000], request("/stream/3")):
        Client(address).send(sent).reset()
    for sent in (request("/stream/3"), post("/echo", b"a" * 100_000)):
        with Client(address) as client:
            client.send(sent).sock.recv(1000)


def play_round(address: Any) -> Counter[str]:
    seen: Counter[str] = Counter()
    for sent in [KEPT + NEW] * 4 + [NEW] * 30 + FAILING:
        seen += ask(address, sent)
    leave(address)
    return seen


if __name__ == "__main__":
    where, outcome = json.loads(sys.argv[1]), Counter[str]()
    for _ in range(int(sys.argv[2])):
        outcome += play_round(where if isinstance(where, str) else tuple(where))
    print(json.dumps(outcome))
