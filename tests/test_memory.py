"""memory.py: parameters against real models, parts against worked examples, peaks against what a
process of its own takes.
"""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from config import RECIPES, Config
from denoiser import BlockCache
from experiments import benchmark
from models.lora import LORA
from training import memory

ROOT = Path(memory.__file__).parent.parent
LLADA, QWEN = benchmark.config_of("LLaDA-8B"), benchmark.config_of("Qwen3-0.6B")
RECIPE = Config(**RECIPES["LLaDA"])
SIZES = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "LLaDA-8B": LLADA,
    "Qwen3-0.6B": QWEN,
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "mixture": Qwen3MoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """A configuration and the model that it describes, without memory for its weights."""
    with torch.device("meta"):
        return CONFIGS[request.param], AutoModelForCausalLM.from_config(CONFIGS[request.param])


def test_parameters_are_counted_as_the_model_has_them(model):
    config, real = model
    linear = [m for m in real.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    expected = sum(m.weight.numel() for m in linear), sum(p.numel() for p in real.parameters())
    assert memory.parameters(config) == expected


def test_an_adapter_is_counted_as_peft_makes_it(model):
    config, real = model
    kinds = LORA[:4] if hasattr(config, "num_experts") else LORA
    adapted = get_peft_model(real, LoraConfig(r=5, target_modules=kinds))
    assert memory.adapter_parameters(config, 5) == adapted.get_nb_trainable_parameters()[0]


def test_weights_gradients_and_moments_are_worked_out_by_hand():
    parts = memory.budget(LLADA, RECIPE, 200)
    assert parts["base"] == pytest.approx(8.0155e9 * 2 / 2**30, rel=1e-3)
    # 4 matrices of 4096 x 4096 and 3 of 4096 x 12288, in 32 layers, at rank 128
    adapter = 32 * 128 * (4 * 8192 + 3 * 16384)
    assert parts["adapter"] == parts["gradients"] == adapter * 4 / 2**30
    assert parts["moments"] == adapter * 8 / 2**30 and parts["reference"] == 0
    full = memory.budget(QWEN, replace(RECIPE, lora_rank=0, beta=0.1), 200)
    total = memory.parameters(QWEN)[1]
    assert full["adapter"] == 0 and full["moments"] == 2 * full["gradients"]
    assert full["base"] == full["reference"] == full["gradients"] == total * 4 / 2**30


def test_four_bits_are_those_of_the_layers_matrices_alone():
    settings = replace(RECIPE)
    settings.dtype = "4bit"
    linear, total = memory.parameters(LLADA)
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    base = memory.budget(LLADA, settings, 200)["base"]
    assert base == pytest.approx((linear * bits / 8 + 2 * (total - linear)) / 2**30)


def test_the_cache_is_what_a_block_cache_holds():
    config, settings = benchmark.llama(*SMALL), replace(RECIPE, dtype="float32")
    policy, cache = benchmark.make_policy(config, torch.float32), BlockCache()
    ids = torch.randint(3, 100, (12, 50))
    with torch.no_grad():
        policy.hidden(ids, cache=cache)
    held = sum(x.nbytes for x in cache.keys + cache.values)
    few = replace(settings, prompts_per_step=2, max_completion_length=40, block_length=8)
    assert memory.budget(config, few, 10)["rollout_cache"] == held / 2**30
    assert memory.budget(config, replace(few, cache="none"), 10)["rollout_cache"] == 0


@pytest.mark.parametrize("config", [LLADA, QWEN, CONFIGS["mixture"]], ids=["llada", "qwen", "moe"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_peak_has_what_stays_and_the_largest_of_what_takes_turns(config, device):
    parts = memory.budget(config, RECIPE, 200, device)
    stays = sum(parts[name] for name in memory.RESIDENT)
    turns = [sum(parts[name] for name in phase) for phase in memory.PHASES]
    assert parts["peak"] == pytest.approx(stays + max(turns) + parts["allowance"])
    named = {*memory.RESIDENT, *sum(memory.PHASES, ()), "allowance", "peak"}
    assert set(parts) == named and min(parts.values()) >= 0
    assert (parts["allowance"] > 0) == (device == "cuda")


@pytest.mark.parametrize(
    ("less", "part"),
    [
        (dict(rollout_batch_size=24), "rollout_cache"),
        (dict(rollout_batch_size=24), "rollout_call"),
        (dict(rollout_batch_size=6, cache="none"), "rollout_call"),
        (dict(micro_batch_size=6), "update_saved"),
        (dict(num_stages=1), "update_saved"),
        (dict(max_completion_length=128), "update_saved"),
        (dict(lora_rank=16), "moments"),
    ],
)
def test_less_takes_less(less, part):
    more = memory.budget(LLADA, RECIPE, 200)
    assert memory.budget(LLADA, replace(RECIPE, **less), 200)[part] < more[part]


def test_canvases_that_a_group_shares_count_once():
    def saved(micro_batch_size, num_stages):
        few = replace(RECIPE, micro_batch_size=micro_batch_size, num_stages=num_stages)
        return memory.budget(LLADA, few, 200)["update_saved"]

    one = saved(1, 1)
    # Rows of a group of 6: one canvas of all [MASK] for each group met, one a row for stage two.
    for rows, canvases in {(6, 1): 1, (12, 1): 2, (12, 2): 14, (4, 1): 2, (3, 2): 4}.items():
        assert saved(*rows) == pytest.approx(canvases * one), rows


@pytest.mark.parametrize("rank", [128, 0])
def test_split_layers_are_divided_and_three_of_them_are_whole_for_a_while(rank):
    one = memory.budget(LLADA, replace(RECIPE, lora_rank=rank), 200)
    four = memory.budget(LLADA, replace(RECIPE, lora_rank=rank, shard=True), 200, processes=4)
    words = (2 * 126464 + 1) * 4096 * (2 if rank else 4) / 2**30  # and the last norm: whole
    assert four["base"] == pytest.approx(words + (one["base"] - words) / 4)
    learned = one["gradients"] if rank else one["gradients"] - words
    for name, numbers in (("gradients", 1), ("moments", 2)):
        kept = numbers * (learned / 4 + (0 if rank else words))
        assert four[name] == pytest.approx(kept)
    assert four["gathered"] == pytest.approx(3 * (one["base"] - words + one["adapter"]) / 32)
    assert one["gathered"] == 0 and four["peak"] < one["peak"]


def test_processes_that_share_rows_take_what_one_takes_for_its_share():
    share = replace(RECIPE, prompts_per_step=4)
    shared = memory.budget(LLADA, RECIPE, 200, processes=4)
    assert shared == memory.budget(LLADA, share, 200)
    assert memory.largest(LLADA, RECIPE, 200, 24, 4).micro_batch_size <= 24


@pytest.mark.parametrize("gib", [24, 40, 80])
def test_the_largest_that_fits_fits_and_the_next_does_not(gib):
    found = memory.largest(LLADA, RECIPE, 200, gib)
    assert memory.budget(LLADA, found, 200)["peak"] <= gib
    rows, micro = found.rollout_batch_size or 96, found.micro_batch_size
    assert rows % 6 == 0 and 96 % micro == 0
    if rows < 96:
        wider = replace(found, rollout_batch_size=2 * rows)
        assert memory.budget(LLADA, wider, 200)["peak"] > gib
    if micro < 96:
        sizes = [size for size in range(micro + 1, 97) if 96 % size == 0]
        wider = replace(found, micro_batch_size=sizes[0])
        assert memory.budget(LLADA, wider, 200)["peak"] > gib
    changed = {f.name for f in fields(found) if getattr(found, f.name) != getattr(RECIPE, f.name)}
    assert changed <= {"micro_batch_size", "rollout_batch_size"}


@pytest.mark.parametrize(
    ("gib", "changes", "what"),
    [(8, {}, "micro_batch_size = 1 "), (24, dict(num_generations=48), "rollout_batch_size = 48 ")],
)
def test_what_does_not_fit_is_said_in_one_line(gib, changes, what):
    with pytest.raises(ValueError, match=f"{gib} GiB are too few") as error:
        memory.largest(LLADA, replace(RECIPE, **changes), 200, gib)
    assert what in str(error.value) and "\n" not in str(error.value)


# ---- against what a process takes ----------------------------------------------------------------

SMALL = (512, 64, 192, 2, 4, 2)  # llama's arguments
ROWS = dict(prompts_per_step=12)
STAGES = dict(micro_batch_size=32, prompts_per_step=4, num_iterations=1)
MEASURED = {"rollout, dual": ROWS, "update, checkpointing": STAGES}
CODE = f"""
import json, os
from experiments import benchmark
for name, changes in {MEASURED}.items():
    if not os.fork():  # each is a process of its own, whose peak starts from what it now has
        print(json.dumps([name, benchmark.check_memory(name, {SMALL}, **changes)]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are those of Linux and its allocator")
def test_predicted_peaks_are_measured_ones():
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    how = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    done = subprocess.run([sys.executable, "-c", CODE], **how)
    rows = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(rows) == [*MEASURED], done.stderr
    for row in rows.values():
        assert row["measured"] > 0.05 and 0.9 < row["ratio"] < 1.1, rows


# ---- what is printed -----------------------------------------------------------------------------


def printed(capsys, *flags):
    benchmark.main(["--memory", *flags])
    return capsys.readouterr().out


def test_every_part_is_printed_and_what_fits_with_each_cache(capsys):
    text = printed(
        capsys,
        "LLaDA-8B",
        "--gpu_gib",
        "40",
        "--max_completion_length",
        "128",
        "--dtype",
        "bfloat16",
    )
    parts = memory.budget(LLADA, replace(RECIPE, max_completion_length=128, dtype="bfloat16"), 200)
    for name, size in parts.items():
        assert f"{name:16}{size:8.2f}\n" in text
    assert "200 prompt tokens, 128 of a completion" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["none", "prefix", "dual"]


def test_it_is_told_of_one_of_several_processes(capsys):
    flags = ("--gpu_gib", "24", "--processes", "4", "--shard", "true")
    text = printed(capsys, "LLaDA-8B", *flags)
    parts = memory.budget(LLADA, replace(RECIPE, shard=True), 200, processes=4)
    assert f"{'gathered':16}{parts['gathered']:8.2f}\n" in text and "4 processes" in text
    assert "24 0 (all)" in " ".join(text.splitlines()[-1].split())  # 4 of 16 prompts


def test_no_weights_are_loaded(capsys, tmp_path, monkeypatch):
    QWEN2 = Qwen2Config(**SIZES, is_causal=False)
    QWEN2.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    assert "base" in printed(capsys, str(tmp_path), "--prompt_tokens", "20")
    tiny = printed(capsys, "tiny", "--task", "sudoku", "--gpu_gib", "2")
    assert "tiny, 200 prompt tokens" in tiny and tiny.splitlines()[-1].startswith("none")


def test_a_gpu_that_is_too_small_gets_a_line_for_each_cache(capsys):
    lines = printed(capsys, "LLaDA-8B", "--gpu_gib", "8").splitlines()[-3:]
    assert all("8 GiB are too few" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpu_gib", "24"], "--gpu_gib is understood only with --memory"),
        (["--prompt_tokens", "20"], "--prompt_tokens is understood only with --memory"),
        (
            ["--max_completion_length", "20"],
            "--max_completion_length is understood only with --memory",
        ),
        (["--memory", "../nothing"], "../nothing is no folder, LLaDA-8B"),
        (["--memory", "LLaDA-8B", "--lenght", "3"], "--lenght"),
        (["--memory", "LLaDA-8B", "--max_completion_length", "-3"], "length = -3"),
        (["--memory", "LLaDA-8B", "--prompt_tokens", "0"], "prompt_tokens = 0"),
        (["--memory", "LLaDA-8B", "--processes", "0"], "processes = 0"),
        (["--processes", "2"], "--processes is understood only with --memory"),
        (["--memory", "LLaDA-8B", "--processes", "17"], "at least 1 for each of the 17"),
        (["--memory", "LLaDA-8B", "--shard", "true"], "start them by torchrun"),
        (["--check", "sleep"], "update"),
    ],
)
def test_bad_flags_get_one_line(capsys, flags, says):
    with pytest.raises(SystemExit) as exit:
        benchmark.main(flags)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and says in message and message.count("\n") == 1


def test_the_check_has_a_line_for_every_row(capsys, monkeypatch):
    rows = {name: dict(predicted=1.0, measured=2.0, ratio=0.5) for name in benchmark.CHECKS}
    rows["update"] = {"failed": "out of memory"}
    monkeypatch.setattr(benchmark, "apart", lambda name, *_: rows[name])
    benchmark.main(["--check"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) and lines[0].split()[1:] == ["1.000", "2.000", "0.500"]
    assert "out of memory" in "".join(lines) and len(lines[0]) == len(header)


def test_work_is_counted_call_by_call():
    config = LlamaConfig(**SIZES)
    weights, P, L = memory.parameters(config)[0], 20, 16
    settings = Config(
        prompts_per_step=3,
        num_generations=2,
        max_completion_length=L,
        block_length=8,
        num_iterations=1,
        lora_rank=2,
    )
    whole = 6 * 8 * (P + L)  # six rows, a call for each two tokens
    update = (3 + 6) * (P + L)  # three canvases of all [MASK], six later ones
    assert memory.work(config, settings, P) == 2 * weights * (whole + 2 * update)
    fewer = 6 * 5 * (P + L)
    assert memory.work(config, settings, P, calls=5) == 2 * weights * (fewer + 2 * update)
    dual = replace(settings, cache="dual", num_iterations=2, gradient_checkpointing=True)
    cached = 6 * (2 * (P + L) + 6 * 8)  # two blocks open, six calls run eight positions
    assert memory.work(config, dual, P) == 2 * weights * (cached + (3 * 2 + 1) * update)
