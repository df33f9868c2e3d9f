"""No operation mixes tensors of CPU and GPU, by a GPU that is pretended (pretend_gpu.py)."""

from collections import Counter

import pytest
import torch
from checkpoints import write_checkpoint
from pretend_gpu import DeviceMismatch, pretend_gpu
from toy import metrics_of, to_the_end, toy_policy

import evaluate
import train
from denoiser import BlockCache
from experiments import gradients
from likelihood import draw_boundaries, surrogate_logp
from models.checkpoints import load_policy
from sampler import Decoder

RUN = (
    "--task countdown --model tiny --prompts_per_step 4 --eval_problems 4 --steps 2 "
    "--frontier false"
)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: torch.cat([gpu, cpu]),
        lambda gpu, cpu: torch.stack([cpu, gpu.long()]),
        lambda gpu, cpu: cpu[gpu.long()],
        lambda gpu, cpu: gpu.index_put((gpu.long(),), cpu),
        lambda gpu, cpu: gpu.__setitem__(gpu.long(), cpu),
        lambda gpu, cpu: gpu.add_(cpu),
        lambda gpu, cpu: torch.isin(cpu, gpu),
        lambda gpu, cpu: torch.where(gpu > 0, gpu, cpu),
        lambda gpu, cpu: torch.nn.functional.linear(gpu, cpu.expand(3, 3)),
        lambda gpu, cpu: torch.rand(3, device="cuda", generator=torch.Generator()),
        lambda gpu, cpu: torch.rand(3, device="cpu", generator=torch.Generator("cuda")),
    ],
)
def test_a_mix_of_devices_is_found(mistake):
    with pretend_gpu():
        gpu = torch.zeros(3, device="cuda")
        with pytest.raises(DeviceMismatch):
            mistake(gpu, torch.zeros(3))


def test_what_torch_allows_is_allowed():
    with pretend_gpu() as mode:
        gpu = torch.arange(3.0).to("cuda")
        other = torch.full_like(gpu, 2) * torch.tensor(3.0) + 1
        assert other.device.type == "cuda" and other.cpu().device.type == "cpu"
        assert mode.syncs == {"copy to the GPU": 1, "cpu": 1}
        gpu[torch.tensor([0, 2])] = 7.0
        gpu[:2] = torch.ones(2)
        assert gpu.tolist() == [1.0, 1.0, 7.0]
        gpu[gpu > 5] = 0
        assert mode.syncs == {"copy to the GPU": 1, "cpu": 1, "tolist": 1, "boolean index": 1}
        assert torch.equal(gpu.cpu(), torch.tensor([1.0, 1.0, 0.0]))
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != "pretended"


@pytest.mark.parametrize(
    "flags",
    [
        "--cache dual --block_length 5 --num_iterations 2 --beta 0.1 --p_mask_prompt 0.2 "
        "--gradient_checkpointing true --lora_dropout 0.1 --rollout_batch_size 5",
        "--lora_rank 0 --train_target policy --micro_batch_size 8 --num_stages 3",
    ],
)
def test_a_run_mixes_no_devices_and_its_numbers_are_the_cpus(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])
    runs = {}
    for device in ("cuda", "cpu"):
        run = tmp_path / device
        where = ["--run_dir", str(run), "--device", device]
        with pretend_gpu():
            assert train.main([*RUN.split(), *flags.split(), *where]) == 0
            assert train.main(["--resume", "--steps", "3", *where]) == 0
            assert evaluate.main([str(run), "--problems", "4", "--device", device]) == 0
        runs[device] = metrics_of(run)
    assert len(runs["cuda"]) == 3 and runs["cuda"] == runs["cpu"]


