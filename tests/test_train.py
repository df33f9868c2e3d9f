"""The training loop, its files and its manners. Every run here is a real one."""

import copy
import dataclasses
import json
import re
import shutil
import signal

import pytest
import torch
from checkpoints import random_adapter, write_checkpoint
from safetensors.torch import load_file
from toy import metrics_of, random_tiny, scores_of

import likelihood
import train
from config import Config
from diffusion_policy import DiffusionPolicy
from evaluate import evaluate
from likelihood import draw_boundaries, draw_masked_prompt, surrogate_logp
from models.checkpoints import load_policy, read_json
from models.loading import load_denoiser
from models.lora import save_adapter
from models.prompting import decode_completions, encode_prompts
from sampler import Decoder, ThresholdHead
from tasks.registry import TASKS
from training import measure, run_folder
from training.files import read_log, write_json
from training.logging import METRICS

PICTURES = "test_a_run_leaves_all_its_files_and_names_its_folder_last"


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take longer than all the rest of these runs; one test looks at them."""
    if request.node.name != PICTURES:
        monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])


@pytest.fixture
def run(tmp_path):
    """run(name, flag=value, ...) trains into tmp_path/name. Returns (exit code, folder).

    It is a small run unless flags say otherwise; with seed 4 its groups' rewards differ.
    """
    small_run = {
        "model": "tiny",
        "steps": 2,
        "prompts_per_step": 2,
        "num_generations": 3,
        "eval_problems": 4,
        "frontier": False,
        "lora_rank": 0,
        "seed": 4,
    }

    def start(name, resume=False, **flags):
        folder = tmp_path / name
        arguments = ["--resume"] if resume else []
        flags = ({} if resume else small_run) | {"run_dir": folder} | flags
        for key, value in flags.items():
            arguments += [f"--{key}", str(value)]
        return train.main(arguments), folder

    return start


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def weights_of(folder):
    return load_denoiser(str(folder / "checkpoint"))[0].state_dict()


def assert_equal_weights(folder, expected_folder):
    weights = weights_of(folder)
    expected = weights_of(expected_folder)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


# ---- the update ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """What update_denoiser takes: 12 rows, and the random choices of two inner updates."""

    policy: DiffusionPolicy
    rollout: object
    advantage: torch.Tensor
    updates: list


@pytest.fixture
def batch():
    policy = DiffusionPolicy(*random_tiny(3), ThresholdHead(104))
    task = TASKS["countdown"].compact
    generator = torch.Generator().manual_seed(0)
    prompts = [task.prompt(problem) for problem in task.problems("train", 12, 0)]
    prompt_ids, prompt_mask = encode_prompts(policy, prompts)
    decoder = Decoder("eb", 3.0, stop_at_eos=False)
    rollout = policy.rollout(prompt_ids, prompt_mask, 10, decoder, generator)
    updates = []
    for seed in range(2):
        boundaries = draw_boundaries(rollout.nfe, 2, generator)
        masked_prompt = draw_masked_prompt(prompt_mask, 1, 0.2, generator)
        updates.append(train.InnerUpdate(boundaries, masked_prompt, dropout_seed=seed))
    return Batch(policy, rollout, torch.randn(12, generator=generator), updates)


def update(batch, reference=None, **settings):
    """update_denoiser of a copy of the batch. Returns its weights after it, and its metrics.

    By plain SGD: Adam would hide the gradient's size.
    """
    batch = copy.deepcopy(batch)
    metrics = train.update_denoiser(
        Config(p_mask_prompt=0.2, max_grad_norm=1e9, **settings),
        batch.policy,
        reference,
        torch.optim.SGD(batch.policy.denoiser.parameters(), lr=0.1),
        batch.rollout,
        batch.advantage,
        batch.updates,
    )
    return torch.nn.utils.parameters_to_vector(batch.policy.denoiser.parameters()), metrics


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_micro_batch_size_changes_nothing(batch, beta):
    reference = DiffusionPolicy(*random_tiny(4)) if beta else None
    whole, metrics = update(batch, reference, micro_batch_size=12, beta=beta)
    before = torch.nn.utils.parameters_to_vector(batch.policy.denoiser.parameters())
    for size in (1, 5):
        parts, metrics_of_parts = update(batch, reference, micro_batch_size=size, beta=beta)
        torch.testing.assert_close(parts - before, whole - before, rtol=1e-3, atol=1e-6)
        assert metrics_of_parts == pytest.approx(metrics, rel=1e-3, abs=1e-5)


def test_the_first_inner_update_has_ratio_one_and_a_gradient(batch):
    batch.updates = batch.updates[:1]
    _, metrics = update(batch)
    assert metrics["ratio_mean"] == 1.0 and metrics["clip_fraction"] == 0.0
    assert metrics["grad_norm"] > 0.01


def test_the_second_inner_update_is_compared_with_the_policy_before_the_first(batch):
    _, metrics = update(batch)  # means of two: the second's ratio is off 1 by twice what is seen
    assert metrics["ratio_mean"] != 1.0 and abs(metrics["ratio_mean"] - 1) < 0.5


def test_speed_multiplies_the_reward(run, monkeypatch):
    def pay_by_length(self, problem, text):  # the base here solves nothing
        return len(text) % 7 / 6

    monkeypatch.setattr(type(TASKS["countdown"].compact), "reward", pay_by_length)
    batches = []

    def record(problems, texts, rollout, reward):
        batches.append((rollout, reward))
        return []

    monkeypatch.setattr(train, "sample_rows", record)
    _, folder = run("a", steps=1, prompts_per_step=1, num_generations=4, nfe_penalty=0.4)
    [(rollout, reward)] = batches
    expected = (reward * (1 - 0.4 * rollout.nfe / 10)).mean().item()
    assert metrics_of(folder)[0]["speed_reward_mean"] == pytest.approx(expected) != 0


def test_masked_prompt_tokens_are_in_the_ratio_and_not_in_the_weights(batch):
    rollout = batch.rollout
    every_step = torch.arange(1, int(rollout.nfe.max())).expand(12, -1)
    for inner_update in batch.updates:
        inner_update.boundaries = every_step
        assert inner_update.masked_prompt.any()
    masked_prompt = batch.updates[0].masked_prompt
    batch.updates = batch.updates[:1]
    _, metrics = update(batch)
    # Without masked prompt tokens that is the exact likelihood.
    assert metrics["surrogate_kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["unit_weight_error"] < 1e-5 and metrics["ratio_mean"] == 1.0
    with torch.no_grad():
        masked_logp = surrogate_logp(batch.policy, rollout, every_step, masked_prompt)
    difference = (rollout.behaviour_logp - masked_logp)[rollout.token_mask]
    assert difference.mean() > 1e-3 and difference.abs().mean() > 0.01  # it would be seen


def test_nothing_is_scored_for_the_log_alone(batch, monkeypatch):
    scored = []

    def counted(*arguments):
        scored.append(torch.is_grad_enabled())
        return surrogate_logp(*arguments)

    monkeypatch.setattr(likelihood, "surrogate_logp", counted)
    # With two updates: the second's old policy; each one's weights, if there are any; the new ones.
    update(batch)
    assert scored == [False, False, False, True, True]
    scored.clear()
    _, metrics = update(batch, importance_weight_cap=0.0)
    assert scored == [False, True, True]
    assert "surrogate_kl" not in metrics and metrics["grad_norm"] > 0
    scored.clear()
    for inner_update in batch.updates:
        inner_update.masked_prompt = None
    _, metrics = update(batch, importance_weight_cap=0.0)
    assert scored == [False, True, True] and metrics["surrogate_kl"] > 0


# ---- the run -------------------------------------------------------------------------------------


def test_a_run_leaves_all_its_files_and_names_its_folder_last(run, capsys):
    code, folder = run("a", frontier=True)
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and lines[-1] == str(folder)
    assert f"plots: {folder}/curves.png {folder}/frontier.png" in lines
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint",
        "completions.json",
        "config.json",
        "curves.png",
        "environment.txt",
        "eval.json",
        "frontier.json",
        "frontier.png",
        "inputs.json",
        "metrics.jsonl",
        "samples.jsonl",
    }
    rows = read_log(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(list(row) == list(METRICS) for row in rows)
    config = config_of(folder)
    assert list(config) == [field.name for field in dataclasses.fields(Config)]
    assert config["model"] == "tiny"
    evaluation = read_json(folder / "eval.json")
    names = ["base", "trained", "trained at starting γ"]
    assert [row["name"] for row in evaluation] == names
    contract = {
        "name",
        "decoder",
        "level",
        "solved",
        "solved_low",
        "solved_high",
        "reward",
        "nfe",
        "tokens_per_call",
        "problems",
        "clusters",
        "seed",
    }
    assert all(contract <= set(row) for row in evaluation)
    assert [row["level"] for row in evaluation] == [0.1, "learned", 0.1]
    for name in ("curves", "frontier"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    sample = read_log(folder / "samples.jsonl")[0]
    assert sample["reward"] == TASKS["countdown"].reward(sample["problem"], sample["text"])


def test_base_and_trained_are_measured_once_at_each_gamma(run, monkeypatch, capsys):
    measured = []
    kills = [3, 10]  # while the base's other gammas are measured, and while the trained model is

    def counted_evaluate(policy, task, problems, decoder, **options):
        measured.append(decoder.level)
        if len(measured) in kills:
            raise KeyboardInterrupt
        return evaluate(policy, task, problems, decoder, **options)

    monkeypatch.setattr(measure, "evaluate", counted_evaluate)
    others = [0.01, 0.03, 0.3, 1.0]
    code, folder = run("a", frontier=True)
    assert code == 130 and measured == [0.1, *others[:2]]
    assert len(read_json(folder / "frontier.json")) == 1
    assert run("a", resume=True)[0] == 130 and measured[3:] == [*others, None, 0.1, 0.01]
    texts = {path: path.read_text() for path in folder.glob("*.json")}
    assert len(read_json(folder / "frontier.json")) == 5
    assert run("a", resume=True)[0] == 0 and measured[10:] == [None, 0.1, *others]
    rows = read_json(folder / "frontier.json")
    assert [(row["name"], row["step"]) for row in rows] == [("base", 0)] * 5 + [("trained", 2)] * 6
    for path, text in texts.items():  # what the base did is as it was
        if path.name == "config.json":
            assert read_json(path) == json.loads(text)
        else:
            assert text[:-3] in path.read_text()
    table = read_json(folder / "eval.json")
    assert [row | {"name": ""} for row in table] == [rows[i] | {"name": ""} for i in (0, 5, 6)]
    capsys.readouterr()
    # It is finished: its results are printed again, and nothing is measured again.
    assert run("a", resume=True)[0] == 0 and len(measured) == 16
    assert "Accuracy: " in capsys.readouterr().out
    assert run("a", resume=True, steps=3)[0] == 0 and measured[16:] == [None, 0.1, *others]


def test_what_changed_has_a_paired_interval_unless_the_run_is_of_before(run, capsys):
    """Such a run's rows lack the calls and clusters of each problem."""
    settings = {"frontier": True, "learning_rate": 0.1, "eval_problems": 24}
    code, folder = run("a", **settings)
    out = " ".join(capsys.readouterr().out.split())
    speed = re.search(r"Speed: .*? calls per completion, (.*?)\. The", out)[1]
    assert code == 0 and re.fullmatch(r".* \(-?[\d.]+ to -?[\d.]+ calls\)", speed)
    for name in ("eval", "frontier"):
        rows = read_json(folder / f"{name}.json")
        for row in rows:
            del row["nfe_each"], row["cluster_each"]
        write_json(folder / f"{name}.json", rows)
    for flags in ({}, {"steps": 3}):  # as it is, and with the trained model measured anew
        assert run("a", resume=True, **flags)[0] == 0
        out = " ".join(capsys.readouterr().out.split())
        speed = re.search(r"Speed: .*? calls per completion, (.*?)\. The", out)[1]
        assert "(" not in speed


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_step_1_waits_for_one_gamma_of_the_base_and_the_others_are_the_bases_too(
    run, monkeypatch, lora_rank
):
    levels_before_step_1 = []
    diffpo_step = train.diffpo_step

    def looking_step(*arguments):
        folder = arguments[0].run_dir
        rows = read_json(f"{folder}/frontier.json")
        levels_before_step_1.extend(row["level"] for row in rows)
        return diffpo_step(*arguments)

    monkeypatch.setattr(train, "diffpo_step", looking_step)
    settings = {"frontier": True, "lora_rank": lora_rank, "learning_rate": 0.1, "steps": 1}
    _, folder = run("a", eval_problems=24, **settings)
    assert levels_before_step_1 == [0.1]
    task = TASKS["countdown"].compact
    problems = task.problems("test", 24, 0)
    rows = read_json(folder / "frontier.json")
    for policy, name in ((load_policy("tiny"), "base"), (load_policy(folder), "trained")):
        for row in rows:
            if row["name"] == name and row["level"] != "learned":
                decoder = Decoder("eb", row["level"], None, 0.0, stop_at_eos=True)
                expected = evaluate(policy, task, problems, decoder, length=10)
                assert row["solved_each"] == expected["solved_each"]
                assert row["nfe"] == expected["nfe"]
    calls = {
        name: [row["nfe"] for row in rows if row["name"] == name] for name in ("base", "trained")
    }
    assert len(calls["base"]) == 5 and not set(calls["base"]) & set(calls["trained"])


