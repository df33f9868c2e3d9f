"""How evaluate.py measures a path: as the flags say and, where they do not, as its run did.

    a run                         is decoded as it was trained, on its own task and data
    a run's checkpoint or adapter is decoded as the run was; the flags give task and problems
    any other model               uses the defaults of evaluation/flags.py

A run's folder may come from anywhere. So its task file is executed only if --task names it, and a
run whose data or base has changed is refused.
"""

from pathlib import Path
from types import SimpleNamespace

from evaluation.flags import DECODING_FROM_RUN, DEFAULTS, FROM_RUN
from models import inputs
from models.checkpoints import (
    adapter_base,
    find_checkpoint,
    is_loadable,
    read_run_config,
    reads_compact_prompts,
    run_of_checkpoint,
)
from sampler import Decoder


def resolve_options(path, flags):
    """The options for one path: from the flags, then the run's own settings, then the defaults.

    flags: a dict from parse_flags. Returns a namespace with a field per flag, and:
        path                the path of the run, checkpoint or model
        folder              where plots go: the run's folder, or the current one
        is_threshold_fixed  the run trained only the policy: its threshold head has learned nothing
        run_data            the file that the run was trained on; "": problems of its task
        is_new_file         --data is a file that the run was not trained on
    Raises ValueError for flags that do not fit, and for a run whose data or base has changed.
    """
    path = Path(path)
    is_run = find_checkpoint(path) != path
    run_dir = path if is_run else run_of_checkpoint(flags.get("adapter") or path)
    config = read_run_config(run_dir) if run_dir else None
    saved_inputs = None
    if is_run:
        saved_inputs = inputs.read_inputs(path)
        verify_inputs(path, flags, config, saved_inputs)

    from_run = {}
    if config:
        from_run = settings_from_run(config, flags, is_run, is_compact=reads_compact_prompts(path))
    options = SimpleNamespace(**DEFAULTS | from_run | flags)
    options.path = path
    options.folder = path if is_run else Path()
    options.is_threshold_fixed = config is not None and config.train_target == "policy"
    if not options.task:
        raise ValueError(f"{path} is not a run, so its task is unknown: give a --task")
    if len(options.max_completion_length) > 1 and (options.frontier or options.trace):
        raise ValueError("--frontier and --trace take one --max_completion_length at a time")

    options.run_data = config.data if is_run else ""
    options.is_new_file = bool(options.data) and options.data != options.run_data
    if options.is_new_file and saved_inputs:  # the run's own file may have been renamed
        options.is_new_file = inputs.data_checksum(options.data) != saved_inputs["data"]
    if not options.split:
        trained_on_all = is_run and config.eval_split == "all"
        options.split = "all" if options.is_new_file or trained_on_all else "test"
    if options.data and options.split == "all" and "problems" not in flags:
        options.problems = None  # the whole file

    if options.adapter:
        verify_adapter(options.adapter, path)
    if options.block_length is not None:
        for level in options.level:  # raises for blocks and caches that do not fit
            make_decoder(options, options.decoder, level)
    return options


def settings_from_run(config, flags, is_run, is_compact):
    """The settings of a run's Config that replace defaults: {flag: value}.

    is_run      the run itself is measured, not its checkpoint or adapter under another path
    is_compact  it is a tiny model, whose completion length depends on the task
    """
    settings = {name: getattr(config, name) for name in (FROM_RUN if is_run else DECODING_FROM_RUN)}
    is_same_task = flags.get("task", config.task) == config.task
    if is_run or is_same_task or not is_compact:
        settings["max_completion_length"] = [config.max_completion_length]
    if config.train_target == "policy" and flags.get("decoder", "eb") == "eb":
        settings["level"] = [config.initial_threshold]
    return settings


def verify_inputs(run_dir, flags, config, saved_inputs):
    """Raises ValueError unless a run's task, data and base are those that it was trained with.

    A task file is executed only if --task names it. --data may name another file.
    """
    if "task" in flags:
        inputs.verify_task(run_dir, flags["task"], config.task, saved_inputs)
    else:
        inputs.require_typed_task(run_dir, config.task)
    if "data" not in flags:
        inputs.verify_data(run_dir, config.data, saved_inputs)
    base = adapter_base(find_checkpoint(run_dir))
    if base and is_loadable(base):  # otherwise load_policy raises
        inputs.verify_model(run_dir, base, saved_inputs)


def verify_adapter(adapter, base):
    """Raises ValueError if the adapter's run was trained on another base.

    Nothing is known about an adapter outside a run's folder, so it is accepted.
    """
    folder = find_checkpoint(adapter)
    run_dir = folder.parent
    if (run_dir / inputs.INPUTS).is_file():
        inputs.verify_model(run_dir, str(base), inputs.read_inputs(run_dir))


def make_decoder(options, rule, level):
    """The Decoder of a rule and level, with the options' blocks, cache and temperature."""
    return Decoder(
        rule=rule,
        level=level,
        block_length=options.block_length or None,
        temperature=options.temperature,
        cache=options.cache,
        sample_threshold=False,
    )
