from collections.abc import Sequence


class InputError(Exception):
    """What the user gave cannot be used.

    The message is one line that names the file or option and says what would work; the command line prints it
    as it stands and exits with code 2.
    """

    @property
    def line(self) -> str:
        """The message on one line, without the traceback a data-loader worker wraps around it."""
        return printable(" ".join(str(self).rsplit("InputError: ", 1)[-1].split()))


def shorten(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def printable(text: str) -> str:
    r"""The text with line breaks, control characters and the like escaped: `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
