"""The errors that end request.py. Each says what is wrong, what was expected and what to do, and has an exit code."""


class EdgeError(Exception):
    exit_code = 1

    def __str__(self) -> str:
        return super().__str__().replace("\n", " ")  # A file's name may have lines.


class OutputError(EdgeError):
    exit_code = 2


class SourceError(EdgeError):
    exit_code = 3


class ServerError(EdgeError):
    exit_code = 4
