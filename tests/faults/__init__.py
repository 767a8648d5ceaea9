"""What must survive, and the test that shows it. A run is the whole of `dtrain launch`, with ranks that are forked
(`harness.py`) where the real command would cost ten times as much; `test_command.py` has the real one.

| fault | expected | test |
|---|---|---|
| all ranks killed at each phase of a save: before it, in the middle of a file, before the manifest, before the rename, after it, before old ones are removed, in the middle of that | goes on from the newest complete checkpoint; nothing unfinished is left | `test_kill.py::test_killed_at_a_phase_of_a_save` |
| all ranks killed at 30 random moments of a run that saves all the time | the same weights, moments and random states as without; no row is lost or seen twice | `test_kill.py::test_killed_at_random_moments` |
| everything killed, the launcher too; the launcher alone | the same command goes on; no two writers | `test_command.py` |
| one rank killed in the middle of a save | exit 3 in seconds, the rank and the next command named | `test_command.py` |
| a file truncated, missing, replaced, foreign; the manifest edited | found and named by `verify`; passed over, or refused where it was asked for by name | `test_damage.py` |
| one byte changed, at 64 places | found at each, the file named | `test_damage.py::test_a_changed_byte_is_found_wherever_it_is` |
| a manifest that names files elsewhere, links, pickles | refused, not opened, not executed | `test_damage.py::test_nothing_of_a_forged_checkpoint_is_executed` and above it |
| `latest` empty, wrong, a folder | the checkpoints themselves decide | `test_damage.py::test_a_pointer_decides_nothing` |
| two jobs, one folder | the second is refused | `test_storage.py::test_a_second_job_is_refused` |
| the disk fills up, is read-only, or takes no file as large | the partial one is removed; the run stops or goes on, as `checkpoint.on_error` says | `test_storage.py` |
| a save fails on one rank | all ranks hear of it at the same step; at the end it is tried again | `test_storage.py` |
| a loss is not finite while an earlier step is being saved | that save is finished | `test_storage.py::test_what_is_being_written_when_a_loss_is_not_finite_is_finished` |
| the folder cannot be written from the start | exit 2 before a rank is started | `test_storage.py::test_a_folder_that_cannot_be_written_is_refused_first` |
| a save takes longer than the time between two | one at a time, the next is postponed and that is said; no second buffer | `test_storage.py::test_saves_on_a_slow_disk_do_not_pile_up` |
| a rank does not see the folder of the others | said in these words | `test_storage.py`, the last two |
| the shared folder is gone | exit 3, kind storage; nothing is saved on the disk below; goes on once it is back | `test_limits.py` |
| the system gives a rank no more memory or files; a port is taken | exit 3, the rank and what to do about it | `test_limits.py` |
| the data changed between two attempts | refused, unless allowed | `test_damage.py::test_changed_data_is_refused` |
| memory runs out in a step, on one rank | kind oom with a hint; or the step is done again in smaller micro-batches | `test_oom.py` |
| one rank is told to stop while it starts, evaluates, saves or exports | all stop at one step, saved, and go on to the same result; an export is ended first | `test_told.py` |
| a rank is killed again and again | started again with growing waits, while it gets on | `test_restart.py` |
| a rank spins, sleeps or is halted | found in time and named, with the stacks of all | `tests/ranks/test_hang.py` |
| clocks jump, times of files lie | the step decides; durations stay true; the lock holds | `test_clocks.py` |

After each: at least one complete checkpoint if there ever was one; going on gives the result of a run without the fault, to the
bit; no process is left; the last line names cause and next command.
"""
