"""`python -m dtrain`, and the `dtrain` command."""

import gc
import sys

gc.set_threshold(100_000, 50, 50)  # starting up makes objects that stay: looking for garbage among them costs a tenth

from dtrain.cli import run  # noqa: E402


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
