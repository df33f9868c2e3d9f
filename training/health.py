"""Numbers gone wrong: what stops a run, and what it is warned of.

A number that is not finite must not reach the optimizer: it would spoil every weight, and the
checkpoint after that. Other numbers mean that nothing is learned; those are said once.
"""

from dataclasses import fields
from statistics import fmean

import torch
from safetensors.torch import save_file

from training import distributed


class NotFinite(ValueError):
    """A quantity of some row is NaN or infinite. `rollout` is the batch it came from."""

    def __init__(self, what, rollout=None):
        super().__init__(what)
        self.rollout = rollout


def assert_finite(what, value, rollout=None):
    """Raises NotFinite, naming the row, unless all of a tensor is finite."""
    if not (good := value.isfinite()).all():
        row = f" of row {int((~good).nonzero()[0, 0])}" if value.dim() else ""
        raise NotFinite(f"{what}{row} is not finite", rollout)


def assert_finite_weights(model):
    for name, p in model.named_parameters():
        if p.requires_grad:
            p = p.detach()
            assert_finite(f"weight {name}", p.to_local() if distributed.is_sharded_tensor(p) else p)


def save_bad_batch(error, run_dir, step):
    """A NotFinite as a ValueError that says all: the step, the batch's file, where to go on."""
    said, rollout = f"step {step}: {error}", error.rollout
    if rollout is not None and distributed.is_main_process():
        file = run_dir / f"broken-{step}.safetensors"
        tensors = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
        tensors = {k: v.contiguous() for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        save_file(tensors, file)
        said += f"; its batch is in {file}"
    kept = "the last checkpoint is from before it" if (run_dir / "checkpoint").exists() else ""
    advice = (
        "a lower --learning_rate or --threshold_learning_rate, or more --warmup_steps, may help"
    )
    return ValueError("; ".join(filter(None, (said, kept, advice))))


# ---- what a run is warned of ---------------------------------------------------------------------


STEPS_LOOKED_BACK = 50  # steps that the last of the warnings looks back


def has_doubled(values, windows=5, size=STEPS_LOOKED_BACK // 5):
    """Whether the means of the last five times ten values rise from each to the next, to almost
    twice the first. (In 68 logged runs: two of three collapses, one decline, none that went well.)
    """
    if len(values) < windows * size or None in values[-windows * size :]:
        return False
    ends = range(len(values) - (windows - 1) * size, len(values) + 1, size)
    means = [fmean(values[end - size : end]) for end in ends]
    rises = all(low < high for low, high in zip(means, means[1:], strict=False))
    return rises and means[-1] > max(1.9 * means[0], 0.01)


def last(name, low, high):
    """A check that a metric of the last step lies between low and high."""
    return lambda rows: rows[-1].get(name) is not None and low <= rows[-1][name] <= high


WARNINGS = {  # what it means and what to change: when
    "no completions of one prompt differ in reward, so nothing is learned: an easier --data, a "
    "larger --num_generations or a --temperature nearer 1": last("frac_reward_zero_std", 1, 1),
    "every completion is empty: it ends with its first token. Is the model an Instruct one, and "
    "--prefill right?": last("completion_length_mean", 0, 1),
    "every importance weight is capped, so the surrogate is sure where the policy was not: more "
    "--num_stages or a lower --learning_rate": last("capped_weight_fraction", 0.999, 1),
    "the importance weights leave less than a tenth of the tokens as a sample: a lower "
    "--importance_weight_cap or more --num_stages": last("ess_fraction", 0, 0.1),
    "γ is at its lower bound, about one token a call: a higher --nfe_penalty": last(
        "threshold_mean", 0, 1.05e-3
    ),
    "γ is at its upper bound, everything in one call: a lower --nfe_penalty": last(
        "threshold_mean", 9.5, 10
    ),
    "the surrogate's KL has doubled in 50 steps, as before a collapse: more --num_stages, a lower "
    "--learning_rate or fewer --num_iterations": lambda rows: has_doubled(
        [row.get("surrogate_kl") for row in rows]
    ),
}


def new_warnings(rows, said):
    """Yields what is wrong after the last of the metrics' rows and not yet in the set `said`."""
    for text, applies in WARNINGS.items():
        if text not in said and applies(rows):
            said.add(text)
            yield text
