"""The run folder, presets, experiments, and the command line of train.py. No torch, unless weights are read or written.

folder.py        Run, run_names, group_members, default_name: what trained_models/NAME holds
files.py         write_atomically, cure_of: files that are whole, and the cure where one cannot be written
digests.py       record, is_as_saved: whether a file of a run is what was saved
lock.py          locked: one process trains a run
presets.py       preset, PRESETS, Preset: named architectures, and how they are trained
experiments.py   experiment_names, experiment_preset: the folders in experiments/
command_line.py  parse, command, Arguments: options into configs, and configs into a command
execution.py     ExecutionPlan, different_execution: what the machine chose for a run, and what differs between runs
code.py          code_digests, digest, text_digest: the code that a run was trained with
looks.py         seeds_at_first_look: when groups of seeds were first compared
moved.py         moved_to: where modules of earlier versions are now
"""
