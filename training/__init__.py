"""Everything around the training loop of train.py.

optim.py       build_optimizers, scheduled_learning_rate, average_of_weights: optimizers, weight EMA and schedules
checkpoint.py  Training, Record: the training state, saving and resuming
setup.py       prepare: model, data, optimizers and run folder before the first step
configure.py   configure_for_training: activation checkpointing, and what a model must support
autotune.py    choose_plan, ExecutionPlan: the fastest number format, kernels, micro-batch and threads on this machine
machine.py     choose_device, available_memory, cpu_name: device, compiler, memory
seeds.py       train_group: the same training with several seeds
report.py      write_report, table, plot_losses, samples, LivePlot: reports of runs for the run folder and notebooks
"""
