"""Checks before a run starts or resumes, so that nothing fails hours later.

Settings that do not go together, a folder that is in use, an export that could not be written, a
checkpoint that was removed: each raises a one-line ValueError that says what to do.
"""

import sys
import tempfile
from pathlib import Path

from models import inputs
from models.checkpoints import read_rows, read_run_config
from models.errors import as_value_error
from sampler import Decoder
from training import checkpoint, distributed, files, logging

# ---- settings ------------------------------------------------------------------------------------


def check_settings(config, export):
    """Raises ValueError for settings that do not go together."""
    Decoder(  # raises for a cache without blocks
        block_length=config.block_length or None, cache=config.cache
    )
    if config.eval_split == "all" and not config.data:
        raise ValueError("eval_split all means all problems of a file: give --data FILE")
    if config.compile and (config.cache == "none" or config.shard or config.dtype == "4bit"):
        raise ValueError(
            "--compile is for calls with a filled block cache, and weights that are neither split "
            "nor in 4 bits: give a --cache other than none, or leave out --compile"
        )
    check_processes(config, distributed.world_size(), export)
    if distributed.is_main_process():
        logging.import_tracker(config.report_to)


def check_processes(config, processes, export=None):
    """Raises ValueError for settings that do not work with several processes or split weights."""
    prompts = config.prompts_per_step
    if prompts < processes:
        raise ValueError(
            f"prompts_per_step = {prompts}: "
            f"it has to be at least 1 for each of the {processes} processes"
        )
    if not config.shard:
        return
    if processes == 1:
        raise ValueError(
            "--shard splits the weights over processes: start several by torchrun, or use "
            "--shard false"
        )
    if prompts % processes:
        raise ValueError(
            f"--shard with {processes} processes needs --prompts_per_step to be a multiple of "
            f"{processes}"
        )
    if config.dtype == "4bit":
        raise ValueError("--shard cannot split weights of --dtype 4bit: use bfloat16")
    if export:
        raise ValueError("--export needs one process: after the run, --resume --shard false")


# ---- folders -------------------------------------------------------------------------------------


def check_folders(config, run_dir, resume, export):
    """Raises ValueError if a folder to write to is taken. Repairs what a kill left half-done."""
    if not resume and run_dir.is_dir():
        check_unused(run_dir)
    if export is not None:
        check_export(export, run_dir)
    files.remove_unfinished(run_dir)
    files.recover_interrupted_rename(run_dir / "checkpoint")
    if (run_dir / "checkpoint").is_dir():
        files.restore_previous_checkpoint(run_dir / "checkpoint")
    if resume:
        check_progress(config, run_dir)


def check_export(export, run_dir):
    """Raises ValueError unless --export names a writable folder outside the run's.

    A file is written there and removed again: after a night it would be too late to find out.
    """
    if not export:
        raise ValueError("--export needs the name of a new folder")
    folder = Path(export).absolute()
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--export {export}: the folder is not empty")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--export {export} is a file: give a new folder")
    if run_dir.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"--export {export} is inside the run's folder: give one beside it")
    with as_value_error(f"--export {export}: the folder cannot be made"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()


def check_progress(config, run_dir):
    """Raises ValueError if --steps or the checkpoint contradicts what the run has already done.

    --steps must not be below the checkpoint's step. If the log shows that a checkpoint was written,
    it has to exist; otherwise the log would be cut and the run repeated under its name.
    """
    step = checkpoint.saved_step(run_dir)
    if config.steps < step:
        raise ValueError(
            f"--steps {config.steps}: {run_dir} has already done {step} steps: give --steps {step} "
            "or more"
        )
    if step == 0:
        rows = logging.read_metrics(run_dir)
        saved_every = read_run_config(run_dir).save_every
        if len(rows) > saved_every or is_trained_measured(run_dir):
            raise ValueError(
                f"{run_dir} has no checkpoint, although {len(rows)} steps are logged: it was "
                "removed. Put it back, or start a new run"
            )
        if rows:
            print(f"{run_dir} has no checkpoint yet: it starts again at step 1", file=sys.stderr)


def is_trained_measured(run_dir):
    """Whether a run's eval.json has a row of the trained model."""
    file = run_dir / "eval.json"
    return file.exists() and any(
        row["name"] == "trained" for row in read_rows(file, fields={"name": str})
    )


def is_base_frontier_measured(run_dir):
    """Whether a run's frontier.json has rows of the base at other gammas than the starting one."""
    file = run_dir / "frontier.json"
    if not file.exists():
        return False
    names = [row["name"] for row in read_rows(file, fields={"name": str})]
    return names.count("base") > 1


def is_environment(file):
    """Whether a file is a run's environment.txt, or an empty one that a kill left."""
    if not file.is_file():
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return not text or text.startswith("python ")


def check_unused(run_dir):
    """Raises ValueError if a folder holds a run or anything else, and says what."""
    names = {file.name for file in run_dir.iterdir() if not file.name.startswith(files.PRIVATE)}
    names.discard(".lock")
    if is_environment(run_dir / "environment.txt"):  # of a run killed before it wrote its config
        names -= {"environment.txt", inputs.INPUTS}
    if not names:
        return
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"{run_dir} is not empty, it has {min(names)}: give a new --run_dir")
    config = read_run_config(run_dir)
    rows = files.read_log(run_dir / "metrics.jsonl")
    steps_done = rows[-1]["step"] if rows else 0
    command = inputs.resume_command(run_dir, config.task)
    if steps_done >= config.steps:
        raise ValueError(
            f"{run_dir} holds a finished run ({steps_done} of {config.steps} steps): "
            f"give a new --run_dir, or continue with {command} --steps N"
        )
    raise ValueError(
        f"{run_dir} holds a run with {steps_done} of {config.steps} steps done: "
        f"resume with {command}, or give a new --run_dir"
    )
