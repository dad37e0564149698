"""Tiles that were tuned for a chip, looked up while a kernel is lowered: a few dictionary reads, never a compile.

A kernel module says what it is about to run (its name and phase, the shape, the dtype) and gets the tiles that were
found best for the nearest shape, or that its default was, from the first of these that knows:

    forced(…)                                   what the tuner is just trying
    $XDG_CACHE_HOME/jaxops/tuned/<chip>.json    what this user tuned (~/.cache without XDG_CACHE_HOME)
    pallas_kernels/tuned/<chip>.json            what comes with the library

Whether the problem at hand allows them is the kernel module's to say: `choose` falls back to its default. A file is
read once, and again only when it has changed. Whatever is wrong with a file or an entry is one warning, never an error.
An entry of the user's is stale, and ignored, under another minor version of JAX or another version of the compiler;
those of the library are kept, as its defaults are.

Nearest: strings of the shape must be equal, numbers may differ; the distance is Σ |log2(a / b)| over the numbers, each
rounded to a power of two. Beyond a factor of four in any of them nothing is known, and the default serves.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from pallas_kernels.chips import CHIPS, Chip

Shape = Mapping[str, int | str]

REACH = 2  # how many doublings a size may be away from the tuned one
COMPILERS = {"tpu": "libtpu", "gpu": "nvidia-cuda-nvcc"}  # the distribution that holds a platform's compiler


@dataclasses.dataclass(frozen=True)
class Question:
    """What a kernel asked for: `kernel` is its name and phase, as "tpu.rms_norm.forward"."""

    kernel: str
    chip: str
    shape: tuple[tuple[str, int | str], ...]
    dtype: str

    @staticmethod
    def of(kernel: str, chip: Chip, shape: Shape, dtype: str) -> "Question":
        """The question of a shape class: numbers are rounded to powers of two."""
        sizes = {name: value if isinstance(value, str) else _bucket(value) for name, value in shape.items()}
        return Question(kernel, chip.name, tuple(sorted(sizes.items())), dtype)

    @property
    def key(self) -> str:
        """Where the answer stands in a file."""
        return "/".join((self.kernel, self.dtype, ",".join(f"{name}={value}" for name, value in self.shape)))


def _bucket(size: int) -> int:
    return 1 << round(math.log2(max(size, 1)))


# ---- lookup ----------------------------------------------------------------------------------------------------------

_forced = jax.make_user_context(())  # part of every trace's cache key: what was traced with other tiles is not reused
_asked: contextvars.ContextVar[list[Question] | None] = contextvars.ContextVar("asked", default=None)


def lookup(kernel: str, chip: Chip, shape: Shape, dtype: str) -> dict[str, int] | None:
    """The tuned tiles, by field, of the nearest shape class; no fields: the default was best; None: none is near.

    kernel: name and phase, "tpu.rms_norm.forward". shape: what the best tiles depend on; a property that has to be the
    same is a string ("kind": "causal"), a size an int. dtype: as "bfloat16".
    """
    return next((tiles for tiles, _ in _answers(kernel, chip, shape, dtype)), None)


def choose[T](
    kernel: str,
    chip: Chip,
    shape: Shape,
    dtype: str,
    make: Callable[..., T],
    allowed: Callable[[T], bool],
    default: T,
    adapt: Callable[[T], T] = lambda tiles: tiles,
) -> T:
    """`adapt(make(**tiles))` of the first tuned tiles that the problem then allows, else `default`.

    kernel, chip, shape, dtype: as for `lookup`. adapt: what of the tiles follows the problem at hand instead of the one
    they were tuned for. Forced tiles are not adapted, and raise `ValueError` if they are not allowed.
    """
    for fields, source in _answers(kernel, chip, shape, dtype):
        if not fields:
            return default
        try:
            tiles = make(**fields)
        except TypeError as error:
            if source is None:
                raise ValueError(f"the tiles forced on {kernel} have other fields: {error}") from error
            _warn(source, f"an entry for {kernel} has other fields: {error}")
            continue
        if source is None:
            if not allowed(tiles):
                raise ValueError(f"{kernel} cannot be cut into the tiles forced on it, {tiles}")
            return tiles
        with contextlib.suppress(ZeroDivisionError):  # a size of zero
            tiles = adapt(tiles)
        if allowed(tiles):
            return tiles
    return default


def _answers(kernel: str, chip: Chip, shape: Shape, dtype: str) -> Iterator[tuple[dict[str, int], pathlib.Path | None]]:
    """(tiles, the file they come from) in the order of the sources; forced ones come from no file, and alone."""
    question = Question.of(kernel, chip, shape, dtype)
    asked = _asked.get()
    if asked is not None:
        asked.append(question)
    for name, fields in _forced.value:
        if name == kernel:
            yield dict(fields), None
            return
    if chip.name not in CHIPS:  # a GPU that is known by its capability only
        return
    for path, own in ((user_file(chip.name), True), (shipped_file(chip.name), False)):
        if found := _nearest(question, _usable(path, chip, own)):
            yield dict(found["tiles"]), path


def forced(tiles: Mapping[str, Mapping[str, int]]) -> contextlib.AbstractContextManager[Any]:
    """Within this context, what is traced and lowered takes these tiles: kernel name → fields."""
    return _forced(tuple(sorted((kernel, tuple(sorted(fields.items()))) for kernel, fields in tiles.items())))


@contextlib.contextmanager
def asked() -> Iterator[list[Question]]:
    """The questions that are asked within this context, as they come."""
    questions: list[Question] = []
    token = _asked.set(questions)
    try:
        yield questions
    finally:
        _asked.reset(token)


def _nearest(question: Question, entries: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The entry with the least distance; of several the first by key."""
    best: tuple[float, str] | None = None
    found = None
    wanted = dict(question.shape)
    for entry in entries:
        if (entry["kernel"], entry["dtype"]) != (question.kernel, question.dtype):
            continue
        apart = _distance(wanted, entry["shape"])
        if apart is not None and (best is None or (apart, entry["key"]) < best):
            best, found = (apart, entry["key"]), entry
    return found


