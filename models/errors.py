"""Turning errors of other libraries, and unforeseen ones, into one-line ValueErrors.

The programs print a ValueError and exit. Any other error is a bug of ours and shows a traceback.
"""

from contextlib import contextmanager


@contextmanager
def as_value_error(message):
    """Turns any error inside the block into a one-line ValueError: `message`, then the reason."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers, peft and the hub each raise their own
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{message} ({reason})") from None


@contextmanager
def unforeseen_as_value_error(message):
    """Turns any error inside the block into a one-line ValueError; a ValueError keeps its message.

    It is for code of this project, which raises ValueErrors with good messages but may fail in
    unforeseen ways, say if it finds a list instead of a number.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{message} ({type(error).__name__}: {reason})") from None
