"""Numbers of one model: scores, losses by story, cost, and grades of the storyworld.

scores.py        evaluate, predictions: loss, bits per byte and top-k accuracy on whole stories
story_losses.py  losses_of, keep_losses, validation_stories: the losses by story in a run folder
measures.py      token_scores, loss_by_position, calibration, repetition: where the loss is
cost.py          cost_of, model_cost, num_parameters: parameters, FLOPs and cache bytes
world_grades.py  grade_model, check_tokenizer, is_world: the storyworld grades samples of a model
world_floor.py   world_floor, floor_of: the exact entropy of storyworld, which no loss can pass for long
world_report.py  plot_grades, draw_entropy: the curves of both
gallery.py       show_blocks: every block with its shapes and cost, for a notebook
"""
