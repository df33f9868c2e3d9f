"""What a new GPU is asked first: `bash tests/gpu.sh`. On a CPU the same at small shape.

    profile     LLaDA-8B's shape: an opening call, a dual call and an update of one micro-batch;
                which kernels take the time, how many are launched, the share that is products
    updates     48 rows of it, in micro-batches of 6, 12 and 24, and of 12 with gradient
                checkpointing
    uneven      96 rows of it with an adapter and the dual cache, which finish one after another as
                in a run; the same with cuDNN's attention, which the project turns off, and with
                padded prompts. The first rollout has new shapes, the second has none
    precision   bfloat16 at real depth: importance weights that must be 1, and rollouts with
                attention's kernel for no mask against its kernel for a mask of padding
    run 0.6b    train.py on random weights in Qwen3-0.6B's exact shape and layout: seconds to the
                first step, seconds a step, peak memory beside training/estimate.py's
    rollouts    12 and 96 rows of LLaDA-8B's shape, all unmasking the same number of tokens, with
                each block cache, and 12 without: tokens/s and TFLOP/s
    compiled    12 and 96 rows as in `uneven`, of a quarter of the layers, with and without
                --compile; the first rollout compiles
    stop        run 0.6b, stopped between its two steps: whether it goes on exactly
    main job    python train.py on the two small bases, countdown's and chain's: minutes, seconds to
                the first step, and the accuracy
    split       the first step of run 0.6b by two processes with split weights, by NCCL; with one
                GPU only the tests' group of one process

Each part is a process of its own with a time limit, and is written to gpu.json, with device, commit
and versions, as soon as it ends; one that exceeds its limit leaves what it has measured. They come
in the order in which a stop loses least, and their limits add up to 23 minutes. With 80 GB:

    python tests/gpu.py --shape 8b --parts run "run 4bit"
                LLaDA-8B's shape, layout and recipe, one step of 2 inner updates; its base in NF4,
                128 tokens, 24 rows at once
"""

# ruff: noqa: E402 (the root of the project has to be on the path first)

import argparse
import gc
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the programs of this project; checkpoints.py needs it too

from checkpoints import edit_config
from checkpoints import write_checkpoint as write_small

