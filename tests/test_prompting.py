"""models/prompting.py: how a prompt becomes tokens, and where a completion's text ends."""

import pytest
import torch
from checkpoints import write_checkpoint
from toy import PROMPTS, A, B, calls_of, generator, toy_policy

from diffpo_loss import diffpo_loss
from diffusion_policy import DiffusionPolicy
from likelihood import draw_boundaries, surrogate_logp
from models.checkpoints import load_policy
from models.prompting import decode_completions, encode_prompts, end_token_ids
from sampler import Decoder


def test_encode_pads_on_the_left_and_refuses_unknown_words():
    policy = toy_policy()
    ids, mask = encode_prompts(policy, PROMPTS)
    assert mask.tolist() == [[False] * (5 - n) + [True] * n for n in (2, 1, 5)]
    assert [row[m].tolist() for row, m in zip(ids, mask, strict=True)] == [
        [A, B],
        [B],
        [A, A, B, B, A],
    ]
    with pytest.raises(ValueError):
        encode_prompts(policy, ["a c"])


# ---- where a LLaDA's completion ends, and how its prompt begins ----------------------------------


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    """The policy of a random LLaDA checkpoint in the hub's layout."""
    folder = tmp_path_factory.mktemp("llada")
    write_checkpoint(folder, "llada")
    return load_policy(folder)


def with_prefill(policy, prefill):
    return DiffusionPolicy(
        policy.denoiser, policy.tokenizer, end_ids=policy.end_ids, prefill=prefill
    )


