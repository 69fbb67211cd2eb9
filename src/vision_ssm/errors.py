class InputError(Exception):
    """What the user gave cannot be used.

    The message is one line that names the file or option and says what would work; the command line prints it
    as it stands and exits with code 2.
    """

    @property
    def line(self) -> str:
        """The message on one line, without the traceback a data-loader worker wraps around it."""
        return " ".join(str(self).rsplit("InputError: ", 1)[-1].split())