def _distance(a: Shape, b: Shape) -> float | None:
    """Doublings between two shape classes; None if they are different things."""
    if a.keys() != b.keys():
        return None
    total = 0.0
    for name, value in a.items():
        other = b[name]
        if isinstance(value, str) or isinstance(other, str):
            if value != other:
                return None
            continue
        apart = abs(math.log2(value / other))
        if apart > REACH:
            return None
        total += apart
    return total


# ---- files -----------------------------------------------------------------------------------------------------------


def user_file(chip: str) -> pathlib.Path:
    """Where this user's tuned tiles for a chip are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "jaxops" / "tuned" / f"{chip}.json"


def shipped_file(chip: str) -> pathlib.Path:
    """Where the library's tuned tiles for a chip are kept."""
    return pathlib.Path(__file__).with_name(f"{chip}.json")


@functools.cache
def compiler_version(platform: str) -> str | None:
    """The installed version of the compiler of "tpu" or "gpu"; None if it is not here."""
    try:
        return importlib.metadata.version(COMPILERS[platform])
    except importlib.metadata.PackageNotFoundError:
        return None


def entry(question: Question, tiles: Mapping[str, int], platform: str, **remarks: Any) -> dict[str, Any]:
    """What is written for a question. `remarks` are for readers: how the tiles were judged, what they gain."""
    return {
        "kernel": question.kernel,
        "dtype": question.dtype,
        "shape": dict(question.shape),
        "tiles": dict(tiles),
        "jax": jax.__version__,
        "compiler": compiler_version(platform),
        **remarks,
    }


def write(path: pathlib.Path, chip: str, entries: Mapping[str, dict[str, Any]]) -> None:
    """Adds entries (`Question.key` → `entry(…)`) to a file, replacing those of the same key.

    Processes that write at once wait for one another, and a reader sees the file before or after. A file that cannot be
    read is written anew. Raises `OSError` where the folder cannot be written.
    """
    import fcntl  # only who writes needs it, and Windows has none

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            kept = json.loads(path.read_text())["entries"]
        except (OSError, ValueError, KeyError, TypeError):
            kept = {}
        if not isinstance(kept, dict):
            kept = {}
        text = json.dumps({"chip": chip, "entries": dict(sorted({**kept, **entries}.items()))}, indent=1)
        new = path.with_suffix(".new")
        new.write_text(text + "\n")
        os.replace(new, path)


_warned: set[pathlib.Path] = set()


def _warn(path: pathlib.Path, why: str) -> None:
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"{path}: {why}; the tiles of the library serve instead", stacklevel=2)


def _usable(path: pathlib.Path, chip: Chip, own: bool) -> tuple[dict[str, Any], ...]:
    """The entries of a file that hold here; one warning if it, or some of them, do not."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return _read(path, status.st_mtime_ns, status.st_size, chip, own)


@functools.lru_cache(maxsize=64)
def _read(path: pathlib.Path, changed: int, size: int, chip: Chip, own: bool) -> tuple[dict[str, Any], ...]:
    del changed, size  # part of the cache's key
    try:
        content = json.loads(path.read_text())
        of, entries = content["chip"], content["entries"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _warn(path, f"it cannot be read ({type(error).__name__}: {error})")
        return ()
    if of != chip.name:
        _warn(path, f"its tiles are for {of!r}, not {chip.name}")
        return ()
    good, reasons = [], []
    for key, one in entries:
        reason = _malformed(one) or (_stale(one, chip.platform) if own else None)
        if reason:
            reasons.append(f"{key}: {reason}")
        else:
            good.append({**one, "key": key})
    if reasons:
        _warn(path, f"{len(reasons)} of {len(entries)} entries are ignored, the first being {reasons[0]}")
    return tuple(good)


def _malformed(one: Any) -> str | None:
    try:
        named = all(isinstance(one[name], str) for name in ("kernel", "dtype", "jax"))
        sizes = all(isinstance(v, str) or (_count(v) and v > 0) for v in one["shape"].values())
        tiles = all(_count(v) for v in one["tiles"].values())
        known = isinstance(one["compiler"], str | None)
    except (KeyError, TypeError, AttributeError) as error:
        return f"not an entry ({type(error).__name__}: {error})"
    return None if named and sizes and tiles and known else "not an entry"


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stale(one: dict[str, Any], platform: str) -> str | None:
    minor = lambda version: version.split(".")[:2]
    if minor(one["jax"]) != minor(jax.__version__):
        return f"tuned with jax {one['jax']}, this is {jax.__version__}"
    compiler = compiler_version(platform)
    if compiler is not None and one["compiler"] != compiler:  # a compiler that is not here contradicts nothing
        return f"tuned with {COMPILERS[platform]} {one['compiler']}, this is {compiler}"
    return None
