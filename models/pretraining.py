"""How the tiny model's base is trained: masked diffusion on demonstrations, in two lessons.

A base model can do more than its greedy answers show, and RL brings it out. Two lessons produce
such a base:

    1. The model learns from good demonstrations: problems with right answers.
    2. It acquires a bad habit: for a short while most demonstrations are careless. (Countdown's
       write + for - and * for /. Sudoku's fill each row in ascending order and ignore the rest.)

After that its most likely answer is a careless one, although it has learned the right one too.
Without the second lesson greedy answers are about as good as the model can do, so that RL has
little to gain.

The loss is LLaDA's:

    t ~ U(0, 1);  each of a completion's L tokens is masked with probability t
    loss = 1/L sum over the masked tokens of  -log p(token | prompt, what is not masked) / t

On average it is an upper bound on a token's negative log-likelihood.

Shapes: N demonstrations, B of them per step, P prompt tokens, L completion tokens.
"""

import hashlib
import json
import math
import random
import signal
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

from models.beside import beside
from models.errors import as_value_error
from models.permissions import apply_umask
from models.tiny import DEVICE, tiny_denoiser, tiny_tokenizer

WARMUP_STEPS = 50


def encode(tokenizer, pairs, length):
    """Tokens of N (prompt, completion) texts: prompt (N, P), prompt_mask (N, P), completion (N, L).

    Prompts are padded on the left, completions with [EOS] up to L = `length`. Raises ValueError for
    a text that the tokenizer cannot read, and for a completion longer than L.
    """
    prompts = [prompt for prompt, _ in pairs]
    completions = [completion for _, completion in pairs]
    try:
        prompt = tokenizer(prompts, padding=True, return_tensors="pt")
        rows = tokenizer(completions).input_ids
    except Exception:  # the tokenizers library raises bare Exceptions
        raise ValueError(
            "tiny has no tokens for a demonstration: it knows 0 to 99, +-*/()= and <answer> tags"
        ) from None
    longest = max(len(row) for row in rows)
    if longest > length:
        raise ValueError(f"a demonstration has {longest} tokens, but its task's length is {length}")
    filled = [row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows]
    return prompt.input_ids, prompt.attention_mask, torch.tensor(filled)


