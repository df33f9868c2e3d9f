"""Every setting of a training run: its flag, its default, what it means, d1's value.

    python train.py --help      prints them, in groups
    runs/NAME/config.json       records them; this file alone is enough to repeat a run

The defaults train the embedded tiny model on countdown. The recipes below list what changes for
other tasks, models and GPUs; train.py applies them, Config alone does not. The method's settings
have TRL's or d1's names. Some constants are not settings: AdamW's betas (train.py), the floor of a
group's std (diffpo_loss.py), gamma's bounds and the head's input scale (sampler.py).

Only the standard library is imported here, so that --help answers before torch is loaded, which
takes seconds.
"""

import math
from dataclasses import dataclass, field, fields

MAX_SEED = 2**63 - 1  # the largest seed torch accepts


def setting(default, help, d1=None, minimum=None, maximum=None, choices=()):
    """A field of Config. `d1` is the value in d1's (diffu-GRPO's) code, if it differs.

    Unless another maximum is given, an integer is at most a million and a float at most 1e12, so
    that a mistyped number is refused at once instead of filling the memory or overflowing a
    float32.
    """
    if maximum is None and type(default) is int:
        maximum = 1_000_000
    if maximum is None and type(default) is float:
        maximum = 1e12
    metadata = {"help": help, "d1": d1, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """One field per flag of train.py. Raises ValueError for a value out of range."""

    # run
    task: str = setting(
        "countdown", "countdown, sudoku, chain, gsm8k, math, or FILE.py:NAME; several as A,B"
    )
    model: str = setting(
        "", "tiny, a hub name, or a folder; default: chosen by the GPU's free memory"
    )
    adapter: str = setting(
        "", "start from this LoRA adapter, with its rank and alpha: a folder or a hub name"
    )
    data: str = setting("", "a file of problems, split 70/10/20; default: the task's own")
    run_dir: str = setting("", "a new folder for this run; default: runs/TASK-TARGET-TIME")
    seed: int = setting(0, "seed of all random numbers", minimum=0, maximum=MAX_SEED)
    steps: int = setting(120, "RL steps, each on a fresh batch of rollouts", minimum=1)
    train_target: str = setting("joint", "what learns", choices=("policy", "sampler", "joint"))
    device: str = setting(
        "auto", "where to run; auto is the GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    report_to: str = setting(
        "none",
        "log metrics to this tracker too",
        choices=("none", "tensorboard", "trackio", "wandb"),
    )
    # rollout
    prompts_per_step: int = setting(32, "P, prompts per step", d1=16, minimum=1)
    num_generations: int = setting(8, "G, completions of each prompt (a group)", d1=6, minimum=2)
    max_completion_length: int = setting(
        0,
        "L, tokens per completion; 0: the task's own length (tiny model only)",
        d1=256,
        minimum=0,
    )
    prefill: str = setting("", "text with which every completion begins, e.g. <reasoning>")
    temperature: float = setting(1.0, "sampling temperature of rollouts", d1=0.9, minimum=0.01)
    block_length: int = setting(
        0, "decode left to right in blocks of this many tokens; 0: one block", d1=32, minimum=0
    )
    cache: str = setting(
        "none",
        "block cache of keys and values; approximate unless none, but always exact for "
        "block-causal models",
        choices=("none", "prefix", "dual"),
    )
    compile: bool = setting(
        False, "run calls with a filled block cache under torch.compile; for GPUs"
    )
    initial_threshold: float = setting(
        0.1,
        "gamma_0 in nats: the entropy threshold that the learned one starts from",
        minimum=1e-3,
        maximum=10,
    )
    # objective
    num_stages: int = setting(
        2,
        "m, stages of the likelihood; 1: mean-field, 2: two-times mean-field",
        d1=1,
        minimum=1,
        maximum=10_000,
    )
    importance_weight_cap: float = setting(
        1.0, "C, cap of the importance weight; 0: no weights", d1=0, minimum=0
    )
    normalise_by: str = setting(
        "canvas",
        "divide a completion's sum by L (canvas) or by |o| (text)",
        choices=("canvas", "text"),
    )
    epsilon: float = setting(0.2, "PPO's clip range of the ratio", d1=0.5, minimum=1e-6)
    num_iterations: int = setting(1, "mu, updates on each batch of rollouts", d1=12, minimum=1)
    scale_rewards: bool = setting(True, "divide advantages by their group's std", d1=False)
    nfe_penalty: float = setting(
        0.35, "lambda: rewards are multiplied by 1 - lambda * NFE / L", d1=0, minimum=0, maximum=1
    )
    p_mask_prompt: float = setting(
        0.0, "mask each prompt token with this probability while scoring", d1=0.15,
        minimum=0, maximum=1,
    )  # fmt: skip
    beta: float = setting(0.0, "weight of the KL to the base model", d1=0.04, minimum=0)
    # optimiser
    learning_rate: float = setting(
        2e-3, "AdamW's for the denoiser, constant after warm-up", d1=3e-6, minimum=0, maximum=1
    )
    warmup_steps: int = setting(
        10, "steps over which the learning rate rises to its value", minimum=0
    )
    max_grad_norm: float = setting(1.0, "clip the denoiser's gradient", d1=0.2, minimum=1e-6)
    weight_decay: float = setting(0.0, "AdamW's for the denoiser", d1=0.1, minimum=0, maximum=1)
    threshold_learning_rate: float = setting(
        1e-2, "Adam's for the threshold head", minimum=0, maximum=1
    )
    threshold_sigma: float = setting(
        0.5, "spread of log gamma around the head's mean: exploration", minimum=1e-3
    )
    threshold_epsilon: float = setting(
        0.2, "PPO's clip range of the threshold's ratio", minimum=1e-6
    )
    # memory
    rollout_batch_size: int = setting(0, "rows rolled out at once; 0: all", minimum=0)
    micro_batch_size: int = setting(
        256, "rows scored at once; does not change the gradient", minimum=1
    )
    lora_rank: int = setting(
        16, "rank of the LoRA adapter; 0 trains all weights", d1=128, minimum=0, maximum=10_000
    )
    lora_alpha: float = setting(
        32.0, "the adapter is scaled by lora_alpha / lora_rank", d1=64, minimum=0
    )
    lora_dropout: float = setting(
        0.0,
        "dropout on the adapter's inputs; adds noise to the ratio",
        d1=0.05,
        minimum=0,
        maximum=0.9,
    )
    gradient_checkpointing: bool = setting(False, "save memory for a third more compute")
    shard: bool = setting(False, "split the layers' weights over torchrun's processes (FSDP2)")
    dtype: str = setting(
        "auto", "type of the base model's weights", d1="4bit",
        choices=("auto", "float32", "bfloat16", "4bit"),
    )  # fmt: skip
    # measuring and saving
    eval_problems: int = setting(
        1000, "held-out problems to evaluate on, before and after training", minimum=1
    )
    eval_split: str = setting(
        "test",
        "split to evaluate on; tune on validation. all: every problem of --data, and training uses "
        "them too",
        choices=("test", "validation", "all"),
    )
    frontier: bool = setting(
        True, "also measure base and trained model at five gammas, for frontier.png"
    )
    save_every: int = setting(50, "steps between checkpoints", minimum=1)

    def __post_init__(self):
        for f in fields(self):
            name = f.name
            value = getattr(self, name)
            if type(value) is not f.type and not (f.type is float and type(value) is int):
                raise ValueError(f"{name} = {value!r:.40}: it has to be of type {f.type.__name__}")
            choices = f.metadata["choices"]
            minimum = f.metadata["minimum"]
            maximum = f.metadata["maximum"]
            if choices and value not in choices:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} = {value}: it has to be a finite number")
            if minimum is not None and value < minimum:
                raise ValueError(f"{name} = {value}: it has to be at least {minimum}")
            if maximum is not None and value > maximum:
                raise ValueError(f"{name} = {value}: it has to be at most {maximum}")
        if 0 < self.importance_weight_cap < 1e-6:  # weights round to 0, and ess_fraction is 0 / 0
            raise ValueError(
                f"importance_weight_cap = {self.importance_weight_cap}: it has to be 0 or at least "
                "1e-6"
            )
        if self.dtype == "4bit" and not self.lora_rank:
            raise ValueError(
                "dtype 4bit can only be trained through an adapter: give a --lora_rank above 0"
            )
        if self.adapter and not self.lora_rank:
            raise ValueError(
                "a model with an --adapter can only be trained through it: give a --lora_rank "
                "above 0"
            )
        if self.adapter and self.beta:
            raise ValueError(
                "beta keeps the policy near the base without its adapter: merge --adapter first, "
                "by python -m models.merge, and train from the merged model"
            )
        if self.prompts_per_step * self.num_generations > 1_000_000:
            raise ValueError(
                f"prompts_per_step x num_generations = {self.prompts_per_step} x "
                f"{self.num_generations}: a step can have at most a million completions"
            )


