"""Serves the GPT that train_gpt.py trained: requests of different lengths in one batch, over a paged cache.

    python examples/train_gpt.py --out runs/book          trains one, if there is none yet
    python examples/generate.py runs/book                 continues eight passages of the held-out text
    python examples/generate.py runs/book --prompt "The " --prompt "A for loop" --temperature 0.8 --top-p 0.9
    python examples/generate.py runs/book --check         greedy, compared with the model without a cache, byte for byte

Continuous batching: every step takes one byte of each request that is being written and a piece of a prompt that is
being read, as one ragged batch of `jaxops.paged_attention`. A request that ends gives its pages to the next. Exit
codes: 0 done, 1 the check failed, 2 something given is wrong.
"""

import argparse
import collections
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gpt import checkpoints, text
from gpt.model import GPT, Config
from rich.console import Console
from rich.table import Table

import jaxops

CHIPS = ("v5e", "h100")  # what `jaxops.explain` is asked about, besides the device that is there


class Stop(Exception):
    """The run cannot go on; the message says why."""


def main(argv: list[str] | None = None) -> int:
    """Runs the program with the arguments `argv`; returns its exit code."""
    try:
        return run(parse(argv))
    except Stop as stop:
        print(f"generate: {stop}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse: 0 after --help, 2 after an error that it has printed
        return int(stop.code or 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate", description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("directory", type=Path, nargs="?", help="what train_gpt.py wrote; without it, the last runs/gpt-N")
    add("--prompt", action="append", metavar="TEXT", help="to continue; may be given several times")
    add("--text", metavar="FILE", help="where prompts come from without --prompt; by default CPython's reference")
    for name, default, what in (
        ("requests", 8, "passages of the held-out text to continue, without --prompt"),
        ("count", 48, "bytes to write for each request"),
        ("slots", 4, "requests that are served at a time"),
        ("chunk", 32, "bytes of prompts that a step reads at most"),
        ("page-size", 16, "bytes whose keys and values share a page"),
    ):
        add(f"--{name}", type=int, default=default, metavar="N", help=what)
    add("--pages", type=int, metavar="N", help="of the cache; without it, as many as the slots can need")
    add("--temperature", type=float, default=0.0, metavar="X", help="0: always the likeliest byte")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest bytes that make up P")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation and the cache")
    add("--check", action="store_true", help="compare with the model without a cache; only at --temperature 0")
    args = parser.parse_args(argv)
    for name in ("requests", "count", "slots", "chunk", "page_size", "pages"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error(f"--temperature must be at least 0 and --top-p in (0, 1], got {args.temperature} and {args.top_p}")
    if args.check and args.temperature > 0:
        parser.error(
            f"--check needs --temperature 0: what is drawn has nothing to compare with, got {args.temperature}"
        )
    if args.prompt and not all(args.prompt):
        parser.error("--prompt must not be empty")
    return args


@dataclasses.dataclass
class Request:
    """A prompt, what was written after it, and where it stands."""

    number: int
    prompt: np.ndarray
    count: int
    written: list[int] = dataclasses.field(default_factory=list)
    read: int = 0  # bytes whose keys are in the cache
    pages: list[int] = dataclasses.field(default_factory=list)

    def ahead(self) -> list[int]:
        """The bytes that the model has yet to see: the rest of the prompt, or the last one written."""
        known = [*self.prompt.tolist(), *self.written]
        return known[self.read :]

    @property
    def reading(self) -> bool:
        return self.read < len(self.prompt)

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.count - 1  # the last byte is never read


Pages = list[tuple[jax.Array, jax.Array]]  # (keys, values)[pages, page_size, heads, dim] of every layer


class Server:
    """A model, its cache in pages, and the compiled steps: `serve` is all that a caller needs."""

    def __init__(self, model: GPT, args: argparse.Namespace, longest: int):
        self.graph, self.parameters = nnx.split(model)
        self.slots, self.chunk, self.page_size = args.slots, args.chunk, args.page_size
        self.per_request = -(-longest // args.page_size)
        self.page_count = args.pages or args.slots * self.per_request
        if self.page_count < self.per_request:
            raise Stop(f"--pages: the longest request needs {self.per_request}, got {self.page_count}")
        config = model.config
        shape = (self.page_count, args.page_size, config.kv_heads, config.width // config.heads)
        dtype = jnp.dtype(args.dtype)
        self.pages: Pages = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]
        self.free = list(range(self.page_count))
        self.key = jax.random.key(args.seed)
        choose = functools.partial(drawn, temperature=args.temperature, top_p=args.top_p)

        def step(parameters, pages, key, batch):
            logits, pages = advance(nnx.merge(self.graph, parameters), pages, batch)
            # A key for each request and byte: what is drawn does not depend on who else is served.
            of = jax.vmap(lambda number, byte: jax.random.fold_in(jax.random.fold_in(key, number), byte))
            return choose(logits, of(*batch["draw"])), pages

        self.step = step
        self.compiled = jax.jit(step, donate_argnums=1)

    def serve(self, requests: list[Request]) -> dict[str, float]:
        """Writes every request to its end. Returns what was counted: steps, bytes, seconds, pages in use at most."""
        waiting, active = collections.deque(requests), [None] * self.slots
        counted = collections.Counter()
        for size in {self.slots, self.slots + self.chunk}:  # compiled before the clock runs
            chosen, self.pages = self.compiled(self.parameters, self.pages, self.key, self.batch([], [], size))
        jax.block_until_ready(chosen)
        began = time.perf_counter()
        while waiting or any(active):
            for slot in range(self.slots):
                if active[slot] is None and waiting:
                    needed = -(-waiting[0].longest // self.page_size)
                    if needed > len(self.free):
                        break  # the pages of those before come back
                    active[slot] = waiting.popleft()
                    active[slot].pages = [self.free.pop() for _ in range(needed)]
            counted["pages"] = max(counted["pages"], self.page_count - len(self.free))
            room, turns = self.chunk, []
            for request in active:  # one byte for those who write; what is left of the chunk, for those who read
                ahead = [] if request is None else request.ahead()
                if request is not None and request.reading:
                    ahead = ahead[:room]
                    room -= len(ahead)
                turns.append(ahead)
            size = self.slots if sum(map(len, turns)) <= self.slots else self.slots + self.chunk
            batch = self.batch(active, turns, size)
            chosen, self.pages = self.compiled(self.parameters, self.pages, self.key, batch)
            chosen = np.asarray(chosen)
            counted["steps"] += 1
            for slot, (request, ahead) in enumerate(zip(active, turns, strict=True)):
                if not ahead:
                    continue
                counted["read"] += len(ahead) if request.reading else 0
                request.read += len(ahead)
                if not request.reading:
                    request.written.append(int(chosen[slot]))
                    counted["written"] += 1
                if len(request.written) == request.count:
                    self.free += request.pages
                    active[slot] = None
        return {**counted, "seconds": time.perf_counter() - began}

    def batch(self, active: list[Request | None], turns: list[list[int]], size: int) -> dict[str, Any]:
        """The operands of a step over `size` bytes, of which those behind the last request's count for nothing."""
        tokens, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        page = np.full(size, self.page_count, np.int32)  # past the end: nothing is written
        table = np.zeros((self.slots, self.per_request), np.int32)
        lengths, starts = np.zeros(self.slots, np.int32), np.zeros(self.slots + 1, np.int32)
        draw = np.zeros((2, self.slots), np.int32)
        for slot, (request, ahead) in enumerate(zip(active, turns, strict=True)):
            starts[slot + 1] = starts[slot] + len(ahead)
            if request is None:
                continue
            here = slice(starts[slot], starts[slot + 1])
            tokens[here] = ahead
            positions[here] = request.read + np.arange(len(ahead))
            page[here] = np.asarray(request.pages, np.int32)[positions[here] // self.page_size]
            table[slot, : len(request.pages)] = request.pages
            lengths[slot] = request.read + len(ahead)
            draw[:, slot] = request.number, len(request.written)
        starts[len(active) + 1 :] = starts[len(active)]
        return {
            "tokens": tokens, "positions": positions, "page": page, "table": table, "lengths": lengths,
            "starts": starts, "draw": draw,
        }  # fmt: skip


def advance(model: GPT, pages: Pages, batch: dict[str, Any]) -> tuple[jax.Array, Pages]:
    """(logits[slots, vocabulary] after the last byte of every request, the pages with the new keys and values)."""
    x, new = model.embed(batch["tokens"]), []
    place = batch["page"], batch["positions"] % pages[0][0].shape[1]
    for block, (keys, values) in zip(model.blocks, pages, strict=True):
        layer, h = block.attention, block.attention_norm(x)
        query, key = (
            jaxops.rope(project(h), batch["positions"], base=layer.options.rope_base)
            for project in (layer.query, layer.key)
        )
        keys = keys.at[place].set(key.astype(keys.dtype), mode="drop")
        values = values.at[place].set(layer.value(h).astype(values.dtype), mode="drop")
        h = jaxops.paged_attention(query, keys, values, batch["table"], batch["lengths"], batch["starts"])
        h, x = block.mlp_norm(layer.out(h), residual=x)
        x = x + block.mlp(h)
        new.append((keys, values))
    last = model.norm(x[jnp.maximum(batch["starts"][1:] - 1, 0)])
    return jnp.matmul(last, model.output_weight().astype(x.dtype), preferred_element_type=jnp.float32), new


def drawn(logits: jax.Array, keys: jax.Array, *, temperature: float, top_p: float) -> jax.Array:
    """One byte of each row of logits[n, vocabulary]: the likeliest, or one of those that make up `top_p`."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    p = jax.nn.softmax(ranked, axis=-1)
    # A byte stays if those before it do not make up top_p yet: the first one always does.
    ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, ranked, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def load(directory: Path | None, dtype: str) -> tuple[GPT, Path]:
    """The newest whole checkpoint's model on one device; without a directory, of the last runs/gpt-N. Raises `Stop`."""
    if directory is None:
        numbered = {int(path.name[4:]): path for path in Path("runs").glob("gpt-*") if path.name[4:].isdigit()}
        directory = numbered[max(numbered)] if numbered else Path("runs") / "gpt-1"
    path = checkpoints.newest_whole(directory, lambda message: print(f"warning: {message}", file=sys.stderr))
    if path is None:
        raise Stop(
            f"there is no checkpoint in {directory}: train one by python examples/train_gpt.py --out {directory}"
        )
    config = Config(**checkpoints.contents(path)["facts"]["model"])
    graph, like = nnx.split(nnx.eval_shape(lambda: GPT(config, jnp.dtype(dtype), rngs=nnx.Rngs(0))))
    parameters = checkpoints.restore_part(path, {"parameters": like})["parameters"]
    return nnx.merge(graph, parameters), path


def passages(args: argparse.Namespace, longest: int) -> list[np.ndarray]:
    """The prompts: those given, or passages of the held-out text of different lengths."""
    if args.prompt:
        prompts = [np.frombuffer(prompt.encode(), np.uint8).astype(np.int32) for prompt in args.prompt]
        for prompt in prompts:
            if len(prompt) > longest:
                raise Stop(
                    f"--prompt: with --count {args.count} it may have {longest} bytes, the model was trained on "
                    f"{longest + args.count}, got {len(prompt)}"
                )
        return prompts
    if longest < 1:
        raise Stop(f"--count must be below the {longest + args.count} bytes that the model was trained on")
    try:
        held_out = text.load(args.text).held_out.astype(np.int32)
    except OSError as error:
        raise Stop(f"--text: {error}") from None
    random = np.random.default_rng(args.seed)
    sizes = random.integers(1, min(longest, len(held_out)) + 1, args.requests)
    starts = random.integers(0, len(held_out) - sizes + 1)
    return [held_out[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def differences(model: GPT, requests: list[Request]) -> list[str]:
    """Where a request is not what the model without a cache writes greedily, byte for byte."""
    graph, parameters = nnx.split(model)
    width = max(len(request.prompt) + request.count for request in requests)  # causal: what follows is not seen
    best = jax.jit(lambda parameters, tokens: jnp.argmax(nnx.merge(graph, parameters).logits(tokens[None])[0], -1))
    found = []
    for request in requests:
        sequence = np.concatenate([request.prompt, request.written]).astype(np.int32)
        predicted = np.asarray(best(parameters, np.pad(sequence, (0, width - len(sequence)))))
        # If every byte is the likeliest after those before it, the whole is what greedy decoding gives.
        expected = predicted[len(request.prompt) - 1 : len(sequence) - 1]
        wrong = np.flatnonzero(expected != np.asarray(request.written))
        if len(wrong):
            at = int(wrong[0])
            found.append(
                f"request {request.number}: byte {at} is {request.written[at]}, without a cache {expected[at]}"
            )
    return found


def run(args: argparse.Namespace) -> int:
    """Loads, serves, checks, reports; returns the exit code. Raises `Stop`."""
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    model, path = load(args.directory, args.dtype)
    prompts = passages(args, model.config.length - args.count)
    requests = [Request(number, prompt, args.count) for number, prompt in enumerate(prompts)]
    server = Server(model, args, max(request.longest for request in requests))
    counted = server.serve(requests)

    table = Table("request", "read", "prompt, its end", "written", title=f"{path}, {args.dtype}")
    show = lambda tokens: repr(bytes(np.asarray(tokens, np.uint8)).decode(errors="replace"))[1:-1]
    for request in requests:
        row = (str(request.number), str(len(request.prompt)), show(request.prompt[-40:]), show(request.written))
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)
    size = server.slots + server.chunk
    batch = server.batch([], [], size)
    here, *others = (
        jaxops.explain(server.step, server.parameters, server.pages, server.key, batch, target=chip)
        for chip in (None, *CHIPS)
    )
    serving = Table("operator", "here", *(f"on one {chip}" for chip in CHIPS), title="which implementation runs")
    for calls in zip(here.lines, *(other.lines for other in others), strict=True):
        serving.add_row(calls[0].operator, *(c.implementation + (c.reason and f" ({c.reason})") for c in calls))
    console.print(serving)
    page_bytes = sum(x.nbytes for layer in server.pages for x in layer) // server.page_count
    total = counted["read"] + counted["written"]
    console.print(
        f"{len(requests)} requests, {args.slots} at a time: {counted['read']} bytes read and {counted['written']} "
        f"written in {counted['steps']} steps and {counted['seconds']:.2f} s: "
        f"{counted['written'] / counted['seconds']:,.0f} tokens/s written, {total / counted['seconds']:,.0f} in all."
    )
    console.print(
        f"Cache: at most {counted['pages']} of {server.page_count} pages of {args.page_size} bytes of text in use, "
        f"{page_bytes:,} bytes of memory each."
    )
    if args.check:
        wrong = differences(model, requests)
        for line in wrong:
            console.print(line)
        console.print(
            f"NOT equal to the model without a cache in {len(wrong)} of {len(requests)} requests."
            if wrong
            else f"Equal to the model without a cache, byte for byte, in all {len(requests)} requests."
        )
        return 1 if wrong else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
