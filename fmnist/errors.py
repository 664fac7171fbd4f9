"""Every error that the product raises on purpose; the command line prints each as one line and exits with its code.

FmnistError
├── UserError                2   the input is wrong; the message holds the remedy
│   ├── SpecError                an experiment file or an override
│   ├── DataError                the dataset can be neither found nor fetched
│   ├── DeviceError              the CUDA device that was asked for can't be used
│   └── StoreError               the record of runs can't be reached, read or written
├── Diverged                 3   a training loss that isn't finite
├── Irreproducible           3   a step on record that comes out otherwise when it is computed again; the run stays resumable
└── Interrupted       128 + n    signal n ended the training: 130 for Ctrl-C, 143 for SIGTERM
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


class DeviceError(UserError):
    pass


class StoreError(UserError):
    pass


class Diverged(FmnistError):
    exit_code = 3


class Irreproducible(FmnistError):
    exit_code = 3


class Interrupted(FmnistError):
    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step:,}")
        self.exit_code = 128 + signal_number
