"""Output that may vanish: the terminal is closed, the reader of a pipe exits, the disk is full.

None of this may stop a run. Every program calls `prepare` first, before torch is imported. Only the
standard library is imported here.
"""

import _thread
import codecs
import logging
import os
import signal
import sys
import threading

# bitsandbytes is imported by peft, and warns about an optional kernel. We silence it here because
# every program imports this file before peft, and so do its child processes, which do not call
# `prepare`.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# What an old terminal shows for a character that it cannot display; for all others, a ?.
STAND_INS = {"✓": "+", "✗": "-", "±": "~", "·": ".", "░": ".", "…": "."}


def stand_in(error):
    """A codecs error handler: replaces what cannot be shown, so that ✓ and ✗ still differ."""
    characters = error.object[error.start : error.end]
    return "".join(STAND_INS.get(character, "?") for character in characters), error.end


codecs.register_error("stand_in", stand_in)


class LastingStream:
    """A text stream to which writing never fails.

    After a failure all output goes to /dev/null, including what libraries print through the same
    file descriptor. `reader_left` is True if the failure was a closed pipe. In that case this
    process also raises SIGPIPE, which Python ignores unless a handler is set, as a training run
    does.
    """

    def __init__(self, stream):
        self.stream = stream
        self.reader_left = False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, action):
        try:
            action()
        except BrokenPipeError:
            self._discard_the_rest()
            self.reader_left = True
            signal.raise_signal(signal.SIGPIPE)
        except OSError:  # the terminal is gone, or the disk under the output is full
            self._discard_the_rest()
        except (ValueError, RuntimeError):
            pass  # the stream was closed, or a signal handler prints while the program prints

    def _discard_the_rest(self):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)


def prepare():
    """Makes printing safe in this process; Ctrl-C prints one line, even while modules are imported.

    Pipes are line-buffered, and an old terminal shows a ? for a γ that it cannot display.
    MPLBACKEND is ignored, since pictures are only drawn to files and an unusable backend must not
    stop a run.
    """
    os.environ.pop("MPLBACKEND", None)
    # `>&-` closes a descriptor. The next file to be opened would get its number and receive what is
    # printed.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        stream.reconfigure(errors="stand_in", line_buffering=True)
        setattr(sys, name, LastingStream(stream))
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # otherwise Ctrl-C is ignored
        signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = print_exception
    sys.unraisablehook = interrupt_again


def interrupt(number, frame):
    """The Ctrl-C handler: ends a program that is still importing at once; later acts as Python's.

    During imports the exception may be lost in a C extension. torch, for example, clears it while
    it imports numpy, which leaves a half-imported numpy that fails later. Ending at once is safe,
    since a program has done nothing until its main is defined.
    """
    if hasattr(sys.modules["__main__"], "main"):
        raise KeyboardInterrupt
    print("\nstopped", file=sys.stderr)
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def interrupt_again(unraisable):
    """sys.unraisablehook that repeats a Ctrl-C where Python can only report an exception.

    This happens in destructors and in callbacks of the import system: without the hook, the program
    would continue.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()  # raised here, it would be lost again
    else:
        sys.__unraisablehook__(unraisable)


def print_exception(kind, error, traceback):
    """sys.excepthook: one line for Ctrl-C; Python then exits with the signal's status."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
