"""The run folder, presets, experiments, and the command line of train.py."""
