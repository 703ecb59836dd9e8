"""What show_shapes records and draws, and shape comments that are checked.

recording.py  Recording: the calls of a model's modules, and the lines of its source
tree.py       Call, Line, fold: the calls as a tree, and what is said of each
drawing.py    as_text, as_html, as_page: the tree as text, in a notebook, or as a page
comments.py   LineFollower, ShapeComments: follow lines, and check comments such as # (B, T, D)
"""
