"""Comparing several models: `python -m evaluation --help`.

comparison.py   compare: which run, or group of seeds, is better, and how sure that is
audit.py        audit_saved: whether the scores of a run can be right
page.py         write_page: a comparison as one HTML page
pairwise.py     by_seeds, by_stories, pairing: the verdict on two of them
statistics.py   over_seeds, over_stories, Difference, Correction: intervals and p-values
curves.py       plot_all_curves, plot_curves: validation curves with bands over seeds
diff.py         diff: what differs between two architectures (alignment.py, diff_view.py)
probes.py       probes, probe: what architectures learn of synthetic tasks (probe_tasks.py)
scaling.py      scaling: how losses fall with the size (ladder.py, loss_law.py)
judge/          stories graded by a large language model
"""
