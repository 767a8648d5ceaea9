"""What must survive. `table.py` has every fault, what is expected and the tests that show it; `make faults` writes what came of
them into docs/reliability.md.

A run is the whole of `dtrain launch`, with ranks that are forked (`harness.py`) where the real command would cost ten times
as much; `test_command.py` has the real one. After each fault: at least one complete checkpoint if there ever was one; going on
gives the result of a run without the fault, to the bit; no process is left; the last line names cause and next command.
"""
