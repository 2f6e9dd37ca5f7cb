"""What ends a program with one clear line and an exit code instead of a traceback."""

EXIT_STOPPED, EXIT_FAILED, EXIT_OPTIONS, EXIT_UNMENDABLE, EXIT_IN_USE = 0, 1, 2, 3, 4
"""Exit codes: stopped as asked; gave up or aborted; wrong options; broken model; address or folder in use."""


class UserError(Exception):
    """Something that only the user can mend; the text is one line that says what."""

    exit_code = EXIT_FAILED
