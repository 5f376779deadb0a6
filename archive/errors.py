"""The errors that end create_mar_file.py, in one line each. They say what is wrong and what to do."""


class ArchiveError(Exception):
    """An input is wrong, or the archive can't be written."""

    exit_code = 1


class DownloadError(ArchiveError):
    """The weights are not in the cache, and can't be downloaded."""

    exit_code = 3