# What changes for other tasks, with the tiny model.
# Sudoku's rows are twice as long, so a step has half as many. Its rewards are dense (each cell
# counts), so wrong grids earn something too, and a high nfe_penalty would teach the model to hurry.
# Chain decodes in blocks of two numbers, the second of which needs the first.
# Countdown and sudoku in one run have 120 steps each and share one nfe_penalty; this is not tuned.
TASK_RECIPES = {
    "sudoku": {
        "prompts_per_step": 16,
        "steps": 140,
        "nfe_penalty": 0.15,
        "learning_rate": 1e-3,
    },
    "chain": {
        "prompts_per_step": 16,
        "steps": 60,
        "block_length": 2,
        "learning_rate": 1e-3,
    },
    "countdown,sudoku": {
        "prompts_per_step": 24,
        "steps": 240,
        "nfe_penalty": 0.25,
        "learning_rate": 1e-3,
    },
}

# What changes for checkpoints other than the tiny model, by their size. Not tuned: no such model
# was available. LLaDA's recipe has d1's value for each setting that d1 has, except for num_stages,
# importance_weight_cap and nfe_penalty, which belong to the method, and for these:
#     num_iterations  8, which d1 has for its planning tasks (countdown, sudoku); 12 for the others
#     normalise_by    canvas: gives the policy gradient if the likelihood is exact (diffpo_loss.py).
#                     d1 divides by the number of all tokens in a micro-batch, which is not offered
#     beta            0: 0.04 held mean-field back on chain (EXPERIMENTS.md)
#     lora_dropout    0: it adds noise to the ratio
#     scale_rewards   true: our choice
#     p_mask_prompt   0: our choice
#     dtype           auto, which is bfloat16 on a GPU; 4bit only where memory is short, see below
MODEL_RECIPES = {
    "LLaDA": {
        "prompts_per_step": 16,
        "num_generations": 6,
        "steps": 300,
        "max_completion_length": 256,
        "temperature": 0.9,
        "block_length": 32,
        "cache": "dual",
        "epsilon": 0.5,
        "num_iterations": 8,
        "nfe_penalty": 0.25,
        "learning_rate": 3e-6,
        "max_grad_norm": 0.2,
        "weight_decay": 0.1,
        "threshold_learning_rate": 3e-3,
        "micro_batch_size": 12,
        "lora_rank": 128,
        "lora_alpha": 64,
        "gradient_checkpointing": True,
        "save_every": 10,  # a step takes minutes
        "eval_problems": 256,
        "frontier": False,
    },
}
MODEL_RECIPES["small"] = MODEL_RECIPES["LLaDA"] | {  # below 2 billion parameters
    "learning_rate": 1e-5,
    "lora_rank": 64,
    "rollout_batch_size": 24,
}

