"""What a GPU computes otherwise than a CPU: kernels, bfloat16 products, its own random numbers.

Each test runs on the CPU too, so that it is itself tested where there is no GPU.
"""

import gpu
import pytest
import torch
import torch.distributed as dist
from checkpoints import VOCABULARY, write_checkpoint
from toy import metrics_of, to_the_end, wide_policy

import train
from denoiser import Float32Product
from diffusion_policy import DiffusionPolicy
from likelihood import cache_kl, draw_boundaries, exact_logp, surrogate_logp, unit_weight_tokens
from models.checkpoints import load_policy
from models.loading import load_denoiser
from models.lora import add_lora
from models.make_base import Recipe, find_demonstrated_task
from models.pretraining import Training
from sampler import ThresholdHead
from training import checks, distributed

GPU = torch.cuda.is_available()
ABSENT = pytest.mark.skipif(not GPU, reason="there is no CUDA device")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ABSENT)])
RUN = "--task countdown --model tiny --prompts_per_step 4 --eval_problems 4 --frontier false"
DECODERS = [to_the_end("eb", None), to_the_end("top_k", 2), to_the_end("eb", 0.3, 3, cache="dual")]


def policy_on(device, dtype=torch.float32):
    policy = wide_policy(layers=4)
    torch.manual_seed(1)
    policy.denoiser.to(device, dtype)
    policy.threshold_head = ThresholdHead(32).to(device)
    return policy


def rollout_on(device, decoder, dtype=torch.float32):
    """(policy, rollout) of 24 rows of three prompts, padded, with 9 tokens each."""
    policy = policy_on(device, dtype)
    ids = torch.tensor([[4, 5, 6], [0, 4, 6], [0, 0, 7]], device=device)
    ids = ids.repeat_interleave(8, dim=0)
    seeded = torch.Generator(device).manual_seed(0)
    return policy, policy.rollout(ids, ids > 0, length=9, decoder=decoder, generator=seeded)


@DEVICES
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: f"{d.rule}-{d.level}-{d.cache}")
def test_recorded_log_probs_are_the_exact_likelihoods(device, decoder):
    policy, rollout = rollout_on(device, decoder)
    assert rollout.completion.device.type == device
    if decoder.cache == "none":
        exact = exact_logp(policy, rollout)
        error = (rollout.behaviour_logp - exact)[rollout.token_mask].abs().max()
        assert error < 1e-3  # TF32 is off unless someone turned it on
    else:
        assert cache_kl(policy, rollout) > 1e-4


@DEVICES
def test_greedy_tokens_are_the_cpus(device):
    for decoder in (
        to_the_end("top_k", 2, temperature=0.0),
        to_the_end("eb", 0.3, temperature=0.0),
    ):
        on_device = rollout_on(device, decoder)[1]
        on_cpu = rollout_on("cpu", decoder)[1]
        assert torch.equal(on_device.completion.cpu(), on_cpu.completion)
        assert torch.equal(on_device.unmask_step.cpu(), on_cpu.unmask_step)


@DEVICES
def test_the_same_seed_draws_the_same_and_the_global_generator_is_left_alone(device):
    policy, first = rollout_on(device, to_the_end("eb", None))
    state = torch.cuda.get_rng_state if device == "cuda" else torch.random.get_rng_state
    before = state()
    again = policy.rollout(
        first.prompt_ids,
        first.prompt_mask,
        length=9,
        decoder=to_the_end("eb", None),
        generator=torch.Generator(device).manual_seed(0),
    )
    assert torch.equal(first.completion, again.completion)
    assert torch.equal(first.threshold, again.threshold) and torch.equal(state(), before)


@DEVICES
def test_tokens_are_drawn_in_proportion_to_their_probability(device):
    policy = policy_on(device)
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(2)).to(device)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens, logp = policy.sample_tokens(
        hidden.expand(20000, -1), temperature=0.5, uniform=uniform.to(device)
    )
    every = torch.arange(3000, device=device)
    p = policy.token_logp(hidden.expand(3000, -1), every, 0.5).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-4) and p[0] == 0
    assert torch.allclose(logp, p[tokens].log(), atol=1e-4)
    likely = p > 0.005
    share = tokens.bincount(minlength=3000) / len(tokens)
    sd = (p * (1 - p) / len(tokens)).sqrt()
    assert likely.sum() > 3 and ((share - p)[likely].abs() < 4.5 * sd[likely]).all()


