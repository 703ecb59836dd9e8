"""What surrounds the loop of train.py.

optim.py       build_optimizers, scheduled_learning_rate, average_of_weights: optimizers, averaged weights and schedules
checkpoint.py  Training, Record: the state of a training, saving and resuming
autotune.py    choose, Choices: the fastest number format, attention, rows at a time and threads of this machine
machine.py     choose_device, available_memory, cpu_name: device, compiler, memory
seeds.py       train_group: the same training with several seeds
report.py      write_report, table, plot_losses, samples: what a run folder and a notebook show
"""