def test_completions_are_the_base_models_and_the_trained_ones(run):
    _, folder = run("a", learning_rate=1e-2, steps=3)
    base = DiffusionPolicy(*load_denoiser("tiny"))
    trained = load_policy(folder)
    rows = read_json(folder / "completions.json")
    task = TASKS["countdown"].compact
    problems = task.problems("test", 4, 0)[:3]
    prompts = [task.prompt(problem) for problem in problems]
    assert [row["problem"] for row in rows] == problems * 2
    assert [row["question"] for row in rows] == prompts * 2
    for policy, level, part in ((base, 0.1, rows[:3]), (trained, None, rows[3:])):
        decoder = Decoder("eb", level, None, 0.0, stop_at_eos=True, sample_threshold=False)
        rollout = policy.rollout(*encode_prompts(policy, prompts, 10), 10, decoder)
        assert [row["text"] for row in part] == decode_completions(policy, rollout)
        assert [row["nfe"] for row in part] == rollout.nfe.tolist()
        assert all(row["solved"] == task.solved(row["problem"], row["text"]) for row in part)


def test_config_json_alone_repeats_the_run(run):
    _, first = run("a", seed=5, num_iterations=2, temperature=0.9)
    config = config_of(first)
    del config["run_dir"]
    _, second = run("b", **config)
    assert metrics_of(first) == metrics_of(second)
    _, third = run("c", **config | {"seed": 6})
    assert metrics_of(first) != metrics_of(third)


