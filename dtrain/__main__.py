"""`python -m dtrain`, and the `dtrain` command."""

import gc
import signal
import sys

gc.set_threshold(100_000, 50, 50)  # starting up makes objects that stay: looking for garbage among them costs a tenth


def main() -> None:
    if sys.argv[1:2] == ["launch"]:
        # Until it can act on them: a scheduler's word would end it, and a pod's be lost, while modules are still read.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
    from dtrain.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
