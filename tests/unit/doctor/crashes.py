"""A child that fails as native code does, for test_checks."""

import json
import os
import signal
import sys
import time

if sys.argv[1] == "flash_attn":
    os.kill(os.getpid(), signal.SIGSEGV)
if sys.argv[1] == "bitsandbytes":
    raise ImportError("libbitsandbytes.so: undefined symbol: _ZN3c105ErrorC2E")
if sys.argv[1] == "hangs":
    time.sleep(1000)
print(json.dumps({"on": "cpu", "version": "1", "nvme": False}))
