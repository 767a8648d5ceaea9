"""dtrain: the same model whatever the parallelism."""

__version__ = "0.1.0"
