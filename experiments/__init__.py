"""Ideas, one folder each: `python -m experiments new my_idea` makes one. Nothing imports them: a config names its plugins."""