def masked_loss(denoiser, prompt, prompt_mask, completion, mask_id, generator):
    """The masked-diffusion loss of B demonstrations, a scalar in nats per token.

    prompt, prompt_mask  (B, P), padded on the left
    completion           (B, L)
    generator            a torch.Generator on the CPU, for t and the masks
    """
    B, L = completion.shape
    # Stratified: one t in each B-th of (0, 1), so that the loss varies less.
    t = (torch.arange(B) + torch.rand(B, generator=generator)) / B
    t = t.clamp(min=1e-3).unsqueeze(1).expand(-1, L)  # (B, L)
    masked = torch.rand((B, L), generator=generator) < t
    t = t.to(completion.device)
    masked = masked.to(completion.device)

    ids = torch.cat([prompt, completion.masked_fill(masked, mask_id)], dim=1)  # (B, P + L)
    attention_mask = None
    position_ids = None
    if not prompt_mask.all():
        attention_mask = pad(prompt_mask, (0, L), value=1)  # (B, P + L)
        position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = denoiser(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
    ).logits[:, -L:]  # (B, L, V)
    nats = cross_entropy(logits[masked], completion[masked], reduction="none")
    return (nats / t[masked]).sum() / (B * L)


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose updates are made orthogonal (Jordan et al. 2024).

    Here it needs a quarter fewer steps than AdamW. torch.optim.Muon multiplies in bfloat16, which
    is 15 times slower on a CPU without bfloat16 instructions.
    """

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"]
                momentum.mul_(0.95).add_(p.grad)
                direction = orthogonal(p.grad + 0.95 * momentum)  # Nesterov's
                rows, columns = p.shape
                p.sub_(direction, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix):
    """`matrix` with all singular values made about 1, by five Newton-Schulz steps."""
    rows, columns = matrix.shape
    x = matrix / (matrix.norm() + 1e-7)
    if rows > columns:
        x = x.T
    for _ in range(5):
        xx = x @ x.T
        x = 3.4445 * x + (2.0315 * xx @ xx - 4.7750 * xx) @ x
    return x.T if rows > columns else x


class Training:
    """Both lessons, step by step. Between any two steps `state` can be saved.

    tasks   objects with prompt, length and demonstrations; they take turns, one step each
    recipe  models.make_base.Recipe
    """

    def __init__(self, tasks, recipe, device=DEVICE):
        self.tasks = tasks
        self.recipe = recipe
        self.device = device
        self.done = 0  # number of steps done
        self.tokenizer = tiny_tokenizer()
        self.denoiser = tiny_denoiser(self.tokenizer, recipe.seed, layers=recipe.layers).to(device)
        matrices = []  # the layers' matrices
        others = []  # embeddings and norms
        for name, p in self.denoiser.named_parameters():
            if "layers" in name and p.ndim == 2:
                matrices.append(p)
            else:
                others.append(p)
        self.muon = Muon(matrices, lr=0.0)
        self.adamw = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self):
        """One step on B fresh demonstrations. Returns its loss, a float.

        All randomness is derived from (seed, step), so an interrupted training ends with the same
        weights once it is resumed.
        """
        recipe = self.recipe
        step = self.done
        if step < recipe.steps:
            task = self.tasks[step % len(self.tasks)]
            careless = 0.0
        else:
            distinct = list(dict.fromkeys(self.tasks))  # every task gets as many steps
            task = distinct[step % len(distinct)]
            careless = recipe.careless
        demonstrations = task.demonstrations(recipe.batch, f"{recipe.seed} {step}", careless)
        pairs = [(task.prompt(problem), text) for problem, text in demonstrations]
        prompt, prompt_mask, completion = encode(self.tokenizer, pairs, task.length)
        seed = random.Random(f"{recipe.seed} {step}").getrandbits(63)
        loss = masked_loss(
            self.denoiser,
            prompt.to(self.device),
            prompt_mask.to(self.device),
            completion.to(self.device),
            mask_id=self.tokenizer.mask_token_id,
            generator=torch.Generator().manual_seed(seed),
        )
        self.denoiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)

        # After the warm-up the rate follows a cosine to a tenth, at which the habit is learned.
        cosine = 0.55 + 0.45 * math.cos(math.pi * min(1, step / recipe.steps))
        rate = recipe.learning_rate * min(1, (step + 1) / WARMUP_STEPS) * cosine
        self.muon.param_groups[0]["lr"] = 5 * rate
        self.muon.step()
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        self.done += 1
        return loss.item()

    def state(self):
        """Everything the next step depends on except the seed, for torch.save."""
        return {
            "done": self.done,
            "model": self.denoiser.state_dict(),
            "optimizers": [self.muon.state_dict(), self.adamw.state_dict()],
        }

    def load(self, state):
        self.done = state["done"]
        self.denoiser.load_state_dict(state["model"])
        muon_state, adamw_state = state["optimizers"]
        self.muon.load_state_dict(muon_state)
        self.adamw.load_state_dict(adamw_state)


def make(out, tasks, recipe, about, save_every=200, device=DEVICE):
    """Trains a base for some tasks, which take turns. `out`: its new folder, a Path.

    about: further entries for made.json, a dict. It also holds the recipe, the versions and the
    weights' checksum.

    Until training is done its state is kept in OUT.training, from which the same call continues.
    Ctrl-C finishes the step, saves and raises KeyboardInterrupt. Raises ValueError if that state
    belongs to another recipe or is broken, and if the loss is not finite.
    """
    training = Training(tasks, recipe, device)
    about = about | {
        "recipe": asdict(recipe),
        "torch": str(torch.__version__),
        "device": device,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with as_value_error(f"{out} cannot be written"):  # better now than after an hour
        tempfile.TemporaryFile(dir=out.parent).close()
    state_file = out.with_name(f"{out.name}.training")
    seconds_before = 0.0
    if state_file.exists():
        with as_value_error(
            f"{state_file} was not written by make_base: move it away to start again"
        ):
            saved = torch.load(state_file, device, weights_only=True)
            if saved["about"] == about:
                training.load(saved)
                seconds_before = saved["seconds"]
        if saved["about"] != about:
            raise ValueError(f"{state_file} belongs to another recipe: remove it to start again")

    began = time.perf_counter()
    seconds = seconds_before
    total = recipe.steps + recipe.habit_steps
    losses = []
    bar = tqdm(range(training.done, total), desc="base", total=total, initial=training.done)
    with finish_step_on_ctrl_c() as stopped:
        for step in bar:
            losses.append(training.step())
            if not math.isfinite(losses[-1]):
                raise ValueError(f"step {step + 1}: the loss is not finite: lower --learning_rate")
            if (step + 1) % save_every == 0 or step + 1 == total or stopped:
                seconds = seconds_before + time.perf_counter() - began
                recent = losses[-save_every:]
                bar.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}")
                with (
                    as_value_error(f"{state_file} cannot be written"),
                    beside(state_file) as temporary,
                ):
                    torch.save(training.state() | {"about": about, "seconds": seconds}, temporary)
            if stopped:
                raise KeyboardInterrupt

    with as_value_error(f"{out} cannot be written"), beside(out) as folder:
        training.denoiser.to(torch.bfloat16).save_pretrained(folder)  # half the size
        training.tokenizer.save_pretrained(folder)
        apply_umask(folder)
        made = about | {
            "minutes": round(seconds / 60, 1),
            "threads": torch.get_num_threads(),
            "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        }
        (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    state_file.unlink()


@contextmanager
def finish_step_on_ctrl_c():
    """Yields a list that stays empty until Ctrl-C is typed. A second Ctrl-C stops at once."""
    stopped = []

    def stop(number, frame):
        stopped.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, previous)
