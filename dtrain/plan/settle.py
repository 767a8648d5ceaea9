"""From what was typed to what runs: a configuration without `auto`, which every rank reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dtrain.config.schema import Config
from dtrain.config.spec import ObjectiveSpec, StrategySpec
from dtrain.errors import ConfigError, DataError
from dtrain.plan.plan import Plan, check_best, lr_of, num_steps


def settle(config: Config, plan: Plan, strategies: Mapping[str, StrategySpec], objective: ObjectiveSpec,
           num_rows: int | None) -> Config:  # fmt: skip
    """Put what the plan and the data decided in place of what was left open. `num_rows`: of an epoch, None where nobody
    has counted them. Raises ConfigError, DataError.
    """
    global_batch = plan.batch.global_batch
    if config.batch.global_batch == "auto" and num_rows is not None:
        global_batch = max(1, min(global_batch, num_rows))
    if num_rows is not None and num_rows < global_batch:
        raise DataError(f"batch.global_batch={global_batch}: the dataset has only {num_rows} training rows, less than "
                        f"one step takes; use at most {num_rows}, shorter rows or more data")  # fmt: skip
    train = dataclasses.replace(config.train, precision=plan.precision, epochs=None,
                                steps=num_steps(config, global_batch, num_rows))  # fmt: skip
    # Of a number of steps, and of an objective, that are known only now.
    if problems := [*train.problems(), *check_best(config, objective)]:
        raise ConfigError.of(problems)
    strategy = config.strategy if not config.strategy.candidates() else strategies[plan.strategy]
    dtype = plan.precision if config.export.dtype == "auto" else config.export.dtype
    return dataclasses.replace(
        config,
        objective=objective,
        strategy=strategy,
        device=plan.device,
        optim=dataclasses.replace(config.optim, lr=lr_of(config, objective)[0]),  # type: ignore[type-var]
        train=train,
        batch=dataclasses.replace(config.batch, global_batch=global_batch, global_tokens=None,
                                  micro_batch=plan.batch.micro_batch),
        export=dataclasses.replace(config.export, dtype=dtype),
    )  # fmt: skip
