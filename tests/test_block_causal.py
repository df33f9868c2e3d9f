"""Block-causal denoisers: their mask, their cache and their likelihood, against plain products."""

import json

import pytest
import torch
from checkpoints import BLOCK_SIZE, reference_logits, write_checkpoint

from diffusion_policy import DiffusionPolicy
from likelihood import cache_kl, latent_at, surrogate_logp, surrogate_logp_by_definition
from models.block_causal import BlockCausalPolicy, block_causal_mask, make_policy
from models.export import export_model
from models.families import read_config
from models.loading import load_denoiser
from sampler import Decoder
from training.replay import rollout_from_steps

L = 10  # tokens of a completion: with prompts of 6, 5 and 3 it ends inside a block or at its end
PROMPT_LENGTHS = (6, 5, 3, 6)


@pytest.fixture(scope="module", params=["sdar", "fast_dllm_qwen", "llada2_moe"])
def model(request, tmp_path_factory):
    """(policy, logits) of a random model, whose blocks have four tokens; Fast-dLLM v2 is shifted.

    `logits` is the forward pass by plain products: ids (1, S) -> (1, S, V), [MASK] at minus
    infinity.
    """
    folder = tmp_path_factory.mktemp(request.param)
    weights, config = write_checkpoint(folder, request.param)
    denoiser, tokenizer = load_denoiser(str(folder))
    policy = make_policy(denoiser, tokenizer)

    def logits(ids):
        values = reference_logits(request.param, weights, config, ids)
        values[:, :, policy.mask_id] = -torch.inf
        return values

    return policy, logits


@pytest.fixture
def prompts():
    """(ids, mask) of four prompts, of 6, 5, 3 and 6 tokens; the last is the first again."""
    P = max(PROMPT_LENGTHS)
    ids = torch.randint(0, 250, (4, P), generator=torch.Generator().manual_seed(1))
    ids[3] = ids[0]
    mask = torch.arange(P) >= P - torch.tensor(PROMPT_LENGTHS).unsqueeze(1)
    return ids, mask


def complete(
    policy, prompts, cache="none", level=3.0, temperature=1.0, block_length=BLOCK_SIZE, seed=0
):
    decoder = Decoder(
        level=level,
        block_length=block_length,
        cache=cache,
        temperature=temperature,
        stop_at_eos=False,
    )
    ids, mask = prompts
    generator = torch.Generator().manual_seed(seed)
    return policy.rollout(ids, mask, L, decoder, generator)


def test_only_its_own_policy_takes_a_block_causal_denoiser(model):
    policy, _ = model
    assert isinstance(policy, BlockCausalPolicy)
    assert isinstance(policy.without_adapter(), BlockCausalPolicy)
    with pytest.raises(ValueError, match="use models.block_causal.BlockCausalPolicy"):
        DiffusionPolicy(policy.denoiser, policy.tokenizer)


# ---- the mask ------------------------------------------------------------------------------------


def test_a_position_sees_its_block_and_those_before_it():
    position = torch.tensor([[0, 0, 1, 2, 3]])  # one of padding, and blocks of two
    is_real = torch.tensor([[False, True, True, True, True]])
    column = torch.arange(5).unsqueeze(0)
    [sees] = block_causal_mask(position, is_real, column, block_size=2)
    expected = [
        [0, 1, 1, 0, 0],  # padding, which nobody sees
        [0, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 1],
        [0, 1, 1, 1, 1],
    ]
    assert sees.int().tolist() == expected
    [some] = block_causal_mask(position, is_real, column[:, 2:4], block_size=2)
    assert some.int().tolist() == expected[2:4]


def test_a_noisy_block_sees_itself_and_the_clean_blocks_before_it():
    # A prompt token and three more, in blocks of two; the last three columns are noisy.
    position = torch.tensor([[0, 1, 2, 3, 1, 2, 3]])
    is_real = torch.ones_like(position, dtype=torch.bool)
    column = torch.arange(7).unsqueeze(0)
    [sees] = block_causal_mask(position, is_real, column, block_size=2, num_noisy=3)
    assert sees.int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 1],
        [1, 1, 0, 0, 0, 1, 1],
    ]


# ---- rollouts ------------------------------------------------------------------------------------


