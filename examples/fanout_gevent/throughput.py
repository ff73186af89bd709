"""Draw throughput.svg: how many requests a second the replica answers with how many slots.

Twice as many clients as slots ask all the time, so that no slot ever lacks a request. A request
takes as long as the slowest model, a second: at best a slot answers one a second. The median
of the rounds counts; each round measures every point, so that what drifts meets all alike.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import monotonic

from models import MODELS

MODES = ("gevent", "thread")
PROCESSES = 2
SECOND = max(model.seconds for model in MODELS)
REQUEST = b"GET /price/80 HTTP/1.1\r\nHost: localhost\r\n\r\n"

WIDTH, HEIGHT = 800, 460
LEFT, RIGHT, TOP, BOTTOM = 72, 640, 76, 404
STYLE = """
text { font: 13px -apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial,
  sans-serif; fill: #1f2328 }
.title { font-size: 17px; font-weight: 600 } .quiet { fill: #59636e }
.card { fill: #ffffff; stroke: #d1d9e0 } .grid { stroke: #e4e8ec }
.best { stroke: #8c959f; stroke-dasharray: 4 3 } polyline { fill: none; stroke-width: 2 }
polyline.gevent { stroke: #1f883d } polyline.thread { stroke: #bf8700; stroke-dasharray: 8 3 }
circle.gevent { fill: #1f883d } circle.thread { fill: #bf8700 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .quiet { fill: #9198a1 } .card { fill: #0d1117; stroke: #3d444d }
  .grid { stroke: #262c36 } .best { stroke: #7d8590 }
  polyline.gevent { stroke: #3fb950 } polyline.thread { stroke: #e8b04a }
  circle.gevent { fill: #3fb950 } circle.thread { fill: #e8b04a }
}
"""

Points = dict[int, float]  # slots: requests a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--seconds", type=float, default=2, help="measured for each point")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    rates: dict[str, dict[int, list[float]]] = {m: {s: [] for s in asked.slots} for m in MODES}
    with running(["models.py", "0", "0", "0"], stdout=subprocess.PIPE) as models:
        urls = " ".join(models.stdout.readline().split()[-1] for _ in MODELS)
        for mode, slots in [
            (m, s) for _ in range(asked.rounds) for s in asked.slots for m in MODES
        ]:
            rate = measure(mode, slots, asked.seconds, urls)
            rates[mode][slots].append(rate)
            print(f"{mode} mode, {slots} slots: {rate:.0f} requests/s", flush=True)
    lines = {m: {s: median(each) for s, each in found.items()} for m, found in rates.items()}
    Path("throughput.svg").write_text(draw(lines))


@contextmanager
def running(arguments: Sequence[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """A Python program, for the time of a `with`."""
    process = subprocess.Popen([sys.executable, *arguments], text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def measure(mode: str, slots: int, seconds: float, models: str) -> float:
    """Requests a second of a replica of so many slots."""
    env = {**os.environ, "MODELS": models, "REPLICA_MODE": mode}
    env["REPLICA_THREADS_PER_PROCESS"] = str(slots // PROCESSES)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bind = ["--bind", f"fd://{listener.fileno()}", "--log-level", "warning"]
        gunicorn = ["-m", "gunicorn", "-c", "python:replica_plugin.conf", *bind, "app:app"]
        with running(gunicorn, env=env, pass_fds=[listener.fileno()]):
            return asyncio.run(ask(listener.getsockname()[1], 2 * slots, seconds))


async def ask(port: int, clients: int, seconds: float) -> float:
    await client(port, 0, 0, [])  # its answer comes when the replica has started
    begin = monotonic() + 2 * SECOND
    end = begin + seconds
    times: list[float] = []
    starts = (number / clients * SECOND for number in range(clients))
    asking = [asyncio.create_task(client(port, start, end, times)) for start in starts]
    done, _ = await asyncio.wait(asking, timeout=end - monotonic())
    for each in done:
        each.result()  # raises what went wrong; the others are cancelled as the loop ends
    return sum(begin <= time < end for time in times) / seconds


async def client(port: int, start: float, end: float, times: list[float]) -> None:
    """Begin after `start` seconds, ask until the time is `end`, note when answers come."""
    await asyncio.sleep(start)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    going = True
    while going:
        writer.write(REQUEST)
        answer = await reader.readuntil(b"}\n")
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        times.append(monotonic())
        going = times[-1] < end
    writer.close()


def draw(lines: Mapping[str, Points]) -> str:
    """A line for each mode, and what would be best."""
    slots = list(next(iter(lines.values())))
    top = max(slots)

    def x(value: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * value / top:.0f}"

    def y(value: float) -> str:
        return f"{BOTTOM - (BOTTOM - TOP) * value / top:.0f}"

    parts = [
        f'<rect class="card" x="0.5" y="0.5" rx="8" width="{WIDTH - 1}" height="{HEIGHT - 1}"/>',
        text(28, 38, "Requests a second against slots, in 2 processes", "title"),
        *(f'<path class="grid" d="M{LEFT} {y(each)}H{RIGHT}"/>' for each in slots),
        *(text(LEFT - 8, int(y(each)) + 4, f"{each}", "quiet", "end") for each in slots),
        *(text(int(x(each)), BOTTOM + 22, f"{each}", "quiet", "middle") for each in slots),
        text(int(x(top / 2)), BOTTOM + 42, "slots", "quiet", "middle"),
        f'<path class="best" d="M{x(0)} {y(0)}L{x(top)} {y(top)}"/>',
        text(RIGHT + 12, TOP + 4, "one a second for each"),
    ]
    for mode, points in lines.items():
        dots = [(x(each), y(rate)) for each, rate in points.items()]
        parts.append(f'<polyline class="{mode}" points="{" ".join(map(",".join, dots))}"/>')
        parts += [f'<circle class="{mode}" cx="{cx}" cy="{cy}" r="4"/>' for cx, cy in dots]
        parts.append(text(RIGHT + 12, int(dots[-1][1]) + 4, f"{mode} mode: {points[top]:.0f}"))
    told = "; ".join(
        f"{mode} mode, {each} slots: {rate:.0f} requests/s"
        for mode, points in lines.items()
        for each, rate in points.items()
    )
    box = f'role="img" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n<title>{told}</title>\n'
    return head + f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"


def text(x: int, y: int, content: str, style: str = "", anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{content}</text>'


if __name__ == "__main__":
    main()
