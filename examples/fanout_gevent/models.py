"""Three slow models, each behind an HTTP server of its own: python models.py PORT PORT PORT.

GET /price/AREA is answered with AREA times what the model takes a square metre to cost.
"""

import argparse
import asyncio
from contextlib import suppress
from dataclasses import dataclass


@dataclass
class Model:
    rate: int
    seconds: float  # how long it thinks

    async def listen(self, port: int) -> None:
        # A connection for each slot of the replica may come in one instant.
        server = await asyncio.start_server(self.serve, "127.0.0.1", port, backlog=1024)
        print(f"Running on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                area = head.split()[1].rpartition(b"/")[2]
                await asyncio.sleep(self.seconds)
                price = b"%d" % (int(area) * self.rate)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(price) + price)
        writer.close()


MODELS = (Model(4000, 0.4), Model(4300, 0.7), Model(4900, 1.0))


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ports", type=int, nargs=len(MODELS))
    ports = parser.parse_args().ports
    await asyncio.gather(*map(Model.listen, MODELS, ports))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
