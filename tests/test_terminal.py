"""Printing never stops a run: a closed pipe, a full device, a stream that is closed or missing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import SMALL_RUN
from toy import metrics_of

import train
from models.terminal import LastingStream
from training import files

ROOT = Path(train.__file__).parent


def broken_pipe():
    """A stream whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return LastingStream(os.fdopen(writer, "w", buffering=1))


def full_disk():
    return LastingStream(open("/dev/full", "w", buffering=1))  # noqa: SIM115


def closed():
    stream = open(os.devnull, "w")  # noqa: SIM115
    stream.close()
    return LastingStream(stream)


@pytest.mark.parametrize("make_stream", [broken_pipe, full_disk, closed])
def test_what_cannot_be_printed_is_dropped(make_stream):
    stream = make_stream()
    for _ in range(3):
        print("a line", file=stream, flush=True)
    assert stream.reader_left == (make_stream is broken_pipe)


INTERRUPTED_IN_A_DESTRUCTOR = """
import os, signal, time
from models import terminal

class Freed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)

terminal.prepare()
signal.signal(signal.SIGINT, signal.default_int_handler)
Freed()
for _ in range(1000):
    time.sleep(0.01)
print('went on')
"""


def test_ctrl_c_is_not_lost_where_python_can_raise_nothing():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IN_A_DESTRUCTOR],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "\nstopped\n")


def hear_sigint():
    """A suite that a script starts with & ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


INTERRUPTED_WHERE_EXCEPTIONS_ARE_CLEARED = """
import os, signal
from models import terminal
terminal.prepare()
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
print("went on")
"""


def test_ctrl_c_while_importing_is_not_lost_where_a_module_clears_exceptions():
    """torch did that where it imports numpy. The program went on, and failed with a traceback."""
    command = [sys.executable, "-c", INTERRUPTED_WHERE_EXCEPTIONS_ARE_CLEARED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=hear_sigint)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "\nstopped\n")


INTERRUPTED_IN_MAIN = """
import signal
from models import terminal

def main():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("tidied up")

terminal.prepare()
main()
"""


def test_ctrl_c_in_a_programs_main_is_an_exception_unless_it_is_ignored():
    command = [sys.executable, "-c", INTERRUPTED_IN_MAIN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=hear_sigint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tidied up\n", "")
    ignoring = ["bash", "-c", 'trap "" INT; exec "$@"', "-", *command]  # as a script's & does
    done = subprocess.run(ignoring, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


PRINT_PREPARED = """
import os
from models import terminal
terminal.prepare()
print("✓ γ ✗ 0.1 ±0.2", os.environ.get("MPLBACKEND"))
"""


def test_an_old_terminal_tells_right_from_wrong_and_no_backend_is_asked_for():
    done = subprocess.run(
        [sys.executable, "-c", PRINT_PREPARED],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("+ ? - 0.1 ~0.2 None\n", "")


def test_a_reader_that_leaves_ends_the_run_as_its_signal_would(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_pictures", lambda config, run_dir: [])
    handler = signal.getsignal(signal.SIGPIPE)
    flags = ["--steps", "4", "--save_every", "4", "--run_dir", str(tmp_path / "a")]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken_pipe())
        patch.setattr(sys, "stderr", full_disk())
        assert train.main([*SMALL_RUN, *flags]) == 128 + signal.SIGPIPE
    assert signal.getsignal(signal.SIGPIPE) == handler
    assert len(metrics_of(tmp_path / "a")) == 1 and (tmp_path / "a" / "checkpoint").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full_disk())
        assert train.main(["--resume", "--run_dir", str(tmp_path / "a")]) == 0
    assert len(metrics_of(tmp_path / "a")) == 4


def test_a_reader_that_leaves_while_the_loop_runs_is_a_signal_too(monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken_pipe())
    with pytest.raises(KeyboardInterrupt) as stop, files.GracefulInterrupt() as interrupt:
        assert interrupt.signal_number == 0
        print("a line")
        assert interrupt.signal_number == signal.SIGPIPE
    assert stop.value.args == (signal.SIGPIPE,)


PREPARE = """
import sys
from models import terminal
terminal.prepare()
file = open(sys.argv[1], "w")
print("to nobody", flush=True)
print("to nobody", file=sys.stderr, flush=True)
file.close()
raise KeyboardInterrupt
"""


def test_a_closed_output_spoils_no_file_and_ctrl_c_while_importing_is_one_line(tmp_path):
    file = tmp_path / "file"
    command = f'"{sys.executable}" -c "$PREPARE" "{file}"'
    for redirection in (">&-", ">&- 2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {redirection}"],
            cwd=ROOT,
            env=os.environ | {"PREPARE": PREPARE},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 128 + signal.SIGINT
        assert file.read_text() == "" and "Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "to nobody\n" and done.stderr == "to nobody\n\nstopped\n"
    assert done.returncode == -signal.SIGINT
