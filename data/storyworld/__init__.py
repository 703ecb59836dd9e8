"""The built-in world of stories, whose every probability is known exactly.

world.py    stories, score, code_length, sentence_spans: make stories, and grade those of a model
grammar.py  World: the language that plots are written in
nodes.py    what the parts of a plot are, and how they are written and read
lexicon.py  people, animals, things and words
plots.py    the plots
"""
