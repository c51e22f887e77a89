"""``python -m bench.metronome SOCKET FLUSH STEPS``: a worker that computes nothing, for measuring the relay alone.

Answers every POST with a stream of ``max_tokens`` tokens at ``STEPS`` a second, ``FLUSH`` of them in an event.
"""

from __future__ import annotations

import asyncio
import json
import sys

_HEAD = b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"'
_TAIL = b'","finish_reason":null}]}\n\n'
_END = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"",'
    b'"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
)
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


async def main() -> None:
    """Serve until the process is ended."""
    flush, steps_per_s = int(sys.argv[2]), float(sys.argv[3])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        (line,) = (line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        body = json.loads(await reader.readexactly(int(line.split(b":")[1])))
        writer.write(_ANSWER)
        loop = asyncio.get_running_loop()
        began_s, count = loop.time(), int(body["max_tokens"])
        for sent in range(0, count, flush):
            tokens = min(flush, count - sent)
            _chunk(writer, _HEAD + b"word " * tokens + _TAIL)
            await writer.drain()
            await asyncio.sleep(max(0.0, began_s + (sent + tokens) / steps_per_s - loop.time()))
        _chunk(writer, _END)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, sys.argv[1])
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


if __name__ == "__main__":
    asyncio.run(main())
