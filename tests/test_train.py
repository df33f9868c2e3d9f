"""The training loop, its files and its manners. Every run here is a real one."""

import copy
import dataclasses
import json
import signal

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file
from toy import metrics_of, random_tiny

import train
from config import Config
from diffusion_policy import DiffusionPolicy
from evaluate import evaluate
from evaluation import summary
from evaluation.summary import METRICS
from likelihood import draw_boundaries, draw_prompt_mask, surrogate_logp
from models.checkpoints import load_policy, read_json
from models.loading import load_denoiser
from sampler import Decoder, ThresholdHead
from tasks.registry import TASKS
from train import update_denoiser
from training import run_folder
from training.files import read_log


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """They take longer than all the rest of these runs; one test looks at them."""
    if request.node.name != "test_a_run_leaves_all_its_files_and_names_its_folder_last":
        monkeypatch.setattr(train, "plot_curves", lambda run_dir: None)
        monkeypatch.setattr(train, "plot_frontier", lambda rows, path, title: None)


@pytest.fixture
def run(tmp_path):
    """run(name, flag=value, ...) trains into tmp_path/name. -> (exit code, folder)

    It is a small run unless flags say otherwise; with seed 4 its groups' rewards differ.
    """
    small = dict(model="tiny", steps=2, prompts_per_step=2, num_generations=3, eval_problems=4)
    small |= dict(frontier=False, lora_rank=0, seed=4)

    def start(name, resume=False, **flags):
        arguments = ["--resume"] if resume else []
        flags = ({} if resume else small) | {"run_dir": tmp_path / name} | flags
        for key, value in flags.items():
            arguments += [f"--{key}", str(value)]
        return train.main(arguments), tmp_path / name

    return start


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def weights_of(folder):
    return load_denoiser(str(folder / "checkpoint"))[0].state_dict()


# ---- the update ----------------------------------------------------------------------------------


@pytest.fixture
def batch():
    """A tiny policy, a rollout of 12 rows, advantages, the stages of two inner updates."""
    policy = DiffusionPolicy(*random_tiny(3), ThresholdHead(104))
    task = TASKS["countdown"].compact
    generator = torch.Generator().manual_seed(0)
    ids, mask = policy.encode([task.prompt(problem) for problem in task.problems("train", 12, 0)])
    rollout = policy.rollout(ids, mask, 10, Decoder("eb", 3.0), generator)
    stages = []
    for seed in range(2):
        boundaries = draw_boundaries(rollout.nfe, 2, generator)
        stages.append((boundaries, draw_prompt_mask(mask, 1, 0.2, generator), seed))
    return policy, rollout, torch.randn(12, generator=generator), stages


def updated(batch, reference=None, **settings):
    """The denoiser's weights after one update_denoiser, and its metrics.

    By plain SGD: Adam would hide the gradient's size.
    """
    policy, rollout, advantage, stages = copy.deepcopy(batch)
    optimizer = torch.optim.SGD(policy.denoiser.parameters(), lr=0.1)
    how = (rollout, stages, advantage, Config(max_grad_norm=1e9, **settings))
    metrics = update_denoiser(policy, reference, optimizer, *how)
    return torch.nn.utils.parameters_to_vector(policy.denoiser.parameters()), metrics


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_micro_batch_size_changes_nothing(batch, beta):
    reference = DiffusionPolicy(*random_tiny(4)) if beta else None
    whole, metrics = updated(batch, reference, micro_batch_size=12, beta=beta)
    before = torch.nn.utils.parameters_to_vector(batch[0].denoiser.parameters())
    for size in (1, 5):
        parts, metrics_of_parts = updated(batch, reference, micro_batch_size=size, beta=beta)
        torch.testing.assert_close(parts - before, whole - before, rtol=1e-3, atol=1e-6)
        assert metrics_of_parts == pytest.approx(metrics, rel=1e-3, abs=1e-5)


def test_the_first_inner_update_has_ratio_one_and_a_gradient(batch):
    _, metrics = updated(batch[:3] + (batch[3][:1],))
    assert metrics["ratio_mean"] == 1.0 and metrics["clip_fraction"] == 0.0
    assert metrics["grad_norm"] > 0.01


def test_the_second_inner_update_is_compared_with_the_policy_before_the_first(batch):
    _, metrics = updated(batch)  # means of two: the second's ratio is off 1 by twice what is seen
    assert metrics["ratio_mean"] != 1.0 and abs(metrics["ratio_mean"] - 1) < 0.5


