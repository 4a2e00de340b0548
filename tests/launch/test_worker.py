"""One process without our launcher: plain torchrun, and the SLURM script."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.processes import ROOT, is_alive, started, wait_until

WORKER = Path(__file__).with_name("worker_script.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"
ORPHAN_SECONDS = 10.0


def torchrun(what: str, directory: Path) -> subprocess.Popen[str]:
    command = [*TORCHRUN, str(WORKER), what, str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(directory)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_under_plain_torchrun_a_mistake_is_said_once(tmp_path: Path) -> None:
    process = torchrun("mistake", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count("threefold: run.seed = -1 is no seed\n") == 1, err
    assert "Traceback (most recent call last):\n  File" not in err.split("torch")[0]


def test_under_plain_torchrun_its_end_is_the_end_of_the_processes(tmp_path: Path) -> None:
    process = torchrun("train", tmp_path)
    pids = started(tmp_path, 2)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in pids.values()), ORPHAN_SECONDS)


def fake(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment as SLURM makes it, with stand-ins for its programs that write down what they are given."""
    fake(tmp_path, "scontrol", f'[ "$1" = show ] && printf "gpu1\\ngpu2\\n" || echo "$@" >> {tmp_path}/scontrol.log')
    fake(tmp_path, "srun", 'while [ "${1#-}" != "$1" ]; do shift; done; SLURM_NODEID=1 exec "$@"')
    job = {"SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12345"}
    return {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}", "THREEFOLD": str(tmp_path / "threefold")}


def test_the_slurm_script_starts_a_launcher_on_each_machine(tmp_path: Path, slurm: dict[str, str]) -> None:
    fake(tmp_path, "threefold", f'printf "%s\\n" "$@" > {tmp_path}/given; exit 7')
    done = subprocess.run(["bash", str(SBATCH), "my recipe.toml", "--ppo.kl_coef=0.1"], env=slurm, timeout=60)
    assert done.returncode == 7
    assert (tmp_path / "given").read_text().splitlines() == [
        "train", "my recipe.toml", "--ppo.kl_coef=0.1", "--nnodes", "2", "--rdzv-endpoint", "gpu1:22345",
        "--node-rank", "1",
    ]  # fmt: skip
    assert not (tmp_path / "scontrol.log").exists()


def test_the_slurm_script_passes_sigterm_on_and_puts_the_job_back(tmp_path: Path, slurm: dict[str, str]) -> None:
    wait = f"trap 'sleep 0.5; exit 143' TERM; touch {tmp_path}/up; while true; do sleep 0.1; done"
    fake(tmp_path, "threefold", wait)
    job = subprocess.Popen(["bash", str(SBATCH), "recipe.toml"], env=slurm)
    wait_until((tmp_path / "up").exists)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 143
    assert (tmp_path / "scontrol.log").read_text() == "requeue 12345\n"


def test_the_slurm_script_without_a_recipe_says_how() -> None:
    done = subprocess.run(["bash", str(SBATCH)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.startswith("usage: sbatch")) == (2, True)
