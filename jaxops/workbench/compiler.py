"""The real TPU and GPU compilers as a service, on a machine that has none of the chips.

    compile_jobs([Job("v5e", "rms_norm", ("x=8192x4096", "scale=4096")), …])  ->  one result for each, in order

Compilers abort and hang. So they run in processes of their own: each works off jobs for one chip, and a supervisor
starts it anew when the compiler brought it down or a job took too long; that costs the one job. Results are kept on
disk, under the fingerprint of all that they were made from.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from jaxops.workbench import sources
from jaxops.workbench.call import Problem
from jaxops.workbench.programs import gpu_resources, last_words
from pallas_kernels import chips, tuned

CHIPS = tuple(name for name in chips.CHIPS if name != "v4")  # no kernel is proved on it
# Distributions that hold the compilers, and the extra of this project that installs them.
COMPILERS = {
    "tpu": ("tpu-compile", ("libtpu",)),
    "gpu": ("gpu-compile", ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm")),
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
}
# What a worker prints around each job. The compilers print, too: what stands between belongs to that job.
BEGIN, END = "jaxops compile begins ", "jaxops compile ends "
_START_SECONDS = 120  # until a worker has imported JAX and loaded its compiler


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile for one chip.

    chip: a name of `CHIPS`.
    function: an operator of the library, or "module:function".
    operands, options: in words, as `jaxops.workbench.call.call` takes them; dtype: of the operands without their own.
    gradients: instead of the function's outputs, the gradients of all floating operands, by `jax.vjp` with the
      cotangents of the floating outputs as operands; what the backward needs of the forward is part of the program.
    implementation: an option of that name, if not None.
    mesh: a slice as "v5p:8x16x16" (on GPUs "h100:1x1x8"): the function is compiled for all its devices under
      `jax.set_mesh`. axes: the mesh's, as "data=64,tensor=32"; empty: one axis "data". An operand
      "x=8192x4096@data,None" is sharded so, "data+tensor" puts two axes on one dimension; without "@" it is replicated.
    tiles: for the library's kernels instead of those they choose.
    schedule: also read the compiler's schedule (`jaxops.schedule`).
    """

    chip: str
    function: str
    operands: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    gradients: bool = False
    implementation: str | None = None
    mesh: str | None = None
    axes: str = ""
    tiles: dict[str, Any] | None = None
    schedule: bool = False


def compile_jobs(
    jobs: Sequence[Job],
    *,
    seconds: float = 300,
    workers: int | None = None,
    advance: Callable[[str], None] = lambda done: None,
    cache: bool = True,
    user_tiles: bool = True,
) -> list[dict[str, Any]]:
    """What the compilers made of `jobs`: one result for each, in their order.

    seconds: the time limit of one job. workers: processes at a time; None: one for each core. advance: called after
      each job, with what was done. cache: read and write results under `$XDG_CACHE_HOME/jaxops` (default `~/.cache`).
    user_tiles: kernels take the tiles that this user tuned, as they would when run here; without, those of the library.

    A result has `status`:
      "compiled"   the compiler made a program of it;
      "refused"    a kernel was asked for and does not serve this: `reason` is its own;
      "failed"     `reason` is what the compiler, or the function itself, says; `bad_question` is there, and True, where
                   the words of the job make no sense; `buffers` where a kernel needs too much of its chip's memory
                   ([{"name", "bytes"}], largest first), with `needed_bytes` and `limit_bytes`;
      "aborted"    the compiler brought its process down;
      "hung"       it had not ended after `seconds`.
    A compiled one also has `runs` (the library's operators in it: [{"operator", "phase", "implementation", "reason"}]),
    `kernels`, `temp_bytes`, `argument_bytes`, `output_bytes`, `flops` and `bytes_accessed` as XLA counts them (None
    where it does not), `vmem_bytes` (TPU) or `smem_bytes`, `registers`, `spill_bytes` (GPU; the most of any kernel),
    `compile_seconds`, `collectives` (on a mesh; see `collectives.collectives`) and, if asked for, `schedule`:
    {"kernels": modelled figures of each, "seconds": of the program or None}, or {"error": why it could not be read}.

    Raises `Problem` for an unknown chip, and where a compiler is not installed.
    """
    for job in jobs:
        if job.chip not in CHIPS:
            raise Problem(f"a chip to compile for must be one of {', '.join(CHIPS)}, got {job.chip!r}")
    if sentence := missing({chips.named(job.chip).platform for job in jobs}):
        raise Problem(sentence)
    service = _Service(jobs, seconds, advance, _Cache.open() if cache else None, user_tiles)
    return service.run(workers or _cores())


