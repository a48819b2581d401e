"""The errors of training that users can do something about."""


class DataError(ValueError):
    """Training data that can't be used; the message names the file, the line, the reason and the remedy."""


class TrainingError(ValueError):
    """A model, folder or package that a training can't do with or without; the message names value and remedy."""


class SavingError(TrainingError):
    """Weights that can't be written; it may happen to one of several processes alone."""