@pytest.mark.parametrize(
    ("mode", "model_moves", "head_moves"),
    [("policy", True, False), ("sampler", False, True), ("joint", True, True)],
)
def test_each_mode_trains_just_what_its_name_says(run, mode, model_moves, head_moves):
    _, folder = run("a", train_target=mode)
    base = load_denoiser("tiny")[0].state_dict()
    moved = any(not torch.equal(base[name], value) for name, value in weights_of(folder).items())
    head = load_file(folder / "checkpoint" / "threshold_head.safetensors")
    assert (moved, bool(head["linear.weight"].any())) == (model_moves, head_moves)


@pytest.fixture(autouse=True)
def every_completion_earns_something(request, monkeypatch):
    """The base here solves nothing: where learning is looked at, pay by the text's length."""
    words = ["each_mode", "resumed", "lora", "exported", "num_iterations", "checkpoint_in"]
    if any(word in request.node.name for word in [*words, "equals"]):

        def pay_by_length(self, problem, text):
            return len(text) % 7 / 6

        monkeypatch.setattr(type(TASKS["countdown"]), "reward", pay_by_length)


@pytest.mark.parametrize("killed_after", [1, 2, 3])  # not saved yet, just saved, and in between
def test_a_killed_and_resumed_run_equals_an_unbroken_one(run, monkeypatch, capsys, killed_after):
    settings = {"steps": 5, "save_every": 2, "num_iterations": 2}
    _, whole = run("whole", **settings)
    log_step = train.log_step

    def pull_the_plug(run_dir, step, metrics, samples):
        if step > killed_after:
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write('{"step": 3, "rew')  # half a line, as a kill leaves it
            raise KeyboardInterrupt
        log_step(run_dir, step, metrics, samples)

    with monkeypatch.context() as patch:
        patch.setattr(train, "log_step", pull_the_plug)
        code, folder = run("killed", **settings)
    assert code == 130 and "--resume" in capsys.readouterr().out
    assert run("killed", resume=True)[0] == 0
    assert metrics_of(folder) == metrics_of(whole)
    assert_equal_weights(folder, whole)
    scores = [
        [(row["solved"], row["nfe"]) for row in read_json(run_dir / "eval.json")]
        for run_dir in (folder, whole)
    ]
    assert scores[0] == scores[1]