@pytest.mark.parametrize("family", ["dream", "sdar", "llada-moe"])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_no_family_mixes_devices(family, cache, tmp_path):
    write_checkpoint(tmp_path, family)
    with pretend_gpu():
        policy = load_policy(str(tmp_path), device="cuda")
        policy.denoiser.requires_grad_(False)
        policy.denoiser.get_decoder().norm.weight.requires_grad_()
        prompt_ids = torch.tensor([[0, 0, 9, 8], [5, 6, 7, 8]], device="cuda").repeat(2, 1)
        rollout = policy.rollout(
            prompt_ids,
            prompt_ids > 0,
            length=10,
            decoder=to_the_end("eb", 3.0, 4, cache=cache),
            generator=torch.Generator("cuda").manual_seed(0),
        )
        boundaries = draw_boundaries(rollout.nfe, 2, torch.Generator("cuda").manual_seed(0))
        logp = surrogate_logp(policy, rollout, boundaries)
        logp.sum().backward()
        assert logp.device.type == "cuda" and logp.isfinite().all()


def test_statistics_of_gradients_that_are_on_a_gpu():
    """Their products are on the GPU, a bootstrap's draws are not."""
    cpu = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    estimators = [(m, weights) for m in gradients.STAGES for weights in gradients.CAPS]
    estimators += [(gradients.EXACT, "no weights"), (gradients.TWO_STEPS, "no weights")]
    calls = dict.fromkeys([*gradients.STAGES, gradients.EXACT, gradients.TWO_STEPS], 1.0)
    on_cpu = gradients.summarise({e: cpu + i for i, e in enumerate(estimators)}, calls)
    with pretend_gpu():
        gpu = cpu.to("cuda")
        on_gpu = gradients.summarise({e: gpu + i for i, e in enumerate(estimators)}, calls)
    assert on_gpu == on_cpu


@pytest.mark.parametrize(
    "cache, per_call",
    [
        ("none", {"copy to the GPU": 5, "cpu": 2, "unique": 1}),
        ("dual", {"copy to the GPU": 5, "cpu": 2}),
    ],
)
def test_a_rollout_waits_for_the_gpu_as_often_as_its_docstring_says(cache, per_call):
    """For a call's rows, the selection, end tokens and, without a filled cache, equal canvases."""
    decoder = Decoder("top_k", 1, block_length=30, cache=cache)
    waits = []
    with pretend_gpu() as mode:
        policy = toy_policy()
        policy.end_ids = [99]  # no row ends early
        policy.denoiser.to("cuda")
        prompt_ids = torch.tensor([[2, 3], [3, 3]], device="cuda")
        for length in (10, 20):
            mode.syncs.clear()
            policy.rollout(prompt_ids, prompt_ids > 0, length, decoder)
            waits.append(Counter(mode.syncs))
    ten_calls_more = waits[1] - waits[0]
    assert ten_calls_more == {name: 10 * number for name, number in per_call.items()}


def test_a_call_and_what_is_read_from_it_are_queued_without_waiting(monkeypatch):
    """Between the denoiser call and the copy of the selection the host never waits."""
    decoder = Decoder("top_k", 1, block_length=10, cache="dual")
    with pretend_gpu() as mode:
        policy = toy_policy()
        policy.denoiser.to("cuda")
        run_decoder = policy.run_decoder
        entropy_and_confidence = policy.entropy_and_confidence
        waits = []

        def run_and_forget(*args, **kwargs):
            mode.syncs.clear()
            return run_decoder(*args, **kwargs)

        def count_waits(*args):
            waits.append(Counter(mode.syncs))
            return entropy_and_confidence(*args)

        monkeypatch.setattr(policy, "run_decoder", run_and_forget)
        monkeypatch.setattr(policy, "entropy_and_confidence", count_waits)
        prompt_ids = torch.tensor([[2, 3], [3, 3]], device="cuda")
        policy.rollout(prompt_ids, prompt_ids > 0, 10, decoder)
    assert waits and not any(waits)


def test_rows_leave_a_cache_with_two_waits_however_many_layers_it_has():
    waits = []
    with pretend_gpu() as mode:
        for layers in (1, 8):
            cache = BlockCache()
            for layer in range(layers):
                keys = torch.ones((4, 1, 3, 2), device="cuda")
                cache.update(keys, keys.clone(), layer)
            mode.syncs.clear()
            cache.keep(torch.tensor([True, False, True, True]))
            waits.append(dict(mode.syncs))
    assert waits == [{"copy to the GPU": 2}] * 2
