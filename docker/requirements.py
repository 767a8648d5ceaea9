"""What a pyproject.toml asks for, a line each: `requirements.py FILE [EXTRA ...]`."""

import pathlib
import sys
import tomllib

project = tomllib.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
lines = [*project["dependencies"], *(one for extra in sys.argv[2:] for one in project["optional-dependencies"][extra])]
sys.stdout.write("".join(f"{line}\n" for line in lines))
