"""DeepSpeed-Chat's two commands stand for the recipes that its scripts describe."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from threefold.compat import deepspeed_chat
from threefold.config.load import load_recipe
from threefold.config.recipe import Recipe
from threefold.errors import ConfigError
from threefold.serve.options import ChatOptions

ROOT = Path(__file__).parents[2]
USUAL = ["--actor-model", "facebook/opt-1.3b", "--reward-model", "facebook/opt-350m", "--deployment-type", "single_gpu"]


def paths(recipe: Recipe) -> list[str]:
    return [path for source in recipe.data.sources for path in source.path]


def test_the_usual_command_stands_for_their_single_gpu_scripts() -> None:
    """Numbers from the published run scripts for one GPU: micro-batches times accumulation, rates, lengths."""
    recipe, steps, output_dir = deepspeed_chat.read_train_flags([*USUAL, "--data-path", "demo"])
    assert (steps, output_dir) == ((1, 2, 3), Path("output"))
    assert (recipe.model.actor, recipe.model.reward) == ("facebook/opt-1.3b", "facebook/opt-350m")
    assert recipe.model.chat_template == "dialogue"
    assert (recipe.run.name, recipe.run.seed) == ("opt-1.3b-opt-350m", 1234)
    assert (paths(recipe), recipe.data.split, recipe.data.max_length) == (["demo"], [2, 4, 4], 512)
    assert (recipe.sft.learning_rate, recipe.sft.batch_size, recipe.sft.weight_decay) == (9.65e-6, 16 * 8, 0)
    assert (recipe.reward.learning_rate, recipe.reward.batch_size, recipe.reward.weight_decay) == (5e-5, 16 * 4, 0.1)
    assert (recipe.ppo.actor_learning_rate, recipe.ppo.critic_learning_rate) == (9.65e-6, 5e-6)
    assert recipe.ppo.prompts_per_iteration * recipe.ppo.answers_per_prompt // recipe.ppo.minibatches == 16 * 2
    assert (recipe.data.max_prompt_length, recipe.ppo.sampling.max_new_tokens) == (256, 256)
    assert (recipe.ppo.warmup_steps, recipe.ppo.epochs, recipe.ppo.ppo_epochs) == (100, 1, 1)
    assert (recipe.ppo.kl_coef, recipe.ppo.reward_clip, recipe.ppo.clip_range) == (0.1, 5.0, 0.2)


@pytest.mark.parametrize("spell", [lambda flag: flag, lambda flag: "--" + flag[2:].replace("-", "_")])
def test_both_spellings_sizes_steps_and_overrides(tmp_path: Path, spell: Callable[[str], str]) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    arguments = [spell("--actor-model"), "6.7B", spell("--reward-model"), "350m", "--step", "2", "3"]
    arguments += [spell("--data-path"), *map(str, files), spell("--output-dir"), "out", "--ppo.kl_coef", "0.05"]
    arguments += [spell("--actor-zero-stage"), "0", "--sft.batch_size=4", "--sft.micro_batch_size", "2"]
    recipe, steps, output_dir = deepspeed_chat.read_train_flags(arguments)
    assert (recipe.model.actor, recipe.model.reward) == ("facebook/opt-6.7b", "facebook/opt-350m")
    assert paths(recipe) == [str(file) for file in files]
    assert (steps, output_dir) == ((2, 3), Path("out"))
    assert (recipe.ppo.kl_coef, recipe.sft.batch_size) == (0.05, 4)


def test_without_data_the_datasets_are_those_of_their_scripts() -> None:
    """One GPU: rm-static. More: four in steps 1 and 2, of which rm-static alone is in step 3."""
    recipe, _, _ = deepspeed_chat.read_train_flags(USUAL)
    assert (paths(recipe), recipe.data.bad_rows) == (["Dahoas/rm-static"], "drop")
    recipe, _, _ = deepspeed_chat.read_train_flags(["--deployment-type", "multi_node"])
    assert paths(recipe) == [
        "Dahoas/rm-static",
        "Dahoas/full-hh-rlhf",
        "Dahoas/synthetic-instruct-gptj-pairwise",
        "yitingxie/rlhf-reward-datasets",
    ]
    assert [source.shares(recipe.data.split) for source in recipe.data.sources] == [[2, 4, 4]] + [[2, 4, 0]] * 3


@pytest.mark.parametrize("spell", [lambda flag: flag, lambda flag: "--" + flag[2:].replace("-", "_")])
def test_flags_for_data(spell: Callable[[str], str]) -> None:
    arguments = [spell("--data-path"), "Dahoas/rm-static", "local/jsonfile", spell("--sft-only-data-path")]
    arguments += ["wangrui6/Zhihu-KOL", "mkqa-Chinese", spell("--data-split"), "6,2,2", *USUAL]
    recipe, _, _ = deepspeed_chat.read_train_flags(arguments)
    assert paths(recipe) == ["Dahoas/rm-static", "local/jsonfile", "wangrui6/Zhihu-KOL", "mkqa-Chinese"]
    assert [source.sft_only for source in recipe.data.sources] == [False, False, True, True]
    assert recipe.data.split == [6, 2, 2]
    recipe, _, _ = deepspeed_chat.read_train_flags([*USUAL, spell("--sft-only-data-path")])
    assert (paths(recipe), recipe.data.split) == (["Dahoas/rm-static"], [2, 4, 4])


NODE = ["--deployment-type", "single_node", "--data-path", "demo"]


def test_the_deployment_types_stand_for_their_scripts() -> None:
    """Per GPU 8, 4 and 4 sequences, ZeRO 2 and an average for 1.3B on 8 GPUs; for 13B ZeRO 3, adapters of rank 128 at
    5e-4 scaled by 1 / rank, and tensor parallelism 2; for 66B on 64 GPUs tensor parallelism 8."""
    small, _, _ = deepspeed_chat.read_train_flags([*NODE, "--actor-model", "1.3b"])
    assert (small.sft.batch_size, small.reward.batch_size, small.ppo.prompts_per_iteration) == (64, 32, 32)
    assert (small.sft.micro_batch_size, small.ppo.micro_batch_size, small.sft.epochs) == (8, 4, 16)
    assert (small.sft.learning_rate, small.sft.lora.rank, small.ppo.ema.enabled) == (9.65e-6, 0, True)
    assert (small.parallel.actor.zero_stage, small.parallel.critic.zero_stage) == (2, 2)
    assert (small.parallel.reward.zero_stage, small.parallel.reference.zero_stage) == (0, 0)
    assert (small.launch.deployment, small.launch.processes_per_node) == ("single_node", 0)
    middle, _, _ = deepspeed_chat.read_train_flags([*NODE, "--actor-model", "meta-llama/Llama-2-7b-hf"])
    assert (middle.sft.batch_size, middle.parallel.actor.zero_stage, middle.ppo.actor_weight_decay) == (48, 3, 0.1)
    large, _, _ = deepspeed_chat.read_train_flags([*NODE, "--actor-model", "13b", "--num-gpus", "4"])
    assert (large.sft.batch_size, large.reward.batch_size, large.ppo.prompts_per_iteration) == (16, 16, 64)
    assert (large.sft.learning_rate, large.sft.lora.rank, large.sft.lora.alpha) == (5e-4, 128, 1)
    assert (large.generation.inference_tp_size, large.launch.processes_per_node) == (2, 4)
    assert (large.parallel.reference.zero_stage, large.parallel.scorer.zero_stage) == (3, 3)
    huge, _, _ = deepspeed_chat.read_train_flags(["--deployment-type", "multi_node", "--actor-model", "66b"])
    assert (huge.sft.batch_size, huge.reward.batch_size, huge.ppo.prompts_per_iteration) == (256, 128, 256)
    assert (huge.sft.weight_decay, huge.ppo.critic_weight_decay, huge.sft.epochs) == (0.1, 0.1, 2)
    assert (huge.generation.inference_tp_size, huge.launch.nodes) == (8, 8)


def test_stages_offload_and_machines_are_flags() -> None:
    flags = ["--actor-zero-stage", "3", "--reward_zero_stage", "1", "--offload", "--num-gpus", "2"]
    recipe, _, _ = deepspeed_chat.read_train_flags([*NODE, *flags])
    parallel = recipe.parallel
    assert (parallel.actor.zero_stage, parallel.actor.offload) == (3, "all")
    assert (parallel.reward.zero_stage, parallel.reward.offload) == (1, "optimizer")
    assert (parallel.critic.zero_stage, parallel.critic.offload) == (1, "optimizer")
    flags = ["--num-nodes", "2", "--num-gpus", "4", "--node-rank", "1", "--rdzv-endpoint", "a:1"]
    recipe, _, _ = deepspeed_chat.read_train_flags(["--deployment-type", "multi_node", *flags])
    launch = recipe.launch
    assert (launch.nodes, launch.processes_per_node, launch.node_rank, launch.rdzv_endpoint) == (2, 4, 1, "a:1")
    assert recipe.sft.batch_size == 4 * 8
    recipe, _, _ = deepspeed_chat.read_train_flags(["--deployment-type", "multi_node", "--hostfile", "hosts"])
    assert (recipe.launch.hostfile, recipe.launch.nodes) == ("hosts", 1)


@pytest.mark.parametrize(
    ("name", "deployment", "size"),
    [
        ("opt-1.3b_single_gpu", "single_gpu", "1.3b"),
        ("opt-13b_single_node", "single_node", "13b"),
        ("opt-66b_multi_node", "multi_node", "66b"),
    ],
)
def test_the_shipped_recipes_say_what_the_flags_stand_for(name: str, deployment: str, size: str) -> None:
    shipped = load_recipe(ROOT / "recipes" / f"{name}.toml").model_dump()
    recipe, _, _ = deepspeed_chat.read_train_flags(["--deployment-type", deployment, "--actor-model", size])
    flags = recipe.model_dump()
    for section in (shipped, flags):
        del section["run"]["name"], section["run"]["output_dir"], section["data"]["sources"]
    assert shipped == flags


def test_other_processes_get_the_same_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `threefold deepspeed-chat` is for: the processes of train.py are started with it."""
    given: list[list[str]] = []
    monkeypatch.setattr(deepspeed_chat, "start", lambda recipe, work, arguments: given.append(arguments))
    deepspeed_chat.train([*NODE, "--num-gpus", "2"])
    assert given == [["deepspeed-chat", *NODE, "--num-gpus", "2"]]


