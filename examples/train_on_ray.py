"""Runs train_gpt.py on a Ray cluster: one process on each host, and again from the last checkpoint if one is lost.

    python examples/train_on_ray.py --processes 2 -- --mesh data=2 --out runs/book      two processes of this machine
    python examples/train_on_ray.py --address auto --processes 4 --each GPU=8 -- --mesh data=4,tensor=8 --out /all/book

After `--` come the arguments of train_gpt.py. Ray (https://docs.ray.io) starts the processes; among them is JAX's own
runtime, as without Ray. Every host must see this checkout and --out under the same path. Exit codes: those of
train_gpt.py, 3 if a process was lost and no restart is left.
"""

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import Any

try:
    import ray
except ImportError:
    sys.exit("train_on_ray: Ray is not installed: pip install 'jaxops[ray]'")

LOST = 3
HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    """Runs the program with the arguments `argv`; returns its exit code."""
    args = parse(argv)
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    ray.init(address=args.address, runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=True)
    try:
        for attempt in range(args.restarts + 1):
            more = ["--resume"] if attempt else []
            code = train([*args.arguments, *more], args.processes, args.each)
            if code != LOST:
                return code
            left = args.restarts - attempt
            print(f"train_on_ray: a process was lost, {left} restarts are left", file=sys.stderr, flush=True)
        return LOST
    finally:
        ray.shutdown()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_on_ray", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--address", help="of the cluster, or auto for the one of this host; without it, one is started here")
    add("--processes", type=int, required=True, metavar="N", help="how many, spread over the hosts")
    add("--each", type=resources, default={}, metavar="NAME=N,…", help="what each process takes: GPU=8, TPU=4, CPU=16")
    add("--restarts", type=int, default=3, metavar="N", help="from the last checkpoint, when a process is lost")
    add("arguments", nargs="*", metavar="ARGUMENT", help="of train_gpt.py, after --")
    args = parser.parse_args(argv)
    if args.processes < 1 or args.restarts < 0:
        parser.error(f"--processes must be at least 1 and --restarts 0, got {args.processes} and {args.restarts}")
    if not any(one == "--out" or one.startswith("--out=") for one in args.arguments):
        parser.error("the arguments of train_gpt.py must have --out, a directory that all hosts share")
    return args


def resources(text: str) -> dict[str, float]:
    """{"GPU": 8.0} of "GPU=8"."""
    pairs = [entry.partition("=") for entry in text.split(",")]
    try:
        return {name: float(count) for name, _, count in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=N,…, got {text!r}") from None


@ray.remote(max_restarts=0)
class Process:
    """One of the processes of a run, on the host that Ray gave it."""

    def address(self) -> str:
        """Where processes may find this one: its host, and a port that is free."""
        with socket.socket() as one:
            one.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{one.getsockname()[1]}"

    def train(self, argv: list[str]) -> int:
        import train_gpt

        return train_gpt.main(argv)


def train(argv: list[str], count: int, each: dict[str, float]) -> int:
    """The exit code of a run in `count` processes: the first that is not 0; LOST if a process died."""
    named: dict[str, Any] = {f"num_{name.lower()}s": each[name] for name in ("CPU", "GPU") if name in each}
    others = {name: amount for name, amount in each.items() if name not in ("CPU", "GPU")}
    place = Process.options(scheduling_strategy="SPREAD", resources=others, **named)
    processes = [place.remote() for _ in range(count)]
    try:
        coordinator = ray.get(processes[0].address.remote())
        together = ["--coordinator", coordinator, "--processes", str(count)]
        running = [
            process.train.remote(
                [*argv, *(together if count > 1 else []), *(["--process", str(i)] if count > 1 else [])]
            )
            for i, process in enumerate(processes)
        ]
        while running:
            (done, *_), running = ray.wait(running)
            if code := ray.get(done):
                return code
        return 0
    except ray.exceptions.RayActorError as error:
        print(f"train_on_ray: {error}", file=sys.stderr)
        return LOST
    finally:  # what waits for a lost process ends with it
        for process in processes:
            ray.kill(process)


if __name__ == "__main__":
    sys.exit(main())