def test_a_run_killed_before_its_first_checkpoint_is_resumed_from_the_start(run, monkeypatch):
    _, whole = run("whole")

    def pull_the_plug(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "log_step", pull_the_plug)
        assert run("killed")[0] == 130
    assert run("killed", resume=True)[0] == 0
    assert metrics_of(whole.parent / "killed") == metrics_of(whole)


def test_a_longer_run_may_be_asked_for_when_resuming(run):
    _, whole = run("whole", steps=4)
    _, folder = run("grown", steps=2)
    assert run("grown", resume=True, steps=4)[0] == 0 and metrics_of(folder) == metrics_of(whole)


def test_of_two_tasks_each_step_is_the_one_that_a_run_of_its_task_would_make(run):
    settings = {
        "train_target": "sampler",
        "threshold_learning_rate": 0.0,  # nothing moves: a step depends on no other
        "nfe_penalty": 0.3,
        "steps": 2,
    }
    _, both = run("both", task="countdown,sudoku", **settings)
    rows = metrics_of(both)
    for i, task in enumerate(("countdown", "sudoku")):
        _, alone = run(task, task=task, **settings)
        assert metrics_of(alone)[i] == rows[i]
        samples = [row for row in read_log(both / "samples.jsonl") if row["step"] == i + 1]
        expected = [row for row in read_log(alone / "samples.jsonl") if row["step"] == i + 1]
        assert [row["problem"].pop("task") for row in samples] == [task] * len(expected)
        assert samples == expected
    assert config_of(both)["max_completion_length"] == 19
    for row in read_json(both / "eval.json"):
        assert [part["length"] for part in row["tasks"].values()] == [10, 19]
    tasks = [row["problem"]["task"] for row in read_json(both / "completions.json")]
    assert tasks == ["countdown", "sudoku", "countdown"] * 2


