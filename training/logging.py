"""What a run logs: every metric with its meaning, and where the numbers go.

    runs/NAME/metrics.jsonl   one line per step, with every key of METRICS
    runs/NAME/samples.jsonl   a few completions of each step
    --report_to NAME          the same metrics to tensorboard, trackio or wandb

Metrics are computed over all rows and micro-batches of a step, and averaged over its inner updates.
A metric that does not apply is None.
"""

import importlib
import re
import sys
import time
import uuid
from dataclasses import asdict
from statistics import fmean

from models.checkpoints import check_fields, read_json_object
from models.device import peak_memory_gib
from models.errors import as_value_error
from training import distributed, files

METRICS = {
    # the rollouts
    "step": "RL steps done, each of num_iterations updates",
    "reward_mean": "the verifier's reward, before the penalty on NFE",
    "speed_reward_mean": "what is maximised: the reward times 1 - lambda * NFE / L",
    "solved_mean": "fraction of rollouts that solve their problem",
    "frac_reward_zero_std": "fraction of prompts whose completions all earn the same, so that they "
    "teach nothing",
    "nfe_mean": "denoiser calls per completion",
    "completion_length_mean": "tokens per completion, including its end token",
    "threshold_mean": "mean gamma, nats",
    "threshold_std": "gamma's standard deviation over the batch, exploration included",
    "cache_kl": "KL(rollout || exact policy), nats per token: the block cache's error, estimated "
    "from 16 states of one row",
    # the model's update
    "loss": "the model's objective, negated; its value at the first inner update says nothing: see "
    "diffpo_loss.py",
    "ratio_mean": "new over old surrogate; exactly 1 at the first inner update",
    "clip_fraction": "fraction of tokens whose gradient is 0 by clipping",
    "importance_weight_mean": "mean importance weight, capped",
    "importance_weight_max": "largest importance weight, before the cap",
    "capped_weight_fraction": "fraction of tokens whose weight the cap lowers beyond rounding",
    "ess_fraction": "effective sample size of the capped weights, over the number of tokens",
    "surrogate_kl": "KL(true || surrogate), nats per token, before the update",
    "unit_weight_error": "RMS of log w where w should be 1: rounding, plus a block cache's error",
    "reference_kl": "KL(new || base model), k3 estimate, if beta is above 0",
    "grad_norm": "norm of the denoiser's gradient before clipping",
    # the sampler's update
    "threshold_loss": "the sampler's objective, negated",
    "threshold_ratio": "new over old density of gamma, last inner update",
    "threshold_clip_fraction": "fraction of completions whose gamma's gradient is 0 by clipping",
    # the step's cost
    "denoiser_rows": "rows run by the step's denoiser calls: in the rollout, in scoring, by a "
    "reference model and for cache_kl",
    "seconds_rollout": "seconds to complete the batch",
    "seconds_update": "seconds to verify the batch and to learn from it",
    "tokens_per_second": "completion tokens per second of rollout",
    "peak_memory_gib": "peak memory so far, of the GPU, else of the process",
}

# The metrics that are read back from metrics.jsonl for progress lines, warnings and plots.
READ_BACK = dict.fromkeys(
    (
        "reward_mean",
        "solved_mean",
        "nfe_mean",
        "threshold_mean",
        "seconds_rollout",
        "seconds_update",
    ),
    float,
)


def read_metrics(run_dir):
    """The rows of metrics.jsonl, each step once. Lines that are not such rows are skipped."""
    rows = files.read_log(run_dir / "metrics.jsonl", READ_BACK)
    first_of_step = {}
    for row in rows:
        first_of_step.setdefault(row["step"], row)
    return list(first_of_step.values())


def rollout_metrics(rollout, advantage, num_generations):
    """The metrics of a batch of rollouts, which do not depend on what learns from it.

    advantage (B,), with the num_generations rows of a prompt adjacent.
    """
    is_flat = (advantage.view(-1, num_generations) == 0).all(dim=1)  # (P,)
    return {
        "frac_reward_zero_std": is_flat.float().mean().item(),
        "nfe_mean": rollout.nfe.float().mean().item(),
        "completion_length_mean": rollout.token_mask.sum(dim=1).float().mean().item(),
        "threshold_mean": rollout.threshold.mean().item(),
        "threshold_std": rollout.threshold.std(unbiased=False).item(),
    }


class StepCost:
    """Measures what a step costs, starting when the object is created.

    policy, reference: the policies whose denoiser calls count; reference may be None.
    """

    def __init__(self, policy, reference):
        self.policies = [policy] if reference is None else [policy, reference]
        self.rows_before = self.count_rows()
        self.began = time.perf_counter()
        self.rollout_ended = None

    def count_rows(self):
        """The rows that all denoiser calls so far have run, in this process."""
        return sum(policy.rows_run for policy in self.policies)

    def end_rollout(self):
        """Call this once the batch is completed: what follows is the update."""
        self.rollout_ended = time.perf_counter()

    def metrics(self, rollout):
        """The step's cost so far, over all processes."""
        seconds_rollout = self.rollout_ended - self.began
        return {
            "denoiser_rows": distributed.all_reduce_sum(self.count_rows() - self.rows_before),
            "seconds_rollout": seconds_rollout,
            "seconds_update": time.perf_counter() - self.rollout_ended,
            "tokens_per_second": rollout.token_mask.sum().item() / seconds_rollout,
            "peak_memory_gib": distributed.all_reduce_max(peak_memory_gib()),
        }


