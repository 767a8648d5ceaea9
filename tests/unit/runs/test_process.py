from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import os, sys
from dtrain.runs import RunDir, redirect
console = redirect(RunDir(sys.argv[1]), 0, 3)
print("python", "\\udcff")
os.system("echo from a child")
os.write(2, b"from C\\n")
console.write("the user\\n")
"""


def test_all_output_goes_to_the_log_but_what_is_meant_for_the_user(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("the user\n", "")
    log = (tmp_path / "logs/attempt-0/rank-3.log").read_text()
    assert log == "python \\udcff\nfrom a child\nfrom C\n"
