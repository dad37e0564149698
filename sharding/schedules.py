"""Schedules of pipeline parallelism: which stage works on which micro-batch when, as one table.

Virtual stage k of stages · chunks is chunk k // stages of stage k % stages. A schedule is an order of phases for every
stage; the table runs the orders tick by tick, each phase as early as its data allow:

    F   forward                  after F of virtual stage k - 1
    B   gradient of the input    after B of virtual stage k + 1, and its own F
    W   gradient of the weights  after its own B; in a table without W the phase B makes both

Sources: Huang et al., "GPipe", arXiv:1811.06965; Narayanan et al., "Efficient Large-Scale Language Model Training on
GPU Clusters Using Megatron-LM", arXiv:2104.04473 (1F1B, interleaved); Qi et al., "Zero Bubble Pipeline Parallelism",
arXiv:2401.10241 (H1).
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble")
ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]
COLOURS = {"F": "#8fb8de", "B": "#f2b880", "W": "#a8d5a2"}


class Cell(NamedTuple):
    """What a stage does in one tick: phase "F", "B" or "W" of a micro-batch in one of the stage's chunks."""

    phase: str
    micro_batch: int
    chunk: int


Order = list[Cell]
Key = tuple[str, int, int]  # phase, virtual stage, micro-batch


def schedule(name: ScheduleName, stages: int, micro_batches: int, chunks: int = 1, *, overlap: bool = False) -> "Table":
    """(stage, tick) ↦ (phase, micro-batch, chunk) for S stages, m micro-batches and v chunks of each stage.

    | name | idle cells of a stage | phases of a stage | activations in flight |
    | --- | --- | --- | --- |
    | "gpipe" | 2 (S − 1) | 2 m | m |
    | "1f1b" | 2 (S − 1) | 2 m | at most S |
    | "interleaved_1f1b" | 2 (S − 1), of 1 / v of a stage's work each | 2 m v | at most 2 (S − 1) + (v − 1) S + 1 |
    | "zero_bubble" | S − 1 | 3 m | at most S |

    Args:
      name: one of the four above.
      stages, micro_batches: at least 1.
      chunks: virtual stages on each device, above 1 for "interleaved_1f1b" only.
      overlap: False: what a tick makes is there in the next one, and the transfer between them is waited for. True: it
        is there one tick later and travels while the stage works. The table then has more idle cells (a tick is not a
        time: see `Table.makespan`) and up to twice the activations in flight.

    Raises `TypeError` if a number is no int, `ValueError` if the name is not known, a number is below 1, chunks do not
    go with the name, or the micro-batches are not what the schedule needs: a multiple of the stages when interleaved
    (of twice the stages with overlap), at least as many as stages in "zero_bubble".
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule: name must be one of {', '.join(map(repr, SCHEDULES))}, got {name!r}")
    for argument, value in (("stages", stages), ("micro_batches", micro_batches), ("chunks", chunks)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"schedule: {argument} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"schedule: {argument} must be at least 1, got {value}")
    if chunks > 1 and name != "interleaved_1f1b":
        raise ValueError(f"schedule: chunks must be 1 for {name!r}, got {chunks}; only 'interleaved_1f1b' has more")
    if chunks == 1 and name == "interleaved_1f1b":
        raise ValueError("schedule: chunks must be at least 2 for 'interleaved_1f1b', got 1; with 1 it is '1f1b'")
    latency = 2 if overlap else 1
    if name == "interleaved_1f1b" and micro_batches % (latency * stages):
        twice = "twice " if overlap else ""
        raise ValueError(
            f"schedule: micro_batches must be a multiple of {twice}the {stages} stages for {name!r}"
            f"{' with overlap' if overlap else ''}, got {micro_batches}"
        )
    if name == "zero_bubble" and micro_batches < stages:
        raise ValueError(
            f"schedule: micro_batches must be at least the {stages} stages for {name!r}, got {micro_batches}"
        )
    orders = [_order(name, stage, stages, micro_batches, chunks, latency) for stage in range(stages)]
    return Table(name, stages, micro_batches, chunks, overlap, _run(orders, stages, chunks, latency))


def _order(name: str, s: int, S: int, m: int, v: int, latency: int) -> Order:
    """The phases of stage s in their order."""
    forwards = [Cell("F", i, 0) for i in range(m)]
    backwards = [Cell("B", i, 0) for i in range(m)]
    if name == "gpipe":
        return forwards + backwards
    if name == "zero_bubble":
        # A message and its answer take 2 (S - s - 1) hops; weight gradients trail so that at most `most` wait.
        most = latency * (S - 1) + 1
        warm = latency * (S - s - 1) + 1
        order, rest = forwards[:warm], forwards[warm:]
        for i in range(m):
            order.append(backwards[i])
            if i >= most - warm:
                order.append(Cell("W", i - (most - warm), 0))
            order += rest[:1]
            rest = rest[1:]
        return order + [Cell("W", i, 0) for i in range(max(m - (most - warm), 0), m)]
    if name == "1f1b":
        warm = latency * (S - s - 1)
    else:
        # Once around the ring takes `lap` ticks: as many micro-batches go through a chunk before the next chunk's turn.
        lap = latency * S
        groups = [(first, chunk) for first in range(0, m, lap) for chunk in range(v)]
        forwards = [Cell("F", first + i, chunk) for first, chunk in groups for i in range(lap)]
        backwards = [Cell("B", first + i, v - 1 - chunk) for first, chunk in groups for i in range(lap)]
        warm = 2 * latency * (S - s - 1) + (v - 1) * lap
    warm = min(warm, len(forwards))
    order = forwards[:warm]
    for forward, backward in zip(forwards[warm:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - warm :]


def _run(orders: list[Order], S: int, v: int, latency: int) -> tuple[tuple[Cell | None, ...], ...]:
    """The orders, each phase in the first tick in which what it reads is there."""
    done: dict[Key, int] = {}
    at = [0] * S
    rows: list[tuple[Cell | None, ...]] = []
    while any(at[s] < len(orders[s]) for s in range(S)):
        tick = len(rows)
        row: list[Cell | None] = []
        for s in range(S):
            cell = orders[s][at[s]] if at[s] < len(orders[s]) else None
            if cell is not None:
                k = cell.chunk * S + s
                for key, wait in _reads(cell.phase, k, cell.micro_batch, S * v, latency):
                    if done.get(key, tick) + wait > tick:
                        cell = None
                        break
            row.append(cell)
        if not any(row) and all(end + latency <= tick for end in done.values()):
            raise AssertionError("the orders wait for each other")
        rows.append(tuple(row))
        for s, cell in enumerate(row):
            if cell is not None:
                done[cell.phase, cell.chunk * S + s, cell.micro_batch] = tick
                at[s] += 1
    return tuple(rows)


def _reads(phase: str, k: int, i: int, K: int, latency: int) -> Iterable[tuple[Key, int]]:
    """What a phase reads, and how many ticks after it was made."""
    if phase == "F" and k > 0:
        yield ("F", k - 1, i), latency
    if phase == "B":
        yield ("F", k, i), 1
        if k < K - 1:
            yield ("B", k + 1, i), latency
    if phase == "W":
        yield ("B", k, i), 1


@dataclasses.dataclass(frozen=True)
class Table:
    """A schedule: `rows[tick][stage]` is a `Cell`, or None where the stage is idle. Made by `schedule`."""

    name: str
    stages: int
    micro_batches: int
    chunks: int
    overlap: bool
    rows: tuple[tuple[Cell | None, ...], ...]

    @property
    def idle(self) -> int:
        """How many cells are idle, over all stages."""
        return sum(cell is None for row in self.rows for cell in row)

    @property
    def bubble(self) -> float:
        """The share of idle cells."""
        return self.idle / (len(self.rows) * self.stages)

    @property
    def has_weights(self) -> bool:
        """Whether weight gradients are a phase of their own."""
        return any(cell is not None and cell.phase == "W" for row in self.rows for cell in row)

    @functools.cached_property
    def ticks(self) -> Mapping[Key, int]:
        """(phase, virtual stage, micro-batch) ↦ its tick."""
        return {
            (cell.phase, cell.chunk * self.stages + s, cell.micro_batch): tick
            for tick, row in enumerate(self.rows)
            for s, cell in enumerate(row)
            if cell is not None
        }

    @functools.cached_property
    def buffers(self) -> "Buffers":
        """The slots that every activation and gradient lies in."""
        return _assign(self)

    @functools.cached_property
    def forwards(self) -> "Table":
        """The forwards of every stage in their order, each as early as its data allow: for a loss without gradients."""
        cells = [[row[s] for row in self.rows] for s in range(self.stages)]
        orders = [[cell for cell in stage if cell is not None and cell.phase == "F"] for stage in cells]
        return dataclasses.replace(self, rows=_run(orders, self.stages, self.chunks, 1 + self.overlap))

    def in_flight(self, stage: int) -> int:
        """Of how many forwards `stage` keeps something at once: those whose last backward phase is still to come."""
        last = "W" if self.has_weights else "B"
        alive = most = 0
        for row in self.rows:
            cell = row[stage]
            alive += cell is not None and cell.phase == "F"
            most = max(most, alive)
            alive -= cell is not None and cell.phase == last
        return most

    def makespan(
        self,
        forward: float = 1,
        backward: float = 1,
        weights: float = 1,
        transfer: float = 0,
        *,
        lockstep: bool = True,
    ) -> float:
        """The time until the last stage is done, modelled: phases of a whole stage take what is given.

        Args:
          forward, backward, weights: of F, of the gradient of the input, of the gradient of the weights; a B without a
            W after it takes both. Of a chunk, 1 / chunks of it.
          transfer: of one activation from a stage to its neighbour.
          lockstep: True: as `pipeline_value_and_grad` does it: neighbours exchange in every tick; without overlap a
            stage begins no tick before its neighbours ended the last one and its transfer, with overlap a tick ends no
            earlier than the transfers that it began with. False: a stage waits for nothing but what it reads.
        """
        cost = {"F": forward, "W": weights, "B": backward if self.has_weights else backward + weights}
        S, ring = self.stages, self.chunks > 1
        time = [0.0] * S
        if lockstep:
            near = [[n % S if ring else n for n in (s - 1, s, s + 1) if ring or 0 <= n < S] for s in range(S)]
            for row in self.rows:
                after = [time[s] + (cost[cell.phase] / self.chunks if cell else 0) for s, cell in enumerate(row)]
                sent = time if self.overlap else after
                time = [max(after[s], max(sent[n] for n in near[s]) + transfer) for s in range(S)]
            return max(time)
        ends: dict[Key, float] = {}
        for row in self.rows:
            begun = list(time)
            for s, cell in enumerate(row):
                if cell is None:
                    continue
                k = cell.chunk * S + s
                for key, _ in _reads(cell.phase, k, cell.micro_batch, S * self.chunks, 1):
                    begun[s] = max(begun[s], ends[key] + (transfer if key[1] != k and S > 1 else 0))
                begun[s] += cost[cell.phase] / self.chunks
                ends[cell.phase, k, cell.micro_batch] = begun[s]
            time = begun
        return max(time)

    def __str__(self) -> str:
        """One line for each stage, one column for each tick: phase and micro-batch, "." where the stage is idle.

        Chunks after the first are marked by as many apostrophes.
        """
        words = [[f"{c.phase}{c.micro_batch}" + "'" * c.chunk if c else "." for c in row] for row in self.rows]
        width = max(len(word) for row in words for word in row)
        lines = [
            f"stage {s:<{len(str(self.stages - 1))}}  " + " ".join(f"{row[s]:<{width}}" for row in words)
            for s in range(self.stages)
        ]
        return "\n".join(line.rstrip() for line in lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Draws stages × ticks to a PNG: a colour for each phase, darker for later chunks, and the micro-batches.

        Needs matplotlib: `pip install 'jaxops[cli]'`.
        """
        from matplotlib import colors, patches
        from matplotlib.figure import Figure

        ticks = len(self.rows)
        figure = Figure(figsize=(max(4.0, 0.28 * ticks + 1), 0.34 * self.stages + 1.1), dpi=120, layout="constrained")
        axes = figure.subplots()
        for tick, row in enumerate(self.rows):
            for s, cell in enumerate(row):
                if cell is None:
                    continue
                base = colors.to_rgb(COLOURS[cell.phase])
                shade = 1 - 0.25 * cell.chunk / max(self.chunks - 1, 1)
                colour = tuple(shade * part for part in base)
                axes.add_patch(patches.Rectangle((tick, s), 1, 1, facecolor=colour, edgecolor="white", linewidth=1))
                axes.text(tick + 0.5, s + 0.5, str(cell.micro_batch), ha="center", va="center", fontsize=7)
        axes.set(xlim=(0, ticks), ylim=(self.stages, 0), xlabel="tick", ylabel="stage")
        axes.set_yticks([s + 0.5 for s in range(self.stages)], [str(s) for s in range(self.stages)])
        axes.set_facecolor("#eeeeee")
        axes.tick_params(left=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        chunks = f", {self.chunks} chunks" if self.chunks > 1 else ""
        axes.set_title(f"{self.name}{chunks}: {self.idle} of {ticks * self.stages} cells idle", fontsize=9)
        names = {"F": "forward", "B": "backward", "W": "weights"}
        if self.has_weights:
            names["B"] = "backward of inputs"
        handles = [
            patches.Patch(color=COLOURS[phase], label=names[phase])
            for phase in "FBW"
            if phase != "W" or self.has_weights
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
        figure.savefig(path, format="png")


@dataclasses.dataclass(frozen=True)
class Buffers:
    """How many slots every stage has of each kind, and by (virtual stage, micro-batch) which slot is whose.

    arriving: activations between their arrival and F. gradients: between their arrival and B (the last virtual stage's
    own come from the loss in F). saved: what F keeps for B. deferred: what F keeps for W. between: what B keeps for W.
    """

    counts: Mapping[str, int]
    slots: Mapping[str, Mapping[tuple[int, int], int]]


def _assign(table: Table) -> Buffers:
    """Slots by interval colouring: a slot is written at the end of a tick in which, at the latest, it was read last."""
    K, done, late = table.stages * table.chunks, table.ticks, int(table.overlap)
    lives: dict[str, dict[tuple[int, int], tuple[int, int]]] = {
        kind: {} for kind in ("arriving", "gradients", "saved", "deferred", "between")
    }
    for (phase, k, i), tick in done.items():
        if phase == "F":
            if k > 0:
                lives["arriving"][k, i] = done["F", k - 1, i] + late, tick
            if ("B", k, i) in done:
                lives["saved"][k, i] = tick, done["B", k, i]
            if table.has_weights:
                lives["deferred"][k, i] = tick, done["W", k, i]
        elif phase == "B":
            lives["gradients"][k, i] = (done["B", k + 1, i] + late if k < K - 1 else done["F", k, i]), tick
            if table.has_weights:
                lives["between"][k, i] = tick, done["W", k, i]
    counts: dict[str, int] = {}
    slots: dict[str, dict[tuple[int, int], int]] = {}
    for kind, of in lives.items():
        slots[kind], counts[kind] = {}, 0
        for s in range(table.stages):
            mine = sorted((span, key) for key, span in of.items() if key[0] % table.stages == s)
            free_at: list[int] = []
            for (begin, end), key in mine:
                slot = next((n for n, tick in enumerate(free_at) if tick <= begin), len(free_at))
                free_at[slot : slot + 1] = [end]
                slots[kind][key] = slot
            counts[kind] = max(counts[kind], len(free_at))
    return Buffers(counts, slots)


def columns(table: Table) -> dict[str, list[list[int]]]:
    """The table as numbers, name ↦ [tick][stage], for a program that runs it.

    phase is an index into " FBW"; micro_batch, chunk, first and last (virtual stage) describe the cell; a kind of
    `Buffers` is the slot that it reads or writes. receive_activation, receive_gradient and keep_gradient are the slots
    in which the end of the tick puts what came from the stage before, from the stage after, and what the cell itself
    made; the number of slots where nothing is to be put.
    """
    S, K, buffers = table.stages, table.stages * table.chunks, table.buffers
    ticks = len(table.rows)
    filled: dict[str, Any] = {
        name: [[value] * S for _ in range(ticks)]
        for name, value in {
            **dict.fromkeys(("phase", "micro_batch", "chunk", "first", "last", *buffers.counts), 0),
            "receive_activation": buffers.counts["arriving"],
            "receive_gradient": buffers.counts["gradients"],
            "keep_gradient": buffers.counts["gradients"],
        }.items()
    }
    for tick, row in enumerate(table.rows):
        for s, cell in enumerate(row):
            if cell is None:
                continue
            k, i = cell.chunk * S + s, cell.micro_batch
            values = dict(
                phase=" FBW".index(cell.phase), micro_batch=i, chunk=cell.chunk, first=k == 0, last=k == K - 1
            )
            values |= {kind: slots.get((k, i), 0) for kind, slots in buffers.slots.items()}
            for name, value in values.items():
                filled[name][tick][s] = int(value)
            if cell.phase == "F" and k < K - 1:
                filled["receive_activation"][tick + table.overlap][(s + 1) % S] = buffers.slots["arriving"][k + 1, i]
            elif cell.phase == "F" and (k, i) in buffers.slots["gradients"]:
                filled["keep_gradient"][tick][s] = buffers.slots["gradients"][k, i]
            elif cell.phase == "B" and k > 0:
                filled["receive_gradient"][tick + table.overlap][(s - 1) % S] = buffers.slots["gradients"][k - 1, i]
    return filled