def test_a_resumed_run_of_two_tasks_equals_an_unbroken_one(run, capsys):
    flags = {"task": "countdown,sudoku", "num_iterations": 2}
    _, whole = run("whole", steps=3, **flags)
    _, folder = run("grown", steps=1, **flags)
    capsys.readouterr()
    assert run("grown", resume=True, steps=3)[0] == 0 and metrics_of(folder) == metrics_of(whole)
    out = capsys.readouterr().out
    assert "10 or 19 tokens a completion" in " ".join(out.split())
    assert out.count("\n  countdown ") == out.count("\n  sudoku ") == 3  # below each model's row
    assert_equal_weights(folder, whole)
    assert sum(row["grad_norm"] > 0 for row in metrics_of(whole)) > 1


def test_a_task_that_the_shipped_base_does_not_know_asks_for_a_base(run, tmp_path, capsys):
    source = "from tasks.countdown import Countdown\nclass Mine(Countdown): pass\n"
    (tmp_path / "mine.py").write_text(source)
    code, folder = run("a", task=f"{tmp_path}/mine.py:Mine")
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1 and not folder.exists()
    assert f"python -m models.make_base --task {tmp_path}/mine.py:Mine" in message


# ---- adapters, caches, real checkpoints ----------------------------------------------------------


LORA = {"lora_rank": 4, "lora_dropout": 0.3, "learning_rate": 1e-2}


def test_old_and_new_policy_are_scored_under_the_same_dropout(run):
    flags = LORA | {"num_iterations": 2, "learning_rate": 0.0, "steps": 1}
    for size in (256, 2):
        [row] = metrics_of(run(f"dropout-{size}", micro_batch_size=size, **flags)[1])
        assert row["ratio_mean"] == pytest.approx(1, abs=1e-6) and row["clip_fraction"] == 0.0


