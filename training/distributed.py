"""One run in several processes: those that torchrun starts work together on each step.

    torchrun --nproc_per_node 4 train.py --task countdown --run_dir runs/a

Each process completes and scores its own rows, which are whole groups. Then the results are
gathered, and every process computes rewards, advantages, boundaries and metrics from the whole
batch, as a single process would. Gradients are summed, because a row counts 1/B wherever it is
scored. All random numbers are drawn for the whole batch. So the number of processes changes only
the speed of a run.

With --shard the layers' weights are split too (FSDP2): each process keeps its part of every layer,
and a layer is gathered while it runs. Every process therefore has to take part in every denoiser
call: ranks that finish early keep making dummy calls until all are done.

Only the main process writes files and prints. This file needs torch alone. Without torchrun, its
functions do nothing.
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

TIMEOUT = timedelta(hours=1)  # for the slowest process; if one ends, the others notice at once

# The handle of the last all-reduce on the CPU. It is kept to avoid a crash on exit: gloo's worker
# thread drops its reference a moment after wait() returns. If that is the last reference, the
# thread frees the tensor, for which it needs the GIL; if the interpreter is already shutting down,
# the process aborts ("terminate called without an active exception"). destroy_process_group alone
# does not help: it ends the threads only if nothing refers to the group any more, and with split
# weights DTensor's caches still do.
last_work = None

# ---- processes -----------------------------------------------------------------------------------


def init(device="auto"):
    """Join the other processes. If there are GPUs, each process takes its own.

    device: the flag; with "cpu" no GPU is used. Raises ValueError if there are fewer GPUs than
    processes.
    """
    if not is_distributed():
        return
    backend = "gloo"
    if torch.cuda.is_available() and device != "cpu":
        local_rank = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(
                f"process {local_rank + 1} finds {gpus} GPU(s), but each process needs its own: "
                f"start {gpus}, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=TIMEOUT)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def is_distributed():
    """Whether torchrun started this program, with more than one process."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if is_distributed() else 0


def is_main_process():
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def barrier():
    """Wait until every process is here."""
    if world_size() > 1:
        all_reduce(torch.zeros(1))


def finish():
    """Wait for all processes, so that none ends while another still writes, and disconnect.

    A process that leaves early looks as if it had failed, and torchrun then ends all the others.
    """
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


@contextmanager
def reraise_lost_peer():
    """Turns the error of a lost connection to another process into a one-line ValueError."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("by peer|peer closed|remote process|ncclRemoteError", str(error)):
            raise
        raise ValueError("another process has ended: see its own message") from None


# ---- rows and gradients --------------------------------------------------------------------------


def local_rows(B, num_generations=1):
    """The rows of this process: a slice of the B rows, made of whole groups.

    With fewer groups than processes, every process takes all rows.
    """
    groups = B // num_generations
    N = world_size()
    if N == 1 or groups < N:
        return slice(0, B)
    first_group = groups * rank() // N
    end_group = groups * (rank() + 1) // N
    return slice(first_group * num_generations, end_group * num_generations)


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Reduce a tensor over all processes in place, by default to its sum. Returns the tensor."""
    global last_work
    if tensor.is_cuda:  # NCCL's threads hold no tensors
        dist.all_reduce(tensor, operation)
        return tensor
    last_work = dist.all_reduce(tensor, operation, async_op=True)
    last_work.wait()
    return tensor


def all_gather_rows(local, rows, B):
    """Each process's rows (b, ...) -> the whole batch (B, ...), on every process.

    rows: the slice of this process, from local_rows.
    """
    if len(local) == B:
        return local
    # Each process fills in its rows and leaves zeros elsewhere. The backends cannot sum bools.
    dtype = torch.uint8 if local.dtype == torch.bool else local.dtype
    batch = torch.zeros((B, *local.shape[1:]), dtype=dtype, device=local.device)
    batch[rows] = local.to(dtype)
    return all_reduce(batch).to(local.dtype)


def rollout(policy, prompt_ids, prompt_mask, length, decoder, generator=None, num_generations=1):
    """Like policy.rollout, divided among the processes. Returns the whole Rollout on each."""
    B = len(prompt_ids)
    rows = local_rows(B, num_generations)
    uniform = policy.draw_uniform(B, length, generator)  # the same numbers as in a single process
    with keep_in_step(policy) if is_sharded(policy.denoiser) else nullcontext():
        local = policy.rollout(
            prompt_ids[rows], prompt_mask[rows], length, decoder, uniform=uniform[rows]
        )
    gathered = {}
    for field in fields(local):
        value = getattr(local, field.name)
        if isinstance(value, torch.Tensor):
            gathered[field.name] = all_gather_rows(value, rows, B)
    return replace(local, **gathered)