def missing(platforms: set[str]) -> str | None:
    """One sentence on what to install to compile for these platforms, or None."""
    absent, extras = [], []
    for platform in sorted(platforms):
        extra, names = COMPILERS[platform]
        lacking = [name for name in names if _version(name) is None]
        absent += lacking
        extras += [extra] if lacking else []
    if not absent:
        return None
    return f"the compilers are missing ({', '.join(absent)}): pip install 'jaxops[{','.join(extras)}]'"


@functools.cache
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(platforms: set[str]) -> dict[str, str]:
    """Of JAX and the compilers of these platforms."""
    names = ["jax", "jaxlib", *(name for platform in sorted(platforms) for name in COMPILERS[platform][1])]
    return {name: version for name in names if (version := _version(name))}


def fingerprint(job: Job, user_tiles: bool = True) -> str:
    """A digest of all that the result of `job` is made from: its words, the sources behind it, the compilers.

    The environment counts as far as JAX and XLA read it (`JAX_…`, `XLA_…`, `LIBTPU_…`), and so do the tiles that the
    user tuned for the chip.
    """
    chip = chips.named(job.chip)
    environment = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_", "LIBTPU_")) and name not in ENVIRONMENT
    }
    here = pathlib.Path(__file__).parent
    made_by = [sources.digest(here / f"{name}.py") for name in ("call", "collectives", "compiler_worker", "programs")]
    made_from = [dataclasses.asdict(job), made_by, versions({chip.platform}), environment]
    made_from.append(sources.fingerprint(job.function, chip))
    if job.schedule:
        made_from.append(sources.fingerprint(f"jaxops.schedule.{chip.platform}:read", chip))
    tuned_here = tuned.user_file(chip.name)
    if user_tiles and tuned_here.is_file():
        made_from.append(sources.digest(tuned_here))
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:40]


