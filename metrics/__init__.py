"""Metrics of one model: scores, losses by story, cost, and storyworld grades.

scores.py        evaluate, predictions, story_nats: loss, bits per byte and top-k accuracy on whole stories
audit/           audit: whether the scores of a model can be right, whatever its code does
story_losses.py  losses_of, save_losses, validation_stories, data_of: losses by story, saved in the run folder
measures.py      token_scores, loss_by_position, calibration, repetition: a closer look at loss and samples
cost.py          cost_of, model_cost, cost_table, block_costs, num_parameters: parameters, FLOPs and cache bytes
counting.py     count_flops, cache_bytes: count both by running a model
world_grades.py  grade_model, check_tokenizer, is_world: grade samples by the rules of storyworld
world_floor.py   world_floor, floor_of: the exact entropy of storyworld, the lower bound of the loss
world_report.py  plot_grades, draw_entropy: plots of grades and entropy
plots.py         in_style, add_legend, alt_text, show_figure: the look of all plots, with plots.mplstyle
proportion.py    proportion_interval: confidence intervals of shares
gallery.py       show_blocks: display every block with its shapes and cost in a notebook
"""
