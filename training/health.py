"""Numbers that have gone wrong: those that stop a run, and those that it warns about.

A number that is not finite must not reach the optimizer, where it would spoil every weight and then
the checkpoint. Other numbers mean that nothing is being learned; a run warns about each once.
"""

from dataclasses import dataclass, fields
from statistics import fmean

import torch
from safetensors.torch import save_file

from diffusion_policy import NotFinite
from training import distributed

# ---- what stops a run ----------------------------------------------------------------------------


def assert_finite(name, tensor, rollout=None):
    """Raises NotFinite, with the quantity's name and the first bad row, unless all is finite."""
    is_finite = tensor.isfinite()
    if is_finite.all():
        return
    row = ""
    if tensor.dim() > 0:
        row = f" of row {int((~is_finite).nonzero()[0, 0])}"
    raise NotFinite(f"{name}{row} is not finite", rollout)


def assert_finite_weights(model):
    """Raises NotFinite, with the weight's name, unless every trained weight is finite."""
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight = weight.detach()
            if distributed.is_sharded_tensor(weight):
                weight = weight.to_local()
            assert_finite(f"weight {name}", weight)


def save_bad_batch(error, run_dir, step):
    """Writes a NotFinite's batch to a file. Returns a one-line ValueError for the user.

    It names the step and the quantity, the batch's file, the last checkpoint and what to change.
    """
    message = [f"step {step}: {error}"]
    if error.rollout is not None and distributed.is_main_process():
        file = run_dir / f"broken-{step}.safetensors"
        tensors = {}
        for field in fields(error.rollout):
            value = getattr(error.rollout, field.name)
            if isinstance(value, torch.Tensor):
                tensors[field.name] = value.contiguous()
        save_file(tensors, file)
        message.append(f"its batch is in {file}")
    if (run_dir / "checkpoint").exists():
        message.append("the last checkpoint is from before it")
    message.append(
        "a lower --learning_rate or --threshold_learning_rate, or more --warmup_steps, may help"
    )
    return ValueError("; ".join(message))


# ---- what a run warns of -------------------------------------------------------------------------

STEPS_LOOKED_BACK = 50  # the number of steps that has_doubled looks at


@dataclass
class RangeWarning:
    """A warning if the metric of a run's last step lies between low and high, both included."""

    metric: str
    low: float
    high: float
    text: str

    def applies(self, rows):
        value = rows[-1].get(self.metric)
        return value is not None and self.low <= value <= self.high


@dataclass
class DoublingWarning:
    """A warning if a run's metric has doubled within STEPS_LOOKED_BACK steps."""

    metric: str
    text: str

    def applies(self, rows):
        return has_doubled([row.get(self.metric) for row in rows])


def has_doubled(values, windows=5, size=STEPS_LOOKED_BACK // 5):
    """Whether the means of the last 5 windows of 10 values rise from window to window, to almost
    twice the first. (In 68 logged runs this flagged two of three collapses, one decline, and no run
    that went well.)
    """
    recent = values[-windows * size :]
    if len(recent) < windows * size or None in recent:
        return False
    means = [fmean(recent[start : start + size]) for start in range(0, len(recent), size)]
    always_rises = all(low < high for low, high in zip(means, means[1:], strict=False))
    return always_rises and means[-1] > max(1.9 * means[0], 0.01)


# Each text says what the number means and which setting to change.
WARNINGS = [
    RangeWarning(
        metric="frac_reward_zero_std",
        low=1,
        high=1,
        text="in every group all completions earn the same reward, so nothing is learned: try "
        "easier --data, a larger --num_generations or a --temperature nearer 1",
    ),
    RangeWarning(
        metric="completion_length_mean",
        low=0,
        high=1,
        text="every completion is empty: it ends with its first token. Is this an Instruct model, "
        "and is --prefill right?",
    ),
    RangeWarning(
        metric="capped_weight_fraction",
        low=0.999,
        high=1,
        text="every importance weight is capped, so the surrogate is sure where the policy was "
        "not: try more --num_stages or a lower --learning_rate",
    ),
    RangeWarning(
        metric="ess_fraction",
        low=0,
        high=0.1,
        text="the importance weights reduce the effective sample to less than a tenth of the "
        "tokens: try a lower --importance_weight_cap or more --num_stages",
    ),
    RangeWarning(
        metric="threshold_mean",
        low=0,
        high=1.05e-3,
        text="γ is at its lower bound, about one token per call: try a higher --nfe_penalty",
    ),
    RangeWarning(
        metric="threshold_mean",
        low=9.5,
        high=10,
        text="γ is at its upper bound, everything in one call: try a lower --nfe_penalty",
    ),
    DoublingWarning(
        metric="surrogate_kl",
        text="the surrogate's KL has doubled in 50 steps, as before a collapse: try more "
        "--num_stages, a lower --learning_rate or fewer --num_iterations",
    ),
]


def new_warnings(rows, already_warned):
    """Yields the text of each warning that applies to the metrics' last row for the first time.

    already_warned: the set of texts already given; new ones are added to it.
    """
    for warning in WARNINGS:
        if warning.text not in already_warned and warning.applies(rows):
            already_warned.add(warning.text)
            yield warning.text