def test_a_directory_as_model_gives_a_usable_name(tmp_path: Path) -> None:
    model = str(tmp_path / "my model+")
    recipe, _, _ = deepspeed_chat.read_train_flags(["--actor-model", model, "--data-path", "demo"])
    assert (recipe.model.actor, recipe.run.name) == (model, "my-model-opt-350m")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([*USUAL, "--data-split", "2,4"], ["--data-split 2,4", "three numbers", "2,4,4"]),
        ([*USUAL, "--data-split", "2,x,4"], ["--data-split 2,x,4", "three numbers"]),
        ([*USUAL, "--data-split=0,0,0"], ["--data-split 0,0,0", "three numbers"]),
        ([*USUAL, "--data-split=2,-4,4"], ["--data-split 2,-4,4", "three numbers"]),
        ([*USUAL, "--data-path", "a.json", "a.json"], ["two sources are called 'a.json'"]),
        (["--deployment-type", "singel_gpu"], ["singel_gpu", "use single_gpu, single_node, multi_node"]),
        (["--num-gpus", "2"], ["--num-gpus 2", "needs --deployment-type single_node"]),
        (["--num-gpus", "-1"], ["--num-gpus -1", "above 0"]),
        (["--deployment-type", "single_node", "--num-nodes", "2"], ["--num-nodes 2", "--deployment-type multi_node"]),
        (["--actor-zero-stage", "4"], ["--actor-zero-stage 4", "0, 1, 2 or 3"]),
        (["--reward_zero_stage", "x"], ["--reward-zero-stage x", "0, 1, 2 or 3"]),
        (["--actor-model", "1.4b", "--data-path", "demo"], ["--actor-model 1.4b", "1.3b"]),
        (["--actor-model", "", "--data-path", "demo"], ["--actor-model is empty"]),
        (["--actor-modle", "1.3b"], ["unknown flag --actor-modle", "did you mean --actor-model?"]),
        (["--data-path", "demo", "--ppo.klcoef", "1"], ["unknown field ppo.klcoef", "ppo.kl_coef"]),
        (["--step", "0"], ["'0' is no step"]),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_chat.read_train_flags(arguments)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_the_printed_recipe_is_the_one_that_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[tuple[Recipe, tuple[int, ...], Path]] = []
    monkeypatch.setattr(deepspeed_chat, "run_pipeline", lambda *arguments: ran.append(arguments))
    deepspeed_chat.train([*USUAL, "--data_path", "demo", "--ppo.kl_coef", "0.05"])
    printed = tmp_path / "recipe.toml"
    printed.write_text(capsys.readouterr().out)
    assert load_recipe(printed, []) == ran[0][0]


def test_chat_knows_path_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    chats: list[ChatOptions] = []
    monkeypatch.setattr(deepspeed_chat, "run_chat", chats.append)
    deepspeed_chat.chat(["--path", "some/dir"])
    deepspeed_chat.chat(["--path", "some/dir", "--max_new_tokens", "256"])
    assert chats == [ChatOptions("some/dir", max_new_tokens=128), ChatOptions("some/dir", max_new_tokens=256)]
    with pytest.raises(ConfigError, match="--path"):
        deepspeed_chat.chat([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py", "--num-gpus", "2"], "--num-gpus 2 needs --deployment-type single_node"),
        (["chat.py"], "the following arguments are required: --path"),
    ],
)
def test_the_scripts_at_the_root_report_mistakes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    script = arguments[0]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith(f"threefold: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("script", ["train.py", "chat.py"])
def test_without_an_installation_the_scripts_say_what_to_run(script: str) -> None:
    """-I -S hides site-packages, so that threefold cannot be found."""
    finished = subprocess.run([sys.executable, "-I", "-S", str(ROOT / script)], capture_output=True, text=True)
    assert finished.returncode != 0
    assert finished.stderr == "threefold is not installed: run `make setup`, then use .venv/bin/python\n"


def test_the_usual_command_prints_its_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_chat, "start", lambda recipe, work, arguments: None)
    deepspeed_chat.train(USUAL)
    printed = capsys.readouterr().out
    assert 'actor = "facebook/opt-1.3b"' in printed
    assert 'reward = "facebook/opt-350m"' in printed
    assert '"Dahoas/rm-static"' in printed
