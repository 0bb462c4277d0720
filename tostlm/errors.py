"""The one exception that users see."""


class UserError(Exception):
    """A mistake the user can mend, or a limit of the machine.

    The message names the value, the rule and the way out. The command line prints it as one line and exits with
    code 2; every other exception is a defect of this project and keeps its traceback.
    """
