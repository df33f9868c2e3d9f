"""A run that takes seconds: the flags that several tests start from."""

import json
from dataclasses import asdict

import pytest
import torch

import train
from models.inputs import INPUTS, input_checksums
from training.files import write_json
from training.run_folder import create_run, write_config

SMALL_RUN = [
    *("--task", "countdown"),
    *("--model", "tiny"),
    *("--prompts_per_step", "4"),
    *("--eval_problems", "4"),
    *("--frontier", "false"),
]


def make_small_run(folder, steps, *flags):
    """Makes a small run in `folder`, without pictures, for a fixture that several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_pictures", lambda config, run_dir: [])
        arguments = [*SMALL_RUN, "--steps", str(steps), *flags, "--run_dir", str(folder)]
        assert train.main(arguments) == 0


def write_results(folder, config, log, measured, frontier, nfe):
    """Writes what a finished run has told: its settings, its log and what was measured of it.

    measured and frontier: the rows of eval.json and frontier.json. nfe: of its two completions.
    """
    completions = [
        {"name": name, "question": "?", "text": "!", "nfe": nfe, "solved": True}
        for name in ("base", "trained")
    ]
    files = {
        "config": asdict(config),
        "inputs": input_checksums(config),
        "eval": measured,
        "frontier": frontier,
        "completions": completions,
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


def make_run_folder(folder, config):
    """The folder of a run that has not begun: its settings and what they were made from."""
    create_run(folder, torch.device("cpu"))
    write_json(folder / INPUTS, input_checksums(config))
    write_config(folder, config)
