"""The one error of saved artifacts."""


class ArtifactError(ValueError):
    """A saved artifact that cannot be written, read or used with the given model.

    The message names the file, what was found, what was expected and what to do.
    """