def test_lora_trains_the_adapter_alone_and_a_checkpoint_holds_nothing_else(run):
    code, folder = run("a", train_target="policy", **LORA)
    assert code == 0
    files = {path.name for path in (folder / "checkpoint").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert "model.safetensors" not in files
    trained = load_policy(folder)
    assert not any(p.requires_grad for p in trained.denoiser.parameters())  # loaded to evaluate
    base = DiffusionPolicy(load_denoiser("tiny")[0], trained.tokenizer)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    without_adapter = trained.without_adapter().hidden(ids)
    assert torch.equal(without_adapter, base.hidden(ids))
    assert not torch.allclose(trained.hidden(ids), without_adapter, atol=1e-4)


def test_a_resumed_lora_run_equals_an_unbroken_one_dropout_and_all(run):
    flags = LORA | {"num_iterations": 2, "gradient_checkpointing": True, "beta": 0.1}
    _, whole = run("whole", steps=4, **flags)
    _, folder = run("grown", steps=2, **flags)
    assert run("grown", resume=True, steps=4)[0] == 0 and metrics_of(folder) == metrics_of(whole)
    assert all(row["reference_kl"] > 1e-5 for row in metrics_of(whole))


def test_the_reference_of_a_lora_run_is_the_base_model_that_it_starts_as(run):
    _, folder = run("a", beta=0.1, **LORA | {"lora_dropout": 0.0})
    first, second = (row["reference_kl"] for row in metrics_of(folder))
    # That of each step's first update: a reference that learns too would give 0 again.
    assert first == 0.0 and second > 1e-6


def test_lora_dropout_is_on_while_learning(run):
    with_dropout = metrics_of(run("with", **LORA | {"lora_dropout": 0.5})[1])[0]
    without = metrics_of(run("without", **LORA | {"lora_dropout": 0.0})[1])[0]
    assert with_dropout["grad_norm"] != without["grad_norm"]
    assert with_dropout["reward_mean"] == without["reward_mean"]


def test_with_two_inner_updates_checkpointing_and_micro_batches_change_nothing_but_memory(run):
    flags = {"num_iterations": 2, "steps": 3, "seed": 2}
    _, plain = run("plain", **flags)
    _, frugal = run("frugal", gradient_checkpointing=True, micro_batch_size=2, **flags)
    for row, expected in zip(metrics_of(frugal), metrics_of(plain), strict=True):
        # Canvases that a group shares are run once in each micro-batch.
        assert expected.pop("denoiser_rows") < row.pop("denoiser_rows")
        assert row == {
            name: None if value is None else pytest.approx(value, rel=1e-2, abs=1e-4)
            for name, value in expected.items()
        }


def test_what_only_costs_memory_may_be_lowered_when_resuming(run):
    _, folder = run("a", block_length=5, cache="dual")
    assert run("a", resume=True, steps=3, micro_batch_size=2, cache="none")[0] == 0
    config = config_of(folder)
    assert config["micro_batch_size"] == 2 and config["cache"] == "none"


@pytest.fixture
def published_adapter(tmp_path):
    """(logits of tiny with a random adapter, its folder)."""
    denoiser, _ = load_denoiser("tiny")
    model = random_adapter(denoiser)
    save_adapter(model, tmp_path / "published")
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits, tmp_path / "published", ids


START = {
    "lora_rank": 3,
    "lora_dropout": 0.3,
    "learning_rate": 1e-2,
    "num_iterations": 2,
    "save_every": 2,
}


def test_a_run_starts_from_a_published_adapter_and_goes_on_exactly(run, published_adapter):
    logits, adapter, ids = published_adapter
    _, still = run("still", adapter=adapter, **START | {"learning_rate": 0.0, "steps": 1})
    assert torch.equal(load_policy(still).denoiser(input_ids=ids).logits, logits)
    _, whole = run("whole", adapter=adapter, steps=4, **START)
    _, folder = run("grown", adapter=adapter, steps=2, **START)
    # Once there is a checkpoint, the adapter that the run began with is needed no more.
    shutil.rmtree(adapter)
    assert run("grown", resume=True, steps=4)[0] == 0 and metrics_of(folder) == metrics_of(whole)
    trained = load_policy(folder).denoiser(input_ids=ids).logits
    assert not torch.allclose(trained, logits, atol=1e-3)
    bare = load_policy("tiny").hidden(ids)
    assert torch.equal(load_policy(folder).without_adapter().hidden(ids), bare)


def test_the_base_of_such_a_run_is_what_it_starts_from(run, published_adapter, tmp_path):
    """Also if it is measured after steps were made."""
    _, adapter, _ = published_adapter
    _, folder = run("a", adapter=adapter, **START)
    first = scores_of(folder)[0]
    policy = load_policy("tiny", adapter=adapter)
    config = Config(**config_of(folder))
    assert config.adapter == str(adapter)
    for name in ("eval.json", "frontier.json", "completions.json"):
        (folder / name).unlink()
    assert run("a", resume=True, steps=3)[0] == 0
    assert scores_of(folder)[0]["solved_each"] == first["solved_each"]
    start = run_folder.untrained_policy(config, policy, folder)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(start.denoiser(input_ids=ids).logits, policy.denoiser(input_ids=ids).logits)


def test_a_run_that_begins_again_wants_the_adapter_that_it_began_with(
    run, published_adapter, tmp_path, capsys
):
    _, adapter, _ = published_adapter
    _, folder = run("a", adapter=adapter, **START)
    for name in ("checkpoint", "checkpoint.old"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "eval.json"):
        (folder / name).unlink()
    (adapter / "adapter_model.safetensors").write_bytes(b"another")
    assert run("a", resume=True)[0] == 2
    assert "is not the adapter that" in capsys.readouterr().err


def test_a_run_whose_base_is_not_measured_whole_wants_the_adapter_too(
    run, published_adapter, capsys
):
    """The starting adapter is measured at its other gammas once the last step is made."""
    _, adapter, _ = published_adapter
    _, folder = run("a", adapter=adapter, frontier=True, eval_problems=1, **START)
    measured = json.loads((folder / "frontier.json").read_text())
    weights = adapter / "adapter_model.safetensors"
    saved = weights.read_bytes()
    weights.write_bytes(b"another")
    assert run("a", resume=True, steps=4)[0] == 0  # the base's rows are all there
    (folder / "frontier.json").write_text(json.dumps(measured[:1]))
    assert run("a", resume=True, steps=5)[0] == 2  # as if killed before them
    assert "is not the adapter that" in capsys.readouterr().err
    weights.write_bytes(saved)
    assert run("a", resume=True, steps=5)[0] == 0
    base = [row for row in scores_of(folder, "frontier.json") if row["name"] == "base"]
    for row in measured:
        row.pop("seconds")
    assert base == [row for row in measured if row["name"] == "base"]


def test_a_resumed_checkpoint_keeps_its_precision(run, tmp_path, capsys):
    write_checkpoint(tmp_path / "hub", "llada")
    _, folder = run(
        "a",
        model=tmp_path / "hub",
        max_completion_length=4,
        block_length=4,
        lora_rank=2,
        dtype="bfloat16",
        num_iterations=1,
        steps=1,
        prompts_per_step=1,
        num_generations=2,
        eval_problems=1,
    )
    config = Config(**config_of(folder))
    policy, _, _ = run_folder.prepare(config, folder, resume=True, export=None)
    # On a CPU a step of a real model may take a day, so it is said before the base is measured.
    said = r"on this CPU a call .* takes .* s, so each of the 1 steps takes at least [0-9.]+ s\n"
    assert re.search(f"{said}.*measuring the base", capsys.readouterr().out, re.DOTALL)
    dtypes = {(p.requires_grad, p.dtype) for p in policy.denoiser.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("flags", [{}, LORA], ids=["full", "lora"])
def test_an_exported_model_is_the_trained_one_without_an_adapter(run, tmp_path, capsys, flags):
    _, folder = run("a", export=tmp_path / "out", **flags)
    exported = load_policy(tmp_path / "out")
    trained = load_policy(folder)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(exported.hidden(ids), trained.hidden(ids), rtol=1e-3, atol=5e-4)
    assert not hasattr(exported.denoiser, "disable_adapter")
    evaluation = (folder / "eval.json").read_text()
    # A finished run is only exported, not measured again.
    assert run("a", resume=True, export=tmp_path / "again")[0] == 0
    assert (folder / "eval.json").read_text() == evaluation
    assert (tmp_path / "again" / "config.json").exists()
    capsys.readouterr()
    assert run("a", resume=True, export=tmp_path / "out")[0] == 2
    assert "out" in capsys.readouterr().err


def test_what_a_block_cache_costs_is_logged(run):
    # A base that is sure of its tokens has no stale calls: hot, and one token a call, it has.
    unsure = {"block_length": 5, "temperature": 3, "initial_threshold": 1e-3}
    rows = {}
    for cache in ("none", "prefix", "dual"):
        rows[cache] = metrics_of(run(cache, cache=cache, **unsure)[1])
    assert all(row["cache_kl"] is None for row in rows["none"])
    for cache in ("prefix", "dual"):
        assert all(abs(row["cache_kl"]) > 1e-4 for row in rows[cache])


def test_compiled_calls_are_those_with_a_filled_cache_and_change_no_metric(run, monkeypatch):
    positions = set()

    def compile_nothing(decoder, dynamic):
        def noted(**inputs):
            positions.add(inputs["input_ids"].shape[1])
            return decoder(**inputs)

        return noted

    monkeypatch.setattr(torch, "compile", compile_nothing)
    settings = {"cache": "dual", "block_length": 5, "task": "countdown"}
    _, plain = run("plain", **settings)
    assert not positions
    _, compiled = run("compiled", compile=True, **settings)
    assert positions == {5} and metrics_of(compiled) == metrics_of(plain)
    assert run("plain", resume=True, steps=3, compile=True)[0] == 0


def test_a_prefill_begins_every_completion(run):
    _, folder = run("a", prefill="<answer>( 3")
    samples = read_log(folder / "samples.jsonl")
    assert all(row["text"].startswith("<answer>( 3") for row in samples)


def test_problems_may_come_from_a_file(run, tmp_path):
    file = tmp_path / "problems.jsonl"
    problems = TASKS["countdown"].compact.problems("train", 60, 0)
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    _, folder = run("a", data=file)
    assert all(row["problem"] in problems for row in read_log(folder / "samples.jsonl"))


def test_one_problem_can_be_trained_and_measured_on_for_who_asks_for_it(run, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"numbers": [3, 4, 5], "target": 35}\n')
    assert run("a", data=file)[0] == 2
    code, folder = run("b", data=file, eval_split="all")
    assert code == 0 and read_json(folder / "eval.json")[0]["problems"] == 1
    assert run("c", eval_split="all")[0] == 2


@pytest.mark.parametrize(("family", "block_length"), [("llada", 8), ("dream", 8), ("sdar", 4)])
def test_a_checkpoint_in_the_hubs_layout_is_trained_evaluated_resumed_and_exported(
    run, tmp_path, family, block_length
):
    write_checkpoint(tmp_path / "hub", family)
    code, folder = run(
        "a",
        model=tmp_path / "hub",
        max_completion_length=16,
        block_length=block_length,
        lora_rank=2,
        num_iterations=2,
        save_every=1,
    )
    assert code == 0
    assert config_of(folder)["cache"] == "dual"  # LLaDA's recipe
    assert run("a", resume=True, steps=3, export=tmp_path / "out")[0] == 0
    assert len(metrics_of(folder)) == 3
    texts = [(tmp_path / name / "config.json").read_text() for name in ("out", "hub")]
    texts = [text.replace("bfloat16", "float32") for text in texts]  # what the weights are now
    assert texts[0] == texts[1]
    exported = load_policy(tmp_path / "out")
    trained = load_policy(folder)
    prompts = encode_prompts(trained, ["what is 3 + 4?", "a shorter one"])
    torch.testing.assert_close(
        exported.hidden(*prompts), trained.hidden(*prompts), rtol=1e-3, atol=1e-4
    )


def test_a_block_causal_model_is_decoded_in_its_own_blocks(run, tmp_path, capsys):
    write_checkpoint(tmp_path / "hub", "sdar")
    code, folder = run("a", model=tmp_path / "hub", max_completion_length=8, lora_rank=2)
    assert code == 0
    assert config_of(folder)["block_length"] == 4
    assert abs(metrics_of(folder)[-1]["cache_kl"]) < 1e-5
    code, _ = run("b", model=tmp_path / "hub", max_completion_length=8, block_length=8)
    assert code == 2
    assert "block-causal, in blocks of 4" in capsys.readouterr().err


def test_ctrl_c_works_as_before_after_an_error_inside_a_step(run, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "update_threshold", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("a")
    assert signal.getsignal(signal.SIGINT) is handler


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task": "chess"}, "countdown"),
        ({"model": "gpt"}, "tiny"),
        ({"train_target": "all"}, "joint"),
        ({"num_generations": 1}, "at least 2"),
        ({"steps": 0}, "at least 1"),
        ({"initial_threshold": 50}, "at most 10"),
        ({"initial_threshold": "nan"}, "finite"),
        ({"temperature": 0}, "at least"),
        ({"learning_rate": "nan"}, "finite"),
        ({"nfe_penalty": 1.5}, "at most 1"),
        ({"micro_batch_size": "many"}, "a whole number, not 'many'"),
        ({"scale_rewards": "maybe"}, "true or false"),
        ({"no_such_flag": 1}, "--help"),
        ({"model": "."}, "config.json"),
        ({"cache": "dual"}, "block_length"),
        ({"cache": "half"}, "prefix"),
        ({"compile": True}, "--cache other than none"),
        (
            {"compile": True, "cache": "dual", "block_length": 5, "dtype": "4bit", "lora_rank": 4},
            "in 4 bits",
        ),
        ({"dtype": "int8"}, "bfloat16"),
        ({"task": "gsm8k"}, "LLaDA"),
        ({"data": "no-such-file.jsonl"}, "no-such-file.jsonl"),
        ({"max_completion_length": 509}, "512"),
        ({"task": "countdown,countdown"}, "twice"),
        ({"task": "sudoku,"}, "unknown task ''"),
        ({"task": "sudoku,gsm8k"}, "LLaDA"),
        ({"task": "sudoku,countdown", "data": "rows.jsonl"}, "one task"),
        ({"task": "sudoku,countdown", "max_completion_length": 12}, "--max_completion_length"),
    ],
)
def test_bad_settings_get_one_line_and_leave_nothing_behind(
    run, capsys, tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    try:
        code, _ = run("a", **flags)
    except SystemExit as end:  # argparse's way out
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_what_a_task_cannot_read_is_one_line_and_the_run_can_go_on(run, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no answer\nto be read")

    run("made")  # the base
    with monkeypatch.context() as patch:
        patch.setattr(measure, "evaluate", fail)
        capsys.readouterr()
        code, folder = run("a")
    assert code == 2 and capsys.readouterr().err == "train.py: no answer to be read\n"
    assert not (folder / "eval.json").exists()
    assert run("a", resume=True)[0] == 0 and len(read_json(folder / "eval.json")) == 3


def test_a_folder_that_holds_a_run_is_not_overwritten(run, capsys):
    _, folder = run("a")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    code, _ = run("a")
    error = capsys.readouterr().err
    assert code == 2 and "--run_dir" in error and error.count("\n") == 1
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("flags", [{"learning_rate": 1.0}, {"seed": 3}, {"max_grad_norm": 2.0}])
def test_resuming_with_another_setting_is_refused(run, capsys, flags):
    run("a")
    capsys.readouterr()
    assert run("a", resume=True, **flags)[0] == 2
    assert next(iter(flags)) in capsys.readouterr().err


def test_resuming_what_is_no_run_is_refused(run, capsys):
    assert run("nothing", resume=True)[0] == 2 and "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "setting"),
    [
        ("update_denoiser", "--micro_batch_size (256)"),
        ("update_denoiser", "--gradient_checkpointing true"),
        ("update_denoiser", "--lora_rank 128"),
        ("update_denoiser", "--rollout_batch_size 1"),
        ("group_advantages", "--prompts_per_step"),
    ],
)
def test_out_of_memory_says_which_setting_to_lower(run, capsys, monkeypatch, place, setting):
    def fail(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB"
        )

    monkeypatch.setattr(train, place, fail)
    code, _ = run("a")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and setting in line and "2.00 GiB" in line and "GiB used" in line


def test_out_of_memory_after_a_checkpoint_says_how_to_go_on(run, capsys, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run("a", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_denoiser", fail)
        code, folder = run("a", resume=True, steps=2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and f"resume with: python train.py --resume --run_dir {folder}" in line
    assert "--rollout_batch_size 1" in line and "--prompts_per_step" not in line
    assert run("a", resume=True, steps=2, rollout_batch_size=1)[0] == 0


def test_another_runtime_error_is_not_called_out_of_memory(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "group_advantages", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        run("a")
