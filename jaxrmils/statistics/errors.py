"""The error of this package."""


class StatisticsError(ValueError):
    """Numbers, groups or options from which no interval can be computed."""