def cache_folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/jaxops`, by default `~/.cache/jaxops`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxops"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Cache:
    """Results on disk, one file each."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    @classmethod
    def open(cls) -> "_Cache | None":
        """None, and one line on the error stream, where the folder cannot be written."""
        folder = cache_folder() / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            print(f"jaxops: nothing is cached: {folder}: {error.strerror}", file=sys.stderr)
            return None
        return cls(folder)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result under `key`; None if there is none, or what is there cannot be read."""
        try:
            found = json.loads((self.folder / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found["result"] if isinstance(found, dict) and found.get("key") == key and "result" in found else None

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keeps `result`. Another process may do the same at this moment: the file is replaced in one step."""
        with contextlib.suppress(OSError):  # a full disk costs the cache, not the result
            write_atomically(self.folder / f"{key}.json", json.dumps({"key": key, "result": result}))


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes `text` so that a reader finds the old file or the new one. Raises `OSError`."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


_Kind = tuple[str, bool]  # what a worker is started for: the chip, and whether its compiler dumps schedules


class _Service:
    """The jobs of one `compile_jobs`, handed to workers."""

    def __init__(
        self,
        jobs: Sequence[Job],
        seconds: float,
        advance: Callable[[str], None],
        cache: _Cache | None,
        user_tiles: bool,
    ):
        self.jobs, self.seconds, self.advance, self.cache, self.user_tiles = jobs, seconds, advance, cache, user_tiles
        self.results: list[dict[str, Any] | None] = [None] * len(jobs)
        self.keys: list[str | None] = [None] * len(jobs)
        self.waiting: dict[_Kind, deque[int]] = {}
        self.busy: Counter[_Kind] = Counter()
        self.lock = threading.Lock()
        self.running: set[_Worker] = set()
        self.stopped = False

    def run(self, workers: int) -> list[dict[str, Any]]:
        for index, job in enumerate(self.jobs):
            key = self.keys[index] = fingerprint(job, self.user_tiles) if self.cache else None
            cached = self.cache.get(key) if self.cache and key else None
            if cached is not None:
                self._done(index, cached)
            else:
                self.waiting.setdefault((job.chip, job.schedule), deque()).append(index)
        threads = min(workers, sum(map(len, self.waiting.values())))
        if threads:
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                lanes = [pool.submit(self._lane) for _ in range(threads)]
                try:
                    for lane in concurrent.futures.as_completed(lanes):
                        lane.result()
                finally:  # also when the user interrupts
                    with self.lock:
                        self.stopped = True
                        for worker in self.running:
                            worker.stop()
        return [result for result in self.results if result is not None]

    def _done(self, index: int, result: dict[str, Any]) -> None:
        with self.lock:
            self.results[index] = result
            self.advance(f"{self.jobs[index].function} for {self.jobs[index].chip}: {result['status']}")

    def _next(self, kind: _Kind | None) -> tuple[_Kind, int] | None:
        """Another job of `kind`, else one of the kind with the most jobs left for each worker on it."""
        with self.lock:
            if kind:
                self.busy[kind] -= 1
            left = {one: len(jobs) / (1 + self.busy[one]) for one, jobs in self.waiting.items() if jobs}
            if self.stopped or not left:
                return None
            if kind not in left:
                kind = max(left, key=lambda one: left[one])
            assert kind is not None
            self.busy[kind] += 1
            return kind, self.waiting[kind].popleft()

    def _lane(self) -> None:
        """Works off jobs, one at a time, with one worker process at a time."""
        worker: _Worker | None = None
        kind: _Kind | None = None
        try:
            while (found := self._next(kind)) is not None:
                if worker and (found[0] != kind or worker.ended):
                    self._stop(worker)
                    worker = None
                kind, index = found
                if worker is None:
                    worker = _Worker(*kind, self.seconds, self.user_tiles)
                    with self.lock:
                        self.running.add(worker)
                job = self.jobs[index]
                result = worker.run(job)
                if self.cache and (key := self.keys[index]) and _lasts(result):
                    self.cache.put(key, result)
                self._done(index, result)
        finally:
            if worker:
                self._stop(worker)

    def _stop(self, worker: "_Worker") -> None:
        with self.lock:
            self.running.discard(worker)
        worker.stop()


def _lasts(result: dict[str, Any]) -> bool:
    """Whether the next time would end so, too."""
    return result["status"] not in ("aborted", "hung") and "bad_question" not in result


def worker_command(chip: str, folder: str) -> list[str]:
    """The command of the process that compiles for `chip`, a job a line on its input (see `compiler_worker`)."""
    return [sys.executable, "-m", "jaxops.workbench.compiler_worker", chip, folder]


class _Worker:
    """A process that compiles for one chip, seen from outside."""

    def __init__(self, chip: str, schedule: bool, seconds: float, user_tiles: bool):
        self.platform, self.seconds = chips.named(chip).platform, seconds
        self.folder = tempfile.TemporaryDirectory(prefix="jaxops-")
        environment = _environment()
        if schedule:
            dump = pathlib.Path(self.folder.name, "dump")
            dump.mkdir()
            environment |= importlib.import_module(f"jaxops.schedule.{self.platform}").environment(dump)
        if not user_tiles:
            environment["XDG_CACHE_HOME"] = self.folder.name
        self.process = subprocess.Popen(
            worker_command(chip, self.folder.name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # so that what the compiler started is ended with it
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ended = False

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def run(self, job: Job) -> dict[str, Any]:
        """The result of `job`; after "aborted" and "hung" the worker has `ended`."""
        assert self.process.stdin
        with contextlib.suppress(OSError):  # it is dead: its output says why
            self.process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            self.process.stdin.flush()
        printed: list[str] = []
        limit, until = self.seconds, time.monotonic() + max(self.seconds, _START_SECONDS)
        while True:
            try:
                line = self.lines.get(timeout=max(0, until - time.monotonic()))
            except queue.Empty:
                self.stop()
                return {"status": "hung", "reason": f"no end after {limit:.0f} s: {last_words(printed)}"}
            if line is None:
                self.stop()
                code = self.process.returncode
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return {"status": "aborted", "reason": f"the compiler aborted ({how}): {last_words(printed)}"}
            if line.startswith(BEGIN):
                printed, until = [], time.monotonic() + self.seconds
            elif line.startswith(END) and (result := _result(line[len(END) :])):
                if result["status"] == "compiled" and self.platform == "gpu" and "registers" not in result:
                    result |= gpu_resources("".join(printed), result["kernels"])
                return result
            else:
                printed.append(line)

    def stop(self) -> None:
        """Ends the process and all that it started."""
        self.ended = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()


def _environment() -> dict[str, str]:
    """Of a worker: it imports what this process can import."""
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _result(text: str) -> dict[str, Any] | None:
    try:
        result = json.loads(text)
    except ValueError:
        return None
    return result if isinstance(result, dict) and "status" in result else None
