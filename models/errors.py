"""Errors of other libraries, and of what nobody has foreseen, as a ValueError of one line.

The programs print a ValueError and exit; any other error is a fault of ours, and shows a traceback.
"""

from contextlib import contextmanager


@contextmanager
def as_value_error(message):
    """Turns any error inside the block into a ValueError of one line, `message` and its reason."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers, peft and the hub each raise their own
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{message} ({reason})") from None


@contextmanager
def unforeseen_as_value_error(message):
    """Turns any error inside the block into a ValueError of one line, but leaves ValueErrors.

    For code of this project, which refuses in words of its own, and fails at what it has not
    foreseen: a list in the place of a number, say.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{message} ({type(error).__name__}: {reason})") from None
