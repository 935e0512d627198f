"""The one exception for what a user can put right."""


class UserError(Exception):
    """Bad input: shown as one line, exit code 2, with a traceback only under `--debug`.

    The message is a sentence or two that name the file, the field and the fix.
    """
