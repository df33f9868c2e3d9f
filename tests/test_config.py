"""The settings: a run's are read back, and values that cannot work are refused."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import config


def test_the_config_of_a_run_is_read_back_and_one_with_other_fields_is_refused():
    saved = asdict(config.Config(seed=3))
    assert config.config_from_json(saved, "config.json") == config.Config(seed=3)
    for other in (saved | {"novelty": 1}, {k: v for k, v in saved.items() if k != "seed"}):
        with pytest.raises(ValueError, match="config.json has other fields"):
            config.config_from_json(other, "config.json")


@pytest.mark.parametrize(
    "too_large",
    [
        {"learning_rate": 1e38},
        {"threshold_learning_rate": 1e38},
        {"epsilon": 1e300},
        {"threshold_epsilon": 1e300},
        {"threshold_sigma": 1e300},
        {"temperature": 1e300},
        {"block_length": 10**20},
        {"num_generations": 10**12},
        {"lora_rank": 10**6},
        {"num_stages": 10**6},
        {"prompts_per_step": 10**4, "num_generations": 10**4},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_value_that_would_fill_the_memory_or_overflow_is_refused(too_large):
    with pytest.raises(ValueError, match="at most"):
        config.Config(**too_large)


def test_a_cap_that_rounds_to_zero_is_refused():
    with pytest.raises(
        ValueError, match="importance_weight_cap = 1e-300: it has to be 0 or at least 1e-6"
    ):
        config.Config(importance_weight_cap=1e-300)


def test_the_comment_on_llada_names_each_setting_that_is_not_d1s():
    recipe = config.Config(**config.MODEL_RECIPES["LLaDA"])
    d1 = {f.name: f.metadata["d1"] for f in fields(recipe) if f.metadata["d1"] is not None}
    differing = {name for name, value in d1.items() if getattr(recipe, name) != value}
    source = Path(config.__file__).read_text(encoding="utf-8")
    [comment] = re.findall(r"((?:#.*\n)+)MODEL_RECIPES = ", source)
    assert len(differing) == 9
    assert differing == set(re.findall(r"\w+", comment)) & d1.keys()
