"""The numbers of the three steps: every seed's run, checked against its bar.

    python benchmarks/three_steps.py demo       reward accuracy, win rates, average, KL, diversity; three seeds
    python benchmarks/three_steps.py stability  four PPO epochs of four minibatches against the demo's own update
    python benchmarks/three_steps.py real       hh_rlhf on stories260K, with and without mixture training

Runs are kept under --output-dir (default runs/three_steps) and finished steps are not run again. `stability` and `real`
take steps 1 and 2 from the run that they are compared with, so both sides start from the very same models. The last
line of each says whether all bars were met; the exit code is 1 if not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from threefold.checkpoint.files import EVALUATION_FILE, read_json, stage_record
from threefold.config.load import load_recipe
from threefold.pipeline import run_pipeline

ROOT = Path(__file__).resolve().parent.parent
STEPS = (1, 2, 3)


def run(recipe: str, directory: Path, overrides: Sequence[str], copy_from: Path | None = None) -> dict[str, Any]:
    """Run a recipe (or find it finished) and return its evaluation with each step's summary and seconds."""
    if copy_from is not None:
        for name in ("sft", "reward"):
            if not (directory / name).exists():
                shutil.copytree(copy_from / name, directory / name)
        shutil.copy(copy_from / "run.json", directory / "run.json")
    run_pipeline(load_recipe(ROOT / "recipes" / recipe, list(overrides)), STEPS, directory)
    result: dict[str, Any] = read_json(directory / EVALUATION_FILE)
    for name in ("sft", "reward", "ppo"):
        record = stage_record(directory / name)
        assert record is not None
        result[name] = {**record["summary"], "seconds": record["seconds"]}
    return result


class Report:
    """A table of measured values against their bars."""

    def __init__(self, title: str) -> None:
        self._table = Table("run", "what", "measured", "bar", "met", title=title)
        self.all_met = True

    def add(self, run_name: str, what: str, measured: str, bar: str, met: bool | None) -> None:
        """One row; `met` None is a value without a bar."""
        self.all_met = self.all_met and met is not False
        self._table.add_row(run_name, what, measured, bar, {True: "yes", False: "NO", None: ""}[met])

    def show(self) -> int:
        """Print the table; the exit code."""
        Console(width=120).print(self._table)
        print("all bars met" if self.all_met else "NOT all bars met")
        return 0 if self.all_met else 1


def largest_first_ratio_error(directory: Path) -> float:
    """The largest |ratio - 1| that any iteration's first minibatch had before its update."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(record.get("val/first_ratio_error", 0.0) for record in map(json.loads, lines))


def interval(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def demo(output: Path, seeds: Sequence[int]) -> int:
    """The demo's bars, for each seed."""
    report = Report("demo")
    for seed in seeds:
        name = f"demo seed {seed}"
        result = run("demo.toml", output / f"demo-{seed}", ["--run.seed", str(seed)])
        sft, ppo, ema = (result["models"][model] for model in ("sft", "ppo", "ema"))
        accuracy, wins = result["reward_clean_accuracy"], ppo["win_rate_by_gold"]
        target = load_recipe(ROOT / "recipes" / "demo.toml", []).ppo.kl_target
        report.add(name, "reward accuracy, clean pairs", interval(accuracy), ">= 0.90", accuracy["mean"] >= 0.90)
        report.add(name, "PPO wins over SFT, gold", interval(wins), ">= 0.75", wins["mean"] >= 0.75)
        report.add(name, "its 95 % interval above", f"{wins['low']:.3f}", "> 0.65", wins["low"] > 0.65)
        ema_wins = ema["win_rate_by_gold"]["mean"]
        report.add(name, "EMA wins over SFT, gold", f"{ema_wins:.3f}", ">= PPO - 0.03", ema_wins >= wins["mean"] - 0.03)
        kl = ppo["kl_per_answer"]
        report.add(name, "KL per answer, nats", f"{kl:.2f}", f"<= {target:g}", kl <= target)
        ratio = ppo["distinct_2_per_prompt"] / sft["distinct_2_per_prompt"]
        report.add(name, "distinct-2 per prompt, PPO / SFT", f"{ratio:.2f}", ">= 0.6", ratio >= 0.6)
        first_ratios = largest_first_ratio_error(output / f"demo-{seed}")
        report.add(name, "max |ratio - 1|, first updates", f"{first_ratios:.1e}", "<= 1e-4", first_ratios <= 1e-4)
        golds = " / ".join(f"{model['gold']['mean']:.3f}" for model in (sft, ppo, ema))
        report.add(name, "gold, SFT / PPO / EMA", golds, "", None)
        seconds = [result[step]["seconds"] for step in ("sft", "reward", "ppo")] + [result["seconds"]]
        shown = " + ".join(f"{value:.0f}" for value in seconds)
        report.add(
            name, "seconds, steps 1-3 + comparison", f"{shown} = {sum(seconds):.0f}", "<= 360", sum(seconds) <= 360
        )
    return report.show()


