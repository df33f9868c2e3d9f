"""From prompts to tokens and from tokens to text: chat templates, prefill, end tokens.

Shapes: B rows, P prompt tokens (left-padded), L completion tokens.
"""

import re
from contextlib import suppress
from os.path import commonprefix

from models.errors import as_value_error


def encode_prompts(policy, prompts, room=0):
    """Texts -> prompt_ids (B, P) long and prompt_mask (B, P) bool, on the denoiser's device.

    Prompts are padded on the left, so that all completions start at P. Each text becomes one user
    message in the tokenizer's chat template, followed by the policy's `prefill`. (A policy with
    `compact_prompts` reads the text as it stands.) `room` is the number of completion tokens.

    Raises ValueError for an empty prompt, a chat template that is missing or fails, a text without
    tokens, a prompt that contains a special token's text, and a prompt that leaves too little room
    for the completion: nothing is ever truncated.
    """
    if not all(prompts):
        raise ValueError("an empty prompt: there is nothing to complete")
    tokenizer = policy.tokenizer
    refuse_special_tokens(tokenizer, prompts)
    texts = prompts
    if not policy.compact_prompts:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template: use the Instruct model's")
        with as_value_error("the tokenizer's chat template fails"):
            texts = tokenizer.apply_chat_template(
                [[{"role": "user", "content": prompt}] for prompt in prompts],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,  # Qwen3's switch; other templates ignore it
            )
    try:
        batch = tokenizer(
            [text + policy.prefill for text in texts],
            add_special_tokens=False,  # the template has added them
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        longest_prompt = max(prompts, key=len)
        raise ValueError(f"no tokens for a text such as {longest_prompt[:60]!r}: {error}") from None
    if not batch.attention_mask.any(dim=1).all():
        first = int(batch.attention_mask.any(dim=1).long().argmin())
        raise ValueError(f"prompt {first + 1} of {len(prompts)}, {prompts[first]!r}, has no tokens")
    longest = batch.input_ids.shape[1]
    limit = getattr(getattr(policy.denoiser, "config", None), "max_position_embeddings", None)
    if limit and longest + room > limit:
        i = int(batch.attention_mask.sum(dim=1).argmax())
        # Quote the part of the prompt that sets it apart: prompts of one task begin alike.
        shared = len(commonprefix(prompts)) if len(set(prompts)) > 1 else 0
        raise ValueError(
            f"prompt {i + 1} of {len(prompts)}, with {prompts[i][shared : shared + 60]!r}, needs "
            f"{longest} tokens and {room} for the completion: more than the {limit} that the "
            "model can read"
        )
    device = policy.denoiser.device
    return batch.input_ids.to(device), batch.attention_mask.bool().to(device)


def refuse_special_tokens(tokenizer, prompts):
    """Raises ValueError for a prompt that contains the text of a special token, such as the mask's.

    The tokenizer would read it as that token, so that a question could end its own turn, say.
    """
    tokens = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = [token.content for token in tokens if token.special and token.content.strip()]
    if not special:
        return
    pattern = re.compile("|".join(map(re.escape, special)))
    for number, prompt in enumerate(prompts, start=1):
        match = pattern.search(prompt)
        if match:
            raise ValueError(
                f"prompt {number} of {len(prompts)} has {match[0]!r} in it, which the tokenizer "
                "reads as a special token: leave the problem out or rephrase it"
            )


def decode_completions(policy, rollout):
    """The completions' texts, each with the prefill and without its end token."""
    is_text = rollout.token_mask & ~policy.is_end_token(rollout.completion)  # (B, L)
    texts = []
    for ids, mask in zip(rollout.completion, is_text, strict=True):
        texts.append(policy.prefill + policy.tokenizer.decode(ids[mask].tolist()))
    return texts


def end_token_ids(tokenizer):
    """The tokens that end a completion: eos and, for a chat model, end of turn and padding.

    LLaDA writes <|eot_id|> and then many eos tokens. Qwen's eos ends a turn, and it pads with
    another token.
    """
    ids = [tokenizer.eos_token_id]
    after_answer = ""
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        with suppress(Exception):  # a template may refuse any input
            text = tokenizer.apply_chat_template(turn, tokenize=False)
            after_answer = text.rpartition("ANSWER")[2]
    if after_answer:
        tokens = tokenizer(after_answer, add_special_tokens=False).input_ids
        special = [token for token in tokens if token in tokenizer.added_tokens_decoder]
        if special:
            ids += [special[0], tokenizer.pad_token_id]
    return list(dict.fromkeys(ids))
