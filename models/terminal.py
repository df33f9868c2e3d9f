"""What a program prints to may vanish: a closed terminal, a reader that has left, a full disk.

None of that may stop a run. A program that is started calls `prepare` first, before torch is
imported. Only the standard library is imported here.
"""

import _thread
import codecs
import logging
import os
import signal
import sys
import threading

# It is imported with peft, and warns of an optional kernel. Set here, since every program imports
# this file before peft; a program's child processes do so too, but never call `prepare`.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# What an old terminal gets for a character that it cannot show; for all others a ?.
STAND_INS = {"✓": "+", "✗": "-", "±": "~", "·": ".", "░": ".", "…": "."}


def stand_in(error):
    """An error handler of codecs: STAND_INS, so that a solved problem looks otherwise than none."""
    characters = error.object[error.start : error.end]
    return "".join(STAND_INS.get(character, "?") for character in characters), error.end


codecs.register_error("stand_in", stand_in)


class LastingStream:
    """A text stream that can be written to whatever becomes of it.

    After a failure everything goes to /dev/null: what is printed here, and what libraries print
    through the same file descriptor. `reader_left` says that the failure was a closed pipe. Then
    this process also gets the signal of that, SIGPIPE, which Python ignores unless a handler is
    set, as a training run does.
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
            pass  # it was closed; or a signal's handler prints while the program does

    def _discard_the_rest(self):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)


def prepare():
    """Makes printing safe in this process, and Ctrl-C one line even while modules are imported.

    A pipe gets each line at once; an old terminal gets a ? for a γ that it cannot show. Pictures
    are drawn to files alone, so what MPLBACKEND says of windows is nothing to fail at.
    """
    os.environ.pop("MPLBACKEND", None)
    # `>&-` closes a descriptor. The next file that is opened would get its number, and what is
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
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = print_exception
    sys.unraisablehook = interrupt_again


def interrupt(number, frame):
    """The handler of Ctrl-C: while a program is still importing, it ends at once; then as Python's.

    An exception may be lost in a module that is not Python's. Where torch imports numpy, it clears
    it: half of numpy stays behind, and whoever uses that fails. Until its main is defined, a
    program has begun nothing.
    """
    if hasattr(sys.modules["__main__"], "main"):
        raise KeyboardInterrupt
    print("\nstopped", file=sys.stderr)
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def interrupt_again(unraisable):
    """sys.unraisablehook: a Ctrl-C is not lost where Python can only report an exception.

    Such a place is a destructor, or a callback of the import system: the program would go on.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()  # here it would be lost again
    else:
        sys.__unraisablehook__(unraisable)


def print_exception(kind, error, traceback):
    """sys.excepthook: one line for Ctrl-C, after which Python ends with the signal's status."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
