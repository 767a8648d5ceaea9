"""Weights & Biases; the sole importer of wandb.

All of it runs in a thread of its own: a slow import, a slow server or none at all never delays a step.
"""

from __future__ import annotations

import http.client
import io
import netrc
import os
import queue
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO, final
from urllib.parse import urlsplit

from dtrain.config.spec import TrackerSpec, spec
from dtrain.runs import redact_config
from dtrain.trackers.base import AbstractTracker, Confusion, EvalReport, Sample, SamplesReport, StepReport
from dtrain.trackers.jsonl import row

REACH_S = 3.0
INIT_S = 15.0
FINISH_S = 20.0
"""How long a run that is over waits for the upload; what is not sent stays on disk."""
_HOSTED = {"api.wandb.ai", "api.forge.coreweave.com"}
"""One service under two names: a key for either is a key for both."""
_GROUPS = {
    "train": ("loss", "grad_norm", "lr"),
    "perf": ("tokens_per_s", "step_s", "mfu", "mem_bytes"),
    "data": ("data_s", "epoch", "samples", "tokens", "num_targets"),
}


@spec
class Wandb(TrackerSpec):
    project: str = "dtrain"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: what WANDB_MODE says, else online when logged in (WANDB_API_KEY, `wandb login`), else offline."""
    run_group: str | None = None
    tags: tuple[str, ...] = ()

    def build(self, run_dir: Path, config: Mapping[str, Any], stream: TextIO) -> AbstractTracker:
        return _Wandb(self, run_dir, redact_config(config))


def names(report: StepReport | EvalReport) -> dict[str, Any]:
    """The report under the names that its charts have: train/loss, perf/mfu, data/epoch, eval/loss."""
    values = {name: value for name, value in row(report).items() if name != "step" and value is not None}
    if isinstance(report, EvalReport):
        return {f"eval/{name}": value for name, value in values.items()}
    group_of = {name: group for group, members in _GROUPS.items() for name in members}
    return {f"{group_of.get(name, 'train')}/{name}": value for name, value in values.items()}


def logged_in(base_url: str, env: Mapping[str, str] = os.environ) -> bool:
    """Whether wandb would find a key for this server without asking."""
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = {urlsplit(base_url).netloc} | (_HOSTED if urlsplit(base_url).netloc in _HOSTED else set())
    paths = [env["NETRC"]] if env.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in paths:
        try:
            found = netrc.netrc(Path(path).expanduser())
        except (OSError, RuntimeError, netrc.NetrcParseError):
            continue
        if any(found.authenticators(host) for host in hosts):
            return True
    return False


def unreachable(base_url: str) -> str | None:
    """Why the server cannot be spoken to, or None: any HTTP answer within REACH_S will do."""
    try:
        urllib.request.urlopen(base_url, timeout=REACH_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, http.client.HTTPException) as error:
        return f"{base_url} does not answer ({getattr(error, 'reason', error)})"
    return None


def run_id(run_dir: Path, first_step: int) -> str:
    """The id of this run at W&B, kept in the run folder. A resumed run takes it up again; one that starts over gets its
    own, since W&B drops steps that it has seen.
    """
    path = run_dir / "wandb" / "id"
    if first_step and path.exists():
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    made = secrets.token_hex(4)
    path.write_text(made + "\n", encoding="utf-8")
    return made


def _shown(value: Any) -> Any:
    """Samples as a table of W&B's, confusions as a picture, anything else as it is."""
    if not isinstance(value, SamplesReport | Confusion):
        return value
    import wandb

    if isinstance(value, SamplesReport):
        return wandb.Table(columns=list(Sample._fields), data=[list(one) for one in value.samples])
    from PIL import Image

    from dtrain.trackers._plot import draw_confusion

    file = io.BytesIO()
    draw_confusion(value, file, "eval")
    return wandb.Image(Image.open(file))


@final
class _Wandb(AbstractTracker):
    def __init__(self, values: Wandb, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._spec, self._run_dir, self._config = values, run_dir, config
        self._todo: queue.SimpleQueue[tuple[int, dict[str, Any]] | str] = queue.SimpleQueue()
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)

    def start(self, *, steps: int, first_step: int, lines: list[str]) -> None:
        self._first_step = first_step
        if self._spec.mode != "disabled":
            self._thread.start()

    def step(self, report: StepReport) -> None:
        self._todo.put((report.step, names(report)))

    def eval(self, report: EvalReport) -> None:
        pictures = {} if report.confusion is None else {"eval/confusion": report.confusion}
        self._todo.put((report.step, names(report) | pictures))

    def samples(self, report: SamplesReport) -> None:
        self._todo.put((report.step, {"eval/samples": report}))

    def note(self, line: str) -> None:
        """Notes are for people at the console."""

    def finish(self, *, outcome: str) -> None:
        if not self._thread.is_alive():
            return
        self._todo.put(outcome)
        self._thread.join(INIT_S + FINISH_S)
        if self._thread.is_alive():
            self._warn("the upload did not end; what is left is in the run folder, for `wandb sync`")

    def warnings(self) -> list[str]:
        found = []
        while not self._warnings.empty():
            found.append(self._warnings.get())
        return found

    def _warn(self, line: str) -> None:
        self._warnings.put(f"wandb: {line}")

    def _work(self) -> None:
        try:
            run = self._open()
            while not isinstance(item := self._todo.get(), str):
                run.log(self._all_shown(item[1]), step=item[0])
            run.finish(exit_code=0 if item == "done" else 1)
        except Exception as error:  # noqa: BLE001  wandb raises what it likes, and none of it may end a run
            self._warn(f"stopped: {type(error).__name__}: {error}")

    def _all_shown(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A picture or a table that cannot be made is left out, and the numbers are not."""
        shown = {}
        for key, value in values.items():
            try:
                shown[key] = _shown(value)
            except Exception as error:  # noqa: BLE001  as above
                self._warn(f"{key}: {type(error).__name__}: {error}; left out")
        return shown

    def _open(self) -> Any:
        """The run at the server, or on disk when there is no server or no key."""
        # Reports to its makers, sent even when offline: 10 s at exit where the server is a black hole.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # half a second

        mode = self._mode(wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url)
        try:
            return self._init(wandb, mode)
        except Exception as error:
            if mode != "online":
                raise
            self._warn(f"{type(error).__name__}: {error}; writing to the run folder, for `wandb sync` later")
            wandb.teardown()  # it holds on to the id of the run that it could not open
            return self._init(wandb, "offline")

    def _mode(self, base_url: str) -> str:
        mode = self._spec.mode
        wanted = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
        if wanted in ("offline", "disabled", "dryrun"):
            return "offline" if wanted == "dryrun" else wanted
        if not logged_in(base_url):
            if wanted == "online":
                self._warn("mode is online, but there is no key: set WANDB_API_KEY or run `wandb login`; writing to "
                           "the run folder, for `wandb sync` later")  # fmt: skip
            return "offline"
        reason = unreachable(base_url)
        if reason is not None:
            self._warn(f"{reason}; writing to the run folder, for `wandb sync` later")
        return "offline" if reason is not None else "online"

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_S,
            finish_timeout=FINISH_S,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,  # it would send the command line
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        return wandb.init(
            project=self._spec.project,
            entity=self._spec.entity,
            group=self._spec.run_group,
            tags=self._spec.tags,
            name=self._run_dir.name,
            id=run_id(self._run_dir, self._first_step),
            resume="allow",
            dir=str(self._run_dir),
            config=dict(self._config),
            mode=mode,
            settings=settings,
        )
