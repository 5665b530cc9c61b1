"""The error tree: every mistake a user can make has one class and one clear line.

    UltrafuserError
    ├── ConfigError        a recipe or an option is wrong
    ├── TemplateError      a chat template cannot render, or breaks the alignment of responses
    ├── DataError          a record, a file or a data set is wrong
    ├── VocabularyError    specialists disagree about a token
    ├── ModelError         a model cannot be loaded, built or saved
    ├── CheckpointError    a checkpoint is missing, damaged or cannot be written
    ├── TrainingError      training cannot go on (a loss that is not finite, say)
    ├── SynthesisError     a data set cannot be made further (an endpoint, a budget, the store)
    ├── SandboxError       model-written code cannot be run safely here
    ├── RequestError       a request that the engine can never serve
    └── BusyError          a request that the engine cannot take now, and may take later

The message says what is wrong, with which value, and what to do. The command line shows it as one line; a
bug, which is any other exception, keeps its traceback.
"""


class UltrafuserError(Exception):
    """Base of every error that a user can cause and mend; `exit_code` is what a command ends with."""

    exit_code = 1
    is_told: bool | None = None  # of several processes: whether another one tells it; None: they have not met yet


class ConfigError(UltrafuserError):
    """A recipe or an option is wrong."""


class TemplateError(UltrafuserError):
    """A chat template cannot render a conversation, or breaks the alignment of responses."""


class DataError(UltrafuserError):
    """A record, a file or a data set is wrong."""


class VocabularyError(UltrafuserError):
    """Specialists disagree about which token an id stands for."""


class ModelError(UltrafuserError):
    """A model cannot be loaded, built or saved."""


class CheckpointError(UltrafuserError):
    """A checkpoint is missing, damaged or cannot be written."""


class TrainingError(UltrafuserError):
    """Training cannot go on."""


class SynthesisError(UltrafuserError):
    """A data set cannot be made further; everything that is answered is kept, and the same command goes on."""


class SandboxError(UltrafuserError):
    """Model-written code cannot be run safely here; the message says what failed and how to mend it."""

    exit_code = 3  # not the 1 of a failed check: nothing was examined


class RequestError(UltrafuserError):
    """A request that the engine can never serve, whoever asks and when."""


class BusyError(UltrafuserError):
    """A request that the engine cannot take now: its queue is full, or it is shutting down."""
