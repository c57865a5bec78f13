"""Load for a server that runs, checked against the library, with a table at the end:

python tests/soak.py --checkpoint=runs/tiny --url=http://127.0.0.1:8000 --pid=PID --requests=5000 --concurrent=200

Documents, questions, rates and lengths are mixed, half of the answers are streamed, some contexts are stored files, and
--leave clients go away at random all the while. In the end the process is sent SIGTERM under load. Exits with 1 if an
answer is lost or wrong. Needs the extra [test]; records are those of the synthetic task.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import httpx2
import numpy as np

from comi_jax.data import synthetic
from comi_jax.serving.compressor import Comi

CHAT, FILES = "/v1/chat/completions", "/v1/files"


@dataclasses.dataclass
class Case:
    """A request, and the text that it must get."""

    body: dict
    want: str
    tokens: int


@dataclasses.dataclass
class Seen:
    """What happened."""

    first: list = dataclasses.field(default_factory=list)  # seconds to the first token of a stream
    whole: list = dataclasses.field(default_factory=list)  # seconds of a request
    tokens: int = 0
    wrong: list = dataclasses.field(default_factory=list)
    statuses: dict = dataclasses.field(default_factory=dict)
    left: int = 0


def parsed():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--leave", type=int, default=32)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--rates", type=int, nargs="+", default=[8, 4, 1])
    return parser.parse_args()


async def cases(options, http, rng):
    """Requests about texts of several lengths, half of them stored."""
    comi, made = Comi.load(options.checkpoint), []
    for number, record in enumerate(synthetic.records("eval", options.texts, 7)):
        sentences = record.context_text().split(". ")
        text = ". ".join(sentences[: max(2, len(sentences) - number % 5 * 3)])
        document = comi.encode(text)
        sent = await http.post(FILES, files={"file": ("a.txt", text.encode())})
        name = sent.json()["id"]
        for rate in options.rates:
            tokens = int(rng.integers(2, 13))
            want = comi.answer(document, record.prompt, rate=rate, max_new_tokens=tokens)
            parts = [{"type": "file", "file": {"file_id": name}}, {"type": "text", "text": record.prompt}]
            whole = [{"role": "system", "content": text}, {"role": "user", "content": record.prompt}]
            for messages in ([{"role": "user", "content": parts}], whole):
                body = {"messages": messages, "rate": rate, "max_tokens": tokens}
                made.append(Case(body, want.text, len(want.tokens)))
    return made


async def ask(http, case, stream, seen):
    """One request; adds what happened to ``seen``."""
    begun, text, first = time.perf_counter(), "", None
    try:
        async with http.stream("POST", CHAT, json=case.body | {"stream": stream}) as response:
            if response.status_code == 200 and stream:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            text = f"error {event['error']['code']}"
                            break
                        piece = "".join(each["delta"].get("content", "") for each in event["choices"])
                        first = first or (piece and time.perf_counter() - begun) or None
                        text += piece
            else:
                content = json.loads(await response.aread())
                text = content["choices"][0]["message"]["content"] if response.status_code == 200 else text
            status = response.status_code
    except httpx2.TransportError as error:
        status = type(error).__name__
    seen.statuses[status] = seen.statuses.get(status, 0) + 1
    if status == 200:
        seen.whole.append(time.perf_counter() - begun)
        seen.first += [first] if first else []
        seen.tokens += case.tokens
        if text != case.want:
            seen.wrong.append((case.want, text))
    return status


async def leave(http, made, seen, done):
    """A client that goes away at random, again and again."""
    while not done.is_set():
        case, stream = random.choice(made), random.random() < 0.5
        body = case.body | {"stream": stream, "max_tokens": 12}
        try:
            async with asyncio.timeout(random.uniform(0.005, 0.3)):
                await http.post(CHAT, json=body)
        except (TimeoutError, httpx2.TransportError):
            seen.left += 1


async def load(http, made, count, concurrent, seen, memory=lambda: None):
    """``count`` requests, ``concurrent`` at a time; those that are told to come back do."""
    numbers = iter(range(count))

    async def client():
        for number in numbers:
            while await ask(http, made[number % len(made)], bool(number % 2), seen) == 429:
                await asyncio.sleep(random.uniform(0.2, 1.0))
            if number % 500 == 0:
                memory()

    await asyncio.gather(*(client() for _ in range(concurrent)))


def resident(pid):
    """MiB of memory of a process."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def percentiles(values):
    return " / ".join(f"{1000 * x:,.0f}" for x in np.percentile(values, (50, 95, 99)))


async def main():
    options, rng = parsed(), np.random.default_rng(0)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=options.concurrent)
    async with httpx2.AsyncClient(base_url=options.url, timeout=300, limits=limits) as http:
        made = await cases(options, http, rng)
        rng.shuffle(made)
        await load(http, made, len(made), 8, Seen())  # warm
        seen, memory, done = Seen(), [resident(options.pid)], asyncio.Event()
        leavers = [asyncio.create_task(leave(http, made, seen, done)) for _ in range(options.leave)]
        begun = time.perf_counter()
        await load(http, made, options.requests, options.concurrent, seen, lambda: memory.append(resident(options.pid)))
        seconds = time.perf_counter() - begun
        done.set()
        await asyncio.gather(*leavers)
        memory.append(resident(options.pid))
        figures = (await http.get("/metrics")).text
        still = [line.split()[-1] for line in figures.splitlines() if line.startswith("comi:num_requests_running")]
        end = Seen()
        drained = asyncio.create_task(load(http, made, 4 * options.concurrent, options.concurrent, end))
        await asyncio.sleep(0.5)
        os.kill(options.pid, signal.SIGTERM)
        await drained
    print("| what | figure |\n| --- | --- |")
    for name, figure in (
        ("requests, each right", f"{len(seen.whole) - len(seen.wrong):,} of {options.requests:,}"),
        ("clients at once, and beside them those that leave", f"{options.concurrent}, {options.leave}"),
        ("times that one left", f"{seen.left:,}"),
        ("told to come back (429)", f"{seen.statuses.get(429, 0):,}"),
        ("requests/s", f"{len(seen.whole) / seconds:,.1f}"),
        ("tokens/s", f"{seen.tokens / seconds:,.1f}"),
        ("first token of a stream, ms, p50 / p95 / p99", percentiles(seen.first)),
        ("whole request, ms, p50 / p95 / p99", percentiles(seen.whole)),
        ("memory, MiB, every 500 requests", ", ".join(f"{each:,.0f}" for each in memory)),
        ("still running after it", ", ".join(still)),
        ("SIGTERM under load: answers, right", f"{len(end.whole)}, {len(end.whole) - len(end.wrong)}"),
        ("and by status", ", ".join(f"{name}: {count}" for name, count in sorted(end.statuses.items(), key=str))),
    ):
        print(f"| {name} | {figure} |")
    strange = set(end.statuses) - {200, 429, 503, "ConnectError", "RemoteProtocolError", "ReadError"}
    return bool(seen.wrong or end.wrong or strange or len(seen.whole) != options.requests)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