def scripted(policy, monkeypatch, *texts, per_step=None, stop_at_eos=False):
    """A rollout that draws these texts, whatever the model thinks."""
    ids = [policy.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    script = torch.tensor(ids)  # (B, L)
    B, L = script.shape
    k = per_step or L
    starts = iter(range(0, L, k))
    decoder = Decoder("top_k", k, k, stop_at_eos=stop_at_eos)  # the blocks, from left to right

    def sample_tokens(hidden, temperature, uniform):
        start = next(starts)
        tokens = script[: len(hidden) // k, start : start + k].flatten()
        return tokens, torch.full((len(hidden),), -1.0)

    monkeypatch.setattr(policy, "sample_tokens", sample_tokens)
    prompt_ids, prompt_mask = encode_prompts(policy, ["same length"] * B)
    return policy, policy.rollout(prompt_ids, prompt_mask, L, decoder)


def test_a_loaded_checkpoint_ends_at_its_tokenizers_end_tokens_and_a_bare_policy_at_eos(llada):
    assert llada.end_ids == end_token_ids(llada.tokenizer) and len(llada.end_ids) > 1
    bare = DiffusionPolicy(llada.denoiser, llada.tokenizer)
    assert bare.end_ids == [llada.tokenizer.eos_token_id]
    assert llada.without_adapter().end_ids == llada.end_ids


FLOOD = "<|endoftext|>" * 4


def test_a_completion_ends_at_the_first_eot_and_the_flood_behind_it_is_padding(llada, monkeypatch):
    texts = "hi<|eot_id|>" + FLOOD, "hi<|endoftext|>" + FLOOD, "hey<|eot_id|>" + FLOOD[13:]
    policy, rollout = scripted(llada, monkeypatch, *texts)
    assert decode_completions(policy, rollout) == ["hi", "hi", "hey"]
    assert rollout.token_mask.sum(-1).tolist() == [3, 3, 4]
    calls = calls_of(policy)
    logp = surrogate_logp(policy, rollout, draw_boundaries(rollout.nfe, 1))
    assert torch.equal(logp != 0, rollout.token_mask) and len(calls) == 1
    noise = torch.where(rollout.token_mask, 0.0, torch.randn(logp.shape, generator=generator()))
    losses = [
        diffpo_loss(
            logp_new=logp_new,
            logp_old=logp,
            advantage=torch.tensor([1.0, -1.0, 0.5]),
            weights=torch.ones_like(logp),
            token_mask=rollout.token_mask,
            epsilon=0.2,
            normalise_by="text",
        )[0]
        for logp_new in (logp, logp + noise)
    ]
    assert losses[0] == losses[1]  # what follows carries no loss


def test_a_row_stops_at_eot_as_it_does_at_eos(llada, monkeypatch):
    texts = "a<|eot_id|>cdef", "a<|endoftext|>cdef"
    _, rollout = scripted(llada, monkeypatch, *texts, per_step=2, stop_at_eos=True)
    assert rollout.nfe.tolist() == [1, 1]
    assert rollout.unmask_step.tolist() == [[1, 1, 2, 2, 2, 2]] * 2
    assert (rollout.completion[:, 2:] == llada.eos_id).all()


def test_a_prompt_is_one_user_message_in_the_chat_template_with_its_prefill(llada):
    policy = with_prefill(llada, "<reasoning>")
    ids, mask = encode_prompts(policy, ["  what is 3 + 4? ", "1"])
    texts = [policy.tokenizer.decode(row[m]) for row, m in zip(ids, mask, strict=True)]
    header = (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<reasoning>"
    )
    assert texts == [header.format("what is 3 + 4?"), header.format("1")]
    assert ids[0][mask[0]].tolist().count(256) == 1
    assert not mask[1, 0] and ids[1, 0] == policy.tokenizer.pad_token_id


def test_decoded_texts_begin_with_the_prefill(llada, monkeypatch):
    policy, rollout = scripted(llada, monkeypatch, "hi<|eot_id|>x", "<|eot_id|>xyz")
    policy = with_prefill(policy, "so: ")
    assert decode_completions(policy, rollout) == ["so: hi", "so: "]


def test_a_prompt_that_does_not_fit_is_an_error_that_names_it_and_nothing_is_cut(llada):
    limit = llada.denoiser.config.max_position_embeddings
    overhead = encode_prompts(llada, ["x"])[0].shape[1] - 1
    fits = "y" * (limit - overhead - 20)
    assert encode_prompts(llada, [fits], room=20)[0].shape[1] == limit - 20
    with pytest.raises(ValueError, match="prompt 2 of 2, with 'zzz.*512") as error:
        long = "z" * (limit - overhead - 19)
        encode_prompts(llada, [f"Work it out: {text}" for text in ("fine", long)], room=20)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_chat_template_is_refused_in_one_line(llada, monkeypatch):
    monkeypatch.setattr(llada.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="chat template") as error:
        encode_prompts(llada, ["hello"])
    assert "\n" not in str(error.value)


def test_an_empty_prompt_is_refused(llada):
    with pytest.raises(ValueError, match="empty"):
        encode_prompts(llada, ["fine", ""])


@pytest.mark.parametrize("token", ["<|mdm_mask|>", "<|eot_id|>", "<|endoftext|>"])
def test_a_special_token_that_a_question_holds_as_text_is_refused(llada, token):
    """The tokenizer read it as the token: a question could hold masks, or end its own turn."""
    with pytest.raises(ValueError, match="prompt 2 of 2 has .*a special token") as error:
        encode_prompts(llada, ["what is 3?", f"what is {token} here?"])
    assert repr(token) in str(error.value) and "\n" not in str(error.value)
    encode_prompts(llada, ["what is <mask> or <|eot id|> here?"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never\nagain') }}",
        "{% for %}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_chat_template_that_fails_is_one_line(llada, monkeypatch, template):
    monkeypatch.setattr(llada.tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="chat template fails") as error:
        encode_prompts(llada, ["what is 3?"])
    assert "\n" not in str(error.value)


def test_a_prompt_without_tokens_is_refused(llada, monkeypatch):
    monkeypatch.setattr(llada.tokenizer, "chat_template", "{{ '' }}")
    with pytest.raises(ValueError, match="prompt 1 of 2, 'a', has no tokens"):
        encode_prompts(llada, ["a", "b"])
    with pytest.raises(ValueError, match="prompt 2 of 2, ' ', has no tokens"):
        encode_prompts(toy_policy(), ["a b", " "])