def test_speed_multiplies_the_reward(run, monkeypatch):
    pay = lambda self, problem, text: len(text) % 7 / 6  # noqa: E731  the base here solves nothing
    monkeypatch.setattr(type(TASKS["countdown"].compact), "reward", pay)
    seen = []
    monkeypatch.setattr(
        summary,
        "sample_rows",
        lambda _, texts, rollout, reward: seen.append((rollout, reward)) or [],
    )
    _, folder = run("a", steps=1, prompts_per_step=1, num_generations=4, nfe_penalty=0.4)
    ((rollout, reward),) = seen
    expected = (reward * (1 - 0.4 * rollout.nfe / 10)).mean().item()
    assert metrics_of(folder)[0]["speed_reward_mean"] == pytest.approx(expected) != 0


def test_hidden_prompt_tokens_are_in_the_ratio_and_not_in_the_weights(batch):
    policy, rollout, advantage, stages = copy.deepcopy(batch)
    every_step = torch.arange(1, int(rollout.nfe.max())).expand(12, -1)
    stages = [(every_step, hidden, seed) for _, hidden, seed in stages]
    assert all(hidden.any() for _, hidden, _ in stages)
    optimizer = torch.optim.SGD(policy.denoiser.parameters(), lr=0.1)
    settings = Config(importance_weight_cap=0.0)
    metrics = update_denoiser(policy, None, optimizer, rollout, stages[:1], advantage, settings)
    assert metrics["surrogate_kl"] == pytest.approx(0, abs=1e-5)  # the exact likelihood, unhidden
    assert metrics["unit_weight_error"] < 1e-5 and metrics["ratio_mean"] == 1.0
    with torch.no_grad():
        hiding = surrogate_logp(batch[0], rollout, every_step, stages[0][1])
    seen = (rollout.behaviour_logp - hiding)[rollout.token_mask]
    assert seen.mean() > 1e-3 and seen.abs().mean() > 0.01  # it would be seen


def test_old_and_new_policy_are_scored_under_the_same_dropout(run):
    flags = LORA | {"lora_dropout": 0.3, "num_iterations": 2, "learning_rate": 0.0, "steps": 1}
    for size in (256, 2):
        row = metrics_of(run(f"dropout-{size}", micro_batch_size=size, **flags)[1])[0]
        assert row["ratio_mean"] == pytest.approx(1, abs=1e-6) and row["clip_fraction"] == 0.0


# ---- the run -------------------------------------------------------------------------------------