from config import Config
from denoiser import BlockCache
from diffusion_policy import DiffusionPolicy
from experiments import benchmark
from likelihood import draw_boundaries, surrogate_logp, unit_weight_tokens
from models import lora
from models.checkpoints import load_policy
from models.device import device_name
from models.families import read_config
from models.prompting import encode_prompts
from sampler import Decoder
from tasks.registry import TASKS
from training.estimate import count_parameters, estimate_gib

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPES = {  # V, D, MLP, layers, heads, key-value heads, width of a head; those of LLaDA have five
    "0.6b": (151936, 1024, 3072, 28, 16, 8, 128),
    "8b": (126464, 4096, 12288, 32, 32),
    "small": (2000, 128, 384, 6, 4, 2, 32),
    "small llada": (2000, 128, 384, 6, 4),
}
RUN = "--cache dual --num_iterations 2 --micro_batch_size 12 --lora_rank 16"
RUNS = {  # flags of train.py; those of 8b are LLaDA's recipe but for the inner updates
    "0.6b": f"{RUN} --prompts_per_step 8 --num_generations 6 --max_completion_length 128"
    " --block_length 32",
    "8b": "--num_iterations 2 --steps 1",
    "small": f"{RUN} --prompts_per_step 2 --num_generations 2 --max_completion_length 16"
    " --block_length 8",
}
RUNS["small llada"] = RUNS["small"]
IN_4_BITS = "--dtype 4bit --max_completion_length 128 --rollout_batch_size 24 --steps 1"
# Dense bfloat16 TFLOP/s by the makers' data sheets; a GPU's name holds the key.
SPEEDS = {
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71,
    "RTX A6000": 155, "RTX 6000 Ada": 364, "A10": 125, "L4": 121,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder, special, **words):
    """Byte pairs of this project's own texts, behind the special tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(word, special=True, normalized=False) for word in special]
    trainer = BpeTrainer(
        vocab_size=1900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(ROOT / "README.md"), str(ROOT / "EXPERIMENTS.md")], trainer)
    words["pad_token"] = special[0].content
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def write_llada(folder, shape):
    """Random weights as GSAI-ML published LLaDA: its sizes, names and configuration."""
    V, D, MLP, layers, heads = SHAPES[shape]
    write_small(folder, "llada")  # for its config.json
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mdm_mask|>"]
    fast = write_tokenizer(folder, special, eos_token=special[0])
    end = fast.eos_token_id
    mask = fast.convert_tokens_to_ids("<|mdm_mask|>")
    edit_config(
        folder, embedding_size=V, vocab_size=V, d_model=D, mlp_hidden_size=MLP, n_layers=layers,
        n_heads=heads, n_kv_heads=heads, max_sequence_length=4096, mask_token_id=mask,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(0)

    def matrix(*shape):
        return (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) * 1.28 / D**0.5).cpu()

    norm = torch.ones(D, dtype=torch.bfloat16)
    shapes = {
        "q_proj": (D, D),
        "k_proj": (D, D),
        "v_proj": (D, D),
        "attn_out": (D, D),
        "ff_proj": (MLP, D),
        "up_proj": (MLP, D),
        "ff_out": (D, MLP),
    }
    weight_map = {}
    for i in range(layers + 1):  # a file for each layer, and one for the rest
        if i < layers:
            weights = {f"blocks.{i}.{name}": matrix(*shape) for name, shape in shapes.items()}
            weights[f"blocks.{i}.attn_norm"] = norm.clone()
            weights[f"blocks.{i}.ff_norm"] = norm.clone()
        else:
            weights = {"wte": matrix(V, D), "ff_out": matrix(V, D), "ln_f": norm}
        weights = {f"model.transformer.{name}.weight": w for name, w in weights.items()}
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def write_checkpoint(folder, shape):
    """Random weights as dllm's converter writes a Qwen3: its sizes, names and configuration."""
    if len(SHAPES[shape]) == 5:
        return write_llada(folder, shape)
    V, D, MLP, layers, heads, kv_heads, head_dim = SHAPES[shape]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    fast = write_tokenizer(folder, special, eos_token="<|im_end|>", mask_token="<|mask|>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V, hidden_size=D, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=4096, tie_word_embeddings=True, rope_theta=1e6, dtype="bfloat16",
        eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, bos_token_id=None,
        mask_token_id=fast.mask_token_id, initializer_range=1.28 / D**0.5,
    )  # fmt: skip
    with DEVICE:
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}
    config["is_causal"] = False  # bidirectional: its mdlm, not its bd3lm
    file.write_text(json.dumps(config, indent=2))


@torch.no_grad()
def precision(folder):
    """bfloat16's own error bar, on 32 rows of equally long prompts."""
    policy = load_policy(folder, DEVICE, torch.bfloat16)
    P = L = 64 if GPU else 16

    def seeded(seed):
        return torch.Generator(DEVICE).manual_seed(seed)

    ids = torch.randint(300, 1900, (32, P), generator=seeded(0), device=DEVICE)
    sampled = Decoder("top_k", 4, stop_at_eos=False)
    drawn = policy.rollout(ids, ids > 0, length=L, decoder=sampled, generator=seeded(1))
    boundaries = draw_boundaries(drawn.nfe, num_stages=2, generator=seeded(2))
    logp = surrogate_logp(policy, drawn, boundaries)
    unit = unit_weight_tokens(drawn.unmask_step, boundaries) & drawn.token_mask
    error = (logp - drawn.behaviour_logp)[unit]
    # The same prompts beside one that is a token longer: now they are padded, and there is a mask.
    # Greedy, since a row more draws other random numbers.
    padded = torch.nn.functional.pad(ids, (1, 0))
    padded = torch.cat([padded, torch.full_like(padded[:1], 300)])
    greedy = Decoder("top_k", 4, temperature=0.0, stop_at_eos=False)
    one, other = (policy.rollout(x, x > 0, L, greedy) for x in (ids, padded))
    assert len(other.nfe) == len(ids) + 1 and not other.prompt_mask.all()
    other = other.rows(slice(0, len(ids)))
    first = one.unmask_step == 1
    same = (one.unmask_step == other.unmask_step) & (one.completion == other.completion)
    return {
        "log weights that must be 0, sd": error.std().item(),
        "the same, largest": error.abs().max().item(),
        "same first tokens with a mask": same[first].float().mean().item(),
        "same tokens with a mask": same.float().mean().item(),
    }


