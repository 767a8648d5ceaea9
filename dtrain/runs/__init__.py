"""The run folder: what a run leaves on disk, and who may write it. No torch, nothing slow to import."""

from dtrain.runs.failures import Failure, first_failure, record_failure, spare_a_file
from dtrain.runs.folder import RunDir
from dtrain.runs.listing import RunSummary, list_runs
from dtrain.runs.lock import Holder, check
from dtrain.runs.outcomes import Outcome
from dtrain.runs.process import die_with_parent, redirect
from dtrain.runs.secrets import redact, redact_config, scrub
from dtrain.runs.versions import versions

__all__ = [
    "Failure",
    "Holder",
    "Outcome",
    "RunDir",
    "RunSummary",
    "check",
    "die_with_parent",
    "first_failure",
    "list_runs",
    "record_failure",
    "redact",
    "redact_config",
    "redirect",
    "scrub",
    "spare_a_file",
    "versions",
]
