"""A model at some point of training, and the rollouts that training would draw from it there.

gradients.py and surrogate.py measure such states one by one, so their results do not include the
variation between training runs. Rollouts are made as in train.py, with its prompts, groups, rewards
and thresholds.

Shapes: B = P * G rows of a batch, L completion tokens.
"""

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import torch

from config import MODEL_RECIPES, TASK_RECIPES, Config
from diffpo_loss import group_advantages
from diffusion_policy import Rollout
from evaluation.options import verify_inputs
from models import inputs
from models.checkpoints import (
    find_checkpoint,
    load_policy,
    read_run_config,
    reads_compact_prompts,
)
from models.device import device_name, pick_device
from models.prompting import decode_completions, encode_prompts
from tasks import mixture, registry
from train import rollout_decoder
from training.run_folder import prepare_threshold_head

# The surrogate likelihoods compared at each state: numbers of stages m, and caps of the weights.
STAGES = (1, 2, 4, 8)
CAPS = {"no weights": 0, "C = 1": 1, "C = 2": 2, "C = 5": 5, "no cap": inf}
EXACT = "exact"  # a boundary at every step; used in place of a number of stages
TWO_STEPS = "two steps, x T/2"  # two random steps scored exactly


@dataclass
class Batch:
    """The rollouts of one training step."""

    rollout: Rollout  #             B rows, a prompt's rows adjacent
    advantage: torch.Tensor  #      (B,)
    generator: torch.Generator  #   for what is drawn next: the boundaries


class State:
    """A model, its task, and the settings with which it is trained.

    path          a run's folder, or a base: "tiny", a checkpoint's folder, a hub name
    task_name     the task of a base; None for a run, which has its own, unless that is in a file
    prompts       P, prompts per batch; None: as in training
    block_length  decode in blocks of this many tokens, 0 for one block; None: as in training

    All weights are float32 and have gradients. A run's adapter is merged into them, so that a base
    and its runs have the same parameters. Raises ValueError for a task that the model cannot do.
    """

    def __init__(self, path, task_name=None, prompts=None, block_length=None):
        self.path = path
        is_compact = reads_compact_prompts(path)
        if is_run(path):
            self.config = read_run_config(path)
            typed = {"task": task_name} if task_name else {}
            verify_inputs(path, typed, self.config, inputs.read_inputs(path))
            self.config = replace(self.config, **typed)
        else:
            recipe = TASK_RECIPES.get(task_name, {}) if is_compact else MODEL_RECIPES["LLaDA"]
            self.config = replace(Config(**recipe), task=task_name, model=str(path))
        if block_length is not None:
            self.config = replace(self.config, block_length=block_length)
        self.task = registry.load_task(self.config.task, is_compact, self.config.data)
        if isinstance(self.task, mixture.TaskMixture):
            raise ValueError(f"{path}: {self.config.task} are several tasks, but a state has one")
        self.length = self.config.max_completion_length or self.task.length
        self.prompts = prompts or self.config.prompts_per_step

        self.device = pick_device()
        self.policy = load_policy(path, self.device, torch.float32)
        self.policy.prefill = self.config.prefill
        self.policy.rollout_batch_size = self.config.rollout_batch_size
        if hasattr(self.policy.denoiser, "disable_adapter"):
            self.policy.denoiser = self.policy.denoiser.merge_and_unload()
        self.policy.denoiser.requires_grad_(True)
        prepare_threshold_head(self.policy, self.config, self.device)
        self.step = self.policy.step or 0
        self.name = inputs.bare_name(self.config.task)
        if block_length is not None:
            self.name += f" in blocks of {block_length}" if block_length else " in one block"
        self.name += f", after step {self.step}" if self.step else ", base"

    def description(self):
        """What was measured, as a dict for JSON."""
        return {
            "name": self.name,
            "path": str(self.path),
            "task": self.config.task,
            "step": self.step,
            "prompts": self.prompts,
            "num_generations": self.config.num_generations,
            "block_length": self.config.block_length,
            "device": device_name(self.device),
            "dtype": "float32",
        }

    def sample_batch(self, seed):
        """The Batch of a training step. Each seed gives other problems and other draws."""
        G = self.config.num_generations
        L = self.length
        generator = torch.Generator(self.device).manual_seed(seed)
        # "claims" is arbitrary, but another word would draw other problems than in EXPERIMENTS.md.
        problems = self.task.problems("train", self.prompts, f"claims {seed}")
        problems = [problem for problem in problems for _ in range(G)]  # B = P * G
        prompts = [self.task.prompt(problem) for problem in problems]
        prompt_ids, prompt_mask = encode_prompts(self.policy, prompts, room=L)
        rollout = self.policy.rollout(
            prompt_ids,
            prompt_mask,
            length=L,
            decoder=rollout_decoder(self.config),
            generator=generator,
        )
        texts = decode_completions(self.policy, rollout)
        rewards = [self.task.reward(*pair) for pair in zip(problems, texts, strict=True)]
        reward = torch.tensor(rewards, device=self.device)
        speed_reward = reward * (1 - self.config.nfe_penalty * rollout.nfe / L)
        advantage = group_advantages(speed_reward, G, self.config.scale_rewards)
        return Batch(rollout, advantage, generator)


def is_run(path):
    """Whether a path is the folder of a run with a checkpoint."""
    return find_checkpoint(path) != Path(path)


def load_states(paths, task_names, prompts, block_length):
    """A State for each run, and for each base and task. Raises ValueError."""
    states = []
    for path in paths:
        if is_run(path):
            own = read_run_config(path).task
            named = [
                task for task in task_names if inputs.bare_names(task) == inputs.bare_names(own)
            ]
            states.append(State(path, named[0] if named else None, prompts, block_length))
            continue
        if not task_names:
            raise ValueError(f"{path} is not a run, so its task is unknown: give a --task")
        for name in task_names:
            states.append(State(path, name, prompts, block_length))
    return states