@DEVICES
def test_bfloat16_products_of_the_last_layer_are_accumulated_and_kept_in_float32(device):
    seeded = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(n, 256, generator=seeded) for n in (500, 40))
    weight, hidden = (x.to(device, torch.bfloat16).requires_grad_() for x in (weight, hidden))
    product = Float32Product.apply(weight, hidden)
    exact = weight.double() @ hidden.double().T
    assert product.dtype == torch.float32 and (product - exact).abs().max() < 1e-3
    gradient = torch.randn(product.shape, generator=seeded).to(device)
    product.backward(gradient)
    for ours, expected in (
        (weight.grad, gradient.double() @ hidden.double()),
        (hidden.grad, gradient.T.double() @ weight.double()),
    ):
        assert (ours - expected).abs().max() < 0.02 * expected.abs().max()


@DEVICES
def test_weights_that_are_1_in_exact_arithmetic_are_near_it_in_bfloat16(device):
    policy, rollout = rollout_on(device, to_the_end("eb", 0.3), torch.bfloat16)
    boundaries = draw_boundaries(rollout.nfe, 2, torch.Generator(device).manual_seed(0))
    with torch.no_grad():
        logp = surrogate_logp(policy, rollout, boundaries)
    unit = unit_weight_tokens(rollout.unmask_step, boundaries) & rollout.token_mask
    error = (logp - rollout.behaviour_logp)[unit]
    assert unit.sum() > 40 and error.std() < 0.05 and error.abs().max() < 0.3


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_learns_and_its_gradient_is_the_cpus(device, dtype, tmp_path):
    write_checkpoint(tmp_path, "llada")
    gradients = []
    for where in (device, "cpu"):
        denoiser, tokenizer = load_denoiser(str(tmp_path), where, dtype)
        model = add_lora(denoiser, 4, 8)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                seeded = torch.Generator().manual_seed(len(name))
                p.data.copy_(0.1 * torch.randn(p.shape, generator=seeded))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = DiffusionPolicy(model.train(), tokenizer)
        ids = torch.arange(60, device=where).view(3, 20) * 4 % VOCABULARY
        hidden = policy.hidden(ids).flatten(0, 1)
        policy.token_logp(hidden, ids.flatten() // 2, 1.0).sum().backward()
        grads = [p.grad.float().flatten().cpu() for p in model.parameters() if p.requires_grad]
        gradients.append(torch.cat(grads))
    cosine = torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert cosine > (0.9999 if dtype == torch.float32 else 0.98)


@DEVICES
def test_a_run_that_was_stopped_goes_on_to_the_same_last_digit(device, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for run, steps in (("whole", 3), ("parts", 1)):
        folder = str(tmp_path / run)
        assert train.main([*RUN.split(), "--steps", str(steps), "--run_dir", folder]) == 0
    again = ["--resume", "--run_dir", str(tmp_path / "parts"), "--steps", "3"]
    assert train.main(again) == 0
    whole, parts = (metrics_of(tmp_path / run) for run in ("whole", "parts"))
    assert whole == parts and len(whole) == 3


@DEVICES
@pytest.mark.parametrize("rank", [0, 4])
def test_split_weights_learn_as_whole_ones_do(device, rank, tmp_path, monkeypatch):
    """By NCCL on a GPU, whose smallest group has one process; gloo's are in test_distributed.py."""
    monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = [*RUN.split(), "--lora_rank", str(rank), "--steps", "1", "--run_dir"]
    assert train.main([*flags, str(tmp_path / "whole")]) == 0
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "WORLD_SIZE": "1"}
    for name, value in (where | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(checks, "check_processes", lambda *_: None)
    backends = []

    def finish():
        backends.append(dist.get_backend_config())
        dist.destroy_process_group()

    monkeypatch.setattr(distributed, "finish", finish)
    assert train.main([*flags, str(tmp_path / "split"), "--shard", "true"]) == 0
    assert ("nccl" if device == "cuda" else "gloo") in backends[0]
    whole, split = (metrics_of(tmp_path / run) for run in ("whole", "split"))
    for a, b in zip(whole, split, strict=True):
        a, b = ({k: v for k, v in row.items() if v is not None} for row in (a, b))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("shape", ["small", "small llada"])
def test_the_random_checkpoints_of_gpu_py_are_read(shape, tmp_path):
    gpu.write_checkpoint(tmp_path, shape)
    policy = load_policy(tmp_path)
    assert policy.denoiser.config.num_hidden_layers == 6 and policy.block_size == 0
    assert policy.hidden(torch.tensor([[300, policy.mask_id]])).isfinite().all()


@DEVICES
def test_a_base_learns_its_lesson(device):
    recipe = Recipe(steps=16, batch=16)
    training = Training([find_demonstrated_task("countdown")], recipe, device=device)
    losses = [training.step() for _ in range(16)]
    assert training.denoiser.device.type == device
    assert sum(losses[:4]) > 1.2 * sum(losses[-4:])
