"""What a run is made from, identified by content: its problems, task file, base and adapter.

    runs/NAME/inputs.json   {"data", "task", "model", "adapter"}: a checksum each, "" for none;
                            {"settings"}: that of the settings that --resume may not change

A path says where a file is, not what it holds. So code that resumes a run, measures it or compares
it with another compares contents: a moved file counts as the same, a changed file does not.
"""

import hashlib
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from config import CHANGEABLE_ON_RESUME, MOVABLE_ON_RESUME
from models.checkpoints import checksum, find_checkpoint, read_json_object
from models.loading import model_folder

INPUTS = "inputs.json"
# The files of a model's folder that are read when it is loaded (unlike made.json, say).
MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def task_files(task):
    """The files that a --task names, as FILE.py:NAME; none for the built-in tasks."""
    return [name.rpartition(":")[0] for name in task.split(",") if ":" in name]


def task_flag(task):
    """The flag --task, after a space, to add to a printed command; "" for the built-in tasks.

    A task's file is run only if it is named on the command line, so a command that continues such a
    run has to name it.
    """
    return f" --task {shlex.quote(task)}" if task_files(task) else ""


def resume_command(run_dir, task, processes=1):
    """The command that resumes a run with this number of processes, ready to be typed."""
    python = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    return f"{python} train.py --resume --run_dir {shlex.quote(str(run_dir))}{task_flag(task)}"


def absolute_task(task):
    """A --task with the absolute paths of its files, so that it is found from any folder."""
    names = []
    for name in task.split(","):
        path, colon, attribute = name.rpartition(":")
        names.append(f"{Path(path).absolute()}:{attribute}" if colon else name)
    return ",".join(names)


def bare_name(name):
    """The name of one task without the path of its file: NAME for FILE.py:NAME."""
    return name.rpartition(":")[2]


def bare_names(task):
    """The names of a --task, without the paths of its files."""
    return [bare_name(name) for name in task.split(",")]


# ---- checksums -----------------------------------------------------------------------------------


def data_checksum(data):
    """The checksum of a file of problems; "" for the task's own problems."""
    return checksum(data) if data else ""


def task_checksum(task):
    """The checksums of the files of a --task; "" for the built-in tasks."""
    return " ".join(checksum(file) for file in task_files(task))


def model_checksum(name_or_path):
    """What identifies a base model: a hub model's commit, or one checksum over a folder's files.

    A folder of 16 GB takes about ten seconds.
    """
    folder = model_folder(name_or_path)
    if folder.parent.name == "snapshots":  # the hub's cache, where the commit is the content
        return folder.name
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    listed = "".join(f"{file.name} {checksum(file)}\n" for file in sorted(files))
    return hashlib.sha256(listed.encode()).hexdigest()


def adapter_checksum(name_or_path):
    """The checksums of the adapter that a run starts from; "" for none."""
    if not name_or_path:
        return ""
    folder = find_checkpoint(name_or_path)
    if not folder.is_dir():
        folder = model_folder(name_or_path)
    files = ("adapter_config.json", "adapter_model.safetensors")
    return " ".join(checksum(folder / file) for file in files)


def settings_checksum(config):
    """The checksum of a Config's settings that --resume may not change, and of its tasks' names."""
    settings = asdict(config)
    for name in (*CHANGEABLE_ON_RESUME, *MOVABLE_ON_RESUME):
        del settings[name]
    settings["task"] = bare_names(config.task)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def input_checksums(config):
    """The content of inputs.json for a run's Config."""
    return {
        "data": data_checksum(config.data),
        "task": task_checksum(config.task),
        "model": model_checksum(config.model),
        "adapter": adapter_checksum(config.adapter),
        "settings": settings_checksum(config),
    }


def read_inputs(run_dir):
    """A run's inputs.json as a dict. If it is missing, prints a message and returns None.

    Raises ValueError if it is broken.
    """
    file = Path(run_dir) / INPUTS
    if not file.is_file():
        print(f"{file} is missing: cannot check that data and base are unchanged", file=sys.stderr)
        return None
    saved = read_json_object(file)
    names = ("data", "task", "model", "adapter")
    if any(not isinstance(saved.get(name), str) for name in names):
        raise ValueError(f"{file} is not as train.py writes it: it needs {', '.join(names)}")
    return saved


# ---- checks --------------------------------------------------------------------------------------


def require_typed_task(run_dir, task):
    """Raises ValueError if a run's task is in a file: it has to be named on the command line.

    A run folder may come from anywhere, so it must not decide which code is executed here.
    """
    if task_files(task):
        raise ValueError(
            f"{run_dir} has a task of its own, and its file runs only if you name it: "
            f"add{task_flag(task)}"
        )


def verify_settings(run_dir, config, inputs):
    """Raises ValueError if config.json, read as `config`, was edited after the run began."""
    checksum_now = settings_checksum(config)
    # Runs that were begun before there was this checksum have none.
    if inputs and inputs.get("settings", checksum_now) != checksum_now:
        raise ValueError(
            f"{run_dir}/config.json was edited after the run began: restore it, or start a new run"
        )


def verify_task(run_dir, task, saved_task, inputs):
    """Raises ValueError for another task than the run's; prints a warning if its file has changed.

    The file may be fixed while a run is interrupted, so a changed file is not an error.
    """
    if bare_names(task) != bare_names(saved_task):
        raise ValueError(f"{run_dir} was trained on {saved_task}: leave out --task {task}")
    for file in task_files(task):
        if not Path(file).is_file():
            raise ValueError(f"{file} of --task does not exist")
    if inputs and task_checksum(task) != inputs["task"]:
        files = " and ".join(task_files(task))
        print(
            f"{files} has changed since {run_dir} was started: its rewards and problems may differ",
            file=sys.stderr,
        )


def verify_data(run_dir, data, inputs):
    """Raises ValueError unless `data` holds the problems that the run was trained on."""
    if data and not Path(data).is_file():
        raise ValueError(f"{data}, the problems of {run_dir}, is missing: give --data FILE")
    if inputs and data_checksum(data) != inputs["data"]:
        problems = f"{data} now has" if data else "the task generates"
        raise ValueError(f"{run_dir} was trained on other problems than {problems}")


def verify_model(run_dir, name_or_path, inputs):
    """Raises ValueError unless a model is the one that the run was trained from."""
    if inputs and model_checksum(name_or_path) != inputs["model"]:
        raise ValueError(
            f"{name_or_path} is not the base that {run_dir} was trained from: its weights, "
            "tokenizer or configuration differ"
        )


def verify_adapter(run_dir, adapter, inputs):
    """Raises ValueError unless an adapter is the one that the run started from."""
    if inputs and adapter_checksum(adapter) != inputs["adapter"]:
        raise ValueError(f"{adapter} is not the adapter that {run_dir} started from")
