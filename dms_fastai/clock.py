"""Durations in readable form."""

from .errors import UserError

__all__ = ["clock", "seconds_of"]


def clock(seconds: float) -> str:
    """A duration as text, minutes and seconds or hours and minutes: 1:05, 2 h 03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"


def seconds_of(text: str, what: str = "time limit") -> float:
    """Seconds of a duration such as 90s, 9m or 2h.

    Raises:
        UserError: The text has another form, or the duration is not above 0.
    """
    try:
        seconds = float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]
    except (KeyError, ValueError, IndexError):
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"{what} is {text!r}; write 90s, 9m or 2h")
    return seconds
