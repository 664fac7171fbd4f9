"""Every error that the product raises on purpose; the command line prints each as one line and exits with its code.

    FmnistError
    ├── UserError                2   the input is wrong; the message holds the remedy
    │   ├── SpecError                an experiment file or an override
    │   ├── DataError                the dataset can be neither found nor fetched
    │   └── StoreError               the record of runs can't be reached, read or written
    ├── RunFailed                3   a run that started could not be finished
    │   └── Diverged                 its training loss stopped being finite
    └── Interrupted        130, 143  SIGINT or SIGTERM, once what was trained is on disk
"""

import signal


class FmnistError(Exception):
    exit_code = 1


class UserError(FmnistError):
    exit_code = 2


class SpecError(UserError):
    pass


class DataError(UserError):
    pass


class StoreError(UserError):
    pass


class RunFailed(FmnistError):
    exit_code = 3


class Diverged(RunFailed):
    pass


class Interrupted(FmnistError):
    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
        self.reason = signal.Signals(signal_number).name