def stability(output: Path, seeds: Sequence[int]) -> int:
    """Four PPO epochs of four minibatches against the demo's own update, from the same steps 1 and 2."""
    report = Report("ppo_epochs = 4, minibatches = 4")
    for seed in seeds:
        base, name = output / f"demo-{seed}", f"seed {seed}"
        single = run("demo.toml", base, ["--run.seed", str(seed)])
        directory = output / f"stability-{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        overrides = ["--run.seed", str(seed), "--ppo.ppo_epochs", "4", "--ppo.minibatches", "4"]
        several = run("demo.toml", directory, overrides, copy_from=base)
        wins = [result["models"]["ppo"]["win_rate_by_gold"]["mean"] for result in (single, several)]
        shown = f"{wins[0]:.3f} -> {wins[1]:.3f}"
        report.add(name, "PPO wins over SFT, gold", shown, ">= single - 0.05", wins[1] >= wins[0] - 0.05)
        kl = several["models"]["ppo"]["kl_per_answer"]
        target = load_recipe(ROOT / "recipes" / "demo.toml", []).ppo.kl_target
        report.add(name, "KL per answer, nats", f"{kl:.2f}", f"<= {target:g}", kl <= target)
        report.add(name, "seconds of step 3", f"{several['ppo']['seconds']:.0f}", "", None)
    return report.show()


def real(output: Path) -> int:
    """hh_rlhf on stories260K; then step 3 again without the mixture loss (its text is still measured)."""
    report = Report("hh_rlhf on stories260K")
    base, without = output / "real", output / "real-no-mixture"
    result = run("hh_stories260k.toml", base, [])
    without.mkdir(parents=True, exist_ok=True)
    plain = run("hh_stories260k.toml", without, ["--ppo.mixture.coef", "0"], copy_from=base)
    sft, reward, ppo = result["sft"], result["reward"], result["ppo"]
    before, after = sft["initial/sft/eval_perplexity"], sft["sft/eval_perplexity"]
    report.add("real", "held-out HH perplexity", f"{before:.2f} -> {after:.2f}", "falls", after < before)
    low, high = reward["reward/eval_accuracy_low"], reward["reward/eval_accuracy_high"]
    report.add("real", "reward accuracy", f"{reward['reward/eval_accuracy']:.3f} [{low:.3f}, {high:.3f}]", "", None)
    rise = ppo["ppo/eval_score"] - ppo["initial/ppo/eval_score"]
    errors = [ppo["ppo/eval_score_standard_error"], ppo["initial/ppo/eval_score_standard_error"]]
    standard_error = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    shown = f"{rise:+.3f} = {rise / standard_error:.1f} standard errors"
    report.add("real", "held-out reward, rise", shown, "> 3", rise > 3 * standard_error)
    report.add("real", "KL per answer, nats", f"{ppo['ppo/eval_kl']:.2f}", "", None)
    seconds = sum(result[step]["seconds"] for step in ("sft", "reward", "ppo")) + result["seconds"]
    report.add("real", "seconds, all", f"{seconds:.0f}", "<= 600", seconds <= 600)
    increases, rises = [], []
    for name, summary in (("mixture", ppo), ("no mixture", plain["ppo"])):
        first, last = summary["initial/ppo/eval_text_perplexity"], summary["ppo/eval_text_perplexity"]
        increases.append(last - first)
        report.add(name, "stories perplexity", f"{first:.3f} -> {last:.3f} ({last - first:+.3f})", "", None)
        score = f"{summary['initial/ppo/eval_score']:.3f} -> {summary['ppo/eval_score']:.3f}"
        report.add(name, "held-out reward", score, "", None)
        rises.append(summary["ppo/eval_score"] - summary["initial/ppo/eval_score"])
    met = increases[1] > 0 and increases[0] <= 0.5 * increases[1]
    report.add("mixture", "increase against none", f"{increases[0]:+.3f} / {increases[1]:+.3f}", "<= half", met)
    comparable = rises[1] > 0 and rises[0] >= 0.75 * rises[1]
    shown = f"{rises[0]:+.3f} / {rises[1]:+.3f}"
    report.add("mixture", "reward's rise against none", shown, ">= 0.75 of it", comparable)
    return report.show()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["demo", "stability", "real"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/three_steps"))
    arguments = parser.parse_args()
    if arguments.what == "real":
        return real(arguments.output_dir)
    return {"demo": demo, "stability": stability}[arguments.what](arguments.output_dir, arguments.seeds)


if __name__ == "__main__":
    sys.exit(main())
