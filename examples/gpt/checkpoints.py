"""Checkpoints that are whole or not there: written aside by orbax, digested, then renamed into place.

<directory>/checkpoint-000200/state/…        what orbax wrote
<directory>/checkpoint-000200/contents.json  the caller's facts and the sha256 of every file of `state`
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_PREFIX = "checkpoint-"
_CONTENTS = "contents.json"


def save(directory: Path, step: int, state: Any, facts: dict[str, Any]) -> Path:
    """Writes `state` (a pytree of arrays) and `facts` as the checkpoint of `step`; returns its path.

    A checkpoint of that step that is there already is left alone if it is whole, and set aside as `….damaged` if it is
    not. Several processes call it together: each writes its part of the arrays, process 0 does the rest.
    """
    final = of_step(directory, step)
    first = jax.process_index() == 0
    whole = first and final.exists() and damage(final) is None
    if multihost_utils.broadcast_one_to_all(np.int32(whole)):
        return final
    aside = directory / f".{final.name}.writing"
    if first:
        if final.exists():
            final.rename(_free(final.with_name(final.name + ".damaged")))
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while writing
        aside.mkdir(parents=True)
    multihost_utils.sync_global_devices(f"{aside} is there")
    with ocp.StandardCheckpointer() as writer:
        writer.save((aside / "state").absolute(), _named(state))
        writer.wait_until_finished()
    if first:
        contents = {"step": step, "facts": facts, "files": _digests(aside / "state")}
        (aside / _CONTENTS).write_text(json.dumps(contents, indent=1))
        aside.rename(final)
    multihost_utils.sync_global_devices(f"{final} is there")
    return final


def of_step(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return directory / f"{_PREFIX}{step:06d}"


def newest_whole(directory: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or None. `report` is told of each damaged one that is passed over."""
    for path in _all(directory):
        why = damage(path)
        if why is None:
            return path
        report(f"checkpoint {path.name} is damaged ({why}): trying the one before it")
    return None


def contents(path: Path) -> dict[str, Any]:
    """`{"step": …, "facts": …}` of a whole checkpoint."""
    return json.loads((path / _CONTENTS).read_text())


def restore(path: Path, like: Any) -> Any:
    """The state in `path`, in the structure, shapes, dtypes and shardings of `like` (arrays or their shapes)."""
    with ocp.StandardCheckpointer() as reader:
        named = reader.restore((path / "state").absolute(), _named(like))
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in _named(like)])


def restore_part(path: Path, like: Any) -> Any:
    """The arrays of `like` that are in `path` among others, on this process's first device, whatever wrote them."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        state = (path / "state").absolute()
        there = reader.metadata(state).item_metadata
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for name, x in there.items()}
        named = reader.restore(state, shapes)
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in _named(like)])


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        expected = contents(path)["files"]
        found = _digests(path / "state")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_CONTENTS}: {error}"
    for name, digest in expected.items():
        if found.get(name) != digest:
            return f"state/{name} is {'missing' if name not in found else 'not what was written'}"
    return None


def _all(directory: Path) -> Iterator[Path]:
    """Checkpoints, newest first."""
    names = (path for path in directory.glob(_PREFIX + "*") if path.name.removeprefix(_PREFIX).isdigit())
    yield from sorted(names, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)


def _free(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, … that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by path: a form of the state that does not depend on the classes it is made of."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }
