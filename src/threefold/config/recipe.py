"""The recipe: every setting of a run, typed, documented in place, frozen.

A default that DeepSpeed-Chat hard-codes or ships is kept where it works and named "DeepSpeed-Chat: ..." where it was
changed. Derived numbers are methods; nothing writes to a recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from threefold.config.data import DataSection
from threefold.config.scale import CheckpointSection, LaunchSection, ParallelSection
from threefold.config.section import (
    BelowOne,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

Scheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


class RunSection(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the recipe, by default that of its file; an output directory that belongs to another is refused."""
    output_dir: str = ""
    """Run directory; empty means runs/NAME."""
    seed: NonNegativeInt = 1234
    """Seed of everything: split, initialisation, shuffling, sampling."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products (weights and optimizer stay float32); auto is bfloat16 on a GPU that has it, else
    float32."""
    num_threads: NonNegativeInt = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    log_every: PositiveInt = 10
    """Optimizer steps between two lines of metrics in steps 1 and 2 (step 3 logs every iteration)."""


class EmbeddedModelSection(Section):
    """The small OPT model that is initialised on the spot when model.actor is "embedded"."""

    vocab_size: PositiveInt = 512
    """Size of the tokenizer that is trained on the spot, special tokens included."""
    hidden_size: PositiveInt = 128
    """Model width D."""
    num_layers: PositiveInt = 4
    """Transformer blocks."""
    num_heads: PositiveInt = 4
    """Attention heads; must divide hidden_size."""
    ffn_dim: PositiveInt = 768
    """Width of the feed-forward layer."""
    max_positions: PositiveInt = 160
    """Context length, tokens."""
    init_std: PositiveFloat = 0.06
    """Standard deviation of the initial weights; larger than a big model's 0.02, with which so narrow a one starts
    slowly."""

    @model_validator(mode="after")
    def _heads_divide(self) -> EmbeddedModelSection:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")
        return self


class ModelSection(Section):
    actor: str = "embedded"
    """Pretrained causal model: Hub id, local directory, or "embedded"."""
    reward: str = ""
    """Model that the reward model starts from: Hub id or directory; empty means the result of step 1."""
    chat_template: str = "tokenizer"
    """"tokenizer" uses the checkpoint's own template; "dialogue" (Human:/Assistant:) and "tags" are built in; or a
    path to a .jinja file."""
    system_prompt: str = ""
    """System message of every conversation that has none of its own, in training, rollouts, evaluation and chat: it
    becomes part of the template that is saved with the model."""
    pad_token: str = ""
    """Token that fills batches, when the tokenizer has none or has its stop token in that place; added if it is new."""
    retokenise_for_reward: bool = False
    """Allow a reward model with another vocabulary: answers go through text, and the critic starts from the actor."""
    embedded: EmbeddedModelSection = EmbeddedModelSection()


class OptimizerSection(Section):
    """AdamW and its schedule, as each of the models has its own."""

    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only (not on biases, norms)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """AdamW betas."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    scheduler: Scheduler = "cosine"
    """Learning-rate schedule over all optimizer steps of the stage."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""


class LoRASection(Section):
    """Low-rank adapters (Hu et al. 2021): the weights stay as they are, and each chosen matrix W acts as
    W + alpha / rank * B A, of which only A and B are trained."""

    rank: NonNegativeInt = 0
    """Rows of A and columns of B; 0 trains the whole model. (Adapters usually want some ten times the learning rate of
    the whole model.)"""
    alpha: NonNegativeInt = 0
    """B A is multiplied by alpha / rank; 0 means 2 * rank, so by 2. (DeepSpeed-Chat: by 1 / rank.)"""
    dropout: BelowOne = 0.0
    """Dropout on what goes into A; must be 0 in step 3."""
    target_modules: Annotated[list[str], Field(min_length=1)] = ["all-linear"]
    """Which linear layers of the transformer blocks: "all-linear", or the ends of their names, as in q_proj,v_proj, in
    which * stands for anything, as in layers.1*.fc? or *attn*. A name that fits no layer is an error."""
    train_heads: bool = False
    """Train the language-model head too, whole. One that is tied to the embeddings gets a matrix of its own, and so it
    is saved. (The score head of a reward model or critic is trained in any case.)"""
    quantise_base: Literal["none", "nf4"] = "none"
    """nf4 keeps the frozen matrices of the blocks in 4 bits (QLoRA, Dettmers et al. 2023), by bitsandbytes: pip install
    "threefold[qlora]". What is saved has these rounded matrices in full precision, the adapters added."""

    def effective_alpha(self) -> int:
        """alpha, its 0 resolved."""
        return self.alpha or 2 * self.rank

    @model_validator(mode="after")
    def _all_or_names(self) -> LoRASection:
        if "all-linear" in self.target_modules and len(self.target_modules) > 1:
            raise ValueError('target_modules "all-linear" leaves nothing to add: give it alone, or give names')
        return self

    @model_validator(mode="after")
    def _base_is_frozen(self) -> LoRASection:
        if self.quantise_base != "none" and self.rank == 0:
            raise ValueError(
                f'quantise_base "{self.quantise_base}" is for weights that are not trained, and with rank 0 all are: '
                'set rank above 0, or quantise_base to "none"'
            )
        return self


class SupervisedSection(OptimizerSection):
    """What steps 1 and 2 have in common."""

    epochs: PositiveInt = 1
    """Passes over the training share."""
    max_steps: NonNegativeInt = 0
    """Stop after this many optimizer steps; 0 means all epochs."""
    batch_size: PositiveInt = 16
    """Examples per optimizer step."""
    micro_batch_size: NonNegativeInt = 0
    """At most this many examples per forward pass; 0 is no limit. Does not change the result, only memory and speed."""
    micro_batch_tokens: NonNegativeInt = 0
    """At most this many tokens, padding included, per forward pass; 0 means what suits the device (2048 on a CPU,
    16384 on a GPU). Examples of like length pass together. Does not change the result, only memory and speed."""
    gradient_checkpointing: bool = False
    """Keep no activations inside a block but compute them again: less memory, about a third more time. The gradient is
    the same."""
    eval_every: NonNegativeInt = 0
    """Optimizer steps between evaluations; 0 evaluates at the end of each epoch."""
    max_eval_examples: PositiveInt = 512
    """At most this many held-out examples per evaluation."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability wherever the model has dropout."""
    lora: LoRASection = LoRASection()


class SFTSection(SupervisedSection):
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate. (DeepSpeed-Chat: 9.65e-6 for full models, 1e-3 with LoRA.)"""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Train on the assistant's tokens only, or on every token. (DeepSpeed-Chat: all.)"""


class RewardSection(SupervisedSection):
    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, on matrices only."""
    loss: Literal["pairwise", "plackett_luce"] = "pairwise"
    """pairwise is the mean over all pairs of a prompt's ranked answers, then over prompts (Ouyang et al. 2022, equation
    1); plackett_luce takes each ranking as successive choices of the best of those left (Luce 1959, Plackett 1975)."""


class SamplingSection(Section):
    """How answers are drawn."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy (refused in PPO, whose maths needs samples)."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""
    min_new_tokens: NonNegativeInt = 0
    """No stop token before this many tokens."""
    max_new_tokens: PositiveInt = 256
    """Longest answer, tokens (DeepSpeed-Chat: max_answer_seq_len)."""

    @model_validator(mode="after")
    def _min_below_max(self) -> SamplingSection:
        if self.min_new_tokens >= self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} must be below max_new_tokens {self.max_new_tokens}")
        return self


class EMASection(Section):
    enabled: bool = True
    """Keep an exponential moving average of the actor and save it as ppo/actor_ema."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.992
    """ema <- decay * ema + (1 - decay) * actor, once per optimizer step, in float32."""
    offload: bool = False
    """Keep the average in host memory. It is sharded as the actor is (parallel.actor.zero_stage)."""


class MixtureSection(Section):
    source: str = ""
    """Pretraining text to mix into PPO: a file of plain text (documents separated by <|endoftext|>) or of rows with a
    `text` field; empty is off."""
    coef: NonNegativeFloat = 1.0
    """Weight of the language-modelling loss, which is a mean per token. (DeepSpeed-Chat: 27.8, which its authors
    report not to converge.)"""
    batch_size: PositiveInt = 16
    """Text chunks per optimizer step."""
    chunk_length: PositiveInt = 256
    """Tokens per text chunk."""
    eval_documents: PositiveInt = 64
    """Documents, from the end of the text and never trained on, for the perplexity that is reported."""


class PPOSection(Section):
    epochs: PositiveInt = 1
    """Passes over the prompts of step 3."""
    iterations: NonNegativeInt = 0
    """Rollout-and-update rounds; 0 means what `epochs` gives."""
    prompts_per_iteration: PositiveInt = 16
    """Prompts per rollout (DeepSpeed-Chat: per_device_generation_batch_size x generation_batches)."""
    answers_per_prompt: PositiveInt = 1
    """Answers sampled for each prompt."""
    ppo_epochs: PositiveInt = 1
    """Passes over each batch of experience."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass: the experience is cut into this many minibatches."""
    micro_batch_size: NonNegativeInt = 0
    """At most this many sequences per forward pass; 0 is no limit. Does not change the result, only memory and
    speed."""
    micro_batch_tokens: NonNegativeInt = 0
    """At most this many tokens, padding included, per forward pass, in scoring too; 0 means what suits the device (2048
    on a CPU, 16384 on a GPU). Sequences of like length pass together. Does not change the result, only memory and
    speed."""
    gradient_checkpointing: bool = False
    """Keep no activations inside a block in the update of actor and critic but compute them again: less memory, about a
    third more time. The gradient is the same."""
    offload_optimizer: bool = False
    """On a GPU, move the optimizer's state to host memory while answers are generated."""
    kl_coef: NonNegativeFloat = 0.1
    """Weight of the per-token KL penalty in the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of KL(policy || reference) per token: k1 = log-ratio, k2 = its square / 2, k3 = ratio - 1 -
    log-ratio."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive moves kl_coef towards kl_target (Ziegler et al. 2019, section 2.2)."""
    kl_target: PositiveFloat = 6.0
    """Mean KL per answer, nats, that the adaptive controller steers to and that the report compares with."""
    kl_horizon: PositiveFloat = 10000
    """Adaptive controller: answers over which the coefficient may change by a factor of e^0.2."""
    reward_clip: NonNegativeFloat = 5.0
    """Clip the (normalised) score to +-this; 0 turns clipping off."""
    normalise_reward: bool = True
    """Subtract the reward model's saved mean and divide by its saved scale before clipping. (DeepSpeed-Chat: no.)"""
    reward_model_coef: NonNegativeFloat = 1.0
    """Weight of the reward model's (normalised, clipped) score."""
    final_answer_coef: NonNegativeFloat = 0.0
    """Reward for a final answer that equals the data's, where they have one (gsm8k); 0 is off."""
    missing_stop_penalty: NonNegativeFloat = 0.0
    """Taken off the clipped score of an answer that was cut at max_new_tokens."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """GAE lambda (DeepSpeed-Chat: lam)."""
    whiten_advantages: bool = True
    """Give the advantages of a batch mean 0 and variance 1. (DeepSpeed-Chat: no.)"""
    clip_range: PositiveFloat = 0.2
    """Policy ratio is clipped to 1 +- this."""
    value_clip_range: PositiveFloat = 0.2
    """New values are clipped to the old ones +- this, normalised reward units."""
    target_kl: NonNegativeFloat = 0.0
    """End an iteration's updates once the policy has moved this far from the rollout's (mean k3 per token, nats); 0
    is off."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of an entropy bonus, per token."""
    critic_warmup_iterations: NonNegativeInt = 0
    """First iterations in which only the critic learns."""
    actor_learning_rate: PositiveFloat = 9.65e-6
    """Peak learning rate of the actor."""
    critic_learning_rate: PositiveFloat = 5e-6
    """Peak learning rate of the critic."""
    actor_weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the actor, on matrices only."""
    critic_weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the critic, on matrices only."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """AdamW betas of both."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest gradient norm of each; 0 turns clipping off."""
    scheduler: Scheduler = "cosine"
    """Learning-rate schedule of both, over all optimizer steps."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps of linear warm-up, of both."""
    eval_every: NonNegativeInt = 0
    """Iterations between evaluations on held-out prompts; 0 evaluates only before and after."""
    num_eval_prompts: PositiveInt = 256
    """At most this many held-out prompts per evaluation."""
    parity_bound: NonNegativeFloat = 0.0
    """Largest difference between a rollout's log-probs and the training forward's before an iteration's first update,
    nats; beyond it the run stops. 0 means 1e-3 in float32 and 0.5 in bfloat16."""
    sampling: SamplingSection = SamplingSection()
    ema: EMASection = EMASection()
    mixture: MixtureSection = MixtureSection()
    actor_lora: LoRASection = LoRASection()
    critic_lora: LoRASection = LoRASection()

    def optimizer(self, model: Literal["actor", "critic"]) -> OptimizerSection:
        """The optimizer settings of one of the two trained models."""
        return OptimizerSection(
            learning_rate=self.actor_learning_rate if model == "actor" else self.critic_learning_rate,
            weight_decay=self.actor_weight_decay if model == "actor" else self.critic_weight_decay,
            betas=self.betas,
            grad_clip=self.grad_clip,
            scheduler=self.scheduler,
            warmup_steps=self.warmup_steps,
        )

    @model_validator(mode="after")
    def _needs_samples(self) -> PPOSection:
        if self.sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature 0 is greedy decoding, and PPO's ratios need sampled answers: set it above 0"
            )
        if self.reward_model_coef == 0 and self.final_answer_coef == 0:
            raise ValueError("reward_model_coef and final_answer_coef are both 0, so no answer is better than another")
        answers = self.prompts_per_iteration * self.answers_per_prompt
        if self.minibatches > answers:
            raise ValueError(
                f"minibatches {self.minibatches} is more than the {answers} answers of an iteration "
                "(prompts_per_iteration x answers_per_prompt)"
            )
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise ValueError('kl_controller "adaptive" multiplies kl_coef, and kl_coef is 0: set it above 0')
        if 0 < self.iterations <= self.critic_warmup_iterations:
            raise ValueError(
                f"critic_warmup_iterations {self.critic_warmup_iterations} leaves the actor none of the "
                f"{self.iterations} iterations: lower it"
            )
        if self.kl_controller == "adaptive" and answers > self.kl_horizon:
            raise ValueError(
                f"kl_horizon {self.kl_horizon:g} is less than the {answers} answers of one iteration, so kl_coef "
                "would jump: raise it"
            )
        return self

    @model_validator(mode="after")
    def _adapters_without_dropout(self) -> PPOSection:
        for name, lora in (("actor_lora", self.actor_lora), ("critic_lora", self.critic_lora)):
            if lora.dropout > 0:
                raise ValueError(
                    f"{name}.dropout {lora.dropout:g} makes two passes of one model differ, and PPO compares log-probs "
                    "and values of answers with those of the pass before: set it to 0"
                )
        return self


