"""Several processes, one run: what torchrun starts work on the same step together.

    torchrun --nproc_per_node 4 train.py --task countdown --run_dir runs/a

Each completes and scores its share of the rows, whole groups. What they find is put together, so
that each has the whole batch: rewards, advantages, boundaries and the log are computed everywhere
from the same numbers, as one process would. Gradients are summed, since a row counts 1/B whoever
scores it. All chance is drawn for the whole batch. So nothing but speed depends on their number N.

With --shard the layers' weights are split too (FSDP2): each process keeps 1/N of every layer, and a
layer comes together while it runs. So all processes have to make every call: one whose completions
are done goes on calling until the last one's are.

Files are written by the first process alone; it alone speaks. This file needs torch alone, and
does nothing in a program that torchrun did not start.
"""

import os
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

WAIT = timedelta(hours=1)  # for the slowest; one that died is noticed at once


def init():
    """Join the others. Raises ValueError for a process without a GPU where others have one."""
    if not is_distributed():
        return
    gpu, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if gpu and local >= (n := torch.cuda.device_count()):
        raise ValueError(f"process {local + 1} finds {n} GPU(s), and each takes its own: start {n}")
    if gpu:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=WAIT)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def barrier():
    """For the first, which looks after the files."""
    if world_size() > 1:
        all_reduce(torch.zeros(1))


@contextmanager
def reraise_lost_peer():
    """Raises ValueError, in one line, where the connection to another process is lost."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("by peer|peer closed|remote process|ncclRemoteError", str(error)):
            raise
        raise ValueError("another process has ended, and its own words say why") from None


def is_distributed():
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return rank() == 0


def rank():
    return int(os.environ["RANK"]) if is_distributed() else 0


def local_rows(B, num_generations=1):
    """The rows of this process: a slice of B, whole groups. Too few for N: all of them have all."""
    groups, N = B // num_generations, world_size()
    if N == 1 or groups < N:
        return slice(0, B)
    first, end = (groups * k // N for k in (rank(), rank() + 1))
    return slice(first * num_generations, end * num_generations)


def all_reduce(tensor, how=dist.ReduceOp.SUM):
    """A tensor's sum over all processes, in place."""
    dist.all_reduce(tensor, how)
    return tensor


def all_gather_rows(part, rows, B):
    """(b, ...) of each process's share of the rows -> (B, ...) of all, in each of them."""
    if len(part) == B:
        return part
    kind = torch.uint8 if part.dtype == torch.bool else part.dtype
    whole = torch.zeros((B, *part.shape[1:]), dtype=kind, device=part.device)
    whole[rows] = part.to(kind)
    return all_reduce(whole).to(part.dtype)


def rollout(policy, prompt_ids, prompt_mask, length, decoder, generator=None, num_generations=1):
    """policy.rollout, by all processes. -> the whole Rollout, in each of them."""
    B = len(prompt_ids)
    rows = local_rows(B, num_generations)
    uniform = policy.draw_uniform(B, length, generator)[rows]
    with keep_in_step(policy) if is_sharded(policy.denoiser) else nullcontext():
        local = policy.rollout(
            prompt_ids[rows], prompt_mask[rows], length, decoder, uniform=uniform
        )
    tensors = {}
    for field in fields(local):
        value = getattr(local, field.name)
        if isinstance(value, torch.Tensor):
            tensors[field.name] = all_gather_rows(value, rows, B)
    return replace(local, **tensors)


def all_reduce_gradients(model):
    """Each learning weight's gradient becomes the sum over the processes."""
    if world_size() == 1:
        return
    weights = [p for p in model.parameters() if p.requires_grad and not is_sharded_tensor(p)]
    if not weights:  # the others' are summed when a layer is left
        return
    # An expert that no token of a process went to has no gradient there.
    used = torch.tensor([p.grad is not None for p in weights], device=weights[0].device)
    used = all_reduce(used.int()).tolist()
    for p, n in zip(weights, used, strict=True):
        if n:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            all_reduce(p.grad)


def all_reduce_max(number):
    """The largest of the processes' numbers."""
    return (
        number if world_size() == 1 else all_reduce(torch.tensor(number), dist.ReduceOp.MAX).item()
    )


def all_reduce_sum(number):
    return number if world_size() == 1 else all_reduce(torch.tensor(number)).item()


# ---- split weights -------------------------------------------------------------------------------


def shard_model(denoiser, device):
    """Split every layer's weights over the processes; the embedding and what follows stay whole."""
    how = {"mesh": init_device_mesh(device.type, (world_size(),)), "reshard_after_forward": True}
    decoder = denoiser.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, **how)
        layer.set_gradient_divide_factor(1.0)  # a sum, as above
        layer.set_force_sum_reduction_for_comms(True)
        layer.set_reduce_scatter_unused_params(True)
    # As their root it has one layer fetched while another runs.
    fully_shard(
        decoder, **how, ignored_params={p for p in decoder.parameters() if not is_sharded_tensor(p)}
    )
    for tensor in [*denoiser.parameters(), *denoiser.buffers()]:
        if not is_sharded_tensor(tensor):
            tensor.data = tensor.data.to(device)


def is_sharded_tensor(tensor):
    return isinstance(tensor, DTensor)


def is_sharded(model):
    return any(map(is_sharded_tensor, model.parameters()))


@contextmanager
def keep_in_step(policy):
    """Inside, each call says that its process is not done; who leaves calls on until all are."""
    call = policy.hidden

    def hidden(*args, **how):
        all_reduce(torch.ones(1))
        return call(*args, **how)

    policy.hidden = hidden
    try:
        yield
    finally:
        del policy.hidden
    while all_reduce(torch.zeros(1)).item():
        call(torch.full((1, 2), policy.mask_id, device=policy.denoiser.device))
        policy.rows_run -= 1


def gather_full_tensor(tensor):
    """A split tensor put together, on the first process's host; any other as it is."""
    if not is_sharded_tensor(tensor):
        return tensor
    tensor = tensor.full_tensor()  # all have to ask
    return tensor.cpu() if is_main_process() else None


def distribute_like(tensor, weight):
    """Of a whole tensor the part that a process keeps of `weight`, if that is split."""
    if not is_sharded_tensor(weight) or tensor.shape != weight.shape:
        return tensor
    how = weight.device_mesh, weight.placements
    return distribute_tensor(tensor.to(weight.device), *how, src_data_rank=None)


def clip_grad_norm(model, limit):
    """Scale the gradient down to a norm of `limit` at most. -> its norm before"""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    halves = [[g for g in grads if is_sharded_tensor(g) is split] for split in (False, True)]
    norms = [torch.nn.utils.get_total_norm(half) for half in halves if half]
    norm = torch.stack([n.full_tensor() if is_sharded_tensor(n) else n for n in norms]).norm()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0).item()
    for g in grads:
        g.mul_(scale)
    return norm
