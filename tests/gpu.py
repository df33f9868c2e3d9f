"""What a new GPU is asked first: `bash tests/gpu.sh`. On a CPU the same at small shape.

    precision   bfloat16 at real depth: importance weights that must be 1, and rollouts with
                attention's kernel for no mask against its kernel for a mask of padding
    run 0.6b    train.py on random weights in Qwen3-0.6B's exact shape and layout: seconds to the
                first step, seconds a step, peak memory beside training/estimate.py's
    stop        the same, stopped between its two steps: whether it goes on exactly
    main job    python train.py --task countdown --model tiny: minutes, and the accuracy
    benchmark   experiments/benchmark.py's rows

One table is printed, and gpu.json has the same with device, commit and versions. With 80 GB:

    python tests/gpu.py --shape 8b --parts run "run 4bit"
                LLaDA-8B's shape, layout and recipe, one step of 2 inner updates; its base in NF4,
                128 tokens, 24 rows at once
"""

# ruff: noqa: E402 (the root of the project has to be on the path first)

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the programs of this project; checkpoints.py needs it too

from checkpoints import edit_config
from checkpoints import write_checkpoint as write_small

from config import Config
from diffusion_policy import DiffusionPolicy
from likelihood import draw_boundaries, scored_as_drawn, surrogate_logp
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
    unit = scored_as_drawn(drawn.unmask_step, boundaries) & drawn.token_mask
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


def train(*flags):
    """Run train.py. Returns its seconds, and each line it prints with the second it comes at."""
    command = [sys.executable, "-u", str(ROOT / "train.py"), *map(str, flags)]
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
            raise RuntimeError(errors.read().strip().splitlines()[-1][:300])
    return time.time() - began, lines


def step_flop(config, settings, prompt_tokens, calls):
    """Floating-point operations of one step, whose completions take so many calls.

    2 for each weight and position of a call. A backward pass through a frozen base costs as much as
    a forward pass, through one that learns twice that; checkpointing makes each call once more.
    """
    B = settings.prompts_per_step * settings.num_generations
    L = settings.max_completion_length
    S = prompt_tokens + L
    block = settings.block_length or L
    part = {"none": S, "prefix": L - L // 2, "dual": block}[settings.cache]
    opening = max(1, L // block) if settings.cache != "none" else 0
    rollout = B * (opening * S + (calls - opening) * part)
    canvases = settings.prompts_per_step + B * (settings.num_stages - 1)
    passes = 2 + settings.gradient_checkpointing + (not settings.lora_rank)
    mu = settings.num_iterations  # the old policy is scored for all updates but the first
    update = canvases * S * (passes * mu + mu - 1)
    if settings.cache != "none":
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


def random_run(flags, work, name="whole"):
    """A step or two."""
    seconds, lines = train(*flags, "--run_dir", work / name)
    whole = rows_of(work / name)
    step = [row["seconds_rollout"] + row["seconds_update"] for row in whole]
    first_step_ends = next(second for second, line in lines if line.startswith("step 1/"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "model")
    task = TASKS["countdown"]
    prompt = task.prompt(task.problems("train", 1, 0)[0])
    config = read_config(work / "model")[0]
    reader = DiffusionPolicy(SimpleNamespace(config=config, device="cpu"), tokenizer)
    P = encode_prompts(reader, [prompt])[0].shape[1]
    settings = Config(**json.loads((work / name / "config.json").read_text()))
    calls = whole[-1]["nfe_mean"]
    flop = step_flop(config, settings, P, calls)
    predicted = estimate_gib(config, settings, P)
    speeds = [speed for key, speed in SPEEDS.items() if key in device_name(DEVICE)]
    return {
        "seconds to the first step": first_step_ends - step[0], "seconds, all": seconds,
        "seconds, first step": step[0], "seconds, last step": step[-1],
        "of it rollout": whole[-1]["seconds_rollout"], "TFLOP of it": flop / 1e12,
        "MFU": flop / (step[-1] * 1e12 * speeds[0]) if speeds else None,
        "tokens/s": whole[-1]["tokens_per_second"], "prompt tokens": P, "calls": calls,
        "peak GiB": whole[-1]["peak_memory_gib"],
        "predicted GiB, less the allowance": predicted["peak"] - predicted["allowance"],
    }  # fmt: skip


def main_job(work):
    shorter = [] if GPU else ["--steps", "3", "--eval_problems", "32"]
    flags = ["--task", "countdown", "--model", "tiny", "--run_dir", work / "tiny", *shorter]
    seconds, lines = train(*flags)
    rows = rows_of(work / "tiny")
    accuracy = next((line.strip() for _, line in lines if line.startswith("Accuracy")), "")
    mean = sum(row["seconds_rollout"] + row["seconds_update"] for row in rows) / len(rows)
    return {"minutes": seconds / 60, "seconds a step": mean, "accuracy": accuracy}


def benchmark():
    command = [sys.executable, "-m", "experiments.benchmark", *([] if GPU else ["--shape", "tiny"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return {line[:16].strip(): line[16:].strip() for line in done.stdout.splitlines()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b" if GPU else "small")
    parser.add_argument("--parts", nargs="+", help="default: all but `run 4bit`")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    report = {
        "device": device_name(DEVICE), "commit": commit.stdout.strip(), "torch": torch.__version__,
        "python": platform.python_version(), "cuda": torch.version.cuda if GPU else None,
    }  # fmt: skip
    print(" ".join(f"{name} {value}," for name, value in report.items()).rstrip(","))
    work = Path(tempfile.mkdtemp())
    write_checkpoint(work / "model", options.shape)
    flags = ["--task", "countdown", "--eval_problems", "2", "--frontier", "false", "--steps", "2"]
    flags += [*RUNS[options.shape].split(), "--model", work / "model"]
    parts = {
        "precision": lambda: precision(work / "model"),
        "run": lambda: random_run(flags, work), "stop": lambda: stopped_run(flags, work),
        "run 4bit": lambda: random_run([*flags, *IN_4_BITS.split()], work, "4bit"),
        "main job": lambda: main_job(work), "benchmark": benchmark,
    }  # fmt: skip
    for name in options.parts or [name for name in parts if name != "run 4bit"]:
        began = time.time()
        try:
            report[name] = parts[name]()
        except Exception as error:  # the others are still worth their time
            report[name] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
        title = name if name in ("main job", "benchmark") else f"{name} {options.shape}"
        print(f"\n{title} ({time.time() - began:.0f} s)")
        for key, value in report[name].items():
            value = f"{value:.4g}" if isinstance(value, float) else value
            print(f"  {key:36}{value}")
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")  # what a stop leaves
    shutil.rmtree(work)
    return int(any("failed" in report.get(name, {}) for name in parts))


if __name__ == "__main__":
    sys.exit(main())
