import difflib
from collections.abc import Iterable, Sequence


class InputError(Exception):
    """What the user gave cannot be used.

    The message is one line that names the file or option and says what would work; the command line prints it
    as it stands and exits with code 2.
    """

    @property
    def line(self) -> str:
        """The message on one line, without the traceback a data-loader worker wraps around it."""
        return printable(" ".join(str(self).rsplit("InputError: ", 1)[-1].split()))


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The known names that are most like a wrong one, as the end of a message."""
    near = difflib.get_close_matches(name, known, n=4)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise


def printable(text: str) -> str:
    """The text with control characters, line breaks and bytes that are not UTF-8 escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shorten(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