def sample_rows(problems, texts, rollout, reward):
    """The first completion of each of the first four different problems, for samples.jsonl.

    unmask_steps: the step, from 1, at which each token of the text, including its end token, was
    drawn.
    """
    first = []
    for i, problem in enumerate(problems):
        if len(first) < 4 and all(problem != problems[j] for j in first):
            first.append(i)
    return [
        {
            "problem": problems[i],
            "text": texts[i],
            "reward": four_digits(reward[i]),
            "nfe": rollout.nfe[i].item(),
            "threshold": four_digits(rollout.threshold[i]),
            "unmask_steps": rollout.unmask_step[i][rollout.token_mask[i]].tolist(),
        }
        for i in first
    ]


def four_digits(number):
    """A scalar tensor as a float of four significant digits: enough to read."""
    return float(f"{number.item():.4g}")


def log_step(run_dir, step, metrics, samples):
    """Append one line to metrics.jsonl, and the sampled completions to samples.jsonl."""
    row = dict.fromkeys(METRICS) | metrics | {"step": step}
    files.append_lines(run_dir / "metrics.jsonl", [row])
    files.append_lines(run_dir / "samples.jsonl", [sample | {"step": step} for sample in samples])


def print_progress(run_dir, bar, step, metrics):
    """Ten times in a run, print a line: means over a tenth of the steps, seconds in total.

    If a tenth of the run takes longer than ten minutes, a line is printed about every ten minutes.

    metrics: this step's
    """
    steps = bar.total
    is_tenth = step * 10 // steps != (step - 1) * 10 // steps
    seconds_of_step = metrics["seconds_rollout"] + metrics["seconds_update"]
    steps_in_ten_minutes = max(1, round(600 / max(seconds_of_step, 0.01)))
    is_overdue = steps_in_ten_minutes < steps / 10 and step % steps_in_ten_minutes == 0
    if not is_tenth and not is_overdue:
        return
    rows = read_metrics(run_dir)
    seconds = sum(row["seconds_rollout"] + row["seconds_update"] for row in rows)
    tenth = rows[-max(1, steps // 10) :]

    def mean(name):
        return fmean(row[name] for row in tenth)

    bar.write(
        f"step {step:{len(str(steps))}}/{steps}  reward {mean('reward_mean'):.3f}  "
        f"solved {mean('solved_mean'):5.1%}  NFE {mean('nfe_mean'):.2f}  "
        f"γ {mean('threshold_mean'):.3f}  {seconds:.0f} s"
    )


def import_tracker(report_to):
    """The module of --report_to, or None for "none". Raises ValueError if it is not installed.

    A run imports it before training starts, so that a missing module is noticed at once.
    """
    if report_to == "none":
        return None
    name = "torch.utils.tensorboard" if report_to == "tensorboard" else report_to
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"--report_to {report_to} needs a package: pip install {report_to}"
        ) from None


def open_tracker(report_to, run_dir, config, first_step):
    """Returns a function(metrics, step) that sends a step's metrics to a tracker; "none": nowhere.

    tensorboard writes to RUN/tensorboard; in trackio and wandb the project is called diffpo.

    first_step: the number of steps done so far. A resumed run continues its own curves. For the
    steps after its checkpoint, which it repeats, tensorboard drops the first values and wandb the
    second; trackio keeps both, which differ only in their times.

    Raises ValueError if the tracker refuses the run. If it fails later, the run continues.
    """
    tracker = import_tracker(report_to)
    if tracker is None:
        return lambda metrics, step: None
    if report_to == "tensorboard":
        writer = tracker.SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

        def report(metrics, step):
            for name, value in metrics.items():
                if value is not None:
                    writer.add_scalar(name, value, step)
            writer.flush()

    else:
        # wandb and trackio have the same interface, but wandb finds a run by its id, trackio by
        # name.
        name = tracker_name(run_dir)
        identity = {"id": name} if report_to == "wandb" else {}
        with as_value_error(f"--report_to {report_to}: it refuses the run"):
            tracker.init(
                project="diffpo",
                name=name,
                config=asdict(config),
                resume="allow",  # continue the run of this name if it exists
                **identity,
            )

        def report(metrics, step):
            tracker.log(metrics, step=step)

    has_failed = False

    def track(metrics, step):
        nonlocal has_failed
        try:
            report(metrics, step)
        except Exception as error:  # each tracker raises its own; metrics.jsonl has all
            if not has_failed:
                reason = " ".join(str(error).split())[:160]
                print(f"step {step}: {report_to} has failed ({reason})", file=sys.stderr)
            has_failed = True

    return track


def tracker_name(run_dir):
    """A run's name in wandb and trackio: the folder's name and a random number.

    RUN/tracker.json keeps it for a resumed run, because the folder may have been moved, and another
    folder may have the same name. (If you copy a run and continue both, remove it from the copy.)
    """
    file = run_dir / "tracker.json"
    if not file.exists():
        folder = re.sub(r"[^\w.-]", "-", run_dir.absolute().name, flags=re.ASCII)[:64]
        files.write_json(file, {"name": f"{folder}-{uuid.uuid4().hex[:8]}"})
    saved = read_json_object(file)
    check_fields(saved, {"name": str}, where=f"cannot read {file}: it")
    return saved["name"]
