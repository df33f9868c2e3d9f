"""Copying must not change the method: a default in the mathematics is the one that train.py uses,
or there is none.
"""

import dataclasses
import inspect

import pytest

import denoiser
import diffpo_loss
import diffusion_policy
import likelihood
import sampler
import train
from config import Config

CONFIG = Config()
NO_DEFAULT = inspect.Parameter.empty
# Parameters with another name than the setting behind them, and what train.py makes of its default.
COUNTERPARTS = {
    "sampler.Decoder.level": CONFIG.initial_threshold,
    "sampler.Decoder.block_length": CONFIG.block_length or None,
    "sampler.ThresholdHead.sigma": CONFIG.threshold_sigma,
    "diffusion_policy.batches_by_length.max_rows": CONFIG.rollout_batch_size,
    "likelihood.draw_masked_prompt.probability": CONFIG.p_mask_prompt,
    "diffpo_loss.importance_weights.cap": CONFIG.importance_weight_cap,
    "diffpo_loss.weight_metrics.cap": CONFIG.importance_weight_cap,
    "diffpo_loss.threshold_loss.epsilon": CONFIG.threshold_epsilon,
}
# Not a setting's value: a BlockCache.
OTHER_MEANING = {
    "denoiser.DenoiserCalls.adapter",
    "diffusion_policy.DiffusionPolicy.adapter",
    "denoiser.DenoiserCalls.hidden.cache",
    "denoiser.DenoiserCalls.hidden_of_distinct.cache",
}


def functions_of(module):
    """(name, function) of a module's public functions, constructors and methods."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for method_name, method in vars(value).items():
                if method_name == "__init__":
                    yield name, method
                elif inspect.isfunction(method) and not method_name.startswith("_"):
                    yield f"{name}.{method_name}", method


# {"module.function.parameter": its default}
DEFAULTS = {
    f"{module.__name__}.{name}.{parameter.name}": parameter.default
    for module in (sampler, denoiser, diffusion_policy, likelihood, diffpo_loss)
    for name, function in functions_of(module)
    for parameter in inspect.signature(function).parameters.values()
}


def test_a_parameter_named_like_a_setting_has_its_default_or_none():
    settings = {field.name: field.default for field in dataclasses.fields(Config)}
    checked = set()
    for name, default in DEFAULTS.items():
        setting = name.rpartition(".")[2]
        if setting in settings and name not in {*COUNTERPARTS, *OTHER_MEANING}:
            assert default in (settings[setting], NO_DEFAULT), name
            checked.add(name)
    assert {"sampler.Decoder.temperature", "diffpo_loss.diffpo_loss.normalise_by"} <= checked


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_a_parameter_with_a_setting_behind_it_has_its_default_or_none(name):
    assert DEFAULTS[name] in (COUNTERPARTS[name], NO_DEFAULT)


def test_what_makes_the_objective_has_no_default():
    for name in (
        "group_advantages.scale_rewards",
        "row_mean.normalise_by",
        "diffpo_loss.normalise_by",
        "diffpo_loss.epsilon",
        "reference_kl.normalise_by",
        "importance_weights.cap",
        "threshold_loss.epsilon",
    ):
        assert DEFAULTS[f"diffpo_loss.{name}"] is NO_DEFAULT, name


def test_a_bare_decoder_and_head_are_those_of_a_training_run():
    fixed = train.rollout_decoder(Config(train_target="policy"))
    learned = train.rollout_decoder(CONFIG)
    assert sampler.Decoder() == fixed
    assert sampler.Decoder(level=None) == learned
    head = sampler.ThresholdHead(8)
    assert head.sigma == CONFIG.threshold_sigma
    assert head.linear.bias.exp().item() == pytest.approx(CONFIG.initial_threshold)


def test_gamma_may_start_wherever_the_head_allows():
    setting = Config.__dataclass_fields__["initial_threshold"].metadata
    head = sampler.ThresholdHead(hidden_size=4)
    assert (setting["minimum"], setting["maximum"]) == (head.floor, head.ceiling)