def train(*flags, processes=1):
    """Run train.py. Returns its seconds, and each line it prints with the second it comes at."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(processes)]
    command = [sys.executable, "-u", *launcher, str(ROOT / "train.py"), *map(str, flags)]
    lines = []
    began = time.time()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
        ) as process,
    ):
        for line in process.stdout:
            lines.append((time.time() - began, line.rstrip()))
        if process.wait():
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            of_train = [line for line in lines if line.startswith("train.py: ")]  # not torchrun's
            raise RuntimeError((of_train or lines)[-1][:300])
    return time.time() - began, lines


def step_flop(config, settings, prompt_tokens, calls, is_useful=False):
    """Floating-point operations of one step, whose completions take so many calls.

    2 for each weight and position of a call. A backward pass through a frozen base costs as much as
    a forward pass, through one that learns twice that; checkpointing makes each call once more.

    is_useful   without what only saves memory or is only measured: checkpointing and cache_kl
    """
    B = settings.prompts_per_step * settings.num_generations
    L = settings.max_completion_length
    S = prompt_tokens + L
    block = settings.block_length or L
    part = {"none": S, "prefix": L - L // 2, "dual": block}[settings.cache]
    opening = max(1, L // block) if settings.cache != "none" else 0
    rollout = B * (opening * S + (calls - opening) * part)
    canvases = settings.prompts_per_step + B * (settings.num_stages - 1)
    is_made_twice = settings.gradient_checkpointing and not is_useful
    passes = 2 + is_made_twice + (not settings.lora_rank)
    mu = settings.num_iterations  # the old policy is scored for all updates but the first
    update = canvases * S * (passes * mu + mu - 1)
    if settings.cache != "none" and not is_useful:
        update += 16 * S  # cache_kl
    return 2 * count_parameters(config)["matrices"] * (rollout + update)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stopped_run(flags, work):
    """The metrics of two steps with a stop between them that differ from those of random_run."""
    train(*flags, "--steps", 1, "--run_dir", work / "parts")
    train("--resume", "--run_dir", work / "parts", "--steps", 2)
    whole = rows_of(work / "whole")
    parts = rows_of(work / "parts")
    names = {name for name in whole[0] if "second" not in name and "memory" not in name}
    differing = [
        name for a, b in zip(whole, parts, strict=True) for name in names if a[name] != b[name]
    ]
    return {"metrics that differ": len(differing), "which": " ".join(sorted({*differing}))}


def seconds_to_step_1(lines, rows):
    """The second in which a run begins its first step, by its lines (`train`) and its metrics."""
    end = next(second for second, line in lines if line.startswith("step 1/"))
    return end - rows[0]["seconds_rollout"] - rows[0]["seconds_update"]


def split_run(flags, work):
    """The first step of random_run, by two processes that split the layers' weights.

    In bfloat16 rows that are rolled out apart can draw other tokens: metrics are near, not equal.
    """
    gpus = torch.cuda.device_count()
    if GPU and gpus < 2:
        test = "test_split_weights_learn_as_whole_ones_do"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-k", test]
        done = subprocess.run(
            [*command, str(ROOT / "tests" / "test_gpu.py")],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        lines = done.stdout.strip().splitlines()
        return {
            "two processes": "not run: there is one GPU",
            "one process, by NCCL": "passed" if done.returncode == 0 else lines[-1][:300],
        }
    flags = [*flags, "--steps", 1, "--shard", "true", "--run_dir", work / "split"]
    train(*flags, processes=2)
    [split] = rows_of(work / "split")
    whole = rows_of(work / "whole")[0]
    names = ("reward_mean", "nfe_mean", "surrogate_kl", "seconds_rollout", "seconds_update")
    results = {}
    for name in (*names, "peak_memory_gib"):
        results[f"{name}: two processes"] = split[name]
        results[f"{name}: one"] = whole[name]
    return results


def random_run(flags, work, name="whole"):
    """A step or two."""
    seconds, lines = train(*flags, "--run_dir", work / name)
    whole = rows_of(work / name)
    step = [row["seconds_rollout"] + row["seconds_update"] for row in whole]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "model")
    task = TASKS["countdown"]
    prompt = task.prompt(task.problems("train", 1, 0)[0])
    config = read_config(work / "model")[0]
    reader = DiffusionPolicy(SimpleNamespace(config=config, device="cpu"), tokenizer)
    P = encode_prompts(reader, [prompt])[0].shape[1]
    settings = Config(**json.loads((work / name / "config.json").read_text()))
    calls = whole[-1]["nfe_mean"]
    flop = step_flop(config, settings, P, calls)
    useful = step_flop(config, settings, P, calls, is_useful=True)
    predicted = estimate_gib(config, settings, P)
    speeds = [speed for key, speed in SPEEDS.items() if key in device_name(DEVICE)]
    return {
        "seconds to the first step": seconds_to_step_1(lines, whole), "seconds, all": seconds,
        "seconds, first step": step[0], "seconds, last step": step[-1],
        "of it rollout": whole[-1]["seconds_rollout"], "TFLOP of it": flop / 1e12,
        "useful TFLOP": useful / 1e12,
        "MFU": useful / (step[-1] * 1e12 * speeds[0]) if speeds else None,
        "tokens/s": whole[-1]["tokens_per_second"], "prompt tokens": P, "calls": calls,
        "peak GiB": whole[-1]["peak_memory_gib"],
        "predicted GiB, less the allowance": predicted["peak"] - predicted["allowance"],
    }  # fmt: skip


# ---- at LLaDA-8B's shape, without a checkpoint ---------------------------------------------------


def shape_of_8b(rows, **settings):
    """LLaDA-8B's shape on a GPU, a small one on a CPU; `rows` completions, 6 of a prompt."""
    shape = benchmark.SHAPES["8b" if GPU else "tiny"]
    config = replace(shape.config, prompts_per_step=rows // 6, num_generations=6, **settings)
    return replace(shape, config=config)


def forward_flop(shape, positions):
    """Floating-point operations of the layers' products at so many positions."""
    matrices = (
        shape.layers
        * shape.hidden
        * (
            2 * shape.hidden
            + 2 * shape.hidden * shape.key_value_heads // shape.heads
            + 3 * shape.mlp
        )
    )
    return 2 * matrices * positions


def profile():
    """Where the time of three kinds of work goes, by torch's profiler."""
    shape = shape_of_8b(rows=12)
    L = shape.config.max_completion_length
    block = shape.config.block_length
    policy = benchmark.make_policy(shape)
    ids = torch.randint(3, 100, (12, shape.prompt_tokens + L), device=DEVICE)
    cache = BlockCache()
    hidden = []

    @torch.no_grad()
    @policy.casting_once()  # as in a rollout
    def opening_call():
        cache.__init__()
        hidden[:] = [policy.hidden(ids, cache=cache)]

    @torch.no_grad()
    @policy.casting_once()
    def dual_call():
        start = shape.prompt_tokens
        states = policy.hidden(ids, cache=cache, start=start, stop=start + block).flatten(0, 1)
        policy.entropy_and_confidence(states)

    generator = torch.Generator(DEVICE).manual_seed(0)
    uniform = policy.draw_uniform(12, L, generator)
    decoder = Decoder("top_k", shape.tokens_per_step, block, stop_at_eos=False, cache="dual")
    prompts = ids[:, : shape.prompt_tokens]
    rollout = policy.rollout(prompts, prompts > 0, L, decoder, uniform=uniform)
    update = benchmark.prepare_updates(
        replace(shape.config, num_iterations=1), policy, rollout, generator
    )
    results = {}
    for name, work in {"opening": opening_call, "dual": dual_call, "update": update}.items():
        work()  # the first call of a kernel is slow
        milliseconds = time_call(work)  # without the profiler, which slows the host down
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
        with torch.profiler.profile(activities=activities) as profiler:
            work()
            if GPU:
                torch.cuda.synchronize()
        events = profiler.key_averages()
        kernels = {}  # name -> (microseconds, how many)
        for event in events:
            if not GPU:
                kernels[event.key] = (event.self_cpu_time_total, event.count)
            # An operator has its kernels' time too, and so has an annotation (AdamW's step).
            elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                kernels[event.key] = (event.self_device_time_total, event.count)
        total = sum(microseconds for microseconds, _ in kernels.values())
        is_product = re.compile("gemm|cutlass|nvjet|cublas|aten::(add)?mm|bmm", re.IGNORECASE)
        # Their names hold "cutlass" too: pytorch_flash, fmha_cutlass, cudnn's sdpa.
        is_attention = re.compile("flash|fmha|sdpa|scaled_dot", re.IGNORECASE)
        attention = sum(time for key, (time, _) in kernels.items() if is_attention.search(key))
        products = sum(
            time
            for key, (time, _) in kernels.items()
            if is_product.search(key) and not is_attention.search(key)
        )
        # cudaLaunchKernel, and cudaLaunchKernelExC and cuLaunchKernelEx of newer libraries
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        results |= {
            f"{name}, ms": milliseconds,
            f"{name}, busy ms": total / 1000,
            f"{name}, share of products": products / total,
            f"{name}, share of attention": attention / total,
            f"{name}, launches": launches,
        }
        longest = sorted(kernels.items(), key=lambda item: item[1], reverse=True)[:8]
        for key, (microseconds, count) in longest:
            results[f"{name}: {key[:60]}"] = f"{microseconds / 1000:.2f} ms, {count} times"
        print_so_far(results)
    return results


def time_call(work, repetitions=3):
    """Milliseconds of a call by the clock, the least of a few."""
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work()
        if GPU:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


def rollouts():
    """Tokens and TFLOP a second, of 12 and of 96 rows, with each block cache."""
    results = {}
    for rows, method in (
        (96, "dual"),
        (96, "prefix"),
        (12, "dual"),
        (12, "prefix"),
        (12, "ours"),
        (12, "naive"),
    ):
        shape = shape_of_8b(rows)
        row = benchmark.measure(shape, method)
        L = shape.config.max_completion_length
        calls = L // shape.tokens_per_step
        opening = max(1, L // shape.config.block_length)
        block = shape.config.block_length
        S = shape.prompt_tokens + L
        part = {"naive": S, "ours": S, "prefix": L - L // 2, "dual": block}[method]
        positions = rows * (opening * S + (calls - opening) * part)
        flop = forward_flop(shape, positions)
        results[f"{rows} rows, {method}: tokens/s"] = row["tokens_per_s"]
        results[f"{rows} rows, {method}: TFLOP/s"] = flop / row["seconds"] / 1e12
        results[f"{rows} rows, {method}: peak GiB"] = row["peak_gib"]
        print_so_far(results)
        release()
    return results


def uneven_rollouts():
    """Seconds of rollouts as in a run: under an adapter, rows finishing one after another.

    With torch's attention as models/loading.py sets it, with cuDNN's too, and with padded prompts.
    """
    shape = shape_of_8b(rows=96)
    policy = adapted_policy(shape)
    results = {}
    for name in ("plain", "cuDNN's attention", "padded prompts"):
        torch.backends.cuda.enable_cudnn_sdp(name == "cuDNN's attention")
        time_rollouts(policy, shape, name, results, is_padded=name == "padded prompts")
    return results


def compiled_rollouts():
    """The same with and without --compile, of a quarter of the layers: compiling takes minutes."""
    results = {}
    for rows in (12, 96):
        shape = shape_of_8b(rows)
        policy = adapted_policy(replace(shape, layers=max(2, shape.layers // 4)))
        plain = time_rollouts(policy, shape, f"{rows} rows, plain", results)
        policy.compile_cached_calls()
        compiled = time_rollouts(policy, shape, f"{rows} rows, compiled", results)
        is_same = plain.completion == compiled.completion
        results[f"{rows} rows: share of equal tokens"] = is_same.float().mean().item()
        release()
    return results


def adapted_policy(shape):
    """A policy of this shape, with random weights, under a LoRA adapter."""
    policy = benchmark.make_policy(shape)
    policy.denoiser = lora.add_lora(
        policy.denoiser, rank=shape.config.lora_rank, alpha=shape.config.lora_alpha
    )
    return policy


def time_rollouts(policy, shape, name, results, is_padded=False):
    """Adds the seconds of two equal rollouts to the results. Returns the second rollout."""
    rows = shape.config.prompts_per_step * shape.config.num_generations
    seeded = torch.Generator(DEVICE).manual_seed(0)
    prompt_ids = torch.randint(3, 100, (rows, shape.prompt_tokens), generator=seeded, device=DEVICE)
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    if is_padded:
        prompt_mask[::2, :2] = False
    decoder = Decoder(
        rule="eb",  # rows finish one after another
        level=4.0,
        block_length=shape.config.block_length,
        cache="dual",
        stop_at_eos=False,
    )
    for turn in ("first", "second"):  # shapes are new in the first alone
        began = time.perf_counter()
        rollout = policy.rollout(
            prompt_ids,
            prompt_mask=prompt_mask,
            length=shape.config.max_completion_length,
            decoder=decoder,
            generator=torch.Generator(DEVICE).manual_seed(1),
        )
        if GPU:
            torch.cuda.synchronize()
        results[f"{name}, {turn} rollout: seconds"] = time.perf_counter() - began
        print_so_far(results)
    results[f"{name}: calls of the slowest row"] = int(rollout.nfe.max())
    return rollout


def updates():
    """Seconds of one step's updates of 48 rows, by checkpointing and micro-batch."""
    results = {}
    for checkpointing, micro_batch in ((False, 12), (True, 12), (False, 24), (False, 6)):
        shape = shape_of_8b(
            48,
            num_iterations=1,
            micro_batch_size=micro_batch,
            gradient_checkpointing=checkpointing,
        )
        row = benchmark.measure(shape, "learning")
        title = f"checkpointing {checkpointing}, micro-batches of {micro_batch}"
        results[f"{title}: seconds"] = row["seconds"]
        results[f"{title}: peak GiB"] = row["peak_gib"]
        print_so_far(results)
        release()
    return results


def print_so_far(results):
    """Prints a part's results as JSON: what is left of it if it exceeds its time limit."""
    print(json.dumps(results), flush=True)


def release():
    """Give the memory of the last model back."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


# ---- the tiny model ------------------------------------------------------------------------------


def main_job(work):
    """The jobs of a minute on a CPU, of which the GPU's results should not differ."""
    shorter = [] if GPU else ["--steps", "3", "--eval_problems", "32"]
    results = {}
    for task, model in (("countdown", "tiny"), ("chain", ROOT / "bases" / "chain")):
        run = work / task
        flags = ["--task", task, "--model", model, "--run_dir", run]
        seconds, lines = train(*flags, *shorter)
        rows = rows_of(run)
        step_seconds = [row["seconds_rollout"] + row["seconds_update"] for row in rows]
        accuracy = [line.strip() for _, line in lines if line.startswith("Accuracy")]
        results[f"{task}: minutes"] = seconds / 60
        results[f"{task}: seconds to the first step"] = seconds_to_step_1(lines, rows)
        results[f"{task}: seconds a step"] = sum(step_seconds) / len(step_seconds)
        results[f"{task}: accuracy"] = " ".join(accuracy)
    return results


# ---- the parts, one after the other --------------------------------------------------------------

LIMITS = {  # seconds of each part, in the order in which a stop loses least
    "profile": 100,
    "updates": 120,
    "uneven": 120,
    "precision": 60,
    "run": 120,
    "rollouts": 150,
    "compiled": 240,
    "stop": 120,
    "main job": 240,
    "split": 120,
    "run 4bit": 300,
}
BY_DEFAULT = [name for name in LIMITS if name != "run 4bit"]


def measure_part(name, shape, work):
    """One part, in this process: what it measures, as a dict for JSON."""
    flags = ["--task", "countdown", "--eval_problems", "2", "--frontier", "false", "--steps", "2"]
    flags += [*RUNS[shape].split(), "--model", work / "model"]
    if name == "profile":
        return profile()
    if name == "updates":
        return updates()
    if name == "uneven":
        return uneven_rollouts()
    if name == "rollouts":
        return rollouts()
    if name == "precision":
        return precision(work / "model")
    if name == "run":
        return random_run(flags, work)
    if name == "stop":
        return stopped_run(flags, work)
    if name == "split":
        return split_run(flags, work)
    if name == "run 4bit":
        return random_run([*flags, *IN_4_BITS.split()], work, "4bit")
    if name == "compiled":
        return compiled_rollouts()
    return main_job(work)


def measure_apart(name, shape, work):
    """The same in a process of its own, which is ended with all that it started at its limit."""
    command = [sys.executable, __file__, "--measure", name, "--shape", shape, "--work", str(work)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=LIMITS[name])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        return read_last(out) | {"failed": f"it took longer than {LIMITS[name]} s"}
    if process.returncode:
        reason = (errors.strip().splitlines() or ["?"])[-1][:300]
        return read_last(out) | {"failed": reason}
    return read_last(out)


def read_last(out):
    """The last line of JSON that a part printed: all its results, or those so far."""
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b" if GPU else "small")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=LIMITS,
        default=BY_DEFAULT,
        help="default: all but run 4bit",
    )
    parser.add_argument("--measure", choices=LIMITS, help="one part, in this process, as JSON")
    parser.add_argument("--work", type=Path, help="with --measure: the folder of the checkpoint")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure_part(options.measure, options.shape, options.work)))
        return 0
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    report = {
        "device": device_name(DEVICE), "commit": commit.stdout.strip(), "torch": torch.__version__,
        "python": platform.python_version(), "cuda": torch.version.cuda if GPU else None,
    }  # fmt: skip
    print(" ".join(f"{name} {value}," for name, value in report.items()).rstrip(","))
    work = Path(tempfile.mkdtemp())
    for name in options.parts:
        began = time.time()
        if (
            name in ("precision", "run", "stop", "split", "run 4bit")
            and not (work / "model").exists()
        ):
            write_checkpoint(work / "model", options.shape)
        report[name] = measure_apart(name, options.shape, work)
        print(f"\n{name} ({time.time() - began:.0f} s)")
        for key, value in report[name].items():
            value = f"{value:.4g}" if isinstance(value, float) else value
            print(f"  {key:60} {value}", flush=True)
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")  # what a stop leaves
    shutil.rmtree(work)
    return int(any("failed" in report[name] for name in options.parts))


if __name__ == "__main__":
    sys.exit(main())