# What changes in LLaDA's recipe on a GPU with less memory. Small models fit without a change.
MEMORY_RECIPES = {
    "48 GB": {"rollout_batch_size": 48},
    "24 GB": {"rollout_batch_size": 24, "dtype": "4bit"},
}

# What --resume may change; config.json then has the new value. Only `steps`, `cache`, `device` (a
# GPU draws other random numbers) and, with lora_dropout, `micro_batch_size` change what is learned;
# the others change at most its last digits.
CHANGEABLE_ON_RESUME = (
    "steps",
    "run_dir",
    "device",
    "report_to",
    "cache",
    "compile",
    "rollout_batch_size",
    "micro_batch_size",
    "gradient_checkpointing",
    "shard",
    "save_every",
)
# Names that --resume may change if they refer to the same content (models/inputs.py).
MOVABLE_ON_RESUME = ("task", "model", "adapter", "data")


def config_from_json(saved, file):
    """The Config in a run's config.json.

    saved  its content, a dict
    file   its path, for messages

    Raises ValueError if its fields are not Config's, or a value is out of range.
    """
    expected = {f.name for f in fields(Config)}
    if set(saved) != expected:
        differing = sorted(set(saved) ^ expected)[0]
        raise ValueError(
            f"{file} has other fields than this train.py's ({differing}): it was edited, or "
            "written by another version of train.py. Restore it, or start a new run"
        )
    try:
        return Config(**saved)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
