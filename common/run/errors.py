"""The two errors that end a run in one line."""


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and what to do."""


class Diverged(UserError):
    """The loss, its gradient or a weight is not finite any more, since step `step`."""

    def __init__(self, message, step):
        super().__init__(message)
        self.step = step
