"""Everything around the training loop of train.py.

optim.py       build_optimizers, step_optimizers, average_of_weights: optimizers, parameter groups and weight EMA
schedules.py   build_schedule, scheduled_learning_rate: learning rate, batch size and window in the course of a run
losses.py      build_loss, loss_terms: what training minimises
trials.py      try_optimizers, try_loss: those of a plugin, before training
checkpoint.py  Training, Record: the training state, saving and resuming
setup.py       prepare, signals_finish_the_step: model, data, optimizers and run folder before the first step; its lock; signals
configure.py   configure_for_training: the loss, activation checkpointing, and what a model must support
autotune.py    choose_plan: the fastest number format, kernels, micro-batch and threads on this machine
plan.py        apply_plan: set a model up by a plan; its speed, memory and agreement with the plain model
compile_trial.py  measure_compiled: try torch.compile in a subprocess
machine.py     choose_device, available_memory, describe_machine: device, compiler, memory
stopwatch.py   Stopwatch: training time apart from all other time
seeds.py       train_group: the same training with several seeds
report.py      write_report, table, plot_losses, samples, film_strip: reports of runs for the run folder and notebooks
stories.py     Stories, one_line: stories in a notebook, in Markdown and in a terminal
notebook.py    LivePlot, preset_table, latest_run: what train.ipynb shows
"""
