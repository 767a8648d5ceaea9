"""dtrain: the same model whatever the parallelism.

It is used by its command, `dtrain`. A package of your own builds on `dtrain.config.spec`, which says what each group of
choices must answer, on the `base` module of the group's folder, and on `dtrain.errors`; `dtrain.runs` reads what runs
have left.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