class GenerationSection(Section):
    """How the hybrid engine decodes: speed and memory, never which answers are likely."""

    inference_tp_size: PositiveInt = 1
    """Processes that share one copy of the actor while it generates, each with its part of the heads and of the
    feed-forward layers (tensor parallelism); must divide the number of processes and the model's attention heads."""
    max_rows: NonNegativeInt = 0
    """At most this many answers decoded together, the others wait for a place; 0 means as many as the memory for keys
    and values holds, and 64 at most on a CPU."""
    kv_memory_gib: NonNegativeFloat = 0.0
    """Ceiling of the memory for keys and values, GiB; 0 means four fifths of what is measured free. After every phase
    of generation it is free for the next phase."""
    packed_weights: Literal["auto", "never"] = "auto"
    """auto keeps a second copy of the matrices: on a CPU, while generating, in the layout that its kernel reads best;
    on a GPU in run.dtype, between phases too if cuda_graphs are in use. never reads the training weights themselves,
    without a copy."""
    cuda_graphs: Literal["auto", "never"] = "auto"
    """auto records the decode step as a CUDA graph, where the family has a decoder and the device is a GPU; never
    launches its operations one by one."""
    overlap_scoring: Literal["never", "auto"] = "never"
    """auto lets reference and reward model score finished answers while others are still decoded, on a GPU whose
    reference is a model of its own (not adapters switched off): which answers pass together then depends on timing, and
    the last bits of their scores with it. never scores all of them afterwards."""


class EvaluateSection(Section):
    """The comparison of the stages that closes a run."""

    num_prompts: PositiveInt = 300
    """At most this many held-out prompts of step 3."""
    answers_per_prompt: Annotated[int, Field(ge=1)] = 2
    """Answers sampled for each."""
    num_samples: NonNegativeInt = 12
    """Prompts that are written, with each model's answer, to samples.jsonl."""


class Recipe(Section):
    """One run: the three steps of InstructGPT on one model and one set of datasets."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    sft: SFTSection = SFTSection()
    reward: RewardSection = RewardSection()
    ppo: PPOSection = PPOSection()
    generation: GenerationSection = GenerationSection()
    evaluate: EvaluateSection = EvaluateSection()
    parallel: ParallelSection = ParallelSection()
    launch: LaunchSection = LaunchSection()
    checkpoint: CheckpointSection = CheckpointSection()
