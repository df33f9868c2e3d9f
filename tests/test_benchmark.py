"""The benchmark's own arithmetic, on a shape that takes a second."""

import pytest
import torch
from benchmark import SHAPES, make_policy, measure, print_table, whole_step, with_ratios

SMALL = SHAPES["tiny"] | {"prompts": 2, "group": 2, "naive_rows": 4, "micro_batch": 4, "rank": 2}


@pytest.fixture(scope="module")
def rows():
    return {
        method: measure(SMALL, method, "cpu") for method in ("naive", "ours", "dual", "learning")
    }


def test_the_operations_counted_are_two_for_every_weight_and_position_and_those_of_attention():
    policy = make_policy(SMALL, "cpu")
    weights = sum(
        p.numel()
        for name, p in policy.denoiser.named_parameters()
        if "layers." in name and p.ndim == 2
    )
    config = policy.denoiser.config
    with torch.no_grad():
        policy.hidden(torch.randint(3, 9, (3, 11)))
    attention = 4 * 3 * 11 * 11 * config.hidden_size * config.num_hidden_layers
    assert policy.flop == 2 * 3 * 11 * weights + attention
    policy.flop = 0
    with torch.no_grad():
        policy.surety(torch.randn(5, config.hidden_size), "eb")
    assert policy.flop == 2 * 5 * config.vocab_size * config.hidden_size


def test_the_naive_loop_and_ours_draw_the_same_tokens(rows):
    table = with_ratios([dict(rows["naive"]), dict(rows["ours"])], same_order=True)
    assert table[1]["same_tokens"] == 1.0 and table[1]["speed_ratio"] > 0
    assert rows["dual"]["tflop"] < rows["ours"]["tflop"] < rows["naive"]["tflop"]


def test_a_stand_in_counts_what_the_model_itself_would(rows):
    for method in ("naive", "ours", "dual"):
        counted = measure(SMALL, method, "cpu", count_only=True)
        assert (
            counted["tflop"] == pytest.approx(rows[method]["tflop"])
            and counted["failed"] == "not measured"
        )


def test_a_step_is_a_rollout_and_its_learning_and_the_table_says_what_was_not_measured(
    rows, capsys
):
    step = whole_step([rows["dual"], rows["learning"]])
    assert step["seconds"] == pytest.approx(rows["dual"]["seconds"] + rows["learning"]["seconds"])
    failed = whole_step([rows["dual"], {"method": "learning", "failed": "out of memory"}])
    assert failed["failed"] == "out of memory" and "tflop" not in failed
    print_table([{"shape": "tiny"} | step, {"shape": "tiny"} | failed])
    lines = capsys.readouterr().out.splitlines()
    assert "MFU" in lines[0] and "out of memory" in lines[3]