def test_a_recorded_log_prob_is_that_of_the_state_by_plain_products(model, prompts):
    policy, plain_logits = model
    rollout = complete(policy, prompts)
    ids, mask = prompts
    for row, P in enumerate(PROMPT_LENGTHS):
        prompt = ids[row, -P:]
        block = (P + torch.arange(L)) // BLOCK_SIZE
        for step in range(int(rollout.nfe[row])):
            state = latent_at(
                rollout.completion[row : row + 1],
                rollout.unmask_step[row : row + 1],
                step,
                policy.mask_id,
            )
            canvas = torch.cat([prompt, state[0]]).unsqueeze(0)
            logits = plain_logits(canvas)[0, P:]
            is_now = rollout.unmask_step[row] == step + 1
            # The rule selects positions of one block, the first with a mask.
            first_masked = (rollout.unmask_step[row] > step).nonzero()[0]
            assert (block[is_now] == block[first_masked]).all()
            logp = logits.log_softmax(-1).gather(1, rollout.completion[row].unsqueeze(1))[:, 0]
            torch.testing.assert_close(
                rollout.behaviour_logp[row][is_now], logp[is_now], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("level", [0.0, 3.0, 1e9])
def test_the_cache_is_exact(model, prompts, level, temperature):
    policy, _ = model
    plain = complete(policy, prompts, "none", level, temperature)
    for cache in ("prefix", "dual"):
        cached = complete(policy, prompts, cache, level, temperature)
        for name in ("completion", "unmask_step", "nfe"):
            assert torch.equal(getattr(cached, name), getattr(plain, name))
        torch.testing.assert_close(cached.behaviour_logp, plain.behaviour_logp, rtol=0, atol=1e-5)
        if temperature:
            assert abs(cache_kl(policy, cached, num_states=1000)) < 1e-5
    if level == 0:  # one token a call
        assert (plain.nfe == L).all()
    if level == 1e9:  # one block a call
        blocks = [-(-(P % BLOCK_SIZE + L) // BLOCK_SIZE) for P in PROMPT_LENGTHS]
        assert plain.nfe.tolist() == blocks


def test_a_cached_call_runs_two_blocks_of_each_row(model, prompts):
    policy, _ = model
    widths = []
    hook = policy.denoiser.get_input_embeddings().register_forward_hook(
        lambda module, args, output: widths.append(args[0].shape[1])
    )
    complete(policy, prompts, "dual")
    hook.remove()
    # A batch holds prompts of about one length, so there may be several opening calls.
    assert set(widths) == {2 * BLOCK_SIZE, *[length + L for length in set(PROMPT_LENGTHS)]} & {
        *widths
    }
    assert widths.count(2 * BLOCK_SIZE) > len(widths) / 2


def test_rows_that_end_early_leave_the_others_as_they_are(model, prompts):
    policy, _ = model
    ids, mask = prompts
    together = complete(policy, prompts, "dual", level=1.0)
    uniform = policy.draw_uniform(4, L, torch.Generator().manual_seed(0))
    decoder = Decoder(level=1.0, block_length=BLOCK_SIZE, cache="dual", stop_at_eos=False)
    for row in range(4):
        alone = policy.rollout(
            ids[row : row + 1], mask[row : row + 1], L, decoder, uniform=uniform[row : row + 1]
        )
        assert torch.equal(alone.completion[0], together.completion[row])


@pytest.mark.parametrize("length", [1, 3, L])
def test_blocks_may_be_decoded_token_by_token(model, prompts, length):
    policy, _ = model
    decoder = Decoder(level=1e9, block_length=1, cache="dual", stop_at_eos=False)
    rollout = policy.rollout(*prompts, length, decoder, torch.Generator().manual_seed(0))
    assert rollout.unmask_step.tolist() == [list(range(1, length + 1))] * 4


def test_parts_of_blocks_are_decoded_one_after_the_other_and_the_cache_is_exact(model, prompts):
    policy, _ = model
    plain = complete(policy, prompts, block_length=2)
    cached = complete(policy, prompts, "dual", block_length=2)
    assert torch.equal(cached.completion, plain.completion)
    torch.testing.assert_close(cached.behaviour_logp, plain.behaviour_logp, rtol=0, atol=1e-5)
    exact = surrogate_logp(policy, plain, torch.arange(1, L + 1).expand(4, -1))
    torch.testing.assert_close(exact, plain.behaviour_logp, rtol=0, atol=1e-5)
    for row, P in enumerate(PROMPT_LENGTHS):
        steps = plain.unmask_step[row]
        part = (P + torch.arange(L)) // 2
        for first, second in zip(part.unique()[:-1], part.unique()[1:], strict=True):
            assert steps[part == first].max() < steps[part == second].min()


@pytest.mark.parametrize("block_length", [None, 3, 8])
def test_it_is_decoded_in_no_other_blocks(model, prompts, block_length):
    policy, _ = model
    with pytest.raises(ValueError, match="block-causal, in blocks of 4 tokens"):
        policy.rollout(*prompts, L, Decoder(block_length=block_length))


# ---- the likelihood ------------------------------------------------------------------------------


def test_a_boundary_at_every_step_gives_the_recorded_log_probs(model, prompts):
    policy, _ = model
    for cache in ("none", "dual"):
        rollout = complete(policy, prompts, cache)
        every_step = torch.arange(1, L + 1).expand(4, -1)
        exact = surrogate_logp(policy, rollout, every_step)
        torch.testing.assert_close(exact, rollout.behaviour_logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("boundaries", [[], [3], [2, 5]])
def test_the_fast_likelihood_is_its_definition_with_gradients(model, prompts, boundaries):
    policy, _ = model
    rollout = complete(policy, prompts)
    boundaries = torch.tensor(boundaries, dtype=torch.long).expand(4, -1)
    results = []
    for function in (surrogate_logp, surrogate_logp_by_definition):
        policy.denoiser.zero_grad()
        logp = function(policy, rollout, boundaries)
        (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
        gradients = [p.grad.clone() for p in policy.denoiser.parameters()]
        results.append((logp.detach(), gradients))
    policy.denoiser.zero_grad()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    for fast, plain in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


def test_mean_field_scores_a_block_from_the_finished_ones_before_it(model, prompts):
    policy, plain_logits = model
    rollout = complete(policy, prompts)
    mean_field = surrogate_logp(policy, rollout, torch.zeros(4, 0, dtype=torch.long))
    ids, _ = prompts
    for row, P in enumerate(PROMPT_LENGTHS):
        block = (P + torch.arange(L)) // BLOCK_SIZE
        for b in block.unique().tolist():
            # Only this block and what comes after it is masked.
            state = rollout.completion[row].masked_fill(block >= b, policy.mask_id)
            canvas = torch.cat([ids[row, -P:], state]).unsqueeze(0)
            logits = plain_logits(canvas)[0, P:]
            logp = logits.log_softmax(-1).gather(1, rollout.completion[row].unsqueeze(1))[:, 0]
            torch.testing.assert_close(
                mean_field[row][block == b], logp[block == b], rtol=0, atol=1e-5
            )


# ---- rollouts from elsewhere ---------------------------------------------------------------------


def test_a_step_map_gives_the_rollout_and_one_in_other_blocks_is_refused(model, prompts):
    policy, _ = model
    ids, mask = prompts
    rollout = complete(policy, prompts, level=0.0, block_length=2)
    again = rollout_from_steps(policy, ids, mask, rollout.completion, rollout.unmask_step)
    torch.testing.assert_close(again.behaviour_logp, rollout.behaviour_logp, rtol=0, atol=1e-5)
    # As an engine would that counts blocks of 4 from the completion: the first two prompts have 2
    # and 1 tokens in its first block.
    steps = torch.tensor([[4, 3, 2, 1, 8, 7, 6, 5, 10, 9]]).expand(4, -1)
    for rows in (slice(0, 1), slice(1, 2)):
        with pytest.raises(ValueError, match="counted from the prompt's first token"):
            rollout_from_steps(policy, ids[rows], mask[rows], rollout.completion[rows], steps[rows])


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_bd3lm_is_read_if_it_says_how_long_its_blocks_are(tmp_path):
    folder = tmp_path / "Qwen3-0.6B-diffusion-bd3lm-v0.1"
    write_checkpoint(folder, "a2d-qwen3")
    file = folder / "config.json"
    published = json.loads(file.read_text())
    del published["is_causal"]
    file.write_text(json.dumps(published))
    with pytest.raises(ValueError, match='add "block_size": N'):
        read_config(folder)
    file.write_text(json.dumps(published | {"block_size": 32}))
    config, _ = read_config(folder)
    assert config.block_size == 32
    denoiser, tokenizer = load_denoiser(str(folder))
    assert denoiser.block_length == 32
    assert make_policy(denoiser, tokenizer).block_size == 32


@pytest.mark.parametrize("block_size", [0, -4, "4", 2.5])
def test_a_block_size_that_is_no_number_of_tokens_is_refused(tmp_path, block_size):
    write_checkpoint(tmp_path, "sdar", block_size=block_size)
    with pytest.raises(ValueError, match="block_size = .* is not a number of tokens"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "block_size"),
    [
        ("JetLM/SDAR-4B-Chat", 4),
        ("JetLM/SDAR-30B-A3B-Chat", 4),
        ("JetLM/SDAR-4B-Chat-b16", 16),
        ("Gen-Verse/TraDo-8B-Thinking", 4),
        ("someone/my-sdar", None),
        ("someone/SDAR-4B-Chat-tuned", None),
    ],
)
def test_an_sdar_has_the_blocks_of_its_name_or_is_asked_for_them(tmp_path, name, block_size):
    """A renamed one would run in other blocks than it was trained in, and say nothing."""
    write_checkpoint(tmp_path, "sdar", block_size=None)
    if block_size:
        config, _ = read_config(tmp_path, name)
        assert config.block_size == block_size
    else:
        with pytest.raises(ValueError, match='add "block_size": N'):
            read_config(tmp_path, name)


def test_an_export_says_how_long_its_blocks_are(tmp_path):
    folder = tmp_path / "SDAR-1B-Chat-b8"
    write_checkpoint(folder, "sdar", block_size=None)
    denoiser, tokenizer = load_denoiser(str(folder))
    export_model(denoiser, tokenizer, tmp_path / "exported")
    exported, _ = load_denoiser(str(tmp_path / "exported"))
    assert exported.config.block_size == 8


@pytest.mark.parametrize("family", ["sdar", "fast_dllm_qwen"])
def test_a_plain_folder_keeps_its_block_size(tmp_path, family):
    write_checkpoint(tmp_path / "source", family)
    policy = make_policy(*load_denoiser(str(tmp_path / "source")))
    policy.denoiser.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    denoiser, tokenizer = load_denoiser(str(tmp_path))
    ids = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(1))
    assert torch.equal(make_policy(denoiser, tokenizer).hidden(ids), policy.hidden(ids))
    assert denoiser.block_length == BLOCK_SIZE  # evaluate.py decodes in these