def test_a_run_leaves_all_its_files_and_names_its_folder_last(run, capsys):
    code, folder = run("a", frontier=True)
    assert code == 0 and capsys.readouterr().out.splitlines()[-1] == str(folder)
    names = {"config.json", "metrics.jsonl", "samples.jsonl", "eval.json", "curves.png"}
    names |= {"frontier.json", "frontier.png", "completions.json", "environment.txt", "checkpoint"}
    assert {path.name for path in folder.iterdir()} == names
    rows = read_log(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(list(row) == list(METRICS) for row in rows)
    config = config_of(folder)
    assert list(config) == [field.name for field in dataclasses.fields(Config)]
    assert config["model"] == "tiny"
    contract = {"name", "decoder", "level", "solved", "solved_low", "solved_high", "reward", "nfe"}
    contract |= {"tokens_per_call", "problems", "clusters", "seed"}
    evaluation = json.loads((folder / "eval.json").read_text())
    names = ["base", "trained", "trained at the starting γ"]
    assert [row["name"] for row in evaluation] == names
    assert all(contract <= set(row) for row in evaluation)
    assert [row["level"] for row in evaluation] == [0.1, "learned", 0.1]
    for name in ("curves", "frontier"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    sample = read_log(folder / "samples.jsonl")[0]
    assert sample["reward"] == TASKS["countdown"].reward(sample["problem"], sample["text"])


def test_base_and_trained_are_measured_once_at_each_gamma(run, monkeypatch, capsys):
    measured = []

    def counted(policy, task, problems, decoder, *rest):
        measured.append(decoder.level)
        if len(measured) == 8:  # killed while the trained model is measured
            raise KeyboardInterrupt
        return evaluate(policy, task, problems, decoder, *rest)

    monkeypatch.setattr(summary, "evaluate", counted)
    gammas = [0.1, 0.01, 0.03, 0.3, 1.0]
    code, folder = run("a", frontier=True)
    assert code == 130 and measured == [*gammas, None, 0.1, 0.01]
    known = {path: path.read_text() for path in folder.glob("*.json")}
    assert len(read_json(folder / "frontier.json")) == 5
    assert run("a", resume=True)[0] == 0 and measured[8:] == [None, *gammas]
    rows = read_json(folder / "frontier.json")
    assert [(row["name"], row["step"]) for row in rows] == [("base", 0)] * 5 + [("trained", 2)] * 6
    for path, text in known.items():  # what the base did is as it was
        now = read_json(path)
        assert (
            now == json.loads(text) if path.name == "config.json" else text[:-3] in path.read_text()
        )
    table = read_json(folder / "eval.json")
    assert [row | {"name": ""} for row in table] == [rows[i] | {"name": ""} for i in (0, 5, 6)]
    capsys.readouterr()
    assert run("a", resume=True)[0] == 0 and len(measured) == 14  # it was finished: told again
    assert "Accuracy: " in capsys.readouterr().out
    assert run("a", resume=True, steps=3)[0] == 0 and measured[14:] == [None, *gammas]


def test_completions_are_the_base_models_and_the_trained_ones(run):
    _, folder = run("a", learning_rate=1e-2, steps=3)
    trained, base = (
        load_policy(folder),
        DiffusionPolicy(*load_denoiser("tiny")),
    )
    rows, task = read_json(folder / "completions.json"), TASKS["countdown"].compact
    problems = task.problems("test", 4, 0)[:3]
    assert [row["problem"] for row in rows] == problems * 2
    for policy, level, part in ((base, 0.1, rows[:3]), (trained, None, rows[3:])):
        decoder = Decoder("eb", level, None, 0.0, stop_at_eos=True, sample_threshold=False)
        rollout = policy.rollout(*policy.encode([*map(task.prompt, problems)], 10), 10, decoder)
        assert [row["text"] for row in part] == policy.decode(rollout)
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
    words = [
        "each_mode",
        "resumed",
        "lora",
        "exported",
        "num_iterations",
        "checkpoint_in",
        "equals",
    ]
    if any(word in request.node.name for word in words):
        pay = lambda self, problem, text: len(text) % 7 / 6  # noqa: E731
        monkeypatch.setattr(type(TASKS["countdown"]), "reward", pay)


@pytest.mark.parametrize("killed_after", [1, 2, 3])  # not saved yet, just saved, and in between
def test_a_killed_and_resumed_run_equals_an_unbroken_one(run, monkeypatch, capsys, killed_after):
    settings = dict(steps=5, save_every=2, num_iterations=2)
    _, whole = run("whole", **settings)
    log_step = summary.log_step

    def pull_the_plug(run_dir, bar, step, *rest):
        if step > killed_after:
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write('{"step": 3, "rew')  # half a line, as a kill leaves it
            raise KeyboardInterrupt
        log_step(run_dir, bar, step, *rest)

    monkeypatch.setattr(summary, "log_step", pull_the_plug)
    code, folder = run("killed", **settings)
    assert code == 130 and "--resume" in capsys.readouterr().out
    monkeypatch.setattr(summary, "log_step", log_step)
    assert run("killed", resume=True)[0] == 0
    assert metrics_of(folder) == metrics_of(whole)
    weights = weights_of(whole)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(folder).items())
    rows = [json.loads((f / "eval.json").read_text()) for f in (folder, whole)]
    scores = [[(row["solved"], row["nfe"]) for row in part] for part in rows]
    assert scores[0] == scores[1]


def test_a_run_killed_before_its_first_checkpoint_is_resumed_from_the_start(run, monkeypatch):
    _, whole = run("whole")

    def pull_the_plug(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(summary, "log_step", pull_the_plug)
        assert run("killed")[0] == 130
    assert run("killed", resume=True)[0] == 0
    assert metrics_of(whole.parent / "killed") == metrics_of(whole)


def test_a_longer_run_may_be_asked_for_when_resuming(run):
    _, whole = run("whole", steps=4)
    _, folder = run("grown", steps=2)
    assert run("grown", resume=True, steps=4)[0] == 0 and metrics_of(folder) == metrics_of(whole)


def test_of_two_tasks_each_step_is_the_one_that_a_run_of_its_task_would_make(run):
    settings = dict(train_target="sampler", threshold_learning_rate=0.0, nfe_penalty=0.3, steps=2)
    _, both = run("both", task="countdown,sudoku", **settings)
    rows = metrics_of(both)
    for i, task in enumerate(("countdown", "sudoku")):  # nothing moves: a step depends on no other
        _, alone = run(task, task=task, **settings)
        assert metrics_of(alone)[i] == rows[i]
        ours = [row for row in read_log(both / "samples.jsonl") if row["step"] == i + 1]
        its = [row for row in read_log(alone / "samples.jsonl") if row["step"] == i + 1]
        assert [row["problem"].pop("task") for row in ours] == [task] * len(its) and ours == its
    assert config_of(both)["max_completion_length"] == 19
    for row in read_json(both / "eval.json"):
        assert [part["length"] for part in row["tasks"].values()] == [10, 19]
    shown = [row["problem"]["task"] for row in read_json(both / "completions.json")]
    assert shown == ["countdown", "sudoku", "countdown"] * 2


def test_a_resumed_run_of_two_tasks_equals_an_unbroken_one(run, capsys):
    flags = {"task": "countdown,sudoku", "num_iterations": 2}
    _, whole = run("whole", steps=3, **flags)
    _, folder = run("grown", steps=1, **flags)
    capsys.readouterr()
    assert run("grown", resume=True, steps=3)[0] == 0 and metrics_of(folder) == metrics_of(whole)
    said = capsys.readouterr().out
    assert "10 or 19 tokens a completion" in " ".join(said.split())
    assert said.count("\n  countdown ") == said.count("\n  sudoku ") == 3  # below each model's row
    weights = weights_of(whole)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(folder).items())
    assert sum(row["grad_norm"] > 0 for row in metrics_of(whole)) > 1


def test_a_task_that_the_shipped_base_does_not_know_asks_for_a_base(run, tmp_path, capsys):
    source = "from tasks.countdown import Countdown\nclass Mine(Countdown): pass\n"
    (tmp_path / "mine.py").write_text(source)
    code, folder = run("a", task=f"{tmp_path}/mine.py:Mine")
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1 and not folder.exists()
    assert f"python -m models.tiny --task {tmp_path}/mine.py:Mine" in message


# ---- adapters, caches, real checkpoints ----------------------------------------------------------


LORA = {"lora_rank": 4, "lora_dropout": 0.3, "learning_rate": 1e-2}


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
    without = trained.without_adapter().hidden(ids)
    assert torch.equal(without, base.hidden(ids))
    assert not torch.allclose(trained.hidden(ids), without, atol=1e-4)


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
    folders = (run(str(p), **LORA | {"lora_dropout": p})[1] for p in (0.5, 0.0))
    with_, without = (metrics_of(folder)[0] for folder in folders)
    assert with_["grad_norm"] != without["grad_norm"]
    assert with_["reward_mean"] == without["reward_mean"]


def test_with_two_inner_updates_checkpointing_and_micro_batches_change_nothing_but_memory(run):
    flags = {"num_iterations": 2, "steps": 3, "seed": 2}
    _, plain = run("plain", **flags)
    _, frugal = run("frugal", gradient_checkpointing=True, micro_batch_size=2, **flags)
    for rows in zip(metrics_of(plain), metrics_of(frugal), strict=True):
        a, b = ({k: v for k, v in row.items() if v is not None} for row in rows)
        # Canvases that a group shares are run once in each micro-batch.
        assert a.pop("denoiser_rows") < b.pop("denoiser_rows")
        assert a == pytest.approx(b, rel=1e-2, abs=1e-4)


def test_what_only_costs_memory_may_be_lowered_when_resuming(run):
    _, folder = run("a", block_length=5, cache="dual")
    assert run("a", resume=True, steps=3, micro_batch_size=2, cache="none")[0] == 0
    config = config_of(folder)
    assert (config["micro_batch_size"], config["cache"]) == (2, "none")


def test_a_resumed_checkpoint_keeps_its_precision(run, tmp_path):
    write_checkpoint(tmp_path / "hub", "llada")
    flags = dict(
        model=tmp_path / "hub",
        max_completion_length=4,
        block_length=4,
        lora_rank=2,
        dtype="bfloat16",
    )
    flags |= dict(num_iterations=1, steps=1, prompts_per_step=1, num_generations=2, eval_problems=1)
    _, folder = run("a", **flags)
    settings = Config(**config_of(folder))
    resumed = run_folder.prepare(settings, folder, resume=True, export="")[0].denoiser
    dtypes = {(p.requires_grad, p.dtype) for p in resumed.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("flags", [{}, LORA], ids=["full", "lora"])
def test_an_exported_model_is_the_trained_one_without_an_adapter(run, tmp_path, capsys, flags):
    _, folder = run("a", export=tmp_path / "out", **flags)
    exported, trained = load_policy(tmp_path / "out"), load_policy(folder)
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
    names = ("none", "prefix", "dual")
    hot = {
        "block_length": 5,
        "temperature": 3,
        "initial_threshold": 1e-3,
    }  # a sure base has no stale calls
    rows = {name: metrics_of(run(name, cache=name, **hot)[1]) for name in names}
    assert all(row["cache_kl"] is None for row in rows["none"])
    assert all(abs(row["cache_kl"]) > 1e-4 for name in ("prefix", "dual") for row in rows[name])


def test_a_prefill_begins_every_completion(run):
    _, folder = run("a", prefill="<answer>( 3")
    samples = read_log(folder / "samples.jsonl")
    assert all(row["text"].startswith("<answer>( 3") for row in samples)


def test_problems_may_come_from_a_file(run, tmp_path):
    file = tmp_path / "problems.jsonl"
    known = TASKS["countdown"].compact.problems("train", 60, 0)
    file.write_text("".join(json.dumps(problem) + "\n" for problem in known))
    _, folder = run("a", data=file)
    assert all(row["problem"] in known for row in read_log(folder / "samples.jsonl"))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_checkpoint_in_the_hubs_layout_is_trained_evaluated_resumed_and_exported(
    run, tmp_path, family
):
    write_checkpoint(tmp_path / "hub", family)
    small = {
        "max_completion_length": 16,
        "block_length": 8,
        "lora_rank": 2,
        "num_iterations": 2,
        "save_every": 1,
    }
    code, folder = run("a", model=tmp_path / "hub", **small)
    assert code == 0
    assert config_of(folder)["cache"] == "dual"  # LLaDA's recipe
    assert run("a", resume=True, steps=3, export=tmp_path / "out")[0] == 0
    assert len(metrics_of(folder)) == 3
    texts = [(tmp_path / name / "config.json").read_text() for name in ("out", "hub")]
    texts = [text.replace("bfloat16", "float32") for text in texts]  # what the weights are now
    assert texts[0] == texts[1]
    exported, trained = load_policy(tmp_path / "out"), load_policy(folder)
    prompts = trained.encode(["what is 3 + 4?", "a shorter one"])
    states, expected = (policy.hidden(*prompts) for policy in (exported, trained))
    torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-4)


def test_ctrl_c_works_as_before_after_an_error_inside_a_step(run, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "update_threshold", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("a")
    assert signal.getsignal(signal.SIGINT) is before


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"task": "chess"}, "countdown"),
        ({"model": "gpt"}, "tiny"),
        ({"train_target": "all"}, "joint"),
        ({"num_generations": 1}, "at least 2"),
        ({"steps": 0}, "at least 1"),
        ({"initial_threshold": 50}, "within 0.001 to 10"),
        ({"initial_threshold": "nan"}, "finite"),
        ({"temperature": 0}, "at least"),
        ({"learning_rate": "nan"}, "finite"),
        ({"nfe_penalty": 1.5}, "at most 1"),
        ({"micro_batch_size": "many"}, "invalid int"),
        ({"scale_rewards": "maybe"}, "true or false"),
        ({"no_such_flag": 1}, "--help"),
        ({"model": "."}, "config.json"),
        ({"cache": "dual"}, "block_length"),
        ({"cache": "half"}, "prefix"),
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
    run, capsys, tmp_path, monkeypatch, flags, says
):
    monkeypatch.chdir(tmp_path)
    try:
        code, folder = run("a", **flags)
    except SystemExit as error:  # argparse's way out
        code, folder = error.code, tmp_path / "a"
    message = capsys.readouterr().err
    assert code == 2 and says in message and message.count("\n") == 1 and not folder.exists()


