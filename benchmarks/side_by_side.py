"""threefold beside its peers, on the same weights and the same prompts, in one run.

    python -m benchmarks.side_by_side run                  everything (about a quarter of an hour on two cores)
    python -m benchmarks.side_by_side run --only A         one part: A, B, C, D, or generation (A's, without training)
    python -m benchmarks.side_by_side report RESULTS.json  a run's tables and plots into benchmarks/README.md and plots/

All of it runs as modules from the repository's root: the folder of a script comes first when libraries look for others,
and a file here would be taken for a library of its name.

`run` prints the tables; only `report` changes files of the repository. `make bench` makes the peers' environment and
calls `run`. What is measured, and how: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.plots import draw
from benchmarks.tables import DISTURBED, all_met, is_disturbed, markdown, rewrite
from benchmarks.workloads import FULL, NUM_SPECIAL, SMALL, Sizes, prepare

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
README, PLOTS = HERE / "README.md", HERE / "plots"
CONTESTANTS = ("threefold", "trl", "transformers", "transformers_continuous")
SMALL_PASS = 2
"""Sequences of an update pass of "trl_small_passes", which is there for its memory."""
PARTS = ("A", "B", "C", "D", "generation")
NUM_BATCHES = 8
LENGTHS_OF_D, BATCHES_OF_D = (64, 128, 256, 512, 1024), (1, 2, 4, 8, 16, 32, 64)
BATCH_OF_D, LENGTH_OF_D, PROMPT_OF_D = 8, 128, 128
ANSWERS_OF_C = 4
OURS_GENERATE = {"threefold": {"do": "generate"}}
"""What an order to generate has besides prompts and length."""
ASK_VERSIONS = """
import importlib.metadata, json
print(json.dumps({name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}))
"""


class Worker:
    """A contestant in a process of its own, which does what it is ordered and then waits."""

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path) -> None:
        own = ("OMP_", "GOMP_", "KMP_", "MKL_", "PYTHON")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.name, self._log = name, log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self.loaded = self._answer()

    def ask(self, **order: Any) -> dict[str, Any]:
        """The worker's answer, with `others_share`: how much of the machine all other processes had meanwhile."""
        assert self._process.stdin is not None
        before = self._others_seconds(), time.perf_counter()
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        seconds = (time.perf_counter() - before[1]) * (os.cpu_count() or 1)
        return {**answer, "others_share": max(self._others_seconds() - before[0], 0.0) / seconds}

    def _others_seconds(self) -> float:
        """Processor time of everything but this worker since the machine started (Linux; elsewhere 0)."""
        if not Path("/proc/stat").is_file():
            return 0.0
        total = sum(map(int, _lines("/proc/stat")[0].split()[1:4]))
        own = sum(map(int, _lines(f"/proc/{self._process.pid}/stat")[0].rpartition(")")[2].split()[11:13]))
        return (total - own) / os.sysconf("SC_CLK_TCK")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            raise SystemExit("\n".join([f"{self.name} ended with code {self._process.returncode}:", *tail]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end; a worker that does not is killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Contest:
    """The contestants of a run and where they put their logs."""

    def __init__(self, directory: Path, peers: Path, threads: int, sizes: Sizes) -> None:
        self.directory, self.peers, self.threads, self.sizes = directory, peers, threads, sizes

    @contextmanager
    def workers(self, names: Sequence[str], workload: str, turns: int) -> Iterator[dict[str, Worker]]:
        """Start the named contestants on a workload, one after the other; end them afterwards."""
        with ExitStack() as stack:
            started = {}
            for name in names:
                log = self.directory / f"{workload}-{name}.log"
                started[name] = Worker(name, self._command(name, workload, turns), self.threads, log)
                stack.callback(started[name].close)
            yield started

    def _command(self, name: str, workload: str, turns: int) -> list[Any]:
        file = self.directory / f"{workload}.json"
        trl = [self.peers, "-m", "benchmarks.peers.trl_ppo", file, turns]
        generation = [self.peers, "-m", "benchmarks.peers.generation"]
        return {
            "threefold": [sys.executable, "-m", "benchmarks.ours", file],
            "trl": trl,
            "trl_small_passes": [*trl, SMALL_PASS],
            "transformers": [*generation, "generate", file],
            "transformers_continuous": [*generation, "continuous", file],
        }[name]

    def turns(self, workload: str, names: Sequence[str], iterations: int) -> dict[str, Any]:
        """Whole iterations of threefold and TRL, generation of the others: a warm-up each, then `iterations` rounds.

        A round in which other processes had more than DISTURBED of the machine during a turn is repeated, while
        there are fewer than twice the rounds that are wanted; the least disturbed ones count.
        """
        most = 2 * iterations
        with self.workers(names, workload, most + 1) as workers:
            loaded = {name: worker.loaded for name, worker in workers.items()}
            rates = [self.matrix_rates()]
            warm_up = self._round(workers, workload, 0)
            rounds: list[dict[str, Any]] = []
            while sum(not _disturbed(found) for found in rounds) < iterations and len(rounds) < most:
                rounds.append(self._round(workers, workload, len(rounds) + 1))
            rates.append(self.matrix_rates())
        kept = sorted(rounds, key=_disturbed)[:iterations]  # a stable sort: quiet ones first, each kind in its order
        contestants = {
            name: {"loaded": loaded[name], "warm_up": warm_up[name], "iterations": [found[name] for found in kept]}
            for name in names
        }
        return {"contestants": contestants, "rates": rates, "rounds_left_out": len(rounds) - len(kept)}

    @staticmethod
    def _round(workers: dict[str, Worker], workload: str, turn: int) -> dict[str, Any]:
        """One iteration of each."""
        found = {}
        for name, worker in workers.items():
            order = {"do": "iteration", "batch": turn} if name == "threefold" else {"batch": turn}
            found[name] = worker.ask(**order)
            share = f"; others had {found[name]['others_share']:.0%} of the machine" if _disturbed(found) else ""
            what = f"round {turn}" if turn else "warm-up"
            say(f"{workload}, {what}: {name} {found[name]['seconds']:.2f} s{share}")
        return found

    def matrix_rates(self) -> dict[str, float]:
        """FLOP/s by kernel, in a process of its own, whose matrices are then in nobody's memory."""
        command = [sys.executable, "-m", "benchmarks.ours", "rate"]
        worker = Worker("rate", command, self.threads, self.directory / "rate.log")
        worker.close()
        return worker.loaded

    def generation(self, workload: str, iterations: int) -> dict[str, Any]:
        """Generation alone: threefold, model.generate, generate_batch."""
        batches = json.loads((self.directory / f"{workload}.json").read_text(encoding="utf-8"))["batches"]
        names = [name for name in CONTESTANTS if name != "trl"]
        found: dict[str, Any] = {name: {"warm_up": None, "iterations": []} for name in names}
        with self.workers(names, workload, iterations + 1) as workers:
            for turn in range(iterations + 1):
                for name, worker in workers.items():
                    order = {"answer_length": self.sizes.answer_length, **OURS_GENERATE.get(name, {})}
                    answer = worker.ask(prompts=batches[turn % len(batches)], **order)
                    say(f"generation, {'round ' + str(turn) if turn else 'warm-up'}: {name} {answer['seconds']:.2f} s")
                    if turn:
                        found[name]["iterations"].append(answer)
                    else:
                        found[name]["warm_up"] = answer
        return {"contestants": found}

    def shared_prefill(self, iterations: int) -> dict[str, Any]:
        """Workload C: prompts with four answers each against every prompt four times."""
        prompts = json.loads((self.directory / "A.json").read_text(encoding="utf-8"))["batches"][0]
        repeated = [prompt for prompt in prompts for _ in range(ANSWERS_OF_C)]
        shared, separate = [], []
        with self.workers(["threefold"], "A", 0) as workers:
            ours = workers["threefold"]
            for turn in range(iterations + 1):
                together = ours.ask(do="prefill", prompts=prompts, answers_per_prompt=ANSWERS_OF_C)
                apart = ours.ask(do="prefill", prompts=repeated, answers_per_prompt=1)
                if turn:
                    shared.append(together["seconds"])
                    separate.append(apart["seconds"])
        say(f"C: shared {min(shared):.3f} s, separate {min(separate):.3f} s")
        return {"answers_per_prompt": ANSWERS_OF_C, "shared_s": shared, "separate_s": separate}

    def growth(self, iterations: int) -> dict[str, Any]:
        """Workload D: seconds of generation over answer lengths (one batch size) and over batch sizes (one length).

        The longest answers come first, unmeasured: memory grows then, which is slow, and once only.
        """
        scale = self.sizes.prompt_length / FULL.prompt_length
        prompt_length = max(int(PROMPT_OF_D * scale), 8)
        vocabulary = self.sizes.actor.vocab_size - NUM_SPECIAL
        points = [("length", BATCH_OF_D, length) for length in LENGTHS_OF_D]
        points += [("batch", batch, LENGTH_OF_D) for batch in BATCHES_OF_D]
        found = []
        with self.workers(["threefold", "transformers"], "A", 0) as workers:
            for axis, batch, length in [("", BATCH_OF_D, max(LENGTHS_OF_D)), *points]:
                length = max(int(length * scale), 4)
                prompts = [
                    [NUM_SPECIAL + (row * 7919 + column) % vocabulary for column in range(prompt_length)]
                    for row in range(batch)
                ]
                answers: dict[str, list[dict[str, Any]]] = {}
                for name, worker in workers.items():
                    order = {"prompts": prompts, "answer_length": length, **OURS_GENERATE.get(name, {})}
                    worker.ask(**{**order, "answer_length": 4})  # kernels meet the batch size
                    answers[name] = _undisturbed(worker, order, iterations if axis and name == "threefold" else 1)
                seconds = {name: [answer["seconds"] for answer in given] for name, given in answers.items()}
                shares = [answer["others_share"] for given in answers.values() for answer in given]
                shown = ", ".join(f"{name} {min(values):.2f} s" for name, values in seconds.items())
                say(f"D{'' if axis else ', warm-up'}: batch {batch}, {length} tokens: {shown}")
                if axis:
                    point = {"axis": axis, "batch": batch, "length": length, "others_share": max(shares)}
                    found.append({**point, "seconds": seconds})
        return {"prompt_length": prompt_length, "points": found}


def _undisturbed(worker: Worker, order: dict[str, Any], times: int) -> list[dict[str, Any]]:
    """The answers to an order given `times` times, or more while something else computes, but at most three times as
    many; the least disturbed ones."""
    answers: list[dict[str, Any]] = []
    while sum(not _disturbed({"": answer}) for answer in answers) < times and len(answers) < 3 * times:
        answers.append(worker.ask(**order))
    return sorted(answers, key=lambda answer: _disturbed({"": answer}))[:times]


def _disturbed(answers: dict[str, dict[str, Any]]) -> bool:
    """Whether something else computed during anybody's turn of a round."""
    return max(answer["others_share"] for answer in answers.values()) > DISTURBED


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What a reader has to know of the machine and the software."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def peer_versions(interpreter: Path) -> dict[str, str]:
    output = subprocess.run([str(interpreter), "-c", ASK_VERSIONS], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(output)
    return found


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    if not arguments.data.is_file():
        raise SystemExit(
            f"{arguments.data}: no such file; give an hh_rlhf file (jsonl.gz, chosen/rejected) with --data"
        )
    if not arguments.peers.is_file():
        raise SystemExit(f"{arguments.peers}: no such interpreter; `make bench` makes the peers' environment")
    sizes = SMALL if arguments.small else FULL
    output = arguments.output.resolve()
    results: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"parts": {}}
    material = output.parent / ("material-small" if arguments.small else "material")
    results |= {"machine": machine(), "peers": peer_versions(arguments.peers), "threads": arguments.threads}
    say(f"models and prompts -> {material}")
    results["material"] = prepare(material, arguments.data, sizes, NUM_BATCHES)
    peers = arguments.peers.absolute()  # not resolved: an environment is known by its own link to the interpreter
    contest = Contest(material, peers, arguments.threads, sizes)
    rounds = arguments.iterations
    work = {
        "A": lambda: contest.turns("A", (*CONTESTANTS, "trl_small_passes"), rounds),
        "B": lambda: contest.turns("B", CONTESTANTS, rounds),
        "C": lambda: contest.shared_prefill(rounds),
        "D": lambda: contest.growth(2),
        "generation": lambda: contest.generation("A", rounds),
    }
    for part in arguments.only or ("A", "B", "C", "D"):
        results["parts"][part] = {**work[part](), "date": time.strftime("%Y-%m-%d"), "small": arguments.small}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(markdown(results))
    say(f"{time.perf_counter() - started:.0f} s; results in {output}")
    return 0 if arguments.small or all_met(results) else 1


def report(arguments: argparse.Namespace) -> int:
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    print(markdown(results))
    if is_disturbed(results) and not arguments.disturbed:
        raise SystemExit("something else ran beside these measurements; measure again, or insist with --disturbed")
    rewrite(README, results)
    for file in draw(results, PLOTS):
        say(f"wrote {file}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="measure")
    runner.add_argument("--only", nargs="+", choices=PARTS, help="parts to run; default A B C D")
    runner.add_argument("--iterations", type=int, default=3, help="measured rounds after the warm-up (default 3)")
    runner.add_argument("--threads", type=int, default=2, help="of every contestant (default 2)")
    runner.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/hh_rlhf/harmless_1600.jsonl.gz")
    runner.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python", help="the peers' interpreter")
    runner.add_argument("--output", type=Path, default=ROOT / "runs/bench/results.json")
    runner.add_argument("--small", action="store_true", help="tiny models: a trial of the machinery, not a measurement")
    runner.set_defaults(function=run)
    reporter = commands.add_parser("report", help="write a run's tables and plots into the repository")
    reporter.add_argument("results", type=Path)
    reporter.add_argument(
        "--disturbed", action="store_true", help="write them even if other processes disturbed the run"
    )
    reporter.set_defaults(function=report)
    arguments = parser.parse_args()
    code: int = arguments.function(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