def all_reduce_gradients(model):
    """Sum each weight's gradient over the processes.

    FSDP has already summed those of split weights, when it left their layer.
    """
    if world_size() == 1:
        return
    weights = [p for p in model.parameters() if p.requires_grad and not is_sharded_tensor(p)]
    if not weights:
        return
    # An expert that no token of a process reached has no gradient there. If no token of any process
    # reached it, it keeps none, so that AdamW does not change it.
    has_gradient = torch.tensor([p.grad is not None for p in weights], device=weights[0].device)
    processes_with_gradient = all_reduce(has_gradient.int()).tolist()
    for p, count in zip(weights, processes_with_gradient, strict=True):
        if count > 0:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            all_reduce(p.grad)


def all_reduce_max(number):
    """The largest of the processes' numbers."""
    if world_size() == 1:
        return number
    return all_reduce(torch.tensor(number), dist.ReduceOp.MAX).item()


def all_reduce_min(number):
    """The smallest of the processes' numbers."""
    return -all_reduce_max(-number)


def all_reduce_sum(number):
    """The sum of the processes' numbers."""
    if world_size() == 1:
        return number
    return all_reduce(torch.tensor(number)).item()


# ---- split weights (FSDP2) -----------------------------------------------------------------------


def shard_model(denoiser, device):
    """Split every layer's weights over the processes, in place.

    The embedding and the last layer, which compute the logits, stay whole on each of them.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    decoder = denoiser.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # Gradients are summed, not averaged, as all_reduce_gradients does.
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)
        layer.set_reduce_scatter_unused_params(True)
    # With the decoder as their root, FSDP fetches one layer while another runs.
    fully_shard(
        decoder,
        mesh=mesh,
        reshard_after_forward=True,
        ignored_params={p for p in decoder.parameters() if not is_sharded_tensor(p)},
    )
    for tensor in [*denoiser.parameters(), *denoiser.buffers()]:
        if not is_sharded_tensor(tensor):
            tensor.data = tensor.data.to(device)


def is_sharded_tensor(tensor):
    """Whether a tensor's values are split over the processes."""
    return isinstance(tensor, DTensor)


def is_sharded(model):
    """Whether some of a model's weights are split over the processes."""
    return any(is_sharded_tensor(p) for p in model.parameters())


@contextmanager
def keep_in_step(policy):
    """After the block, keep making dummy denoiser calls until every process has left its block.

    Split layers are gathered by all processes together, so each call needs all of them. Before a
    call, a process adds 1 to a sum over the processes; after its last call it adds 0. As long as
    the sum is not 0, some process is about to make a call.
    """
    call_denoiser = policy.hidden

    def announced_call(*args, **kwargs):
        all_reduce(torch.ones(1))
        return call_denoiser(*args, **kwargs)

    policy.hidden = announced_call
    try:
        yield
    finally:
        del policy.hidden
    while all_reduce(torch.zeros(1)).item() > 0:
        call_denoiser(torch.full((1, 2), policy.mask_id, device=policy.denoiser.device))
        policy.rows_run -= 1  # a dummy row does not count as work


def gather_full_tensor(tensor):
    """Gather a split tensor on the main process's CPU; the other processes get None.

    A tensor that is not split is returned as it is. Every process has to call this.
    """
    if not is_sharded_tensor(tensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if is_main_process() else None


def distribute_like(tensor, weight):
    """This process's part of a tensor, split like `weight`; all of it if that is whole.

    It is used on an optimizer's state, which has tensors of the weight's shape and a step counter;
    the counter stays whole.
    """
    if not is_sharded_tensor(weight) or tensor.shape != weight.shape:
        return tensor
    return distribute_tensor(
        tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
    )


def clip_grad_norm(model, max_norm):
    """Scale the gradient down to a norm of at most max_norm. Returns its norm before that.

    torch.nn.utils.clip_grad_norm_ does not accept a mixture of split and whole gradients.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norms = []
    whole_grads = [grad for grad in grads if not is_sharded_tensor(grad)]
    if whole_grads:
        norms.append(torch.nn.utils.get_total_norm(whole_grads))
    split_grads = [grad for grad in grads if is_sharded_tensor(grad)]
    if split_grads:
        norms.append(torch.nn.utils.get_total_norm(split_grads).full_tensor())
    norm = torch.stack(norms).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).item()
    for grad in grads:
        grad.mul_(scale)
    return norm