def test_what_a_task_cannot_read_is_one_line_and_the_run_can_go_on(run, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no answer\nto be read")

    run("made")  # the base
    with monkeypatch.context() as patch:
        patch.setattr(summary, "evaluate", fail)
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
    message = capsys.readouterr().err
    assert code == 2 and "--run_dir" in message and message.count("\n") == 1
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("flags", [{"learning_rate": 1.0}, {"seed": 3}, {"rollout_batch_size": 2}])
def test_resuming_with_another_setting_is_refused(run, capsys, flags):
    run("a")
    capsys.readouterr()
    assert run("a", resume=True, **flags)[0] == 2
    assert next(iter(flags)) in capsys.readouterr().err


def test_resuming_what_is_no_run_is_refused(run, capsys):
    assert run("nothing", resume=True)[0] == 2 and "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("update_denoiser", "--micro_batch_size (256)"),
        ("update_denoiser", "--gradient_checkpointing true"),
        ("update_denoiser", "--lora_rank 128"),
        ("update_denoiser", "--rollout_batch_size 1"),
        ("group_advantages", "--prompts_per_step"),
    ],
)
def test_out_of_memory_says_which_setting_to_lower(run, capsys, monkeypatch, place, says):
    def fail(*_):
        said = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB"
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(train, place, fail)
    code, folder = run("a")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1 and says in message and "2.00 GiB" in message and "GiB used" in message


def test_another_runtime_error_is_not_called_out_of_memory(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "group_advantages", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        run("a")
